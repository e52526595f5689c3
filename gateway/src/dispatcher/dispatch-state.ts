// The dispatcher's view: the live requests of one model and the group of each. Rebuilt from the stream and the
// heartbeats, so a new dispatcher needs nothing from the old one. The view may be wrong for a moment; the owning
// gateway's answer to an assignment is authoritative. The waiting work is in backlog.ts. Pure: time is an argument, the
// dispatcher's own monotonic clock.

import type { MarkedGroups } from '@mimo/core/bus/drain-marks';
import type { FollowedRecord, QueuedRecord } from '@mimo/core/bus/records';
import { Company, type Needs, type RequestEnded } from '@mimo/proto/queue';
import { GroupState, type Heartbeat } from '@mimo/proto/worker';

import { provenTokens } from './suspicion.ts';
import { Backlog, nothing, type BacklogSummary, type Load } from './backlog.ts';
import type { OpenGroup, TrialRequest, WaitingRequest } from './placement.ts';

/** A group and its incarnation. */
export interface Place {
  readonly group: string;
  readonly incarnation: string;
}

interface Placed extends Place {
  readonly sinceMs: number;
  readonly onTrial: boolean;
  /** Whether it made progress there, according to the group. */
  readonly proven: boolean;
}

/** How long a group may leave an assigned request out of its heartbeats before it counts as waiting again. */
const settleMs = 2_000;
/** A group gets no requests for this long after a failed attempt: the time that it takes to detect a lost group. */
const suspectMs = 2_000;

/** The state of one model's queue. */
export class DispatchState {
  readonly #backlog: Backlog;
  /** The few requests that are in a group. */
  readonly #placed = new Map<string, Placed>();
  /** The earliest attempt of a request that may still run: reports on earlier attempts are out of date. */
  readonly #epochs = new Map<string, number>();
  /** Incarnations on which an attempt failed, and when they may get requests again. */
  readonly #suspects = new Map<string, number>();
  /** When each incarnation was first seen, or was last left by a request that may still be in it. */
  readonly #unsureMs = new Map<string, number>();
  #endedTokens = 0;

  /** `storeId` is the previously known store, empty if there was none. */
  constructor(storeId = '') {
    this.#backlog = new Backlog(storeId);
  }

  get storeId(): string {
    return this.#backlog.storeId;
  }

  /** Adds a record; a new arrival also counts in the total of arrived work. */
  add(followed: FollowedRecord, nowMs: number): void {
    this.#backlog.add(followed, nowMs);
  }

  /**
   * Removes an ended request. It counts as ended work if a group had it, since the group computed its tokens. Unless
   * the group has `released` it, it may still be there, for example in a paused group.
   */
  remove(requestId: string, released: boolean, nowMs: number): void {
    const request = this.#backlog.get(requestId);
    if (request !== undefined) {
      this.#endedTokens += this.#placed.has(requestId) ? request.record.tokens : 0;
      this.#unplace(requestId, released ? undefined : nowMs);
      this.#backlog.remove(requestId);
      this.#epochs.delete(requestId);
    }
  }

  get(requestId: string): QueuedRecord | undefined {
    return this.#backlog.get(requestId);
  }

