// A misbehaving gRPC client: any headers, any bytes, any frames. Owns one HTTP/2 connection a call; knows no proto.

import { connect, constants, type ClientHttp2Session, type OutgoingHttpHeaders } from 'node:http2';

import { errorTable, type ErrorCode } from '@mimo/core/process/errors';

import { openSocket } from '../harness/raw-http2.ts';

/** How a call ended for its client. `ok`: it finished. `reset`: the connection or stream broke without a status. */
export interface CallEnd {
  readonly code: ErrorCode | 'ok' | 'reset';
  /** Of the status; empty if it finished. */
  readonly message: string;
}

/** What is sent. Bytes go as they are: `frame` makes a well-formed message of them. */
export interface RawCall {
  readonly path: string;
  readonly headers?: OutgoingHttpHeaders;
  readonly body: Uint8Array;
  /** False: the stream stays open after the body, until the server ends it or `timeoutMs` has passed. */
  readonly end?: boolean;
  readonly timeoutMs?: number;
  /** An address of this machine, as 127.0.2.1: the server takes it for another peer. */
  readonly from?: string;
}

const defaultTimeoutMs = 30_000;
const codeOfStatus = new Map<number, ErrorCode | 'ok'>([
  [0, 'ok'],
  ...Object.entries(errorTable).map(([code, { grpcStatus }]) => [grpcStatus, code as ErrorCode] as const),
]);

/** A gRPC message: the flag, the length, the bytes. */
export function frame(message: Uint8Array, flag = 0): Buffer {
  const prefix = Buffer.alloc(5);
  prefix.writeUInt8(flag);
  prefix.writeUInt32BE(message.length, 1);
  return Buffer.concat([prefix, message]);
}

/** Makes the call on a connection of its own and reads it to its end. */
export async function rawCall(address: string, call: RawCall): Promise<CallEnd> {
  const { from } = call;
  const session = connect(`http://${address}`, { createConnection: () => openSocket(address, from) });
  try {
    return await callOn(session, call);
  } finally {
    session.destroy();
  }
}

async function callOn(session: ClientHttp2Session, call: RawCall): Promise<CallEnd> {
  const { promise, resolve } = Promise.withResolvers<CallEnd>();
  const broken = (error: unknown): void => {
    resolve({ code: 'reset', message: error instanceof Error ? error.message : 'closed without a status' });
  };
  session.on('error', broken);
  session.on('close', () => broken(undefined));
  const stream = session.request({
    [constants.HTTP2_HEADER_METHOD]: 'POST',
    [constants.HTTP2_HEADER_PATH]: call.path,
    'content-type': 'application/grpc',
    te: 'trailers',
    ...call.headers,
  });
  let httpStatus = 0;
  const readStatus = (headers: Readonly<Record<string, unknown>>): void => {
    const { 'grpc-status': status, 'grpc-message': text } = headers;
    if (status !== undefined) {
      const code = codeOfStatus.get(Number(status)) ?? 'internal';
      resolve({ code, message: decodeURIComponent(typeof text === 'string' ? text : '') });
    }
  };
  stream.on('response', (headers) => {
    httpStatus = Number(headers[':status']);
    readStatus(headers);
  });
  stream.on('trailers', readStatus);
  stream.on('error', broken);
  stream.on('close', () => broken(new Error(`closed without a status, HTTP ${httpStatus}`)));
  stream.setTimeout(call.timeoutMs ?? defaultTimeoutMs, () => broken(new Error('timed out')));
  stream.resume();
  stream.write(call.body);
  if (call.end ?? true) {
    stream.end();
  }
  return promise;
}
