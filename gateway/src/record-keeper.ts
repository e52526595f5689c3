// The durable records of the requests that this gateway holds: each is stored, recorded again in every store that
// loses it, moved behind newer ones when it is old, and erased when its request has ended. Knows records and not
// requests.

import type { RecordPlace, Records } from '@mimo/core/bus/records';
import { QueueRefusal } from '@mimo/core/bus/queue-refusal';
import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';
import type { RequestRecord } from '@mimo/proto/queue';

import type { GatewayMetrics } from './metrics.ts';
import type { HeldRecord } from './relay.ts';

/** What the keeper works with. */
export interface RecordKeeperParts {
  readonly records: Records;
  readonly metrics: Pick<GatewayMetrics, 'queueRefusals'>;
  /** A record that is older is written again, so that what ended around it can be erased; Infinity: never. */
  readonly eraseAfterMs: number;
  readonly log: Log;
}

/** A record that is kept. */
export interface KeptRecord {
  /** As it was stored last. */
  record: HeldRecord;
  /** Rejected where it could not be stored. */
  recorded: Promise<RecordPlace>;
  /** Where it is stored, once it is. */
  place: RecordPlace | undefined;
  /** When its request was accepted, and when it was written last; by performance.now(). */
  readonly acceptedMs: number;
  recordedMs: number;
}

/** A lost store is noticed at this pace; one that does not take everything back is tried again at the second. */
const lookMs = 200;
const retryMs = 1_000;
/** Records on their way at once when many are recorded again: in order, since they share a connection. */
const restoredAtOnce = 256;

interface PlacedRecord {
  readonly kept: KeptRecord;
  readonly place: RecordPlace;
}

/** Which of its stores a record came in, counted backwards, and where. */
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

/** The records of one gateway. Nothing to close: what is kept is erased. */
export class RecordKeeper {
  readonly #parts: RecordKeeperParts;
  readonly #kept = new Set<KeptRecord>();

  constructor(parts: RecordKeeperParts) {
    this.#parts = parts;
  }

  /** Stores a record; `record` is the same, as it is held while its request lives. */
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

  /** Erases a record whose request has ended, once it is stored. Fails if it was not, or the bus is closed first. */
  async erase(kept: KeptRecord): Promise<void> {
    this.#kept.delete(kept);
    await this.#parts.records.erase(await kept.recorded);
  }

  /**
   * Records again, in their old order, what the store has lost while its request goes on, and what was recorded long
   * ago; until the signal fires.
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

  /** False if some of it could not be stored. */
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

  /** Puts what was recorded long ago behind what came since, so that the store can remove the files of that time. */
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
    // Evenly over the time, and twice as fast as they come of age.
    const atOnce = Math.max(16, Math.ceil((2 * this.#kept.size * lookMs) / eraseAfterMs));
    await Promise.allSettled(
      old.slice(0, atOnce).map(async ({ kept, place }) => {
        const { storesOutlived } = kept.record;
        const firstSequence = originOf({ kept, place }).sequence;
        await this.#rewrite(kept, { storesOutlived, firstSequence }, async (record) =>
          records.publishAgain(record, place).catch((error: unknown) => {
            // It stays where it is.
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
    // Known at once, so that a request that ends meanwhile waits for it and erases it.
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
