// Handlers of gRPC calls, from async functions that throw ClusterErrors: the signal of a call, strict decoding of
// requests, writing with back-pressure, and the status with its details.

import { EventEmitter } from 'node:events';
import { constants, type Http2Stream } from 'node:http2';

import { BinaryReader } from '@bufbuild/protobuf/wire';
import type * as grpc from '@grpc/grpc-js';

import type { MessageLimits } from '@mimo/proto/limits';

import { beforeAbort } from '../process/abort.ts';
import { ClusterError } from '../process/errors.ts';
import { statusFromError } from './status.ts';
import { assertWithinLimits } from './wire-limits.ts';

/** One service and its handlers. */
export interface ServiceEntry {
  readonly definition: grpc.ServiceDefinition;
  readonly implementation: grpc.UntypedServiceImplementation;
}

interface CancellableCall {
  readonly cancelled: boolean;
  on(event: 'cancelled', listener: () => void): unknown;
  getDeadline(): grpc.Deadline;
}

/** Fires when the peer cancels or goes away (`canceled`), or its deadline passes (`deadline_exceeded`). */
function signalOf(call: CancellableCall): AbortSignal {
  const controller = new AbortController();
  const abort = (): void =>
    controller.abort(
      performance.now() >= deadlineMsOf(call)
        ? new ClusterError('deadline_exceeded', 'the deadline passed')
        : new ClusterError('canceled', 'the call was canceled by its caller'),
    );
  if (call.cancelled) {
    abort();
  } else {
    call.on('cancelled', abort);
  }
  return controller.signal;
}

interface WritableCall<Response> {
  write(message: Response, taken: () => void): unknown;
}

/**
 * Writes a message and waits until the transport accepts it: a peer with a closed window blocks this from the first
 * byte. Rejects with the signal's reason if the signal fires first.
 */
async function writeBounded<Response>(
  call: WritableCall<Response>,
  message: Response,
  signal: AbortSignal,
): Promise<void> {
  signal.throwIfAborted();
  const { promise: taken, resolve } = Promise.withResolvers<void>();
  call.write(message, resolve);
  await beforeAbort(taken, signal);
}

/** How long a peer may take to read the status of a failed call; then its stream is reset, with all unread data. */
const statusTimeoutMs = 5_000;

/** Ensures that a stream ends, whether its peer reads or not. */
function endUnread(call: object): void {
  const inner: unknown = Reflect.get(call, 'call');
  const stream: unknown =
    typeof inner === 'object' && inner !== null ? Reflect.get(inner, 'stream') : undefined;
  if (!isHttp2Stream(stream)) {
    throw new ClusterError(
      'internal',
      'this version of grpc-js does not keep the http2 stream of a call in call.call.stream',
    );
  }
  if (!stream.closed) {
    const timer = setTimeout(() => stream.close(constants.NGHTTP2_ENHANCE_YOUR_CALM), statusTimeoutMs);
    stream.once('close', () => clearTimeout(timer));
  }
}

function isHttp2Stream(value: unknown): value is Http2Stream {
  return value instanceof EventEmitter && 'rstCode' in value;
}

/** A request that is not a valid message of its type; `unaryHandler` and `streamHandler` reject it. */
export class MalformedRequest {
  readonly error: ClusterError;

  constructor(error: ClusterError) {
    this.error = error;
  }
}

const strictUtf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

function decodeStrictly(bytes: Uint8Array): string {
  try {
    return strictUtf8.decode(bytes);
  } catch {
    throw new ClusterError('invalid_argument', 'a text field of the request is not valid UTF-8');
  }
}

/**
 * A request deserializer that rejects invalid messages: fields beyond their limits, before they become objects;
 * invalid UTF-8 (by default replaced with U+FFFD); malformed bytes (by default an INTERNAL error).
 */
export function strictDeserializer<Request>(
  message: { decode(input: BinaryReader): Request },
  limits: MessageLimits,
): (bytes: Buffer) => Request | MalformedRequest {
  return (bytes) => {
    try {
      assertWithinLimits(bytes, limits);
      return message.decode(new BinaryReader(bytes, decodeStrictly));
    } catch (error) {
      if (error instanceof ClusterError) {
        return new MalformedRequest(error);
      }
      const text = `the request is not a valid message: ${ClusterError.from(error).message}`;
      return new MalformedRequest(new ClusterError('invalid_argument', text, { cause: error }));
    }
  };
}

/** What a handler gets besides the request. */
export interface CallContext {
  readonly signal: AbortSignal;
  readonly metadata: grpc.Metadata;
  /** By performance.now(); infinite if the caller set none. */
  readonly deadlineMs: number;
}

function contextOf(call: CancellableCall & { metadata: grpc.Metadata }): CallContext {
  return { signal: signalOf(call), metadata: call.metadata, deadlineMs: deadlineMsOf(call) };
}

/** What grpc/deadline.ts has set. */
function deadlineMsOf(call: CancellableCall): number {
  return Number(call.getDeadline());
}

function assertWellFormed<Request>(request: Request | MalformedRequest): asserts request is Request {
  if (request instanceof MalformedRequest) {
    throw request.error;
  }
}

/** Makes a grpc-js handler from a function; its errors become the call's status. */
export function unaryHandler<Request, Response>(
  serve: (request: Request, context: CallContext) => Promise<Response>,
): grpc.handleUnaryCall<Request | MalformedRequest, Response> {
  return (call, callback) => {
    const answer = async (): Promise<Response> => {
      assertWellFormed<Request>(call.request);
      return serve(call.request, contextOf(call));
    };
    answer().then(
      (response) => callback(null, response),
      (error: unknown) => callback(statusFromError(error)),
    );
  };
}

/** Makes a grpc-js handler from a function that writes; its errors become the stream's status. */
export function streamHandler<Request, Response>(
  serve: (
    request: Request,
    context: CallContext,
    write: (message: Response) => Promise<void>,
  ) => Promise<void>,
): grpc.handleServerStreamingCall<Request | MalformedRequest, Response> {
  return (call) => {
    const answer = async (): Promise<void> => {
      assertWellFormed<Request>(call.request);
      const context = contextOf(call);
      await serve(call.request, context, (message) => writeBounded(call, message, context.signal));
    };
    answer().then(
      () => call.end(),
      (error: unknown) => {
        call.emit('error', statusFromError(error));
        endUnread(call);
      },
    );
  };
}
