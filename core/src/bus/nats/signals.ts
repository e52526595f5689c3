// The small messages on core NATS: a subject each, bytes as the protos have them, the queue's state as JSON.

import {
  Assignment,
  AssignmentReply,
  Cancellation,
  CancellationReply,
  RequestEnded,
} from '@mimo/proto/queue';
import { Heartbeat } from '@mimo/proto/worker';

import { ClusterError } from '../../process/errors.ts';
import {
  ownerSilent,
  ownerTimeoutMs,
  type Closeable,
  type Heartbeats,
  type QueueState,
  type QueueStates,
  type Signals,
} from '../signals.ts';
import { isNobodyThere, unavailable } from './errors.ts';
import type { Decoder, Messages } from './messages.ts';
import { subjects } from './subjects.ts';

const timeoutMs = ownerTimeoutMs;

/** The signals of one link. */
export class NatsSignals implements Signals {
  readonly #messages: Messages;

  constructor(messages: Messages) {
    this.#messages = messages;
  }

  async assign(gatewayId: string, assignment: Assignment): Promise<AssignmentReply> {
    const subject = subjects.assignments(gatewayId);
    const bytes = Assignment.encode(assignment).finish();
    try {
      return await this.#messages.ask({ subject, bytes, answer: AssignmentReply, timeoutMs });
    } catch (error) {
      if (isNobodyThere(error)) {
        const text = `gateway ${gatewayId} is not listening for assignments`;
        throw new ClusterError('not_found', text, { cause: error });
      }
      throw unavailable(`gateway ${gatewayId} did not answer within ${timeoutMs} ms`, error);
    }
  }

  serveAssignments(gatewayId: string, handler: (assignment: Assignment) => AssignmentReply): Closeable {
    return this.#messages.serve(subjects.assignments(gatewayId), Assignment, (assignment) =>
      AssignmentReply.encode(handler(assignment)).finish(),
    );
  }

  async cancel(gatewayId: string, cancellation: Cancellation): Promise<boolean> {
    const subject = subjects.cancellations(gatewayId);
    const bytes = Cancellation.encode(cancellation).finish();
    try {
      return (await this.#messages.ask({ subject, bytes, answer: CancellationReply, timeoutMs })).cancelled;
    } catch (error) {
      throw ownerSilent(gatewayId, error);
    }
  }

  serveCancellations(gatewayId: string, handler: (cancellation: Cancellation) => boolean): Closeable {
    return this.#messages.serve(subjects.cancellations(gatewayId), Cancellation, (cancellation) =>
      CancellationReply.encode({ cancelled: handler(cancellation) }).finish(),
    );
  }

  publishEnded(ended: RequestEnded): void {
    this.#messages.send(subjects.ended(ended.model), RequestEnded.encode(ended).finish());
  }

  followEnded(model: string, signal: AbortSignal): AsyncIterable<RequestEnded> {
    return this.#messages.follow(subjects.ended(model), RequestEnded, signal);
  }
}

/** The heartbeats of one link. */
export class NatsHeartbeats implements Heartbeats {
  readonly #messages: Messages;

  constructor(messages: Messages) {
    this.#messages = messages;
  }

  publish(heartbeat: Heartbeat): void {
    const subject = subjects.heartbeat(heartbeat.model, heartbeat.group);
    this.#messages.send(subject, Heartbeat.encode(heartbeat).finish());
  }

  follow(signal: AbortSignal): AsyncIterable<Heartbeat> {
    return this.#messages.follow(subjects.allHeartbeats, Heartbeat, signal);
  }
}

const stateFromJson: Decoder<QueueState> = {
  decode: (bytes) => JSON.parse(Buffer.from(bytes).toString()) as QueueState,
};

/** The queues' states of one link. */
export class NatsQueueStates implements QueueStates {
  readonly #messages: Messages;

  constructor(messages: Messages) {
    this.#messages = messages;
  }

  publish(state: QueueState): void {
    this.#messages.send(subjects.queueState(state.model), Buffer.from(JSON.stringify(state)));
  }

  follow(model: string, signal: AbortSignal): AsyncIterable<QueueState> {
    return this.#messages.follow(subjects.queueState(model), stateFromJson, signal);
  }
}
