// A client that does not read properly: an HTTP/2 connection whose streams have a window of the test's choice.
// Owns its streams, their bytes and how they ended; knows gRPC's framing and nothing of grpc-js, which reads as fast
// as it can.

import { connect as connectSocket, type Socket } from 'node:net';
import {
  connect,
  constants,
  type ClientHttp2Session,
  type ClientHttp2Stream,
  type IncomingHttpHeaders,
  type OutgoingHttpHeaders,
} from 'node:http2';
import { Duplex } from 'node:stream';

import { ChatRequest, ChatResponse } from '@mimo/proto/inference';

/** How a stream ended: the status of its trailers, or the code with which it was reset. */
interface StreamEnd {
  readonly status: number | undefined;
  readonly message: string;
  readonly resetCode: number;
}

/** One call. */
interface SlowStream {
  readonly ended: Promise<StreamEnd>;
  /** The messages that have come whole. */
  messages(): ChatResponse[];
  /** Bytes that have come. */
  readonly bytes: number;
}

interface SlowReaderOptions {
  /** Of each stream so many bytes are taken. */
  readonly windowBytes: number;
  /** The window moves on as they come. */
  readonly reads?: boolean;
  /** Such as the API key. */
  readonly headers?: OutgoingHttpHeaders;
}

/** The connection. Close it. */
export interface SlowReader {
  chat(request: ChatRequest): SlowStream;
  /** Stops taking anything at all from the connection, down to its acknowledgements of HTTP/2 frames. */
  freeze(): void;
  /** Resets every stream, or leaves politely. */
  leave(how: 'reset' | 'goaway'): void;
  /** Gives the streams that are there, and later ones, a window of this many bytes: they are read from here on. */
  readOn(windowBytes: number): void;
  close(): void;
}

/** Connects, in the background. */
export function openSlowReader(
  address: string,
  { windowBytes, reads = false, headers = {} }: SlowReaderOptions,
): SlowReader {
  const { hostname, port } = new URL(`http://${address}`);
  const line = new Line(connectSocket(Number(port), hostname));
  const session = connect(`http://${address}`, {
    settings: { initialWindowSize: windowBytes },
    createConnection: () => line,
  });
  session.on('error', () => undefined);
  const streams: ClientHttp2Stream[] = [];
  let isReading = reads;
  return {
    chat: (request) => {
      const stream = openCall(session, request, headers);
      const slow = new Call(stream);
      streams.push(stream);
      if (isReading) {
        slow.read();
      } else {
        stream.once('resume', () => slow.read());
      }
      return slow;
    },
    freeze: () => line.freeze(),
    leave: (how) => {
      if (how === 'goaway') {
        session.goaway();
      }
      streams.forEach((stream) => stream.close(constants.NGHTTP2_CANCEL));
    },
    readOn: (bytes) => {
      isReading = true;
      session.settings({ initialWindowSize: bytes });
      streams.forEach((stream) => stream.resume());
    },
    close: () => {
      session.destroy();
      line.destroy();
    },
  };
}

/** A socket that can be frozen: what comes is left to pile up in the kernel, what goes is lost. */
class Line extends Duplex {
  readonly #socket: Socket;
  #isFrozen = false;

  constructor(socket: Socket) {
    super();
    this.#socket = socket;
    socket.on('data', (chunk) => {
      if (!this.push(chunk)) {
        socket.pause();
      }
    });
    socket.on('end', () => this.push(null));
    socket.on('error', () => this.destroy());
  }

  freeze(): void {
    this.#isFrozen = true;
    this.#socket.pause();
  }

  override _read(): void {
    if (!this.#isFrozen) {
      this.#socket.resume();
    }
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, done: (error?: Error | null) => void): void {
    if (this.#isFrozen) {
      done();
    } else {
      this.#socket.write(chunk, done);
    }
  }

  override _destroy(error: Error | null, done: (error: Error | null) => void): void {
    this.#socket.destroy();
    done(error);
  }
}

function openCall(
  session: ClientHttp2Session,
  request: ChatRequest,
  headers: OutgoingHttpHeaders,
): ClientHttp2Stream {
  const body = ChatRequest.encode(request).finish();
  const frame = Buffer.alloc(5 + body.length);
  frame.writeUInt32BE(body.length, 1);
  frame.set(body, 5);
  const stream = session.request({
    [constants.HTTP2_HEADER_METHOD]: 'POST',
    [constants.HTTP2_HEADER_PATH]: '/mimo.inference.v1.InferenceService/Chat',
    [constants.HTTP2_HEADER_CONTENT_TYPE]: 'application/grpc',
    [constants.HTTP2_HEADER_TE]: 'trailers',
    ...headers,
  });
  stream.end(frame);
  return stream;
}

class Call implements SlowStream {
  readonly ended: Promise<StreamEnd>;
  readonly #chunks: Buffer[] = [];
  readonly #stream: ClientHttp2Stream;
  #reads = false;

  constructor(stream: ClientHttp2Stream) {
    this.#stream = stream;
    const { promise, resolve } = Promise.withResolvers<StreamEnd>();
    this.ended = promise;
    let status: number | undefined;
    let message = '';
    const note = (headers: IncomingHttpHeaders): void => {
      if (headers['grpc-status'] !== undefined) {
        status = Number(headers['grpc-status']);
        message = decodeURI(headers['grpc-message']?.toString() ?? '');
      }
    };
    stream.on('response', note);
    stream.on('trailers', note);
    stream.on('error', () => undefined);
    stream.on('close', () => resolve({ status, message, resetCode: stream.rstCode ?? 0 }));
  }

  read(): void {
    if (!this.#reads) {
      this.#reads = true;
      this.#stream.on('data', (chunk: Buffer) => this.#chunks.push(chunk));
    }
  }

  get bytes(): number {
    return this.#chunks.reduce((sum, { length }) => sum + length, 0);
  }

  messages(): ChatResponse[] {
    const all = Buffer.concat(this.#chunks);
    const messages: ChatResponse[] = [];
    for (let at = 0; at + 5 <= all.length;) {
      const end = at + 5 + all.readUInt32BE(at + 1);
      if (end > all.length) {
        break;
      }
      messages.push(ChatResponse.decode(all.subarray(at + 5, end)));
      at = end;
    }
    return messages;
  }
}

/** The token ids of a stream's deltas, in order. */
export function tokenIdsOf(messages: readonly ChatResponse[]): number[] {
  return messages.flatMap(({ event }) => (event?.$case === 'delta' ? event.value.tokenIds : []));
}
