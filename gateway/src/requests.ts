// The requests that this gateway has accepted and not yet ended. Owns their end (exactly once, for any reason, and
// then the record is erased), deadlines, the longest wait, and the answers to dispatchers. Knows no client protocol;
// records are kept in record-keeper.ts, tokens are handled in relay.ts.

import { pause } from '@mimo/core/process/abort';
import { ClusterError, errorTable } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';
import type { Bus } from '@mimo/core/bus/bus';
import type { RecordPlace } from '@mimo/core/bus/records';
import { startTimer, type Timer } from '@mimo/core/process/timer';
import {
  AssignmentOutcome,
  type Assignment,
  type AssignmentReply,
  type Cancellation,
  type RequestRecord,
} from '@mimo/proto/queue';

import type { CompletionTextOptions } from './completion-text.ts';
import type { GatewayMetrics } from './metrics.ts';
import type { Groups } from './dispatcher/groups.ts';
import { RecordKeeper, type KeptRecord } from './record-keeper.ts';
import { Relay, type RelayEnd } from './relay.ts';
import type { Sessions } from './session.ts';
import { leastCompany, type LostAttempt } from './dispatcher/suspicion.ts';

/** The table's dependencies. */
export interface RequestsParts {
  readonly bus: Pick<Bus, 'connected' | 'records' | 'signals'>;
  readonly sessions: Sessions;
  readonly groups: Pick<Groups, 'runningIn'>;
  readonly maxWaitMs: number;
  /** Older records are written again, so that ended records around them can be erased; Infinity: never. */
  readonly eraseAfterMs: number;
  /** The request of a client that reads nothing for this long is ended. */
  readonly clientStallMs: number;
  readonly metrics: GatewayMetrics;
  readonly log: Log;
}

/** An accepted request: its relay, and the promise of its record (rejected if it could not be stored). */
export interface OpenRequest {
  readonly relay: Relay;
  readonly recorded: Promise<RecordPlace>;
}

interface HeldRequest {
  readonly relay: Relay;
  readonly kept: KeptRecord;
  readonly deadline: Timer | undefined;
  /** By performance.now(), as all times here. */
  readonly acceptedMs: number;
  /** The start of the longest wait: its acceptance, or the loss of a group that had given it tokens. */
  waitingSinceMs: number;
  wait: Timer | undefined;
  /** When it was first found that no known or expected group can continue it; undefined while one can. */
  strandedSinceMs: number | undefined;
  /** A dispatcher knows that it is parked, and will not offer it until it is notified otherwise. */
  isParkingTold: boolean;
}

/** A group that is briefly silent or restarting may still return. */
const strandedMs = 5_000;
/** The form of ids that admission creates: other ids need not be looked up. */
const requestIdPattern = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;

/** In a full gateway, a request whose client has read nothing for this long makes room for a new one. */
const giveWayAfterMs = 2_000;

/** The table. Nothing to close: it is empty when every request has ended and `settled` has resolved. */
export class Requests {
  readonly #parts: RequestsParts;
  readonly #keeper: RecordKeeper;
  readonly #held = new Map<string, HeldRequest>();
  readonly #deleting = new Set<Promise<void>>();
  readonly #newestDispatcher = new Map<string, { readonly storeId: string; readonly epoch: number }>();

  constructor(parts: RequestsParts) {
    const { eraseAfterMs, metrics, log } = parts;
    this.#parts = parts;
    this.#keeper = new RecordKeeper({ records: parts.bus.records, eraseAfterMs, metrics, log });
  }

