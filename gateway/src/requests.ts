// The requests that this gateway has accepted and not yet ended. Owns the durable record of each from publish to its
// deletion (exactly once, however the request ends), deadlines, the longest wait, and the answers to dispatchers. Knows no
// gRPC server; what happens to tokens is relay.ts's business.

import { pause } from '@mimo/core/process/abort';
import { ClusterError, errorTable } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';
import type { RecordPlace, RequestQueue } from '@mimo/core/bus/queue';
import { QueueRefusal } from '@mimo/core/bus/queue-refusal';
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
import { Relay, type HeldRecord, type RelayEnd } from './relay.ts';
import type { Sessions } from './session.ts';
import { leastCompany, type LostAttempt } from './dispatcher/suspicion.ts';

/** What the table works with. */
export interface RequestsParts {
  readonly queue: RequestQueue;
  readonly sessions: Sessions;
  readonly groups: Pick<Groups, 'runningIn'>;
  readonly maxWaitMs: number;
  /** A record that is older is written again, so that what ended around it can be erased; Infinity: never. */
  readonly eraseAfterMs: number;
  /** A client that takes nothing for this long loses its request. */
  readonly clientStallMs: number;
  readonly metrics: GatewayMetrics;
  readonly log: Log;
}

/** An accepted request: its relay, and the promise of its record (rejected where it could not be stored). */
export interface OpenRequest {
  readonly relay: Relay;
  readonly recorded: Promise<RecordPlace>;
}

interface HeldRequest {
  readonly relay: Relay;
  /** As it was stored last. */
  record: HeldRecord;
  recorded: Promise<RecordPlace>;
  /** Where that is, once it is. */
  place: RecordPlace | undefined;
  /** When it was written last; by performance.now(). */
  recordedMs: number;
  readonly deadline: Timer | undefined;
  /** By performance.now(), as all times here. */
  readonly acceptedMs: number;
  /** Since when no group has given it a token: what the longest wait counts from. */
  waitingSinceMs: number;
  wait: Timer | undefined;
  /** Since when no group was known that could go on with it, and none is to come; by performance.now(). */
  strandedSinceMs: number | undefined;
  /** A dispatcher has heard that it is parked, and will not offer it until it hears otherwise. */
  isParkingTold: boolean;
}

/** A group that is not heard of for a moment, or is made ready again, is not gone for good. */
const strandedMs = 5_000;
/** A lost store is noticed at this pace; one that does not take everything back is tried again at the second. */
const lookMs = 200;
const retryMs = 1_000;
/** Records on their way at once when many are recorded again: in order, since they share a connection. */
const restoredAtOnce = 256;

/** What admission gives: other ids need not be looked up. */
const requestIdPattern = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;

/** In a full gateway, a client that takes nothing for this long gives way to a new request. */
const giveWayAfterMs = 2_000;

interface PlacedRecord {
  readonly held: HeldRequest;
  readonly place: RecordPlace;
}

/** Which of its stores a record came in, counted backwards, and where. */
interface Origin {
  readonly outlived: number;
  readonly sequence: number;
}

function originOf({ held: { record }, place }: PlacedRecord): Origin {
  const { storesOutlived, firstSequence } = record;
  return { outlived: storesOutlived, sequence: firstSequence === 0 ? place.sequence : firstSequence };
}

function compareOrigins(one: Origin, other: Origin): number {
  return other.outlived - one.outlived || one.sequence - other.sequence;
}

/** The table. Close nothing: when every request has ended and `settled` has resolved, nothing of it is left. */
export class Requests {
  readonly #parts: RequestsParts;
  readonly #held = new Map<string, HeldRequest>();
  readonly #deleting = new Set<Promise<void>>();
  readonly #newestDispatcher = new Map<string, { readonly storeId: string; readonly epoch: number }>();

  constructor(parts: RequestsParts) {
    this.#parts = parts;
  }

