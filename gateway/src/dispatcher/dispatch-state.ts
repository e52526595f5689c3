// What a dispatcher believes: the live requests of one model and the group that each is with. Rebuilt from the stream and
// the heartbeats, so a new dispatcher needs nothing from the old one. A belief may be wrong for a moment; the owning
// gateway's answer to an assignment is the truth. Time is an
// argument: the dispatcher's own monotonic clock, which is compared with nobody's.

import type { DrainMarks, FollowedRecord, QueuedRecord, QueueState } from '@mimo/core/bus/queue';
import { Company, type Needs, type RequestEnded, type RequestSummary } from '@mimo/proto/queue';
import { GroupState, type Heartbeat } from '@mimo/proto/worker';

import { patienceMs, provenTokens } from './suspicion.ts';
import type { OpenGroup, TrialRequest, WaitingRequest } from './placement.ts';

/** Which life of which group. */
export interface Place {
  readonly group: string;
  readonly incarnation: string;
}

interface Placed extends Place {
  readonly sinceMs: number;
  readonly onTrial: boolean;
  /** It made progress there, as the group says. */
  readonly proven: boolean;
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
/** What is parked is offered again after this, in case its owner's word was lost. */
const parkedRetryMs = 10_000;
/** Every gateway has noticed a lost store and recorded its requests again by then. */
const restoreMs = 2_000;
/** A gateway that does not listen for this long is gone, and with it everybody who waits for its requests. */
const orphanAfterMs = 15_000;

/** The state of one model's queue. */
export class DispatchState {
  /** In order of arrival once sorted: most are added in that order, and after the loss of a store some are not. */
  #requests = new Map<string, SeenRecord>();
  #isSorted = true;
  #last: SeenRecord | undefined;
  /** The store of the newest record: what is known from another one was lost with it, and its owner may record it again. */
  #storeId: string;
  /** Until then what came in this store waits for older requests to be recorded again. */
  #settledMs = 0;
  /** The few of them that are with a group. */
  readonly #placed = new Map<string, Placed>();
  /** The earliest attempt of a request that may still run: who speaks of an earlier one speaks of the past. */
  readonly #epochs = new Map<string, number>();
  /** Of those whose needs are not the record's any more. */
  readonly #needs = new Map<string, Needs & { readonly sinceMs: number }>();
  /** What waits, by the identity that it needs. */
  readonly #waitingFor = new Map<string, PlacedLoad>();
  /** Of those whose clients take nothing: until when they are not offered, in case their owner's next word is lost. */
  readonly #parked = new Map<string, number>();
  /** Lives of groups on which an attempt failed, and until when they are left alone. */
  readonly #suspects = new Map<string, number>();
  /** When each life of a group was first heard of, or last left by a request that may still be in it. */
  readonly #unsureMs = new Map<string, number>();
  readonly #silent = new Map<string, SilentGateway>();
  // Kept as things change: a queue may hold tens of thousands of requests.
  #inFlightTokens = 0;
  #arrivedTokens = 0;
  #endedTokens = 0;

  /** `storeId` is the store that was known before, empty where there was none. */
  constructor(storeId = '') {
    this.#storeId = storeId;
  }

  get storeId(): string {
    return this.#storeId;
  }

  /** Takes a record; one that arrived counts among those that came since the beginning. */
  add({ isArrival, ageMs, ...queued }: FollowedRecord, nowMs: number): void {
    const { record, storeId } = queued;
    const known = this.#requests.get(record.requestId);
    if (known?.storeId === storeId) {
      if (known.sequence < queued.sequence) {
        // Written again: it keeps its turn.
        this.#requests.set(record.requestId, { ...known, ...queued });
      }
      return;
    }
    const seen = { seenMs: nowMs, storedMs: nowMs - ageMs, ...known, ...queued };
    this.#requests.set(record.requestId, seen);
    this.#isSorted &&=
      storeId === this.#storeId && (this.#last === undefined || this.#compare(this.#last, seen) < 0);
    if (this.#storeId !== storeId) {
      this.#settledMs = this.#storeId === '' ? 0 : nowMs + restoreMs;
      this.#storeId = storeId;
    }
    this.#last = seen;
    if (known === undefined) {
      this.#countWaiting(record, 1);
      this.#arrivedTokens += isArrival && record.firstSequence === 0 ? record.tokens : 0;
    }
  }

