// The durable records of the requests that this gateway holds. Each is stored, recorded again if the store loses it,
// moved behind newer records when it is old, and erased when its request has ended. Knows records and not requests.

import type { RecordPlace, Records } from '@mimo/core/bus/records';
import { QueueRefusal } from '@mimo/core/bus/queue-refusal';
import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';
import type { RequestRecord } from '@mimo/proto/queue';

import type { GatewayMetrics } from './metrics.ts';
import type { HeldRecord } from './relay.ts';

/** The keeper's dependencies. */
export interface RecordKeeperParts {
  readonly records: Records;
  readonly metrics: Pick<GatewayMetrics, 'queueRefusals'>;
  /** Older records are written again, so that ended records around them can be erased; Infinity: never. */
  readonly eraseAfterMs: number;
  readonly log: Log;
}

/** A record while its request lives. */
export interface KeptRecord {
  /** As it was stored last. */
  record: HeldRecord;
  /** Rejects if it could not be stored. */
  recorded: Promise<RecordPlace>;
  /** Its place in the store, once stored. */
  place: RecordPlace | undefined;
  /** Times of its request's acceptance and of its last write, by performance.now(). */
  readonly acceptedMs: number;
  recordedMs: number;
}

/** Intervals of checking for a lost store, and of retrying if it did not accept every record. */
const lookMs = 200;
const retryMs = 1_000;
/** Maximum records in flight when many are recorded again; they stay in order, since they share a connection. */
const restoredAtOnce = 256;

interface PlacedRecord {
  readonly kept: KeptRecord;
  readonly place: RecordPlace;
}

/** The store that a record first came in, as the number of stores lost since, and its sequence there. */
interface Origin {
  readonly outlived: number;
  readonly sequence: number;
}

function originOf({ kept: { record }, place }: PlacedRecord): Origin {
  const { storesOutlived, firstSequence } = record;
  return { outlived: storesOutlived, sequence: firstSequence === 0 ? place.sequence : firstSequence };
}

function compareOrigins(one: Origin, other: Origin): number {
  return other.outlived - one.outlived || one.sequence - other.sequence;
}

/** The records of one gateway. Nothing to close: every kept record is erased when its request ends. */
export class RecordKeeper {
  readonly #parts: RecordKeeperParts;
  readonly #kept = new Set<KeptRecord>();

  constructor(parts: RecordKeeperParts) {
    this.#parts = parts;
  }

  /** Stores a record; `record` is its compact form, held while its request lives. */
  keep(admitted: RequestRecord, record: HeldRecord): KeptRecord {
    const recorded = this.#parts.records.publish(admitted);
    const nowMs = performance.now();
    const kept: KeptRecord = { record, recorded, place: undefined, acceptedMs: nowMs, recordedMs: nowMs };
    this.#kept.add(kept);
    recorded.then(
      (place) => (kept.place = place),
      (error: unknown) => this.#noteRefusal(error),
    );
    return kept;
  }

  /**
   * Erases the record of an ended request, once it is stored. Fails if it could not be stored, or if the bus is closed
   * first.
   */
  async erase(kept: KeptRecord): Promise<void> {
    this.#kept.delete(kept);
    await this.#parts.records.erase(await kept.recorded);
  }

  /**
   * Records live requests again until the signal fires: those that the store has lost, in their old order, and those
   * recorded long ago.
   */
  async keepRecorded(signal: AbortSignal): Promise<void> {
    let known: RecordPlace | undefined;
    while (!signal.aborted) {
      const { oldest, fault } = this.#parts.records;
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

  /** Records again every record that the store has lost; false if some could not be stored. */
  async #recordLost(oldest: RecordPlace): Promise<boolean> {
    const lost = [...this.#kept].flatMap((kept) => {
      const { place } = kept;
      const isLost =
        place !== undefined && (place.storeId !== oldest.storeId || place.sequence < oldest.sequence);
      return isLost ? [{ kept, place }] : [];
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
      this.#parts.log.warn({ lost: lost.length, stored }, 'the queue lost records: recorded them again');
    }
    return stored === lost.length;
  }

  async #recordAgain(lost: PlacedRecord): Promise<void> {
    const { kept } = lost;
    if (this.#kept.has(kept)) {
      const { outlived, sequence } = originOf(lost);
      const origin = { storesOutlived: outlived + 1, firstSequence: sequence };
      await this.#rewrite(kept, origin, (record) => this.#parts.records.publish(record));
    }
  }

  /** Moves old records behind newer ones, so that the store can remove its old files. */
  async #moveOld(): Promise<void> {
    const { eraseAfterMs, records, log } = this.#parts;
    const { storeId, sequence } = records.oldest;
    const nowMs = performance.now();
    const old = [...this.#kept].flatMap((kept) => {
      const { place, recordedMs } = kept;
      const isOld =
        place?.storeId === storeId && place.sequence >= sequence && nowMs - recordedMs >= eraseAfterMs;
      return isOld ? [{ kept, place }] : [];
    });
    // Spread over time, and twice as fast as records reach that age.
    const atOnce = Math.max(16, Math.ceil((2 * this.#kept.size * lookMs) / eraseAfterMs));
    await Promise.allSettled(
      old.slice(0, atOnce).map(async ({ kept, place }) => {
        const { storesOutlived } = kept.record;
        const firstSequence = originOf({ kept, place }).sequence;
        await this.#rewrite(kept, { storesOutlived, firstSequence }, async (record) =>
          records.publishAgain(record, place).catch((error: unknown) => {
            // The record stays where it is.
            log.debug({ error: ClusterError.from(error) }, 'cannot rewrite a record');
            return place;
          }),
        );
      }),
    );
  }

  async #rewrite(
    kept: KeptRecord,
    origin: Pick<RequestRecord, 'storesOutlived' | 'firstSequence'>,
    write: (record: RequestRecord) => Promise<RecordPlace>,
  ): Promise<void> {
    const nowMs = performance.now();
    const again = { ...kept.record, ...origin, heldMs: Math.round(nowMs - kept.acceptedMs) };
    // Set at once, so that if the request ends meanwhile, its end waits for the new record and erases it.
    kept.recorded = write({ ...again, promptTokenIds: [...again.promptTokenIds] });
    kept.place = await kept.recorded;
    kept.record = again;
    kept.recordedMs = nowMs;
  }

  #noteRefusal(error: unknown): void {
    if (error instanceof QueueRefusal) {
      this.#parts.metrics.queueRefusals({ reason: error.reason });
      this.#parts.log.warn({ reason: error.reason, error }, 'cannot record a request');
    }
  }
}
