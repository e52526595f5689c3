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

/** The position of a record. Sequences only grow within a store, so they are also the order of arrival. */
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
  /** True: it arrived after the following began. False: it existed before. */
  readonly isArrival: boolean;
  /** How long it had been stored when it was delivered, by the store's own clock; about 0 for new records. */
  readonly ageMs: number;
}

/** The right to dispatch for one model. Only one process holds it at a time, as far as clocks and the network allow. */
export interface Lease {
  /** Larger than that of every earlier lease of the model in this store: it fences the holder's assignments. */
  readonly epoch: number;
  /** Fires when the lease is no longer held: lost, expired or released. */
  readonly lost: AbortSignal;
  /** Releases the lease at once, so that others need not wait for its expiry. */
  release(): Promise<void>;
}

/** A live group, as the dispatcher sees it. */
export interface QueueGroupState {
  readonly group: string;
  readonly incarnation: string;
  readonly revision: string;
  /** The identity of its model (model-identity.ts). */
  readonly identity: string;
  /**
   * The dispatcher's gateway holds a greeted, unbroken session with the group's leader, its heartbeats are fresh, and
   * it reports READY, which it does only when all of its ranks have joined.
   */
  readonly routable: boolean;
  /** The dispatcher has seen the group's drain mark, or the group reports that it drains: it gets no more requests. */
  readonly draining: boolean;
  /** Sequences that it can run at once. */
  readonly slots: number;
  readonly inFlightRequests: number;
  readonly inFlightTokens: number;
}

/**
 * What a dispatcher publishes about its queue, at every change and once a second. Without one for `queueStateFreshMs`
 * the state is unknown, which is not zero. Tokens are prompt plus permitted completion: known in advance.
 */
export interface QueueState {
  readonly model: string;
  readonly dispatcherEpoch: number;
  readonly waitingRequests: number;
  readonly runningRequests: number;
  /** Requests whose clients are not reading now: they need no group. */
  readonly parkedRequests: number;
  readonly waitingTokens: number;
  readonly inFlightTokens: number;
  readonly oldestWaitingMs: number;
  readonly readyGroups: number;
  /** Sequences that all groups, ready and not draining, can run at once. */
  readonly slots: number;
  /**
   * Tokens of the requests that arrived, and that ended in a group, since this dispatcher took its lease: counters that
   * restart with `dispatcherEpoch`. Requests already in the queue do not count as arrivals.
   */
  readonly arrivedTokens: number;
  readonly endedTokens: number;
  /**
   * Waiting work by the identity of the groups that may run it; an empty identity means any. Only identities with
   * waiting work.
   */
  readonly waitingFor: readonly {
    readonly identity: string;
    readonly requests: number;
    readonly tokens: number;
  }[];
  /** By name. */
  readonly groups: readonly QueueGroupState[];
}

/** A group's drain mark: it gets no more requests. */
export interface DrainMark {
  /** For people: no decision depends on it. */
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
 * retried forever. Iterations end without an error when their signal fires or the queue is closed.
 */
export interface RequestQueue extends Closeable {
  /** `memory` is not durable and lives in one process; the code that starts it tells the user. */
  readonly kind: 'nats' | 'memory';
  readonly connected: boolean;
  /**
   * Why records cannot be stored, according to the latest writes; undefined if they can. A test record is written
   * every second, so this is known without any requests.
   */
  readonly fault: QueueRefusal | undefined;
  /** The id of the store: it changes when a server came back empty. Sequences and lease epochs then start over. */
  readonly storeId: string;
  /** Waits for the first connection. Rejects with the signal's reason if the signal fires first. */
  opened(signal: AbortSignal): Promise<void>;