  /**
   * The request has ended. It counts as ended work where it was with a group, which then had its tokens to compute. Unless
   * the group has `released` it, it may still be there, as in a group that stands still.
   */
  remove(requestId: string, released: boolean, nowMs: number): void {
    const request = this.#requests.get(requestId);
    if (request !== undefined) {
      this.#endedTokens += this.#placed.has(requestId) ? request.record.tokens : 0;
      this.#unplace(requestId, released ? undefined : nowMs);
      this.#unpark(requestId);
      this.#countWaiting(request.record, -1);
      this.#requests.delete(requestId);
      this.#epochs.delete(requestId);
      this.#needs.delete(requestId);
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
      this.#unpark(requestId);
      const before = this.#placed.get(requestId);
      if (before === undefined) {
        this.#countWaiting(request.record, -1);
        this.#inFlightTokens += request.record.tokens;
      }
      const stays = before?.group === group && before.incarnation === incarnation;
      this.#placed.set(requestId, {
        group,
        incarnation,
        sinceMs: nowMs,
        onTrial: (this.#needs.get(requestId)?.company ?? Company.UNSPECIFIED) !== Company.UNSPECIFIED,
        proven: stays && before.proven,
      });
    }
  }

  /**
   * An attempt is over: the request waits again, and the group is not trusted for a while. Where it is `parked` it waits for
   * its client, and the group did no more than to say so.
   */
  requeue(
    ended: Pick<RequestEnded, 'requestId' | 'epoch' | 'needs' | 'released' | 'parked'>,
    nowMs: number,
  ): void {
    const { requestId, epoch, needs, released, parked } = ended;
    if (!parked) {
      this.#unpark(requestId);
    }
    if (epoch < (this.#epochs.get(requestId) ?? 0)) {
      return;
    }
    this.#begin(requestId, epoch + 1);
    const place = this.#placed.get(requestId);
    if (place !== undefined) {
      if (!parked) {
        this.#suspects.set(placeKey(place), nowMs + suspectMs);
      }
      this.#unplace(requestId, released ? undefined : nowMs);
    }
    this.#need(requestId, needs, nowMs);
    if (parked) {
      this.park(requestId, nowMs);
    }
  }

  /** Its client takes nothing: it is in no group, and waits for none. */
  park(requestId: string, nowMs: number): void {
    const request = this.#requests.get(requestId);
    if (request !== undefined) {
      this.#unplace(requestId);
      if (!this.#parked.has(requestId)) {
        this.#countWaiting(request.record, -1);
      }
      this.#parked.set(requestId, nowMs + parkedRetryMs);
    }
  }

  /** Its owner does not want it in the group that it was offered: it waits again, for one that it needs. */
  refuse(requestId: string, needs: Needs | undefined, nowMs: number): void {
    this.#unplace(requestId);
    this.#need(requestId, needs, nowMs);
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
    // It may have begun, and its answer be what was lost.
    this.#unplace(requestId, nowMs);
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
    const lives = new Set<string>();
    for (const heartbeat of groups) {
      const key = placeKey(heartbeat);
      lives.add(key);
      this.#unsureMs.set(key, this.#unsureMs.get(key) ?? nowMs);
      for (const { requestId, epoch, tokens } of heartbeat.running) {
        if (epoch >= (this.#epochs.get(requestId) ?? 0)) {
          running.add(requestId);
          this.place(requestId, heartbeat, nowMs);
          this.#begin(requestId, epoch);
          const placed = this.#placed.get(requestId);
          if (placed?.proven === false && tokens >= provenTokens) {
            this.#placed.set(requestId, { ...placed, proven: true });
          }
        }
      }
    }
    for (const [requestId, { sinceMs }] of this.#placed) {
      if (!running.has(requestId) && nowMs - sinceMs > settleMs) {
        this.#unplace(requestId);
      }
    }
    for (const [requestId, untilMs] of this.#parked) {
      if (untilMs <= nowMs) {
        this.#unpark(requestId);
      }
    }
    for (const [key, untilMs] of this.#suspects) {
      if (untilMs <= nowMs) {
        this.#suspects.delete(key);
      }
    }
    for (const [key, sinceMs] of this.#unsureMs) {
      if (!lives.has(key) && nowMs - sinceMs > settleMs) {
        this.#unsureMs.delete(key);
      }
    }
  }

  /** What no group has, in order of arrival: for groups of these identities, or all of it. */
  *waiting(identities?: ReadonlySet<string>): Generator<WaitingRequest, void, undefined> {
    const wanted = identities === undefined ? undefined : new Set([...identities, '']);
    let left = 0;
    for (const [identity, { requests }] of this.#waitingFor) {
      left += wanted?.has(identity) === false ? 0 : requests;
    }
    for (const { record } of this.#inOrder()) {
      if (left === 0) {
        return;
      }
      const request = this.#isWaiting(record.requestId) ? this.#waiting(record.requestId) : undefined;
      if (request !== undefined && wanted?.has(request.identity) !== false) {
        left -= 1;
        yield request;
      }
    }
  }

  /** Those of them that may not be in any company; in one that is not quite what they need, once they have waited for it. */
  *onTrial(nowMs: number): Generator<TrialRequest, void, undefined> {
    for (const [requestId, needs] of this.#needs) {
      const request = this.#isWaiting(requestId) ? this.#waiting(requestId) : undefined;
      if (request !== undefined && needs.company !== Company.UNSPECIFIED) {
        const { breaks } = needs;
        const hasWaited = nowMs - needs.sinceMs >= patienceMs(needs);
        yield { ...request, breaks, company: hasWaited ? Company.PROVEN : needs.company };
      }
    }
  }

  #isWaiting(requestId: string): boolean {
    return !this.#placed.has(requestId) && !this.#parked.has(requestId);
  }

  #waiting(requestId: string): WaitingRequest | undefined {
    const request = this.#requests.get(requestId);
    if (request === undefined) {
      return undefined;
    }
    const { record, seenMs } = request;
    const needs = this.#needs.get(requestId);
    return {
      requestId,
      // What was left at acceptance cannot be more now: late by the record's age, and never early.
      expiredMs: seenMs + (record.timeLeftMs ?? Number.POSITIVE_INFINITY),
      notBeforeMs: Math.max(
        this.#silent.get(record.gatewayId)?.retryMs ?? 0,
        this.#originOf(request).outlived === 0 ? this.#settledMs : 0,
      ),
      identity: this.#identityOf(record),
      company: needs?.company ?? Company.UNSPECIFIED,
    };
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
   * The groups that may be given requests, of those that are ready: not the marked ones. One in which a sequence waits for
   * room has no free slot; a sequence that gives way to the next one does not hold its own.
   */
  openGroups(ready: readonly Heartbeat[], drains: DrainMarks, nowMs: number): OpenGroup[] {
    const loads = this.loads();
    const placed = Map.groupBy(this.#placed, ([, place]) => placeKey(place));
    return ready
      .filter(({ state, group }) => state === GroupState.READY && !drains.has(group))
      .map((heartbeat) => {
        const key = placeKey(heartbeat);
        const { company, closed } = this.#companyIn(heartbeat, placed.get(key) ?? [], nowMs);
        return {
          group: heartbeat.group,
          identity: heartbeat.identity,
          slots: closed || heartbeat.blockedSequences > 0 ? 0 : heartbeat.maxSequences,
          usedSlots:
            Math.max(loads.get(key)?.requests ?? 0, heartbeat.runningSequences) - heartbeat.parkableSequences,
          notBeforeMs: this.#suspects.get(key) ?? 0,
          company,
        };
      });
  }

  /**
   * Who is in a group: what is believed to be with it, and what it says it runs, though its client may be gone long since.
   * `closed`: one of them is on trial there and has made no progress yet.
   */
  #companyIn(
    heartbeat: Heartbeat,
    believed: readonly (readonly [string, Placed])[],
    nowMs: number,
  ): { readonly company: Company; readonly closed: boolean } {
    const unproven = [
      ...believed.map(([, placed]) => placed).filter(({ proven }) => !proven),
      ...heartbeat.running.filter(({ tokens }) => tokens < provenTokens),
    ];
    const isSure = nowMs - (this.#unsureMs.get(placeKey(heartbeat)) ?? nowMs) > settleMs;
    return {
      company:
        !isSure || unproven.length > 0
          ? Company.UNSPECIFIED
          : believed.length + heartbeat.running.length > 0
            ? Company.PROVEN
            : Company.NONE,
      closed: unproven.some(({ onTrial }) => onTrial),
    };
  }

  /** Figures for the published state. */
  summary(
    nowMs: number,
  ): Pick<
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
  > {
    let oldestMs = nowMs;
    for (const { record, storedMs } of this.#inOrder()) {
      if (this.#isWaiting(record.requestId)) {
        oldestMs = storedMs;
        break;
      }
    }
    return {
      waitingRequests: this.#requests.size - this.#placed.size - this.#parked.size,
      runningRequests: this.#placed.size,
      parkedRequests: this.#parked.size,
      waitingTokens: this.#waitingFor.values().reduce((sum, { tokens }) => sum + tokens, 0),
      inFlightTokens: this.#inFlightTokens,
      oldestWaitingMs: nowMs - oldestMs,
      arrivedTokens: this.#arrivedTokens,
      endedTokens: this.#endedTokens,
      waitingFor: [...this.#waitingFor]
        .map(([identity, load]) => ({ identity, ...load }))
        .toSorted((a, b) => (a.identity < b.identity ? -1 : 1)),
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
      sequence: record.firstSequence === 0 ? sequence : record.firstSequence,
    };
  }

  #begin(requestId: string, epoch: number): void {
    if (this.#requests.has(requestId)) {
      this.#epochs.set(requestId, epoch);
    }
  }

  /** It waits again. With `leftMs` its group has not said that it is gone from there. */
  #unplace(requestId: string, leftMs?: number): void {
    const request = this.#requests.get(requestId);
    const place = this.#placed.get(requestId);
    if (place !== undefined && request !== undefined) {
      this.#placed.delete(requestId);
      this.#inFlightTokens -= request.record.tokens;
      this.#countWaiting(request.record, 1);
      if (leftMs !== undefined && !place.proven) {
        this.#unsureMs.set(placeKey(place), leftMs);
      }
    }
  }

  /** It waits for a group again. */
  #unpark(requestId: string): void {
    const request = this.#requests.get(requestId);
    if (this.#parked.delete(requestId) && request !== undefined) {
      this.#countWaiting(request.record, 1);
    }
  }

  #identityOf({ requestId, identity }: RequestSummary): string {
    return this.#needs.get(requestId)?.identity ?? identity;
  }

  /** Only of one that waits. */
  #need(requestId: string, needs: Needs | undefined, nowMs: number): void {
    const record = this.#requests.get(requestId)?.record;
    if (record !== undefined && needs !== undefined && !this.#placed.has(requestId)) {
      const isCounted = !this.#parked.has(requestId);
      this.#countWaiting(record, isCounted ? -1 : 0);
      const known = this.#needs.get(requestId);
      const isKnown = known?.company === needs.company && known.breaks === needs.breaks;
      this.#needs.set(requestId, { ...needs, sinceMs: isKnown ? known.sinceMs : nowMs });
      this.#countWaiting(record, isCounted ? 1 : 0);
    }
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

const nothing: PlacedLoad = { requests: 0, tokens: 0 };

/** Names a life of a group. */
export function placeKey({ group, incarnation }: Place): string {
  return JSON.stringify([group, incarnation]);
}
