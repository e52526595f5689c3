// The live records of one model in order of arrival, also when their store was lost and they were recorded again in
// another one. Pure: time is an argument.

import type { FollowedRecord, QueuedRecord } from '@mimo/core/bus/records';

/** A record that this dispatcher has seen, and when; it was stored at `storedMs`, which may be before its time. */
export interface SeenRecord extends QueuedRecord {
  readonly seenMs: number;
  readonly storedMs: number;
}

/** Every gateway has noticed a lost store and recorded its requests again by then. */
const restoreMs = 2_000;

/** The records, by their requests. */
export class Arrivals {
  /** In order of arrival once sorted: most are added in that order, and after the loss of a store some are not. */
  #records = new Map<string, SeenRecord>();
  #isSorted = true;
  #last: SeenRecord | undefined;
  /**
   * The store of the newest record: records of another store were lost with it, and their owners may record them again.
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

  /** Takes a record; false if its request is known already, perhaps from another store. */
  add({ isArrival: _isArrival, ageMs, ...queued }: FollowedRecord, nowMs: number): boolean {
    const { record, storeId } = queued;
    const known = this.#records.get(record.requestId);
    if (known?.storeId === storeId) {
      if (known.sequence < queued.sequence) {
        // Written again: it keeps its turn.
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

  /** The request has ended. */
  delete(requestId: string): void {
    this.#records.delete(requestId);
  }

  /** All of them, the earliest first. */
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
   * Which came first. A record that outlived more stores came in an earlier one; of those that came in the same store
   * the sequences there say it.
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
