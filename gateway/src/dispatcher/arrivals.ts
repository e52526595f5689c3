// The live records of one model in order of arrival, even after their store was lost and they were recorded again in
// another. Pure: time is an argument.

import type { FollowedRecord, QueuedRecord } from '@mimo/core/bus/records';

/** A record and when this dispatcher first saw it. `storedMs` may be before the dispatcher's start. */
export interface SeenRecord extends QueuedRecord {
  readonly seenMs: number;
  readonly storedMs: number;
}

/** Within this time every gateway has noticed a lost store and recorded its requests again. */
const restoreMs = 2_000;

/** The records, by their requests. */
export class Arrivals {
  /** In order of arrival once sorted. Most are added in that order; after the loss of a store some are not. */
  #records = new Map<string, SeenRecord>();
  #isSorted = true;
  #last: SeenRecord | undefined;
  /**
   * The store of the newest record. Records of other stores are lost, but their owners may record them again.
   */
  #storeId: string;
  /** Until then, new records in this store wait for older requests to be recorded again. */
  #settledMs = 0;

  /** `storeId` is the previously known store, empty if there was none. */
  constructor(storeId: string) {
    this.#storeId = storeId;
  }

  get storeId(): string {
    return this.#storeId;
  }

  get size(): number {
    return this.#records.size;
  }

  get(requestId: string): SeenRecord | undefined {
    return this.#records.get(requestId);
  }

  /** Adds a record; false if its request is known already, perhaps from another store. */
  add({ isArrival: _isArrival, ageMs, ...queued }: FollowedRecord, nowMs: number): boolean {
    const { record, storeId } = queued;
    const known = this.#records.get(record.requestId);
    if (known?.storeId === storeId) {
      if (known.sequence < queued.sequence) {
        // A rewritten record keeps its turn.
        this.#records.set(record.requestId, { ...known, ...queued });
      }
      return false;
    }
    const seen = { seenMs: nowMs, storedMs: nowMs - ageMs, ...known, ...queued };
    this.#records.set(record.requestId, seen);
    this.#isSorted &&=
      storeId === this.#storeId && (this.#last === undefined || this.#compare(this.#last, seen) < 0);
    if (this.#storeId !== storeId) {
      this.#settledMs = this.#storeId === '' ? 0 : nowMs + restoreMs;
      this.#storeId = storeId;
    }
    this.#last = seen;
    return known === undefined;
  }

  /** Removes an ended request. */
  delete(requestId: string): void {
    this.#records.delete(requestId);
  }

  /** All records, the earliest first. */
  inOrder(): Iterable<SeenRecord> {
    if (!this.#isSorted) {
      this.#records = new Map([...this.#records].toSorted(([, one], [, other]) => this.#compare(one, other)));
      this.#isSorted = true;
      this.#last = [...this.#records.values()].at(-1);
    }
    return this.#records.values();
  }

  /** Not to be offered before this: older requests of a lost store may still be on their way into this one. */
  notBeforeMs(record: SeenRecord): number {
    return this.#originOf(record).outlived === 0 ? this.#settledMs : 0;
  }

  /**
   * Compares by arrival. A record that outlived more stores came in an earlier one; records of the same store compare
   * by their sequences there.
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
}
