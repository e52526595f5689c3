// The small messages between gateways, groups and the controller. They are transient: nothing stores them, and
// messages sent without a connection are dropped. Implemented by nats/signals.ts (core NATS) and memory/signals.ts.

import type { Assignment, AssignmentReply, Cancellation, RequestEnded } from '@mimo/proto/queue';
import type { Heartbeat } from '@mimo/proto/worker';

import { ClusterError } from '../process/errors.ts';

/** Something that stops when closed; closing twice is allowed. */
export interface Closeable {
  close(): Promise<void>;
}

/** Between the dispatcher of a model and the gateways that own its requests. */
export interface Signals {
  /**
   * Offers a request to its owning gateway. Fails with `not_found` if no such gateway listens, `unavailable` if
   * it does not answer in time.
   */
  assign(gatewayId: string, assignment: Assignment): Promise<AssignmentReply>;
  /** Answers the assignments to this gateway until closed. The handler may not throw. */
  serveAssignments(gatewayId: string, handler: (assignment: Assignment) => AssignmentReply): Closeable;
  /**
   * Asks the gateway that owns a request to end it. False if the request has ended already; fails with `unavailable` if
   * the gateway does not answer.
   */
  cancel(gatewayId: string, cancellation: Cancellation): Promise<boolean>;
  /**
   * Answers cancellations for this gateway until closed; the handler returns whether it ended the request and may not
   * throw.
   */
  serveCancellations(gatewayId: string, handler: (cancellation: Cancellation) => boolean): Closeable;
  /** Says to the dispatcher that a request has ended, or waits again. */
  publishEnded(ended: RequestEnded): void;
  followEnded(model: string, signal: AbortSignal): AsyncIterable<RequestEnded>;
}

/** From the leaders of groups to every gateway. */
export interface Heartbeats {
  publish(heartbeat: Heartbeat): void;
  /** Follows the heartbeats of every group of every model. */
  follow(signal: AbortSignal): AsyncIterable<Heartbeat>;
}

/** From the dispatcher of a model to the controller and every gateway. */
export interface QueueStates {
  publish(state: QueueState): void;
  follow(model: string, signal: AbortSignal): AsyncIterable<QueueState>;
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
   * Waiting requests by the identity of the groups that may run them; an empty identity means any group. Identities
   * without waiting requests are left out.
   */
  readonly waitingFor: readonly {
    readonly identity: string;
    readonly requests: number;
    readonly tokens: number;
  }[];
  /** By name. */
  readonly groups: readonly QueueGroupState[];
}

/** A state older than this counts as unknown. */
export const queueStateFreshMs = 5_000;

/** How long to wait for the owning gateway's answer; its handlers only look into a map. */
export const ownerTimeoutMs = 2_000;

/** The error of `cancel` if the owner of a request does not answer. */
export function ownerSilent(gatewayId: string, cause?: unknown): ClusterError {
  const text = `gateway ${gatewayId}, which holds the request's stream, does not answer: the request may still run`;
  return new ClusterError('unavailable', text, { cause, detail: { retryAfterMs: 1_000 } });
}