  /** Requests that have not ended, and records whose deletion is not confirmed yet. */
  counts(): { readonly requests: number; readonly deletingRecords: number } {
    return { requests: this.#held.size, deletingRecords: this.#deleting.size };
  }

  /** Requests of a model that have not ended. */
  countOf(model: string): number {
    return [...this.#held.values()].filter(({ record }) => record.model === model).length;
  }

  /** Accepts a request: it is known here before its record exists, since a dispatcher may be quicker than the ack. */
  open(admitted: RequestRecord, text: CompletionTextOptions): OpenRequest {
    // Half of what an array takes: a request may wait for long.
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
    const recorded = this.#parts.queue.publish(admitted);
    const held: HeldRequest = {
      relay,
      recorded,
      record,
      place: undefined,
      recordedMs: nowMs,
      deadline: timeLeftMs === undefined ? undefined : startTimer(timeLeftMs, () => this.#expire(held)),
      acceptedMs: nowMs,
      waitingSinceMs: nowMs,
      wait: undefined,
      strandedSinceMs: undefined,
      isParkingTold: false,
    };
    recorded.then(
      (place) => (held.place = place),
      (error: unknown) => {
        this.#noteRefusal(error);
        relay.fail(ClusterError.from(error));
      },
    );
    this.#held.set(requestId, held);
    this.#watchWait(held);
    return held;
  }

  /**
   * Records again, in their old order, what the store has lost while its request goes on, and what was recorded long ago; until
   * the signal fires.
   */
  async keepRecorded(signal: AbortSignal): Promise<void> {
    let known: RecordPlace | undefined;
    while (!signal.aborted) {
      const { oldest, fault } = this.#parts.queue;
      const isNew = known?.storeId !== oldest.storeId || known.sequence !== oldest.sequence;
      if (isNew && (fault === undefined || fault.reason === 'full')) {
        known = (await this.#recordLost(oldest)) ? oldest : undefined;
      }
      if (known !== undefined && fault === undefined) {
        await this.#moveOld();
      }
      await pause(known === undefined ? retryMs : lookMs, signal);
    }
  }

  /** Answers a dispatcher. Begins an attempt where the request waits. */
  assign(assignment: Assignment): AssignmentReply {
    const { requestId, model, dispatcherEpoch } = assignment;
    const nowhere = { group: '', incarnation: '', epoch: 0, needs: undefined };
    const { storeId } = this.#parts.queue;
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
      // Such as an address that is none: whoever waits learns of it, and the dispatcher has nothing to try again.
      relay.fail(ClusterError.from(error));
    }
    return { ...nowhere, outcome: AssignmentOutcome.ACCEPTED, group, incarnation, epoch: relay.epoch };
  }

  /**
   * Ends a request of the tenant, here or at the gateway that owns it; false where there is none of that id. Fails with
   * `unavailable` where the queue, or the owner, does not answer.
   */
  async cancel(cancellation: Cancellation): Promise<boolean> {
    return (
      this.cancelHeld(cancellation) ||
      (requestIdPattern.test(cancellation.requestId) && (await this.#parts.queue.cancel(cancellation)))
    );
  }

  /** Ends a request of the tenant that is held here; false where there is none of that id. */
  cancelHeld({ requestId, tenant }: Cancellation): boolean {
    const held = this.#held.get(requestId);
    if (held?.record.tenant !== tenant) {
      return false;
    }
    held.relay.fail(new ClusterError('canceled', 'the request was canceled with Cancel'));
    return true;
  }

  /** Ends the requests of a model that are in no group at this moment. */
  failWaiting(model: string, error: ClusterError): void {
    for (const { relay, record } of this.#held.values()) {
      if (record.model === model && relay.place === undefined) {
        relay.fail(error);
      }
    }
  }

  /**
   * Ends the requests of a model that have waited for a while for an identity that is none of `possible`: those of the groups
   * that take requests, and of those that are to come. To be called again and again.
   */
  endStranded(model: string, possible: ReadonlySet<string>): void {
    const nowMs = performance.now();
    for (const held of this.#held.values()) {
      const { relay, record } = held;
      const { identity } = relay.needs;
      const isStranded =
        record.model === model &&
        relay.place === undefined &&
        identity !== '' &&
        !possible.has(identity) &&
        this.#parts.queue.connected;
      if (record.model === model) {
        held.strandedSinceMs = isStranded ? (held.strandedSinceMs ?? nowMs) : undefined;
      }
      if (isStranded && nowMs - (held.strandedSinceMs ?? nowMs) >= strandedMs) {
        const when =
          relay.completionTokens === 0
            ? 'while the request waited'
            : `after ${relay.completionTokens} completion tokens`;
        const text =
          `model ${model} was replaced ${when}, and no group is left that computes what the request began with ` +
          `(identity ${identity}): send it again`;
        relay.fail(new ClusterError('aborted', text));
      }
    }
  }

  /** Ends the request whose client has taken nothing for longest, for a new one; false where every client reads. */
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
        `the gateway is full, and the client has taken nothing for ${Math.round(longest.stalledMs)} ms`,
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

  /** False where some of it could not be stored. */
  async #recordLost(oldest: RecordPlace): Promise<boolean> {
    const lost = [...this.#held.values()].flatMap((held) => {
      const { place } = held;
      const isLost =
        place !== undefined && (place.storeId !== oldest.storeId || place.sequence < oldest.sequence);
      return isLost ? [{ held, place }] : [];
    });
    lost.sort((one, other) => compareOrigins(originOf(one), originOf(other)));
    let stored = 0;
    for (let at = 0; at < lost.length; at += restoredAtOnce) {
      const results = await Promise.allSettled(
        lost.slice(at, at + restoredAtOnce).map((each) => this.#recordAgain(each)),
      );
      const refused = results.find((result) => result.status === 'rejected');
      stored += results.filter(({ status }) => status === 'fulfilled').length;
      if (refused !== undefined) {
        this.#noteRefusal(refused.reason);
        break;
      }
    }
    if (lost.length > 0) {
      this.#parts.log.warn({ lost: lost.length, stored }, 'queue lost records: they were recorded again');
    }
    return stored === lost.length;
  }

  async #recordAgain(lost: PlacedRecord): Promise<void> {
    const { held } = lost;
    const { queue } = this.#parts;
    if (!held.relay.ended) {
      const { outlived, sequence } = originOf(lost);
      const origin = { storesOutlived: outlived + 1, firstSequence: sequence };
      await this.#rewrite(held, origin, (record) => queue.publish(record));
    }
  }

  /** Puts what was recorded long ago behind what came since, so that the store can remove the files of that time. */
  async #moveOld(): Promise<void> {
    const { eraseAfterMs, queue, log } = this.#parts;
    const { storeId, sequence } = queue.oldest;
    const nowMs = performance.now();
    const old = [...this.#held.values()].flatMap((held) => {
      const { place, recordedMs, relay } = held;
      const isOld =
        place?.storeId === storeId &&
        place.sequence >= sequence &&
        nowMs - recordedMs >= eraseAfterMs &&
        !relay.ended;
      return isOld ? [{ held, place }] : [];
    });
    // Evenly over the time, and twice as fast as they come of age.
    const atOnce = Math.max(16, Math.ceil((2 * this.#held.size * lookMs) / eraseAfterMs));
    await Promise.allSettled(
      old.slice(0, atOnce).map(async ({ held, place }) => {
        const { storesOutlived } = held.record;
        const firstSequence = originOf({ held, place }).sequence;
        await this.#rewrite(held, { storesOutlived, firstSequence }, async (record) =>
          queue.publishAgain(record, place).catch((error: unknown) => {
            // It stays where it is.
            log.debug({ error: ClusterError.from(error) }, 'record not written again');
            return place;
          }),
        );
      }),
    );
  }

  async #rewrite(
    held: HeldRequest,
    origin: Pick<RequestRecord, 'storesOutlived' | 'firstSequence'>,
    write: (record: RequestRecord) => Promise<RecordPlace>,
  ): Promise<void> {
    const nowMs = performance.now();
    const again = { ...held.record, ...origin, heldMs: Math.round(nowMs - held.acceptedMs) };
    // Known at once, so that a request that ends meanwhile waits for it and deletes it.
    held.recorded = write({ ...again, promptTokenIds: [...again.promptTokenIds] });
    held.place = await held.recorded;
    held.record = again;
    held.recordedMs = nowMs;
  }

  #noteRefusal(error: unknown): void {
    if (error instanceof QueueRefusal) {
      this.#parts.metrics.queueRefusals({ reason: error.reason });
      this.#parts.log.warn({ reason: error.reason, error }, 'request not recorded');
    }
  }

  #requeued(requestId: string, { broke, tokens }: LostAttempt): void {
    const held = this.#held.get(requestId);
    if (held !== undefined) {
      const { relay, record } = held;
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
      this.#parts.metrics.parks({ model: held.record.model });
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

  /** Its attempt is over: it waits for a group, or for its client, and the dispatcher learns for which. */
  #wait(held: HeldRequest): void {
    const { relay, record } = held;
    const { requestId, model } = record;
    held.isParkingTold = relay.isParked;
    if (relay.isParked) {
      held.wait?.clear();
    } else {
      this.#watchWait(held);
    }
    const { epoch, needs, released, isParked: parked } = relay;
    this.#parts.queue.publishEnded({ requestId, model, requeued: true, epoch, needs, released, parked });
  }

  #ended(requestId: string, end: RelayEnd): void {
    const held = this.#held.get(requestId);
    if (held === undefined) {
      return;
    }
    this.#held.delete(requestId);
    held.deadline?.clear();
    held.wait?.clear();
    const deleting = this.#delete(held).finally(() => this.#deleting.delete(deleting));
    this.#deleting.add(deleting);
    // What the client is not shown.
    if (end.kind === 'error' && !errorTable[end.error.code].textLeaves) {
      this.#parts.log.error({ error: end.error, requestId, model: held.record.model }, 'request failed');
    }
  }

  async #delete({ record: { requestId, model }, recorded, relay }: HeldRequest): Promise<void> {
    try {
      await this.#parts.queue.delete(await recorded);
      const { epoch, released } = relay;
      this.#parts.queue.publishEnded({
        requestId,
        model,
        requeued: false,
        epoch,
        needs: undefined,
        released,
        parked: false,
      });
    } catch (error) {
      // Not stored, or the queue was closed first: then a dispatcher finds that nobody holds the request.
      this.#parts.log.debug({ error: ClusterError.from(error), requestId, model }, 'record not deleted');
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
