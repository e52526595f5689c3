// Whether the stream of records has room for one more, from what the server last said and what was written from here
// since. Rejects before the stream is full, so that other gateways' records and those recorded again still fit.

import type { StreamInfo } from '@nats-io/jetstream';

import { QueueRefusal } from '../queue-refusal.ts';
import type { StreamLimits } from './streams.ts';

/** Records are rejected from this share of a limit on. */
const refuseAtShare = 0.9;

/** The room in one stream, as far as is known. */
export class Room {
  /** The stream's own, once they are read. */
  #limits: StreamLimits;
  readonly #stored = { bytes: 0, records: 0 };
  readonly #written = { bytes: 0, records: 0 };

  constructor(limits?: StreamLimits) {
    this.#limits = limits ?? { maxBytes: boundOf(0), maxRecords: boundOf(0) };
  }

  /** The most bytes that the stream may hold. */
  get maxBytes(): number {
    return this.#limits.maxBytes;
  }

  /** Fails with a QueueRefusal, `full`, if a record of so many bytes would fill the stream. */
  assertFor(bytes: number): void {
    const { maxBytes, maxRecords } = this.#limits;
    const heldBytes = this.#stored.bytes + this.#written.bytes;
    const heldRecords = this.#stored.records + this.#written.records;
    if (heldBytes + bytes > refuseAtShare * maxBytes) {
      throw new QueueRefusal('full', `the queue is full: it holds ${heldBytes} bytes of ${maxBytes}`);
    }
    if (heldRecords + 1 > refuseAtShare * maxRecords) {
      throw new QueueRefusal('full', `the queue is full: it holds ${heldRecords} requests of ${maxRecords}`);
    }
  }

  /** Counts a record before it is stored: records in transit need room too. Returns a function that undoes it. */
  add(bytes: number): () => void {
    this.#count(bytes, 1);
    return () => this.#count(-bytes, -1);
  }

  /**
   * Begins a look at the stream; what is returned takes its answer, which holds all that was written before the look.
   */
  look(): (info: StreamInfo) => void {
    const before = { ...this.#written };
    return ({ state, config }) => {
      this.#limits = { maxBytes: boundOf(config.max_bytes), maxRecords: boundOf(config.max_msgs) };
      this.#stored.bytes = state.bytes;
      this.#stored.records = state.messages;
      this.#count(-before.bytes, -before.records);
    };
  }

  #count(bytes: number, records: number): void {
    this.#written.bytes += bytes;
    this.#written.records += records;
  }
}

/** A stream's own bound; zero and below mean no bound. */
function boundOf(limit: number): number {
  return limit > 0 ? limit : Number.POSITIVE_INFINITY;
}
