// Calling gRPC services: promises and async iterables with signals and deadlines over grpc-js's callbacks. Errors
// arrive as ClusterError with the server's details. A stream that is left early is cancelled, which grpc-js itself
// does not do.

import * as grpc from '@grpc/grpc-js';

import { keepLivingCalls } from './keepalive.ts';
import { withholdGrpcLog } from './log.ts';
import { errorFromStatus } from './status.ts';

keepLivingCalls();
withholdGrpcLog();

/** The limits of a call. Time counts from the call; the server gets the time left. */
export interface CallLimits {
  readonly signal?: AbortSignal | undefined;
  readonly timeoutMs?: number | undefined;
  readonly metadata?: grpc.Metadata | undefined;
}

type Unary<Request, Response> = grpc.MethodDefinition<Request, Response> & {
  readonly requestStream: false;
  readonly responseStream: false;
};

type ServerStreaming<Request, Response> = grpc.MethodDefinition<Request, Response> & {
  readonly requestStream: false;
  readonly responseStream: true;
};

/**
 * Options of a channel: pings find a peer that is stopped or cut off within 30 s (off by default), and reconnecting
 * does not slow down to two minutes. `maxReceiveBytes` bounds one message.
 */
export function channelOptions(maxReceiveBytes: number): grpc.ChannelOptions {
  return {
    'grpc.max_receive_message_length': maxReceiveBytes,
    'grpc.max_send_message_length': -1,
    'grpc.keepalive_time_ms': 10_000,
    'grpc.keepalive_permit_without_calls': 1,
    'grpc.initial_reconnect_backoff_ms': 100,
    'grpc.max_reconnect_backoff_ms': 2_000,
  };
}

/** Makes a unary call; the signal cancels it. */
export async function callUnary<Request, Response>(
  client: grpc.Client,
  method: Unary<Request, Response>,
  call: CallLimits & { readonly request: Request },
): Promise<Response> {
  call.signal?.throwIfAborted();
  const { promise, resolve, reject } = Promise.withResolvers<Response>();
  const running = client.makeUnaryRequest(
    method.path,
    method.requestSerialize,
    method.responseDeserialize,
    call.request,
    call.metadata ?? new grpc.Metadata(),
    optionsOf(call),
    (error, response) => {
      if (error === null && response !== undefined) {
        resolve(response);
      } else {
        reject(errorFromStatus(error));
      }
    },
  );
  const stop = cancelOn(call.signal, running);
  try {
    return await promise;
  } finally {
    stop();
  }
}

/** Makes a server-streaming call. Leaving the loop cancels the call, and so does the signal. */
export async function* callServerStream<Request, Response>(
  client: grpc.Client,
  method: ServerStreaming<Request, Response>,
  call: CallLimits & { readonly request: Request },
): AsyncGenerator<Response, void, undefined> {
  call.signal?.throwIfAborted();
  const running = client.makeServerStreamRequest(
    method.path,
    method.requestSerialize,
    method.responseDeserialize,
    call.request,
    call.metadata ?? new grpc.Metadata(),
    optionsOf(call),
  );
  const stop = cancelOn(call.signal, running);
  try {
    for await (const message of running) {
      yield message as Response;
    }
  } catch (error) {
    throw errorFromStatus(error);
  } finally {
    stop();
    running.on('error', () => undefined);
    running.cancel();
  }
}

function optionsOf(limits: CallLimits): grpc.CallOptions {
  // grpc-js accepts a point in time and converts it back to the time left.
  return limits.timeoutMs === undefined ? {} : { deadline: Date.now() + limits.timeoutMs };
}

function cancelOn(signal: AbortSignal | undefined, call: { cancel(): void }): () => void {
  const cancel = (): void => call.cancel();
  signal?.addEventListener('abort', cancel, { once: true });
  return () => signal?.removeEventListener('abort', cancel);
}
