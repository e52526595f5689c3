// The queue as the rest of the cluster sees it: the durable record of each accepted request, the dispatchers' leases,
// and the small messages between dispatcher, gateways and groups. Implemented by queue-nats (JetStream) and by
// queue-memory (one process, nothing durable); a shared test suite holds both to the promises below. Tokens never
// travel here.

import type {
  Assignment,
  AssignmentReply,
  Cancellation,
  RequestEnded,
  RequestRecord,
  RequestSummary,
} from '@mimo/proto/queue';
import type { Heartbeat } from '@mimo/proto/worker';

import { ClusterError } from '../process/errors.ts';
import type { QueueRefusal } from './queue-refusal.ts';

/** Where a record lies: sequences only grow within a store, so they are also the order of arrival. */
export interface RecordPlace {
  readonly storeId: string;
  readonly sequence: number;
}

/** A live record; its prompt stays in the store. */
export interface QueuedRecord extends RecordPlace {
  readonly record: RequestSummary;
}

/** A live record as a follower gets it. */
export interface FollowedRecord extends QueuedRecord {
  /** It came after the following began; false: it lay there then. */
  readonly isArrival: boolean;
  /** For how long it had been stored when it was handed over, by the store's own clock alone; about 0 for what arrives. */
  readonly ageMs: number;
}

/** The right to dispatch for one model. Only one holder has it at a time, as far as clocks and the network allow. */
export interface Lease {
  /** Larger than that of every earlier lease of the model in this store: it fences the holder's assignments. */
  readonly epoch: number;
  /** Fires when the lease is no longer held: lost, expired or released. */
  readonly lost: AbortSignal;
  /** Gives the lease up at once, so that another need not wait for its expiry. */
  release(): Promise<void>;
}

/** A group that is alive, as the dispatcher sees it. */
export interface QueueGroupState {
  readonly group: string;
  readonly incarnation: string;
  readonly revision: string;
  /** What it computes with: model-identity.ts. */
  readonly identity: string;
  /**
   * The dispatcher's gateway holds a greeted, unbroken session with the group's leader, its heartbeats are fresh, and it
   * says READY, which it does only when all of its ranks have joined.
   */
  readonly routable: boolean;
  /** The dispatcher has seen the group's drain mark, or the group says it drains: it is assigned nothing more. */
  readonly draining: boolean;
  /** Sequences that it can run at once. */
  readonly slots: number;
  readonly inFlightRequests: number;
  readonly inFlightTokens: number;
}

/**
 * What a dispatcher publishes about its queue, at every change and once a second. A reader that has received none for
 * `queueStateFreshMs` knows nothing, which is not zero. Tokens are prompt plus permitted completion: known in advance.
 */
export interface QueueState {
  readonly model: string;
  readonly dispatcherEpoch: number;
  readonly waitingRequests: number;
  readonly runningRequests: number;
  /** Requests whose clients take nothing at present: they need no group. */
  readonly parkedRequests: number;
  readonly waitingTokens: number;
  readonly inFlightTokens: number;
  readonly oldestWaitingMs: number;
  readonly readyGroups: number;
  /** Sequences that the ready groups that do not drain can run at once. */
  readonly slots: number;
  /**
   * Tokens of the requests that arrived, and that ended in a group, since this dispatcher took its lease: counters that
   * begin anew with `dispatcherEpoch`. What it found in the queue is no arrival.
   */
  readonly arrivedTokens: number;
  readonly endedTokens: number;
  /** What waits, by the identity of the groups that alone may run it; empty: any. Only those for which something waits. */
  readonly waitingFor: readonly {
    readonly identity: string;
    readonly requests: number;
    readonly tokens: number;
  }[];
  /** By name. */
  readonly groups: readonly QueueGroupState[];
}

/** A group's drain mark: nothing more is assigned to it. */
export interface DrainMark {
  /** For people: nobody decides by it. */
  readonly sinceUnixMs: number;
}

/** The marked groups of a model, by name. */
export type DrainMarks = ReadonlyMap<string, DrainMark>;

/** Something that stops when closed; closing twice is allowed. */
export interface Closeable {
  close(): Promise<void>;
}

/**
 * The queue. Methods fail with `unavailable` (and `retryAfterMs`) while the server cannot be reached; connections are
 * made again for ever. Iterations end without an error when their signal fires or the queue is closed.
 */
export interface RequestQueue extends Closeable {
  /** `memory` is not durable and lives in one process; whoever starts it says so. */
  readonly kind: 'nats' | 'memory';
  readonly connected: boolean;
  /**
   * Why records are not stored, as the latest writes show, or undefined. A record is tried out every second, so that this is
   * known without any requests.
   */
  readonly fault: QueueRefusal | undefined;
  /** Which store is behind it: another one when a server came back empty. Sequences and lease epochs begin anew then. */
  readonly storeId: string;
  /** Waits for the first connection. Rejects with the signal's reason where that fires first. */
  opened(signal: AbortSignal): Promise<void>;

