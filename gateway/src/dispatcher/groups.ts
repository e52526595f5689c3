// The gateway's view of the replica groups: the last heartbeat of each. Decides which groups count as alive, and which
// are recent enough to get work; independent of the transport and use of heartbeats. Time is an argument.

import { GroupState, type Heartbeat, type RunningRequest } from '@mimo/proto/worker';

/**
 * After three missing heartbeats a group gets no new requests until the next heartbeat. A false alarm costs no more:
 * running streams stay until their session breaks.
 */
export const heartbeatQuietMs = 800;

/** A group that is silent for this long is forgotten; the margin allows for a busy machine. */
export const heartbeatGoneMs = 2_000;

interface SeenGroup {
  readonly heartbeat: Heartbeat;
  readonly seenMs: number;
}

/** The groups, by model and name. Nothing to close. */
export class Groups {
  readonly #seen = new Map<string, SeenGroup>();

  /** Stores a heartbeat, unless a later one of the same incarnation has overtaken it. */
  observe(heartbeat: Heartbeat, nowMs: number): void {
    const key = keyOf(heartbeat.model, heartbeat.group);
    const last = this.#seen.get(key)?.heartbeat;
    const overtaken =
      last?.incarnation === heartbeat.incarnation && last.sequenceNumber >= heartbeat.sequenceNumber;
    if (!overtaken) {
      this.#seen.set(key, { heartbeat, seenMs: nowMs });
    }
  }

  /** The latest heartbeat of each live group of a model. A failed group counts as gone at once. */
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

  /** The sequences of one incarnation of a group, from its last heartbeat; empty without a heartbeat. */
  runningIn({
    model,
    group,
    incarnation,
  }: Pick<Heartbeat, 'model' | 'group' | 'incarnation'>): RunningRequest[] {
    const heartbeat = this.#seen.get(keyOf(model, group))?.heartbeat;
    return heartbeat?.incarnation === incarnation ? heartbeat.running : [];
  }

  /** The groups that accept requests, according to a recent heartbeat. */
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
