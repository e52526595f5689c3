// What a dispatcher believes: the live requests of one model and the group that each is with. Rebuilt from the stream and
// the heartbeats, so a new dispatcher needs nothing from the old one. A belief may be wrong for a moment; the owning
// gateway's answer to an assignment is the truth. Time is an
// argument: the dispatcher's own monotonic clock, which is compared with nobody's.

import type { DrainMarks, FollowedRecord, QueuedRecord, QueueState } from '@mimo/core/queue';
import { GroupState, type Heartbeat } from '@mimo/proto/worker';

import type { OpenGroup, WaitingRequest } from './placement.ts';

/** Which life of which group. */
export interface Place {
  readonly group: string;
  readonly incarnation: string;
}

interface Placed extends Place {
  readonly sinceMs: number;
}

/** What is with one life of a group. Tokens are prompt plus permitted completion. */
export interface PlacedLoad {
  readonly requests: number;
  readonly tokens: number;
}

/** A record that this dispatcher has seen, and when; it was stored at `storedMs`, which may be before its time. */
interface SeenRecord extends QueuedRecord {
  readonly seenMs: number;
  readonly storedMs: number;
}

/** A gateway that did not answer. */
interface SilentGateway {
  /** Since when nobody listens in its name; undefined where somebody does, but did not answer in time. */
  readonly goneSinceMs: number | undefined;
  readonly retryMs: number;
}

/** How long a group may leave an assigned request out of its heartbeats before it counts as waiting again. */
const settleMs = 2_000;
/** A group on which an attempt failed is left alone for as long as it takes to notice that it is gone. */
const suspectMs = 2_000;
const retryMs = 1_000;
/** A request on trial gets its eight tokens, or breaks its group, in about this time. */
const postponeMs = 250;
/** A gateway that does not listen for this long is gone, and with it everybody who waits for its requests. */
const orphanAfterMs = 15_000;

/** The state of one model's queue. */
export class DispatchState {
  /** In order of arrival once sorted: most are added in that order, and after the loss of a store some are not. */
  #requests = new Map<string, SeenRecord>();
  #isSorted = true;
  #last: SeenRecord | undefined;
  /** The store of the newest record: what is known from another one was lost with it, and its owner may record it again. */
  #storeId = '';
  /** The few of them that are with a group. */
  readonly #placed = new Map<string, Placed>();
  /** The earliest attempt of a request that may still run: who speaks of an earlier one speaks of the past. */
  readonly #epochs = new Map<string, number>();
  readonly #postponed = new Map<string, number>();
  readonly #suspects = new Map<string, number>();
  readonly #silent = new Map<string, SilentGateway>();
  // Kept as things change: a queue may hold tens of thousands of requests.
  #waitingTokens = 0;
  #inFlightTokens = 0;
  #arrivedTokens = 0;
  #endedTokens = 0;

  /** Takes a record; one that arrived counts among those that came since the beginning. */
  add({ isArrival, ageMs, ...queued }: FollowedRecord, nowMs: number): void {
    const { record, storeId } = queued;
    const known = this.#requests.get(record.requestId);
    if (known?.storeId === storeId) {
      return;
    }
    const seen = { seenMs: nowMs, storedMs: nowMs - ageMs, ...known, ...queued };
    this.#requests.set(record.requestId, seen);
    this.#isSorted &&=
      storeId === this.#storeId && (this.#last === undefined || this.#compare(this.#last, seen) < 0);
    this.#storeId = storeId;
    this.#last = seen;
    if (known === undefined) {
      this.#waitingTokens += record.tokens;
      this.#arrivedTokens += isArrival && record.storesOutlived === 0 ? record.tokens : 0;
    }
  }

  /** The request has ended. It counts as ended work where it was with a group, which then had its tokens to compute. */
  remove(requestId: string): void {
    const request = this.#requests.get(requestId);
    if (request !== undefined) {
      this.#endedTokens += this.#placed.has(requestId) ? request.record.tokens : 0;
      this.#unplace(requestId);
      this.#requests.delete(requestId);
      this.#epochs.delete(requestId);
      this.#waitingTokens -= request.record.tokens;
    }
  }

