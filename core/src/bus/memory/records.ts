// The records in a Map: gone with the process.

import type { RequestRecord } from '@mimo/proto/queue';

import { ClusterError } from '../../process/errors.ts';
import type { QueueRefusal } from '../queue-refusal.ts';
import { summaryOf, type FollowedRecord, type RecordPlace, type Records } from '../records.ts';
import { assertOpen, faultOf, type MemoryHandle } from './broker.ts';

/** The records of one bus. */
export class MemoryRecords implements Records {
  readonly storeId = 'memory';
  readonly oldest: RecordPlace = { storeId: 'memory', sequence: 0 };
  readonly #handle: MemoryHandle;

  constructor(handle: MemoryHandle) {
    this.#handle = handle;
  }

  get fault(): QueueRefusal | undefined {
    return faultOf(this.#handle);
  }

  async publish(record: RequestRecord): Promise<RecordPlace> {
    assertOpen(this.#handle);
    const { broker } = this.#handle;
    const sequence = broker.nextSequence();
    broker.records.set(sequence, { record, storedMs: performance.now() });
    const place = { storeId: this.storeId, sequence };
    broker.arrivals.publish({ ...place, record: summaryOf(record) });
    return place;
  }

  async publishAgain(record: RequestRecord, { sequence }: RecordPlace): Promise<RecordPlace> {
    assertOpen(this.#handle);
    if (!this.#handle.broker.records.delete(sequence)) {
      throw new ClusterError('not_found', `no record is stored at ${sequence}`);
    }
    return this.publish(record);
  }

  async turnFile(): Promise<void> {
    assertOpen(this.#handle);
  }

  async erase({ sequence }: RecordPlace): Promise<boolean> {
    return this.#handle.broker.records.delete(sequence);
  }

  async read(requestId: string): Promise<RequestRecord | undefined> {
    assertOpen(this.#handle);
    return this.#handle.broker.records
      .values()
      .map(({ record }) => record)
      .find((record) => record.requestId === requestId);
  }

  async *follow(
    model: string,
    signal: AbortSignal,
    onReplayed?: () => void,
  ): AsyncGenerator<FollowedRecord, void, undefined> {
    const { broker, closing } = this.#handle;
    const live = [...broker.records].map(([sequence, { record }]) => ({
      storeId: this.storeId,
      sequence,
      record: summaryOf(record),
    }));
    const lastFound = live.at(-1)?.sequence ?? 0;
    let toReplay = live.length;
    if (toReplay === 0) {
      onReplayed?.();
    }
    for await (const queued of broker.arrivals.follow(AbortSignal.any([signal, closing]), live)) {
      const stored = broker.records.get(queued.sequence);
      if (queued.record.model === model && stored !== undefined) {
        const ageMs = queued.record.heldMs + performance.now() - stored.storedMs;
        yield { ...queued, isArrival: queued.sequence > lastFound, ageMs };
      }
      toReplay -= 1;
      if (toReplay === 0) {
        onReplayed?.();
      }
    }
  }

  async count(): Promise<number> {
    return this.#handle.broker.records.size;
  }
}