  /**
   * Writes a record and waits until it is stored. Fails with a QueueRefusal if it cannot be written, or if the store
   * is nearly full and the record is new (not one that outlived a store).
   */
  publish(record: RequestRecord): Promise<RecordPlace>;
  /**
   * Writes the record of a request again, behind all others; it replaces the stored one at `place`. Fails like
   * `publish`, and if there is no record at `place` any more.
   */
  publishAgain(record: RequestRecord, place: RecordPlace): Promise<RecordPlace>;
  /** Has the store begin another file. The store removes a file once it holds no live record. */
  turnFile(): Promise<void>;
  /** Records of any other store, and records before this one, are gone. */
  readonly oldest: RecordPlace;
  /**
   * Deletes a record, and overwrites it on disk if the server stores plain text. True if this call deleted
   * it, false if it was gone already, perhaps with its whole store. Waits through disconnections.
   */
  delete(place: RecordPlace): Promise<boolean>;
  /**
   * Replays the live records of a model in order, then follows new ones; each record once. `onReplayed` is called when
   * the records from before the start have been read, and again after the store was replaced.
   */
  follow(model: string, signal: AbortSignal, onReplayed?: () => void): AsyncIterable<FollowedRecord>;
  /** Live records of every model, counted by the server. */
  counts(): Promise<{ readonly records: number }>;

  /** Waits until the lease of a model is free and takes it. Rejects if the signal fires first. */
  acquireLease(model: string, holder: string, signal: AbortSignal): Promise<Lease>;

  /**
   * Offers a request to its owning gateway. Fails with `not_found` if no such gateway listens, `unavailable` if
   * it does not answer in time.
   */
  assign(gatewayId: string, assignment: Assignment): Promise<AssignmentReply>;
  /** Answers the assignments to this gateway until closed. The handler may not throw. */
  serveAssignments(gatewayId: string, handler: (assignment: Assignment) => AssignmentReply): Closeable;

  /**
   * Asks the gateway that owns a request to end it. False if the tenant has no such record, or its owner reports that
   * the request has ended; fails with `unavailable` if the record exists and its owner does not answer.
   */
  cancel(cancellation: Cancellation): Promise<boolean>;
  /**
   * Answers cancellations for this gateway until closed; the handler returns whether it ended the request and may not
   * throw.
   */
  serveCancellations(gatewayId: string, handler: (cancellation: Cancellation) => boolean): Closeable;

  /** Sends a heartbeat; lost without an error while disconnected. */
  publishHeartbeat(heartbeat: Heartbeat): void;
  /** Follows the heartbeats of every group of every model. */
  followHeartbeats(signal: AbortSignal): AsyncIterable<Heartbeat>;
  /** Notifies the dispatcher that a request has ended; lost without an error while disconnected. */
  publishEnded(ended: RequestEnded): void;
  followEnded(model: string, signal: AbortSignal): AsyncIterable<RequestEnded>;
  publishState(state: QueueState): void;
  followState(model: string, signal: AbortSignal): AsyncIterable<QueueState>;

  /**
   * Marks a group: dispatchers assign it no requests until the mark is cleared. Marking a marked group keeps the
   * older mark; clearing an unmarked one changes nothing. Marks outlive the process that set them.
   */
  markDraining(model: string, group: string, mark: DrainMark): Promise<void>;
  clearDraining(model: string, group: string): Promise<void>;
  /** The marks of a model: all of them first, and all again after every change. */
  followDrains(model: string, signal: AbortSignal): AsyncIterable<DrainMarks>;
}

/** How long a lease outlives its holder: a takeover takes at most this long, and the holder survives shorter pauses. */
export const leaseTtlMs = 5_000;

/** How often a holder renews: it can miss two renewals. */
export const leaseRenewMs = leaseTtlMs / 3;

/** How long to wait for the owning gateway's answer; its handlers only look into a map. */
export const ownerTimeoutMs = 2_000;

/** What followers get of a record. */
export function summaryOf(record: RequestRecord): RequestSummary {
  const { requestId, model, gatewayId, identity, timeLeftMs, storesOutlived, firstSequence, heldMs } = record;
  const tokens = record.promptTokenIds.length + (record.sampling?.maxTokens ?? 0);
  return { requestId, model, gatewayId, tokens, identity, timeLeftMs, storesOutlived, firstSequence, heldMs };
}

/** A state older than this counts as unknown. */
export const queueStateFreshMs = 5_000;

/** The error of `cancel` if the owner of a request does not answer. */
export function ownerSilent(gatewayId: string, cause?: unknown): ClusterError {
  const text = `gateway ${gatewayId}, which holds the request's stream, does not answer: the request may still run`;
  return new ClusterError('unavailable', text, { cause, detail: { retryAfterMs: 1_000 } });
}
