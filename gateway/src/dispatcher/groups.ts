// What the gateway knows of the replica groups: the last heartbeat of each. Owns which groups count as alive, and which as
// heard of lately enough to be given work; knows neither how heartbeats travel nor what is done with them. Time is an
// argument.

import { GroupState, type Heartbeat, type RunningRequest } from '@mimo/proto/worker';

/**
 * Three missing heartbeats: the group is given nothing more until the next one. A mistake costs only that, since what runs
 * there goes on: a stream is moved when its session breaks and not before.
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

  /** What a life of a group runs, as it said last; nothing where it was not heard of. */
  runningIn({
    model,
    group,
    incarnation,
  }: Pick<Heartbeat, 'model' | 'group' | 'incarnation'>): RunningRequest[] {
    const heartbeat = this.#seen.get(keyOf(model, group))?.heartbeat;
    return heartbeat?.incarnation === incarnation ? heartbeat.running : [];
  }

  /** Those of them that take requests, and said so lately. */
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
