// The waiting work of one model's queue: which of its live requests wait, for what, and how much that is. Their order
// is in arrivals.ts, where a request runs is in dispatch-state.ts. Pure: time is an argument, the dispatcher's own
// monotonic clock, which is never compared with other clocks.

import type { FollowedRecord, QueuedRecord } from '@mimo/core/bus/records';
import type { QueueState } from '@mimo/core/bus/signals';
import { Company, type Needs, type RequestSummary } from '@mimo/proto/queue';

import { patienceMs } from './suspicion.ts';
import { Arrivals } from './arrivals.ts';
import type { TrialRequest, WaitingRequest } from './placement.ts';

/** Requests and their tokens, prompt plus permitted completion. */
export interface Load {
  readonly requests: number;
  readonly tokens: number;
}

/** The load of nothing. */
export const nothing: Load = { requests: 0, tokens: 0 };

/** A gateway that did not answer. */
interface SilentGateway {
  /** Since when nobody listens under its name; undefined if it listens but did not answer in time. */
  readonly goneSinceMs: number | undefined;
  readonly retryMs: number;
}

const retryMs = 1_000;
/** A parked request is offered again after this, in case its owner's message was lost. */
const parkedRetryMs = 10_000;
/** A gateway that does not listen for this long is gone, and so are the clients of its requests. */
const orphanAfterMs = 15_000;

/** The backlog of one model. A request waits until it is said to be with a group, or is parked. */
export class Backlog {
  readonly #arrivals: Arrivals;
  /** The few of them that are with a group. */
  readonly #held = new Set<string>();
  /** Of those whose clients take nothing: until when they are not offered, in case their owner's next word is lost. */
  readonly #parked = new Map<string, number>();
  /** Requests whose needs differ from their records. */
  readonly #needs = new Map<string, Needs & { readonly sinceMs: number }>();
  readonly #silent = new Map<string, SilentGateway>();
  // Kept as things change: a queue may hold tens of thousands of requests.
  /** Waiting requests, by the identity that they need. */
  readonly #waitingFor = new Map<string, Load>();
  #heldTokens = 0;
  #arrivedTokens = 0;

  /** `storeId` is the previously known store, empty if there was none. */
  constructor(storeId: string) {
    this.#arrivals = new Arrivals(storeId);
  }

  get storeId(): string {
    return this.#arrivals.storeId;
  }

  get(requestId: string): QueuedRecord | undefined {
    return this.#arrivals.get(requestId);
  }

  /** Takes a record; one that arrived counts among those that came since the beginning. */
  add(followed: FollowedRecord, nowMs: number): void {
    if (this.#arrivals.add(followed, nowMs)) {
      const { record, isArrival } = followed;
      this.#countWaiting(record, 1);
      this.#arrivedTokens += isArrival && record.firstSequence === 0 ? record.tokens : 0;
    }
  }

  /** The request has ended. */
  remove(requestId: string): void {
    const request = this.#arrivals.get(requestId);
    if (request !== undefined) {
      this.release(requestId);
      this.unpark(requestId);
      this.#countWaiting(request.record, -1);
      this.#arrivals.delete(requestId);
      this.#needs.delete(requestId);
    }
  }

  /** The request is with a group. False if there is no such request. */
  hold(requestId: string): boolean {
    const request = this.#arrivals.get(requestId);
    if (request === undefined) {
      return false;
    }
    this.unpark(requestId);
    if (!this.#held.has(requestId)) {
      this.#held.add(requestId);
      this.#heldTokens += request.record.tokens;
      this.#countWaiting(request.record, -1);
    }
    return true;
  }

  /** The request waits again, where it was with a group. */
  release(requestId: string): void {
    const request = this.#arrivals.get(requestId);
    if (this.#held.delete(requestId) && request !== undefined) {
      this.#heldTokens -= request.record.tokens;
      this.#countWaiting(request.record, 1);
    }
  }

  /** The request's client takes nothing: it is in no group, and waits for none. */
  park(requestId: string, nowMs: number): void {
    const request = this.#arrivals.get(requestId);
    if (request !== undefined) {
      this.release(requestId);
      if (!this.#parked.has(requestId)) {
        this.#countWaiting(request.record, -1);
      }
      this.#parked.set(requestId, nowMs + parkedRetryMs);
    }
  }

  /** The request waits for a group again, where it was parked. */
  unpark(requestId: string): void {
    const request = this.#arrivals.get(requestId);
    if (this.#parked.delete(requestId) && request !== undefined) {
      this.#countWaiting(request.record, 1);
    }
  }

  /** Unparks what was parked long ago. */
  tick(nowMs: number): void {
    for (const [requestId, untilMs] of this.#parked) {
      if (untilMs <= nowMs) {
        this.unpark(requestId);
      }
    }
  }

  /** What a request needs from here on, as its owner says; only of one that is in no group. */
  need(requestId: string, needs: Needs | undefined, nowMs: number): void {
    const record = this.#arrivals.get(requestId)?.record;
    if (record !== undefined && needs !== undefined && !this.#held.has(requestId)) {
      const isCounted = !this.#parked.has(requestId);
      this.#countWaiting(record, isCounted ? -1 : 0);
      const known = this.#needs.get(requestId);
      const isKnown = known?.company === needs.company && known.breaks === needs.breaks;
      this.#needs.set(requestId, { ...needs, sinceMs: isKnown ? known.sinceMs : nowMs });
      this.#countWaiting(record, isCounted ? 1 : 0);
    }
  }

