// The waiting work of one model's queue: its waiting requests, their needs, and their amount. Their order is in
// arrivals.ts; dispatch-state.ts knows the group of each running request. Pure: time is an argument, the dispatcher's
// own monotonic clock, which is never compared with other clocks.

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

/** An empty load. */
export const nothing: Load = { requests: 0, tokens: 0 };

/** A gateway that did not answer. */
interface SilentGateway {
  /** When it was first found not listening; undefined if it listens but did not answer in time. */
  readonly goneSinceMs: number | undefined;
  readonly retryMs: number;
}

const retryMs = 1_000;
/** A parked request is offered again after this, in case its owner's message was lost. */
const parkedRetryMs = 10_000;
/** A gateway that has not listened for this long is gone, and so are the clients of its requests. */
const orphanAfterMs = 15_000;

/** The backlog of one model. A request waits unless a group holds it or it is parked. */
export class Backlog {
  readonly #arrivals: Arrivals;
  /** The few requests that are in a group. */
  readonly #held = new Set<string>();
  /** Parked requests, and when to offer them again in case their owner's next message is lost. */
  readonly #parked = new Map<string, number>();
  /** Requests whose needs differ from their records. */
  readonly #needs = new Map<string, Needs & { readonly sinceMs: number }>();
  readonly #silent = new Map<string, SilentGateway>();
  // Sums are updated at each change: a queue may hold tens of thousands of requests.
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

  /** Adds a record; a new arrival also counts in the total of arrived work. */
  add(followed: FollowedRecord, nowMs: number): void {
    if (this.#arrivals.add(followed, nowMs)) {
      const { record, isArrival } = followed;
      this.#countWaiting(record, 1);
      this.#arrivedTokens += isArrival && record.firstSequence === 0 ? record.tokens : 0;
    }
  }

  /** Removes an ended request. */
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

  /** Notes that a group holds the request. False if there is no such request. */
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

  /** Makes a request wait again if a group held it. */
  release(requestId: string): void {
    const request = this.#arrivals.get(requestId);
    if (this.#held.delete(requestId) && request !== undefined) {
      this.#heldTokens -= request.record.tokens;
      this.#countWaiting(request.record, 1);
    }
  }

  /** Parks a request whose client is not reading: it is in no group, and waits for none. */
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

  /** Makes a parked request wait for a group again. */
  unpark(requestId: string): void {
    const request = this.#arrivals.get(requestId);
    if (this.#parked.delete(requestId) && request !== undefined) {
      this.#countWaiting(request.record, 1);
    }
  }

  /** Unparks requests that were parked long ago. */
  tick(nowMs: number): void {
    for (const [requestId, untilMs] of this.#parked) {
      if (untilMs <= nowMs) {
        this.unpark(requestId);
      }
    }
  }

  /** Sets the needs of a request, as its owner reports them. Ignored while a group holds it. */
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

  /** Whether the request's company is restricted. */
  isOnTrial(requestId: string): boolean {
    return (this.#needs.get(requestId)?.company ?? Company.UNSPECIFIED) !== Company.UNSPECIFIED;
  }

  /** Notes that a gateway answered: its requests may be offered again. */
  heard(gatewayId: string): void {
    this.#silent.delete(gatewayId);
  }

  /**
   * Notes that a gateway did not answer; none of its requests are offered for a while. `gone`: nothing listens under
   * its name. Returns its requests once it has been gone for so long that they have no owner.
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

  /** The waiting requests in order of arrival: those for groups of these identities, or all. */
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
   * The waiting requests whose company is restricted. A request that must be alone accepts a group with proven
   * sequences after a wait.
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