  /** Requests that have not ended, and records whose deletion is not confirmed yet. */
  counts(): { readonly requests: number; readonly deletingRecords: number } {
    return { requests: this.#held.size, deletingRecords: this.#deleting.size };
  }

  /** Requests of a model that have not ended. */
  countOf(model: string): number {
    return [...this.#held.values()].filter(({ relay }) => relay.record.model === model).length;
  }

  /** Accepts a request. It is in the table before its record exists, since a dispatcher may be faster than the ack. */
  open(admitted: RequestRecord, text: CompletionTextOptions): OpenRequest {
    // Half the size of an array: a request may wait for a long time.
    const record = { ...admitted, promptTokenIds: Uint32Array.from(admitted.promptTokenIds) };
    const { requestId, timeLeftMs } = record;
    const nowMs = performance.now();
    const { clientStallMs: stallLimitMs } = this.#parts;
    const relay = new Relay(
      record,
      { text, stallLimitMs },
      {
        onRequeued: (attempt) => this.#requeued(requestId, attempt),
        onParked: () => this.#parked(requestId),
        onStalled: () => this.#parts.metrics.stalls({ model: record.model }),
        onUnparked: () => this.#unparked(requestId),
        onEnded: (end) => this.#ended(requestId, end),
      },
    );
    const kept = this.#keeper.keep(admitted, record);
    const held: HeldRequest = {
      relay,
      kept,
      deadline: timeLeftMs === undefined ? undefined : startTimer(timeLeftMs, () => this.#expire(held)),
      acceptedMs: nowMs,
      waitingSinceMs: nowMs,
      wait: undefined,
      strandedSinceMs: undefined,
      isParkingTold: false,
    };
    const { recorded } = kept;
    recorded.catch((error: unknown) => relay.fail(ClusterError.from(error)));
    this.#held.set(requestId, held);
    this.#watchWait(held);
    return { relay, recorded };
  }

  /** Keeps the records stored, even if the store is lost, until the signal fires. */
  keepRecorded(signal: AbortSignal): Promise<void> {
    return this.#keeper.keepRecorded(signal);
  }

  /** Answers a dispatcher. Begins an attempt if the request is waiting. */
  assign(assignment: Assignment): AssignmentReply {
    const { requestId, model, dispatcherEpoch } = assignment;
    const nowhere = { group: '', incarnation: '', epoch: 0, needs: undefined };
    const { storeId } = this.#parts.bus.records;
    const newest = this.#newestDispatcher.get(model);
    if (newest?.storeId === storeId && dispatcherEpoch < newest.epoch) {
      return { outcome: AssignmentOutcome.STALE_DISPATCHER, ...nowhere };
    }
    this.#newestDispatcher.set(model, { storeId, epoch: dispatcherEpoch });
    const held = this.#held.get(requestId);
    if (held === undefined) {
      return { outcome: AssignmentOutcome.UNKNOWN_REQUEST, ...nowhere };
    }
    const { relay } = held;
    if (relay.place !== undefined) {
      return { outcome: AssignmentOutcome.ALREADY_ASSIGNED, ...nowhere, ...relay.place, epoch: relay.epoch };
    }
    if (relay.isParked) {
      held.isParkingTold = true;
      return { ...nowhere, outcome: AssignmentOutcome.PARKED };
    }
    const { needs } = relay;
    const { group, incarnation, identity, company, breaks } = assignment;
    const isOther = needs.identity !== '' && needs.identity !== identity;
    if (isOther || company < leastCompany(needs, breaks)) {
      return { outcome: AssignmentOutcome.UNFIT, ...nowhere, needs };
    }
    held.wait?.clear();
    if (relay.epoch === 0) {
      this.#parts.metrics.queueWait(performance.now() - held.acceptedMs, { model });
    }
    try {
      const isAlone = (): boolean =>
        this.#parts.groups.runningIn(assignment).every((each) => each.requestId === requestId);
      relay.begin(this.#parts.sessions.to(assignment), { identity, company, isAlone });
    } catch (error) {
      // For example an invalid address: the client gets the error, and the dispatcher need not retry.
      relay.fail(ClusterError.from(error));
    }
    return { ...nowhere, outcome: AssignmentOutcome.ACCEPTED, group, incarnation, epoch: relay.epoch };
  }

  /**
   * Ends a request of the tenant, here or at the gateway that owns it; false if there is none with that id. Fails
   * with `unavailable` if the queue or the owner does not answer.
   */
  async cancel(cancellation: Cancellation): Promise<boolean> {
    const { requestId, tenant } = cancellation;
    if (this.cancelHeld(cancellation)) {
      return true;
    }
    if (!requestIdPattern.test(requestId)) {
      return false;
    }
    const { records, signals } = this.#parts.bus;
    const record = await records.read(requestId);
    return record?.tenant === tenant && (await signals.cancel(record.gatewayId, cancellation));
  }

  /** Ends a request of the tenant in this gateway; false if there is none with that id. */
  cancelHeld({ requestId, tenant }: Cancellation): boolean {
    const held = this.#held.get(requestId);
    if (held?.relay.record.tenant !== tenant) {
      return false;
    }
    held.relay.fail(new ClusterError('canceled', 'the request was canceled with Cancel'));
    return true;
  }

  /** Ends the requests of a model that are in no group at this moment. */
  failWaiting(model: string, error: ClusterError): void {
    for (const { relay } of this.#held.values()) {
      if (relay.record.model === model && relay.place === undefined) {
        relay.fail(error);
      }
    }
  }

  /**
   * Ends the requests of a model that have waited for a while for an identity outside `possible`, the identities of the
   * groups that accept or will accept requests. Call it regularly.
   */
  endStranded(model: string, possible: ReadonlySet<string>): void {
    const nowMs = performance.now();
    for (const held of this.#held.values()) {
      const { relay } = held;
      const { record } = relay;
      const { identity } = relay.needs;
      const isStranded =
        record.model === model &&
        relay.place === undefined &&
        identity !== '' &&
        !possible.has(identity) &&
        this.#parts.bus.connected;
      if (record.model === model) {
        held.strandedSinceMs = isStranded ? (held.strandedSinceMs ?? nowMs) : undefined;
      }
      if (isStranded && nowMs - (held.strandedSinceMs ?? nowMs) >= strandedMs) {
        const when =
          relay.completionTokens === 0
            ? 'while the request waited'
            : `after ${relay.completionTokens} completion tokens`;
        const text =
          `model ${model} was replaced ${when}, and no group with the request's model identity is left ` +
          `(identity ${identity}): send it again`;
        relay.fail(new ClusterError('aborted', text));
      }
    }
  }

  /** Ends the request whose client has been idle for longest, to make room; false if every client reads. */
  makeRoom(): boolean {
    const nowMs = performance.now();
    const longest = [...this.#held.values()]
      .map(({ relay }) => ({ relay, stalledMs: relay.stalledMs(nowMs) }))
      .filter(({ stalledMs }) => stalledMs >= giveWayAfterMs)
      .reduce<{ relay: Relay; stalledMs: number } | undefined>(
        (most, each) => (each.stalledMs > (most?.stalledMs ?? 0) ? each : most),
        undefined,
      );
    longest?.relay.stall(
      new ClusterError(
        'resource_exhausted',
        `the gateway is full, and the client has read nothing for ${Math.round(longest.stalledMs)} ms`,
      ),
    );
    return longest !== undefined;
  }

  /** Ends every request with this error. */
  failAll(error: ClusterError): void {
    for (const { relay } of this.#held.values()) {
      relay.fail(error);
    }
  }

  /** Resolves when no request is left and every record is deleted, or the signal fires. */
  async settled(signal: AbortSignal): Promise<void> {
    while (!signal.aborted && this.#held.size + this.#deleting.size > 0) {
      await pause(20, signal);
    }
  }

  #requeued(requestId: string, { broke, tokens }: LostAttempt): void {
    const held = this.#held.get(requestId);
    if (held !== undefined) {
      const { relay } = held;
      const { record } = relay;
      const { model } = record;
      if (relay.completionTokens === 0) {
        this.#parts.metrics.requeues({ model });
      } else {
        this.#parts.metrics.moves({ model, cause: broke ? 'broken' : 'handed over' });
      }
      if (tokens > 0) {
        held.waitingSinceMs = performance.now();
      }
      this.#wait(held);
    }
  }

  #parked(requestId: string): void {
    const held = this.#held.get(requestId);
    if (held !== undefined) {
      this.#parts.metrics.parks({ model: held.relay.record.model });
      this.#wait(held);
    }
  }

  #unparked(requestId: string): void {
    const held = this.#held.get(requestId);
    if (held?.isParkingTold === true) {
      held.waitingSinceMs = performance.now();
      this.#wait(held);
    }
  }

  /** Its attempt is over: it waits for a group or for its client, and the dispatcher is notified which of the two. */
  #wait(held: HeldRequest): void {
    const { relay } = held;
    const { record } = relay;
    const { requestId, model } = record;
    held.isParkingTold = relay.isParked;
    if (relay.isParked) {
      held.wait?.clear();
    } else {
      this.#watchWait(held);
    }
    const { epoch, needs, released, isParked: parked } = relay;
    this.#parts.bus.signals.publishEnded({
      requestId,
      model,
      requeued: true,
      epoch,
      needs,
      released,
      parked,
    });
  }

  #ended(requestId: string, end: RelayEnd): void {
    const held = this.#held.get(requestId);
    if (held === undefined) {
      return;
    }
    this.#held.delete(requestId);
    held.deadline?.clear();
    held.wait?.clear();
    const deleting = this.#erase(held).finally(() => this.#deleting.delete(deleting));
    this.#deleting.add(deleting);
    // The error's text is hidden from the client.
    if (end.kind === 'error' && !errorTable[end.error.code].textLeaves) {
      this.#parts.log.error(
        { error: end.error, requestId, model: held.relay.record.model },
        'request failed',
      );
    }
  }

  async #erase({ kept, relay }: HeldRequest): Promise<void> {
    const { requestId, model } = relay.record;
    try {
      await this.#keeper.erase(kept);
      const { epoch, released } = relay;
      this.#parts.bus.signals.publishEnded({
        requestId,
        model,
        requeued: false,
        epoch,
        needs: undefined,
        released,
        parked: false,
      });
    } catch (error) {
      // It was not stored, or the queue was closed first; then a dispatcher finds that the request has no owner.
      this.#parts.log.debug({ error: ClusterError.from(error), requestId, model }, 'cannot delete a record');
    }
  }

  #watchWait(held: HeldRequest): void {
    held.wait?.clear();
    const { maxWaitMs } = this.#parts;
    held.wait = startTimer(held.waitingSinceMs + maxWaitMs - performance.now(), () => {
      const { completionTokens } = held.relay;
      const which = completionTokens === 0 ? '' : ` up again, after ${completionTokens} completion tokens,`;
      const text = `no group took the request${which} within ${maxWaitMs} ms`;
      held.relay.fail(new ClusterError('deadline_exceeded', text, { detail: { retryAfterMs: 5_000 } }));
    });
  }

  #expire({ relay }: HeldRequest): void {
    const where =
      relay.place === undefined
        ? 'while the request waited for a group'
        : `after ${relay.completionTokens} completion tokens`;
    relay.fail(new ClusterError('deadline_exceeded', `the deadline passed ${where}`));
  }
}
