// What the gateway knows of the replica groups: the last heartbeat of each. Owns which groups count as alive; knows
// neither how heartbeats travel nor what is done with them. Time is an argument.

import { GroupState, type Heartbeat } from '@mimo/proto/worker';

/** Heartbeats come several times a second; the margin is for a machine that is busy, not dead. */
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
    const key = JSON.stringify([heartbeat.model, heartbeat.group]);
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

  /** Those of them that take requests. */
  ready(model: string, nowMs: number): Heartbeat[] {
    return this.alive(model, nowMs).filter(({ state }) => state === GroupState.READY);
  }
}
