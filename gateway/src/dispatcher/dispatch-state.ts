// What a dispatcher believes: the live requests of one model and the group that each is with. Rebuilt from the stream and
// the heartbeats, so a new dispatcher needs nothing from the old one. A belief may be wrong for a moment; the owning
// gateway's answer to an assignment is the truth. Time is an argument.

import { GroupState, type Heartbeat } from '@mimo/proto/worker';
import type { QueuedRecord } from '@mimo/core/queue';

import type { OpenGroup, WaitingRequest } from './placement.ts';

/** Which life of which group. */
export interface Place {
  readonly group: string;
  readonly incarnation: string;
}

interface Placed extends Place {
  readonly sinceUnixMs: number;
}

/** A gateway that did not answer. */
interface SilentGateway {
  /** Since when nobody listens in its name; undefined where somebody does, but did not answer in time. */
  readonly goneSinceUnixMs: number | undefined;
  readonly retryUnixMs: number;
}

/** How long a group may leave an assigned request out of its heartbeats before it counts as waiting again. */
const settleMs = 2_000;
/** A group on which an attempt failed is left alone for as long as it takes to notice that it is gone. */
const suspectMs = 2_000;
const retryMs = 1_000;
/** A gateway that does not listen for this long is gone, and with it everybody who waits for its requests. */
const orphanAfterMs = 15_000;

/** The state of one model's queue. */
export class DispatchState {
  /** In order of arrival, which is the order in which they were added. */
  readonly #requests = new Map<string, QueuedRecord>();
  /** The few of them that are with a group. */
  readonly #placed = new Map<string, Placed>();
  readonly #suspects = new Map<string, number>();
  readonly #silent = new Map<string, SilentGateway>();

  add(queued: QueuedRecord): void {
    this.#requests.set(queued.record.requestId, queued);
  }

  remove(requestId: string): void {
    this.#requests.delete(requestId);
    this.#placed.delete(requestId);
  }

  get(requestId: string): QueuedRecord | undefined {
    return this.#requests.get(requestId);
  }

  /** The request is with a group, as far as is known. */
  place(requestId: string, { group, incarnation }: Place, nowUnixMs: number): void {
    if (this.#requests.has(requestId)) {
      this.#placed.set(requestId, { group, incarnation, sinceUnixMs: nowUnixMs });
    }
  }

  /** Its attempt failed: it waits again, and the group is not trusted for a while. */
  requeue(requestId: string, nowUnixMs: number): void {
    const place = this.#placed.get(requestId);
    if (place !== undefined) {
      this.#suspects.set(keyOf(place), nowUnixMs + suspectMs);
      this.#placed.delete(requestId);
    }
  }

  /** A gateway answered: its requests need not wait for it. */
  heard(gatewayId: string): void {
    this.#silent.delete(gatewayId);
  }

  /**
   * A gateway did not answer for this request, which waits again; all of its requests are left alone for a while. With
   * `gone` nobody even listens in its name. Returns the requests that are nobody's by now.
   */
  unanswered(requestId: string, gone: boolean, nowUnixMs: number): string[] {
    const request = this.#requests.get(requestId);
    if (request === undefined) {
      return [];
    }
    this.#placed.delete(requestId);
    const { gatewayId } = request.record;
    const goneSinceUnixMs = gone ? (this.#silent.get(gatewayId)?.goneSinceUnixMs ?? nowUnixMs) : undefined;
    this.#silent.set(gatewayId, { goneSinceUnixMs, retryUnixMs: nowUnixMs + retryMs });
    if (goneSinceUnixMs === undefined || nowUnixMs - goneSinceUnixMs < orphanAfterMs) {
      return [];
    }
    return [...this.#requests.values()]
      .filter((each) => each.record.gatewayId === gatewayId)
      .map((each) => each.record.requestId);
  }

  /**
   * Brings the beliefs in line with the groups that are alive: what a group says it runs is with it; what is believed
   * with a group that does not say so, or is gone, waits again after a while.
   */
  reconcile(groups: readonly Heartbeat[], nowUnixMs: number): void {
    const running = new Set<string>();
    for (const heartbeat of groups) {
      for (const { requestId } of heartbeat.running) {
        running.add(requestId);
        this.place(requestId, heartbeat, nowUnixMs);
      }
    }
    for (const [requestId, { sinceUnixMs }] of this.#placed) {
      if (!running.has(requestId) && nowUnixMs - sinceUnixMs > settleMs) {
        this.#placed.delete(requestId);
      }
    }
    for (const [key, untilUnixMs] of this.#suspects) {
      if (untilUnixMs <= nowUnixMs) {
        this.#suspects.delete(key);
      }
    }
  }

  /** What no group has, in order of arrival. */
  *waiting(): Generator<WaitingRequest, void, undefined> {
    for (const { record } of this.#requests.values()) {
      const { requestId, gatewayId, deadlineUnixMs } = record;
      if (!this.#placed.has(requestId)) {
        const notBeforeUnixMs = this.#silent.get(gatewayId)?.retryUnixMs ?? 0;
        yield { requestId, deadlineUnixMs, notBeforeUnixMs };
      }
    }
  }

  /** The groups that take requests. One that has a queue of its own, for want of KV blocks, has no free slot. */
  openGroups(groups: readonly Heartbeat[]): OpenGroup[] {
    const used = new Map<string, number>();
    for (const place of this.#placed.values()) {
      used.set(keyOf(place), (used.get(keyOf(place)) ?? 0) + 1);
    }
    return groups
      .filter(({ state }) => state === GroupState.READY)
      .map((heartbeat) => ({
        group: heartbeat.group,
        slots: heartbeat.waitingSequences > 0 ? 0 : heartbeat.maxSequences,
        usedSlots: Math.max(used.get(keyOf(heartbeat)) ?? 0, heartbeat.runningSequences),
        notBeforeUnixMs: this.#suspects.get(keyOf(heartbeat)) ?? 0,
      }));
  }

  /** Figures for the published state: what waits and what is with a group. */
  summary(nowUnixMs: number): {
    readonly waitingRequests: number;
    readonly runningRequests: number;
    readonly waitingTokens: number;
    readonly oldestWaitingMs: number;
  } {
    let waitingTokens = 0;
    let oldestUnixMs = nowUnixMs;
    for (const { record } of this.#requests.values()) {
      if (!this.#placed.has(record.requestId)) {
        waitingTokens += record.promptTokenIds.length + (record.sampling?.maxTokens ?? 0);
        oldestUnixMs = Math.min(oldestUnixMs, record.acceptedUnixMs);
      }
    }
    return {
      waitingRequests: this.#requests.size - this.#placed.size,
      runningRequests: this.#placed.size,
      waitingTokens,
      oldestWaitingMs: nowUnixMs - oldestUnixMs,
    };
  }
}

function keyOf({ group, incarnation }: Place): string {
  return JSON.stringify([group, incarnation]);
}