  /**
   * Writes a record and waits until it is stored. Fails with a QueueRefusal: before the store is full, unless the record
   * outlived a store, and where it cannot be written.
   */
  publish(record: RequestRecord): Promise<RecordPlace>;
  /** Records in another store than this, and records before this one, are not stored any more. */
  readonly oldest: RecordPlace;
  /**
   * Deletes a record, and overwrites it on disk where the server keeps it in plain text. True where this call deleted it, false where it was gone, perhaps with its whole store. Waits
   * through disconnections.
   */
  delete(place: RecordPlace): Promise<boolean>;
  /**
   * Replays the live records of a model in order, then follows new ones; each record once. `onReplayed` is called when
   * what was there at the beginning has been taken, and again where the store was replaced.
   */
  follow(model: string, signal: AbortSignal, onReplayed?: () => void): AsyncIterable<FollowedRecord>;
  /** Live records of every model, counted by the server. */
  counts(): Promise<{ readonly records: number }>;

  /** Waits until the lease of a model is free and takes it. Rejects when the signal fires first. */
  acquireLease(model: string, holder: string, signal: AbortSignal): Promise<Lease>;

  /**
   * Offers a request to its owning gateway. Fails with `not_found` where no such gateway listens, `unavailable` where
   * it does not answer in time.
   */
  assign(gatewayId: string, assignment: Assignment): Promise<AssignmentReply>;
  /** Answers the assignments to this gateway until closed. The handler may not throw. */
  serveAssignments(gatewayId: string, handler: (assignment: Assignment) => AssignmentReply): Closeable;

  /**
   * Has the gateway that owns a request end it. False where the tenant has no such record, or its owner says that the request
   * has ended; fails with `unavailable` where a record is there and its owner does not answer.
   */
  cancel(cancellation: Cancellation): Promise<boolean>;
  /** Answers the cancellations that reach this gateway until closed: whether it ended the request. May not throw. */
  serveCancellations(gatewayId: string, handler: (cancellation: Cancellation) => boolean): Closeable;

  /** Sends a heartbeat; lost without an error while disconnected. */
  publishHeartbeat(heartbeat: Heartbeat): void;
  /** Follows the heartbeats of every group of every model. */
  followHeartbeats(signal: AbortSignal): AsyncIterable<Heartbeat>;
  /** Tells the dispatcher that a request has ended; lost without an error while disconnected. */
  publishEnded(ended: RequestEnded): void;
  followEnded(model: string, signal: AbortSignal): AsyncIterable<RequestEnded>;
  publishState(state: QueueState): void;
  followState(model: string, signal: AbortSignal): AsyncIterable<QueueState>;

  /**
   * Marks a group: dispatchers give it nothing more, until the mark is cleared. Marking a marked group keeps the older
   * mark; clearing an unmarked one changes nothing. Marks outlive whoever set them, so that nothing need be repeated.
   */
  markDraining(model: string, group: string, mark: DrainMark): Promise<void>;
  clearDraining(model: string, group: string): Promise<void>;
  /** The marks of a model: all of them first, then all of them again at every change. */
  followDrains(model: string, signal: AbortSignal): AsyncIterable<DrainMarks>;
}

/** How long a lease outlives its holder: a takeover takes at most this long, a hiccup shorter than this is survived. */
export const leaseTtlMs = 5_000;

/** How often a holder renews: two renewals may be lost. */
export const leaseRenewMs = leaseTtlMs / 3;

/** How long an owning gateway has to answer; its handlers only look into a map. */
export const ownerTimeoutMs = 2_000;

/** What followers learn of a record. */
export function summaryOf(record: RequestRecord): RequestSummary {
  const { requestId, model, gatewayId, identity, timeLeftMs, storesOutlived, firstSequence } = record;
  const tokens = record.promptTokenIds.length + (record.sampling?.maxTokens ?? 0);
  return { requestId, model, gatewayId, tokens, identity, timeLeftMs, storesOutlived, firstSequence };
}

/** A state that was received longer ago than this says nothing any more. */
export const queueStateFreshMs = 5_000;

/** What `cancel` fails with where the owner of a request does not answer. */
export function ownerSilent(gatewayId: string, cause?: unknown): ClusterError {
  const text = `gateway ${gatewayId}, which holds the request's stream, does not answer: the request may still run`;
  return new ClusterError('unavailable', text, { cause, detail: { retryAfterMs: 1_000 } });
}
