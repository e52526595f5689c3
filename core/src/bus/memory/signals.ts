// The small messages within one process: questions call the handler, the others go to those who listen.

import type { Assignment, AssignmentReply, Cancellation, RequestEnded } from '@mimo/proto/queue';
import type { Heartbeat } from '@mimo/proto/worker';

import { ClusterError } from '../../process/errors.ts';
import {
  ownerSilent,
  type Closeable,
  type Heartbeats,
  type QueueState,
  type QueueStates,
  type Signals,
} from '../signals.ts';
import { assertOpen, type MemoryHandle } from './broker.ts';

/** The signals of one bus. */
export class MemorySignals implements Signals {
  readonly #handle: MemoryHandle;

  constructor(handle: MemoryHandle) {
    this.#handle = handle;
  }

  async assign(gatewayId: string, assignment: Assignment): Promise<AssignmentReply> {
    assertOpen(this.#handle);
    const handler = this.#handle.broker.assigned.get(gatewayId);
    if (handler === undefined) {
      throw new ClusterError('not_found', `gateway ${gatewayId} is not listening for assignments`);
    }
    return handler(assignment);
  }

  serveAssignments(gatewayId: string, handler: (assignment: Assignment) => AssignmentReply): Closeable {
    return this.#serve(this.#handle.broker.assigned, gatewayId, handler);
  }

  async cancel(gatewayId: string, cancellation: Cancellation): Promise<boolean> {
    assertOpen(this.#handle);
    const handler = this.#handle.broker.cancelled.get(gatewayId);
    if (handler === undefined) {
      throw ownerSilent(gatewayId);
    }
    return handler(cancellation);
  }

  serveCancellations(gatewayId: string, handler: (cancellation: Cancellation) => boolean): Closeable {
    return this.#serve(this.#handle.broker.cancelled, gatewayId, handler);
  }

  publishEnded(ended: RequestEnded): void {
    this.#handle.broker.ended.publish(ended);
  }

  async *followEnded(model: string, signal: AbortSignal): AsyncGenerator<RequestEnded, void, undefined> {
    const { broker, closing } = this.#handle;
    for await (const ended of broker.ended.follow(AbortSignal.any([signal, closing]))) {
      if (ended.model === model) {
        yield ended;
      }
    }
  }

  #serve<Handler>(handlers: Map<string, Handler>, gatewayId: string, handler: Handler): Closeable {
    const stop = (): void => {
      if (handlers.get(gatewayId) === handler) {
        handlers.delete(gatewayId);
      }
    };
    handlers.set(gatewayId, handler);
    const { closing } = this.#handle;
    closing.addEventListener('abort', stop, { once: true });
    return {
      close: async () => {
        closing.removeEventListener('abort', stop);
        stop();
      },
    };
  }
}

/** The heartbeats of one bus. */
export class MemoryHeartbeats implements Heartbeats {
  readonly #handle: MemoryHandle;

  constructor(handle: MemoryHandle) {
    this.#handle = handle;
  }

  publish(heartbeat: Heartbeat): void {
    this.#handle.broker.heartbeats.publish(heartbeat);
  }

  follow(signal: AbortSignal): AsyncIterable<Heartbeat> {
    const { broker, closing } = this.#handle;
    return broker.heartbeats.follow(AbortSignal.any([signal, closing]));
  }
}

/** The queues' states of one bus. */
export class MemoryQueueStates implements QueueStates {
  readonly #handle: MemoryHandle;

  constructor(handle: MemoryHandle) {
    this.#handle = handle;
  }

  publish(state: QueueState): void {
    this.#handle.broker.states.publish(state);
  }

  async *follow(model: string, signal: AbortSignal): AsyncGenerator<QueueState, void, undefined> {
    const { broker, closing } = this.#handle;
    for await (const state of broker.states.follow(AbortSignal.any([signal, closing]))) {
      if (state.model === model) {
        yield state;
      }
    }
  }
}
