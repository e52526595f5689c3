// The gateway's view of the replica groups: the last heartbeat of each. Owns which groups count as alive, and which
// are recent enough to get work; independent of how heartbeats travel and are used. Time is an
// argument.

import { GroupState, type Heartbeat, type RunningRequest } from '@mimo/proto/worker';

/**
 * Three missing heartbeats: the group gets no new requests until the next one. A false alarm costs only that: running
 * streams stay until their session breaks.
 */
export const heartbeatQuietMs = 800;

/** A group that is silent for this long is forgotten; the margin is for a machine that is busy, not dead. */
export const heartbeatGoneMs = 2_000;

interface SeenGroup {
  readonly heartbeat: Heartbeat;
  readonly seenMs: number;
}

/** The groups, by model and name. Nothing to close. */
export class Groups {
  readonly #seen = new Map<string, SeenGroup>();

  /** Takes a heartbeat; one that was overtaken by a later one of the same life is ignored. */
  observe(heartbeat: Heartbeat, nowMs: number): void {
    const key = keyOf(heartbeat.model, heartbeat.group);
    const last = this.#seen.get(key)?.heartbeat;
    const overtaken =
      last?.incarnation === heartbeat.incarnation && last.sequenceNumber >= heartbeat.sequenceNumber;
    if (!overtaken) {
      this.#seen.set(key, { heartbeat, seenMs: nowMs });
    }
  }

  /** The latest heartbeat of each group of a model that is not gone. A failed group is gone at once. */
  alive(model: string, nowMs: number): Heartbeat[] {
    const alive: Heartbeat[] = [];
    for (const [key, { heartbeat, seenMs }] of this.#seen) {
      if (nowMs - seenMs > heartbeatGoneMs) {
        this.#seen.delete(key);
      } else if (heartbeat.model === model && heartbeat.state !== GroupState.FAILED) {
        alive.push(heartbeat);
      }
    }
    return alive;
  }

  /** The sequences of one life of a group, from its last heartbeat; none without a heartbeat. */
  runningIn({
    model,
    group,
    incarnation,
  }: Pick<Heartbeat, 'model' | 'group' | 'incarnation'>): RunningRequest[] {
    const heartbeat = this.#seen.get(keyOf(model, group))?.heartbeat;
    return heartbeat?.incarnation === incarnation ? heartbeat.running : [];
  }

  /** Those that accept requests, according to a recent heartbeat. */
  ready(model: string, nowMs: number): Heartbeat[] {
    return this.alive(model, nowMs).filter(({ state, group }) => {
      const seenMs = this.#seen.get(keyOf(model, group))?.seenMs ?? Number.NEGATIVE_INFINITY;
      return state === GroupState.READY && nowMs - seenMs <= heartbeatQuietMs;
    });
  }
}

function keyOf(model: string, group: string): string {
  return JSON.stringify([model, group]);
}
