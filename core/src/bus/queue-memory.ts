// The queue in the memory of one process, with the semantics of queue-nats except durability: for machines without a
// nats-server, and as the fast half of the shared test suite. Handles of one broker see each other.

import type {
  Assignment,
  AssignmentReply,
  Cancellation,
  RequestEnded,
  RequestRecord,
} from '@mimo/proto/queue';
import type { Heartbeat } from '@mimo/proto/worker';

import { beforeAbort } from '../process/abort.ts';
import { Channel, channelUntil } from '../process/channel.ts';
import { ClusterError } from '../process/errors.ts';
import { QueueRefusal } from './queue-refusal.ts';
import { ownerSilent, summaryOf } from './queue.ts';
import type {
  Closeable,
  DrainMark,
  DrainMarks,
  FollowedRecord,
  Lease,
  QueuedRecord,
  QueueState,
  RecordPlace,
  RequestQueue,
} from './queue.ts';

/** One topic: values go to all current listeners. */
class Topic<T> {
  readonly #listeners = new Set<Channel<T>>();

  publish(value: T): void {
    for (const listener of this.#listeners) {
      listener.push(value);
    }
  }

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

/** What the handles of one in-memory queue share. Nothing to close: it is freed with its handles. */
export class MemoryBroker {
  readonly records = new Map<number, StoredRecord>();
  readonly arrivals = new Topic<QueuedRecord>();
  readonly heartbeats = new Topic<Heartbeat>();
  readonly ended = new Topic<RequestEnded>();
  readonly states = new Topic<QueueState>();
  readonly drains = new Map<string, DrainMarks>();
  readonly drainChanges = new Topic<{ readonly model: string; readonly marks: DrainMarks }>();
  readonly assigned = new Map<string, (assignment: Assignment) => AssignmentReply>();
  readonly cancelled = new Map<string, (cancellation: Cancellation) => boolean>();
  readonly leases = new Map<string, { readonly holder: symbol; readonly freed: Promise<void> }>();
  #sequence = 0;

  nextSequence(): number {
    this.#sequence += 1;
    return this.#sequence;
  }
}

/** Opens a handle on a broker, by default on one of its own. Close it to end its iterations and give up its leases. */
export function createMemoryQueue(broker: MemoryBroker = new MemoryBroker()): RequestQueue {
  return new MemoryQueue(broker);
}

class MemoryQueue implements RequestQueue {
  readonly kind = 'memory';
  readonly storeId = 'memory';
  readonly oldest: RecordPlace = { storeId: 'memory', sequence: 0 };
  readonly #broker: MemoryBroker;
  readonly #closing = new AbortController();
  readonly #leases = new Set<Lease>();
  readonly #served = new Set<Closeable>();

  constructor(broker: MemoryBroker) {
    this.#broker = broker;
  }

  get connected(): boolean {
    return !this.#closing.signal.aborted;
  }

  get fault(): QueueRefusal | undefined {
    return this.connected ? undefined : new QueueRefusal('disconnected', 'the queue is closed');
  }

  async opened(): Promise<void> {
    this.#assertOpen();
  }

  async publish(record: RequestRecord): Promise<RecordPlace> {
    this.#assertOpen();
    const sequence = this.#broker.nextSequence();
    this.#broker.records.set(sequence, { record, storedMs: performance.now() });
    const place = { storeId: this.storeId, sequence };
    this.#broker.arrivals.publish({ ...place, record: summaryOf(record) });
    return place;
  }

  async publishAgain(record: RequestRecord, { sequence }: RecordPlace): Promise<RecordPlace> {
    this.#assertOpen();
    if (!this.#broker.records.delete(sequence)) {
      throw new ClusterError('not_found', `no record is stored at ${sequence}`);
    }
    return this.publish(record);
  }

  async turnFile(): Promise<void> {
    this.#assertOpen();
  }

  async delete({ sequence }: RecordPlace): Promise<boolean> {
    return this.#broker.records.delete(sequence);
  }