  /** Notes that its owner has started attempt `epoch` of the request in a group. */
  confirm(requestId: string, where: Place & { readonly epoch: number }, nowMs: number): void {
    if (where.epoch >= (this.#epochs.get(requestId) ?? 0)) {
      this.place(requestId, where, nowMs);
      this.#begin(requestId, where.epoch);
    }
  }

  /** Notes that the request is in a group, as far as is known. */
  place(requestId: string, { group, incarnation }: Place, nowMs: number): void {
    if (this.#backlog.hold(requestId)) {
      const before = this.#placed.get(requestId);
      const stays = before?.group === group && before.incarnation === incarnation;
      this.#placed.set(requestId, {
        group,
        incarnation,
        sinceMs: nowMs,
        onTrial: this.#backlog.isOnTrial(requestId),
        proven: stays && before.proven,
      });
    }
  }

  /**
   * Ends an attempt: the request waits again, and the group gets no requests for a while. A `parked` request waits for
   * its client instead, and its group is not to blame.
   */
  requeue(
    ended: Pick<RequestEnded, 'requestId' | 'epoch' | 'needs' | 'released' | 'parked'>,
    nowMs: number,
  ): void {
    const { requestId, epoch, needs, released, parked } = ended;
    if (!parked) {
      this.#backlog.unpark(requestId);
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
    this.#backlog.need(requestId, needs, nowMs);
    if (parked) {
      this.park(requestId, nowMs);
    }
  }

  /** Parks a request whose client is not reading: it has no group and waits for none. */
  park(requestId: string, nowMs: number): void {
    this.#unplace(requestId);
    this.#backlog.park(requestId, nowMs);
  }

  /** Notes that its owner declined the offered group: the request waits again, for a group that meets its needs. */
  refuse(requestId: string, needs: Needs | undefined, nowMs: number): void {
    this.#unplace(requestId);
    this.#backlog.need(requestId, needs, nowMs);
  }

  /** Notes that a gateway answered: its requests may be offered again. */
  heard(gatewayId: string): void {
    this.#backlog.heard(gatewayId);
  }

  /**
   * Notes that a gateway did not answer for this request, which waits again; none of the gateway's requests are offered
   * for a while. `gone`: nothing listens under the gateway's name. Returns the requests that have lost their owner.
   */
  unanswered(requestId: string, gone: boolean, nowMs: number): string[] {
    const request = this.#backlog.get(requestId);
    if (request === undefined) {
      return [];
    }
    // The attempt may have begun, and only the answer was lost.
    this.#unplace(requestId, nowMs);
    return this.#backlog.unanswered(request.record.gatewayId, gone, nowMs);
  }

  /**
   * Updates the view from the live groups' heartbeats: a request that a group reports is in that group; a request whose
   * group is gone, or does not report it for a while, waits again.
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
    this.#backlog.tick(nowMs);
    this.#forget(lives, nowMs);
  }

  /** Waiting requests in order of arrival: those for groups of these identities, or all. */
  waiting(identities?: ReadonlySet<string>): Iterable<WaitingRequest> {
    return this.#backlog.waiting(identities);
  }

  /**
   * The waiting requests whose company is restricted. A request that must be alone accepts a group with proven
   * sequences after a wait.
   */
  onTrial(nowMs: number): Iterable<TrialRequest> {
    return this.#backlog.onTrial(nowMs);
  }

  /** The requests of each incarnation of a group, by `placeKey`. */
  loads(): ReadonlyMap<string, Load> {
    const loads = new Map<string, Load>();
    for (const [requestId, place] of this.#placed) {
      const key = placeKey(place);
      const { requests, tokens } = loads.get(key) ?? nothing;
      const record = this.#backlog.get(requestId)?.record;
      loads.set(key, {
        requests: requests + 1,
        tokens: tokens + (record?.tokens ?? 0),
      });
    }
    return loads;
  }

  /**
   * The ready groups that may get requests: those without a drain mark. A group in which a sequence waits for room has
   * no free slot; a sequence that must make room for the next one does not count.
   */
  openGroups(ready: readonly Heartbeat[], drains: MarkedGroups, nowMs: number): OpenGroup[] {
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
   * The sequences of a group: those assigned to it, and those that it reports, even if their clients are gone.
   * `closed`: one of them is on trial and has made no progress yet.
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
  summary(nowMs: number): BacklogSummary {
    return { ...this.#backlog.summary(nowMs), endedTokens: this.#endedTokens };
  }

  #begin(requestId: string, epoch: number): void {
    if (this.#backlog.get(requestId) !== undefined) {
      this.#epochs.set(requestId, epoch);
    }
  }

  /** Returns a request to the queue. `leftMs`: when it left a group that has not confirmed its removal. */
  #unplace(requestId: string, leftMs?: number): void {
    const place = this.#placed.get(requestId);
    if (place !== undefined) {
      this.#placed.delete(requestId);
      this.#backlog.release(requestId);
      if (leftMs !== undefined && !place.proven) {
        this.#unsureMs.set(placeKey(place), leftMs);
      }
    }
  }

  /** Drops expired suspicions, and incarnations that are gone. */
  #forget(lives: ReadonlySet<string>, nowMs: number): void {
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
}

/** The key of an incarnation of a group. */
export function placeKey({ group, incarnation }: Place): string {
  return JSON.stringify([group, incarnation]);
}