  /** The request may not be in any company. */
  isOnTrial(requestId: string): boolean {
    return (this.#needs.get(requestId)?.company ?? Company.UNSPECIFIED) !== Company.UNSPECIFIED;
  }

  /** A gateway answered: its requests need not wait for it. */
  heard(gatewayId: string): void {
    this.#silent.delete(gatewayId);
  }

  /**
   * A gateway did not answer; all of its requests are left alone for a while. With `gone` nobody even listens in its
   * name. Returns its requests where it has been gone for so long that they are nobody's.
   */
  unanswered(gatewayId: string, gone: boolean, nowMs: number): string[] {
    const goneSinceMs = gone ? (this.#silent.get(gatewayId)?.goneSinceMs ?? nowMs) : undefined;
    this.#silent.set(gatewayId, { goneSinceMs, retryMs: nowMs + retryMs });
    if (goneSinceMs === undefined || nowMs - goneSinceMs < orphanAfterMs) {
      return [];
    }
    return [...this.#arrivals.inOrder()]
      .filter(({ record }) => record.gatewayId === gatewayId)
      .map(({ record }) => record.requestId);
  }

  /** What waits, in order of arrival: for groups of these identities, or all of it. */
  *waiting(identities?: ReadonlySet<string>): Generator<WaitingRequest, void, undefined> {
    const wanted = identities === undefined ? undefined : new Set([...identities, '']);
    let left = 0;
    for (const [identity, { requests }] of this.#waitingFor) {
      left += wanted?.has(identity) === false ? 0 : requests;
    }
    for (const { record } of this.#arrivals.inOrder()) {
      if (left === 0) {
        return;
      }
      const request = this.#waiting(record.requestId);
      if (request !== undefined && wanted?.has(request.identity) !== false) {
        left -= 1;
        yield request;
      }
    }
  }

  /**
   * Those of them that may not share a group with any sequence; after a wait they accept company that is not quite
   * suitable.
   */
  *onTrial(nowMs: number): Generator<TrialRequest, void, undefined> {
    for (const [requestId, needs] of this.#needs) {
      const request = this.#waiting(requestId);
      if (request !== undefined && needs.company !== Company.UNSPECIFIED) {
        const { breaks } = needs;
        const hasWaited = nowMs - needs.sinceMs >= patienceMs(needs);
        yield { ...request, breaks, company: hasWaited ? Company.PROVEN : needs.company };
      }
    }
  }

  /** Figures for the published state. */
  summary(nowMs: number): Omit<BacklogSummary, 'endedTokens'> {
    let oldestMs = nowMs;
    for (const { record, storedMs } of this.#arrivals.inOrder()) {
      if (this.#isWaiting(record.requestId)) {
        oldestMs = storedMs;
        break;
      }
    }
    return {
      waitingRequests: this.#arrivals.size - this.#held.size - this.#parked.size,
      runningRequests: this.#held.size,
      parkedRequests: this.#parked.size,
      waitingTokens: this.#waitingFor.values().reduce((sum, { tokens }) => sum + tokens, 0),
      inFlightTokens: this.#heldTokens,
      oldestWaitingMs: nowMs - oldestMs,
      arrivedTokens: this.#arrivedTokens,
      waitingFor: [...this.#waitingFor]
        .map(([identity, load]) => ({ identity, ...load }))
        .toSorted((a, b) => (a.identity < b.identity ? -1 : 1)),
    };
  }

  #isWaiting(requestId: string): boolean {
    return !this.#held.has(requestId) && !this.#parked.has(requestId);
  }

  #waiting(requestId: string): WaitingRequest | undefined {
    const request = this.#arrivals.get(requestId);
    if (request === undefined || !this.#isWaiting(requestId)) {
      return undefined;
    }
    const { record, seenMs } = request;
    const needs = this.#needs.get(requestId);
    return {
      requestId,
      // The time left cannot exceed the time left at acceptance: this is late by the record's age, and never early.
      expiredMs: seenMs + (record.timeLeftMs ?? Number.POSITIVE_INFINITY),
      notBeforeMs: Math.max(
        this.#silent.get(record.gatewayId)?.retryMs ?? 0,
        this.#arrivals.notBeforeMs(request),
      ),
      identity: this.#identityOf(record),
      company: needs?.company ?? Company.UNSPECIFIED,
    };
  }

  #identityOf({ requestId, identity }: RequestSummary): string {
    return this.#needs.get(requestId)?.identity ?? identity;
  }

  #countWaiting(record: RequestSummary, requests: -1 | 0 | 1): void {
    const identity = this.#identityOf(record);
    const before = this.#waitingFor.get(identity) ?? nothing;
    const after = {
      requests: before.requests + requests,
      tokens: before.tokens + requests * record.tokens,
    };
    if (after.requests === 0) {
      this.#waitingFor.delete(identity);
    } else {
      this.#waitingFor.set(identity, after);
    }
  }
}

/** Figures of a queue. */
export type BacklogSummary = Pick<
  QueueState,
  | 'waitingRequests'
  | 'runningRequests'
  | 'parkedRequests'
  | 'waitingTokens'
  | 'inFlightTokens'
  | 'oldestWaitingMs'
  | 'arrivedTokens'
  | 'endedTokens'
  | 'waitingFor'
>;
