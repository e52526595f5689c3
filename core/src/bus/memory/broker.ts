// What the in-memory buses of one process share: the stores, and who listens at this moment.

import type {
  Assignment,
  AssignmentReply,
  Cancellation,
  RequestEnded,
  RequestRecord,
} from '@mimo/proto/queue';
import type { Heartbeat } from '@mimo/proto/worker';

import { channelUntil, type Channel } from '../../process/channel.ts';
import type { MarkedGroups } from '../drain-marks.ts';
import { QueueRefusal } from '../queue-refusal.ts';
import type { QueuedRecord } from '../records.ts';
import type { QueueState } from '../signals.ts';

/** One topic: values go to all current listeners. */
export class Topic<T> {
  readonly #listeners = new Set<Channel<T>>();

  /** Sends a value. */
  publish(value: T): void {
    for (const listener of this.#listeners) {
      listener.push(value);
    }
  }

  /** Yields the backlog, then newly published items, until the signal fires. */
  async *follow(signal: AbortSignal, backlog: readonly T[] = []): AsyncGenerator<T, void, undefined> {
    const channel = channelUntil<T>(signal);
    for (const value of backlog) {
      channel.push(value);
    }
    this.#listeners.add(channel);
    try {
      yield* channel;
    } finally {
      this.#listeners.delete(channel);
    }
  }
}

interface StoredRecord {
  readonly record: RequestRecord;
  readonly storedMs: number;
}

/** The shared state. Nothing to close: it is freed with its buses. */
export class MemoryBroker {
  readonly records = new Map<number, StoredRecord>();
  readonly arrivals = new Topic<QueuedRecord>();
  readonly heartbeats = new Topic<Heartbeat>();
  readonly ended = new Topic<RequestEnded>();
  readonly states = new Topic<QueueState>();
  readonly drains = new Map<string, MarkedGroups>();
  readonly drainChanges = new Topic<{ readonly model: string; readonly marks: MarkedGroups }>();
  readonly assigned = new Map<string, (assignment: Assignment) => AssignmentReply>();
  readonly cancelled = new Map<string, (cancellation: Cancellation) => boolean>();
  readonly leases = new Map<string, { readonly holder: symbol; readonly freed: Promise<void> }>();
  #sequence = 0;

  /** The next number of records and epochs. */
  nextSequence(): number {
    this.#sequence += 1;
    return this.#sequence;
  }
}

/** One bus on a broker, as its ports see it: the shared state, and when it is closed. */
export interface MemoryHandle {
  readonly broker: MemoryBroker;
  /** Fires when the bus is closed. */
  readonly closing: AbortSignal;
}

/** Why nothing can be stored: the bus is closed. */
export function faultOf({ closing }: MemoryHandle): QueueRefusal | undefined {
  return closing.aborted ? new QueueRefusal('disconnected', 'the queue is closed') : undefined;
}

/** Fails with `unavailable` once the bus is closed. */
export function assertOpen(handle: MemoryHandle): void {
  const fault = faultOf(handle);
  if (fault !== undefined) {
    throw fault;
  }
}