  async *follow(
    model: string,
    signal: AbortSignal,
    onReplayed?: () => void,
  ): AsyncGenerator<FollowedRecord, void, undefined> {
    const live = [...this.#broker.records].map(([sequence, { record }]) => ({
      storeId: this.storeId,
      sequence,
      record: summaryOf(record),
    }));
    const lastFound = live.at(-1)?.sequence ?? 0;
    let toReplay = live.length;
    if (toReplay === 0) {
      onReplayed?.();
    }
    for await (const queued of this.#broker.arrivals.follow(this.#until(signal), live)) {
      const stored = this.#broker.records.get(queued.sequence);
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

  async counts(): Promise<{ readonly records: number }> {
    return { records: this.#broker.records.size };
  }

  async acquireLease(model: string, _holder: string, signal: AbortSignal): Promise<Lease> {
    const until = this.#until(signal);
    const holder = Symbol(model);
    for (
      let held = this.#broker.leases.get(model);
      held !== undefined;
      held = this.#broker.leases.get(model)
    ) {
      await beforeAbort(held.freed, until);
    }
    until.throwIfAborted();
    const { promise: freed, resolve: free } = Promise.withResolvers<void>();
    const lost = new AbortController();
    this.#broker.leases.set(model, { holder, freed });
    const lease: Lease = {
      epoch: this.#broker.nextSequence(),
      lost: lost.signal,
      release: async () => {
        this.#leases.delete(lease);
        lost.abort();
        if (this.#broker.leases.get(model)?.holder === holder) {
          this.#broker.leases.delete(model);
          free();
        }
      },
    };
    this.#leases.add(lease);
    return lease;
  }

  async assign(gatewayId: string, assignment: Assignment): Promise<AssignmentReply> {
    this.#assertOpen();
    const handler = this.#broker.assigned.get(gatewayId);
    if (handler === undefined) {
      throw new ClusterError('not_found', `gateway ${gatewayId} is not listening for assignments`);
    }
    return handler(assignment);
  }

  serveAssignments(gatewayId: string, handler: (assignment: Assignment) => AssignmentReply): Closeable {
    return this.#serve(this.#broker.assigned, gatewayId, handler);
  }

  async cancel(cancellation: Cancellation): Promise<boolean> {
    this.#assertOpen();
    const { requestId, tenant } = cancellation;
    const record = this.#broker.records
      .values()
      .map((stored) => stored.record)
      .find((each) => each.requestId === requestId);
    if (record?.tenant !== tenant) {
      return false;
    }
    const handler = this.#broker.cancelled.get(record.gatewayId);
    if (handler === undefined) {
      throw ownerSilent(record.gatewayId);
    }
    return handler(cancellation);
  }

  serveCancellations(gatewayId: string, handler: (cancellation: Cancellation) => boolean): Closeable {
    return this.#serve(this.#broker.cancelled, gatewayId, handler);
  }

  publishHeartbeat(heartbeat: Heartbeat): void {
    this.#broker.heartbeats.publish(heartbeat);
  }

  followHeartbeats(signal: AbortSignal): AsyncIterable<Heartbeat> {
    return this.#broker.heartbeats.follow(this.#until(signal));
  }

  publishEnded(ended: RequestEnded): void {
    this.#broker.ended.publish(ended);
  }

  async *followEnded(model: string, signal: AbortSignal): AsyncGenerator<RequestEnded, void, undefined> {
    for await (const ended of this.#broker.ended.follow(this.#until(signal))) {
      if (ended.model === model) {
        yield ended;
      }
    }
  }

  publishState(state: QueueState): void {
    this.#broker.states.publish(state);
  }

  async *followState(model: string, signal: AbortSignal): AsyncGenerator<QueueState, void, undefined> {
    for await (const state of this.#broker.states.follow(this.#until(signal))) {
      if (state.model === model) {
        yield state;
      }
    }
  }

  async markDraining(model: string, group: string, { sinceUnixMs }: DrainMark): Promise<void> {
    this.#changeDrains(model, (marks) => marks.set(group, marks.get(group) ?? { sinceUnixMs }));
  }

  async clearDraining(model: string, group: string): Promise<void> {
    this.#changeDrains(model, (marks) => marks.delete(group));
  }

  async *followDrains(model: string, signal: AbortSignal): AsyncGenerator<DrainMarks, void, undefined> {
    const first = { model, marks: this.#broker.drains.get(model) ?? new Map<string, DrainMark>() };
    for await (const change of this.#broker.drainChanges.follow(this.#until(signal), [first])) {
      if (change.model === model) {
        yield change.marks;
      }
    }
  }

  async close(): Promise<void> {
    this.#closing.abort(new ClusterError('canceled', 'the queue is closed'));
    await Promise.all([...this.#leases].map((lease) => lease.release()));
    await Promise.all([...this.#served].map((served) => served.close()));
  }

  #changeDrains(model: string, change: (marks: Map<string, DrainMark>) => void): void {
    this.#assertOpen();
    const marks = new Map(this.#broker.drains.get(model));
    change(marks);
    this.#broker.drains.set(model, marks);
    this.#broker.drainChanges.publish({ model, marks });
  }

  #serve<Handler>(handlers: Map<string, Handler>, gatewayId: string, handler: Handler): Closeable {
    handlers.set(gatewayId, handler);
    const served: Closeable = {
      close: async () => {
        this.#served.delete(served);
        if (handlers.get(gatewayId) === handler) {
          handlers.delete(gatewayId);
        }
      },
    };
    this.#served.add(served);
    return served;
  }

  #until(signal: AbortSignal): AbortSignal {
    return AbortSignal.any([signal, this.#closing.signal]);
  }

  #assertOpen(): void {
    if (this.fault !== undefined) {
      throw this.fault;
    }
  }
}