  get(requestId: string): QueuedRecord | undefined {
    return this.#requests.get(requestId);
  }

  /** The request is with a group, as its owner says: the attempt has this number. */
  confirm(requestId: string, where: Place & { readonly epoch: number }, nowMs: number): void {
    if (where.epoch >= (this.#epochs.get(requestId) ?? 0)) {
      this.place(requestId, where, nowMs);
      this.#begin(requestId, where.epoch);
    }
  }

  /** The request is with a group, as far as is known. */
  place(requestId: string, { group, incarnation }: Place, nowMs: number): void {
    const request = this.#requests.get(requestId);
    if (request !== undefined) {
      if (!this.#placed.has(requestId)) {
        this.#waitingTokens -= request.record.tokens;
        this.#inFlightTokens += request.record.tokens;
      }
      this.#placed.set(requestId, { group, incarnation, sinceMs: nowMs });
    }
  }

  /** Its attempt of this number is over: it waits again, and the group is not trusted for a while. */
  requeue(requestId: string, epoch: number, nowMs: number): void {
    if (epoch < (this.#epochs.get(requestId) ?? 0)) {
      return;
    }
    this.#begin(requestId, epoch + 1);
    const place = this.#placed.get(requestId);
    if (place !== undefined) {
      this.#suspects.set(placeKey(place), nowMs + suspectMs);
      this.#unplace(requestId);
    }
  }

  /** Its owner does not want it in this group at this moment: it waits again, and is left alone for a while. */
  postpone(requestId: string, nowMs: number): void {
    if (this.#requests.has(requestId)) {
      this.#unplace(requestId);
      this.#postponed.set(requestId, nowMs + postponeMs);
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
  unanswered(requestId: string, gone: boolean, nowMs: number): string[] {
    const request = this.#requests.get(requestId);
    if (request === undefined) {
      return [];
    }
    this.#unplace(requestId);
    const { gatewayId } = request.record;
    const goneSinceMs = gone ? (this.#silent.get(gatewayId)?.goneSinceMs ?? nowMs) : undefined;
    this.#silent.set(gatewayId, { goneSinceMs, retryMs: nowMs + retryMs });
    if (goneSinceMs === undefined || nowMs - goneSinceMs < orphanAfterMs) {
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
  reconcile(groups: readonly Heartbeat[], nowMs: number): void {
    const running = new Set<string>();
    for (const heartbeat of groups) {
      for (const { requestId, epoch } of heartbeat.running) {
        if (epoch >= (this.#epochs.get(requestId) ?? 0)) {
          running.add(requestId);
          this.place(requestId, heartbeat, nowMs);
          this.#begin(requestId, epoch);
        }
      }
    }
    for (const [requestId, { sinceMs }] of this.#placed) {
      if (!running.has(requestId) && nowMs - sinceMs > settleMs) {
        this.#unplace(requestId);
      }
    }
    for (const kept of [this.#suspects, this.#postponed]) {
      for (const [key, untilMs] of kept) {
        if (untilMs <= nowMs) {
          kept.delete(key);
        }
      }
    }
  }

  /** What no group has, in order of arrival. */
  *waiting(): Generator<WaitingRequest, void, undefined> {
    for (const { record, seenMs } of this.#inOrder()) {
      const { requestId, gatewayId, timeLeftMs } = record;
      if (!this.#placed.has(requestId)) {
        const notBeforeMs = Math.max(
          this.#silent.get(gatewayId)?.retryMs ?? 0,
          this.#postponed.get(requestId) ?? 0,
        );
        // What was left at acceptance cannot be more now: late by the record's age, and never early.
        yield { requestId, expiredMs: seenMs + (timeLeftMs ?? Number.POSITIVE_INFINITY), notBeforeMs };
      }
    }
  }

  /** What is with each life of a group, by `placeKey`. */
  loads(): ReadonlyMap<string, PlacedLoad> {
    const loads = new Map<string, PlacedLoad>();
    for (const [requestId, place] of this.#placed) {
      const key = placeKey(place);
      const { requests, tokens } = loads.get(key) ?? nothing;
      const record = this.#requests.get(requestId)?.record;
      loads.set(key, {
        requests: requests + 1,
        tokens: tokens + (record?.tokens ?? 0),
      });
    }
    return loads;
  }

  /**
   * The groups that may be given requests, of those that are ready: not the marked ones. One that has a queue of its own,
   * for want of KV blocks, has no free slot.
   */
  openGroups(ready: readonly Heartbeat[], drains: DrainMarks): OpenGroup[] {
    const loads = this.loads();
    return ready
      .filter(({ state, group }) => state === GroupState.READY && !drains.has(group))
      .map((heartbeat) => ({
        group: heartbeat.group,
        slots: heartbeat.waitingSequences > 0 ? 0 : heartbeat.maxSequences,
        usedSlots: Math.max(loads.get(placeKey(heartbeat))?.requests ?? 0, heartbeat.runningSequences),
        notBeforeMs: this.#suspects.get(placeKey(heartbeat)) ?? 0,
      }));
  }

  /** Figures for the published state. */
  summary(
    nowMs: number,
  ): Pick<
    QueueState,
    | 'waitingRequests'
    | 'runningRequests'
    | 'waitingTokens'
    | 'inFlightTokens'
    | 'oldestWaitingMs'
    | 'arrivedTokens'
    | 'endedTokens'
  > {
    let oldestMs = nowMs;
    for (const { record, storedMs } of this.#inOrder()) {
      if (!this.#placed.has(record.requestId)) {
        oldestMs = storedMs;
        break;
      }
    }
    return {
      waitingRequests: this.#requests.size - this.#placed.size,
      runningRequests: this.#placed.size,
      waitingTokens: this.#waitingTokens,
      inFlightTokens: this.#inFlightTokens,
      oldestWaitingMs: nowMs - oldestMs,
      arrivedTokens: this.#arrivedTokens,
      endedTokens: this.#endedTokens,
    };
  }

  #inOrder(): Iterable<SeenRecord> {
    if (!this.#isSorted) {
      this.#requests = new Map(
        [...this.#requests].toSorted(([, one], [, other]) => this.#compare(one, other)),
      );
      this.#isSorted = true;
      this.#last = [...this.#requests.values()].at(-1);
    }
    return this.#requests.values();
  }

  /**
   * Who came first. A record that outlived more stores came in an earlier one; of those that came in the same store the
   * sequences there say it.
   */
  #compare(one: SeenRecord, other: SeenRecord): number {
    const [{ outlived, sequence }, than] = [this.#originOf(one), this.#originOf(other)];
    return than.outlived - outlived || sequence - than.sequence;
  }

  #originOf({ storeId, sequence, record }: SeenRecord): {
    readonly outlived: number;
    readonly sequence: number;
  } {
    return {
      outlived: record.storesOutlived + (storeId === this.#storeId ? 0 : 1),
      sequence: record.storesOutlived === 0 ? sequence : record.firstSequence,
    };
  }

  #begin(requestId: string, epoch: number): void {
    if (this.#requests.has(requestId)) {
      this.#epochs.set(requestId, epoch);
    }
  }

  #unplace(requestId: string): void {
    const request = this.#requests.get(requestId);
    if (this.#placed.delete(requestId) && request !== undefined) {
      this.#inFlightTokens -= request.record.tokens;
      this.#waitingTokens += request.record.tokens;
    }
  }
}

const nothing: PlacedLoad = { requests: 0, tokens: 0 };

/** Names a life of a group. */
export function placeKey({ group, incarnation }: Place): string {
  return JSON.stringify([group, incarnation]);
}
