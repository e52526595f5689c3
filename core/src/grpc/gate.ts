// The guard before grpc-js, for servers that anybody can reach. It checks a stream by its headers, before it reads a
// byte of the body; grpc-js sees only streams that passed. Owns this check and slows down peers with wrong keys.
// Connections are grpc/connections.ts's, bodies grpc/bodies.ts's, keys the caller's (`admit`).

import { constants, type Http2Server, type IncomingHttpHeaders, type ServerHttp2Stream } from 'node:http2';
import type { Socket } from 'node:net';

import { ClusterError, type ErrorCode } from '../process/errors.ts';
import { Bodies, type BodyLimits, type BodyRule } from './bodies.ts';
import { Connections, type Connection, type ConnectionLimits } from './connections.ts';
import { PacedSocket } from './paced-socket.ts';
import { statusFromError } from './status.ts';
import { PeerAllowances, type Rate } from './peers.ts';

/** Limits that an operator sets. */
export interface GateLimits extends ConnectionLimits, BodyLimits {
  readonly maxStreamsPerConnection: number;
  /** Of all headers of a stream. */
  readonly maxHeaderBytes: number;
}

export interface GateMethod extends BodyRule {
  /** Anybody may call it, at a low rate: health and reflection. */
  readonly open: boolean;
}

export interface GateOptions {
  readonly limits: GateLimits;
  /** By path. */
  readonly methods: ReadonlyMap<string, GateMethod>;
  /** Throws a ClusterError if the caller is not allowed. */
  readonly admit: (headers: IncomingHttpHeaders) => void;
  /** A call ended here; `path` is one of `methods`. */
  readonly onRefused: (path: string, code: ErrorCode) => void;
}

export interface GateCounts {
  readonly provenConnections: number;
  readonly unprovenConnections: number;
  readonly unansweredBytes: number;
}

/** The next handler, which is grpc-js's. */
export type ServeStream = (
  stream: ServerHttp2Stream,
  headers: IncomingHttpHeaders,
  flags: number,
  rawHeaders: string[],
) => void;

/**
 * Wrong keys of one peer that are answered at once; after that each answer is delayed, and if too many are waiting
 * there is none.
 */
const wrongKeyRate: Rate = { burst: 20, perSecond: 2 };
const slowMs = 1_000;
const maxSlowed = 256;
/** Rate of one peer's calls without a key. Probes and load balancers call every few seconds. */
const openRate: Rate = { burst: 200, perSecond: 20 };
const maxPeers = 4_096;
/** Bytes that a client may send before it gets an answer. */
const windowBytes = 65_535;
/** HTTP/2 counts 32 bytes for each header besides its texts. */
const headerBytes = 16;
const encodings = new Set([undefined, 'identity', 'gzip', 'deflate']);

/** Guards the HTTP/2 servers of one gRPC server. Close it. */
export class Gate {
  readonly #options: GateOptions;
  readonly #connections: Connections;
  readonly #bodies: Bodies;
  readonly #wrongKeys = new PeerAllowances(wrongKeyRate, maxPeers);
  readonly #openCalls = new PeerAllowances(openRate, maxPeers);
  #slowed = 0;

  constructor(options: GateOptions) {
    this.#options = options;
    this.#connections = new Connections(options.limits);
    this.#bodies = new Bodies(options.limits);
  }

  /** Guards a server: its streams reach `serve` once they have passed. */
  guard(server: Http2Server, serve: ServeStream): void {
    this.#judgeConnections(server);
    const judge: ServeStream = (stream, ...rest) => {
      // Resets and lost connections: the reading or writing code gets its own error.
      stream.on('error', () => undefined);
      if (this.#judge(stream, rest[0], rest[2])) {
        serve(stream, ...rest);
      }
    };
    server.on('stream', judge);
  }

  /** Runs before node:http2 begins a session, which is the main cost of a rejected connection. */
  #judgeConnections(server: Http2Server): void {
    const listeners = server.listeners('connection');
    let connecting: PacedSocket | undefined;
    server.removeAllListeners('connection');
    server.on('connection', (socket: Socket) => {
      if (!this.#connections.mayConnect(socket)) {
        socket.destroy();
        return;
      }
      const paced = new PacedSocket(socket);
      connecting = paced;
      listeners.forEach((listener) => Reflect.apply(listener, server, [paced]));
    });
    server.on('session', (session) => this.#connections.take(session, connecting!));
  }

  counts(): GateCounts {
    const { size, provenSize } = this.#connections;
    return {
      provenConnections: provenSize,
      unprovenConnections: size - provenSize,
      unansweredBytes: this.#bodies.bytes,
    };
  }

  close(): void {
    this.#connections.close();
    this.#bodies.close();
  }

  #judge(stream: ServerHttp2Stream, headers: IncomingHttpHeaders, rawHeaders: readonly string[]): boolean {
    const connection = this.#connections.of(stream);
    if (connection === undefined || stream.closed || stream.destroyed) {
      // Reset before it was checked, or on a rejected connection.
      connection?.reset();
      connection?.refuse();
      stream.destroy();
      return false;
    }
    if (!connection.open(stream)) {
      connection.refuse();
      stream.close(constants.NGHTTP2_REFUSED_STREAM);
      return false;
    }
    const bytes = rawHeaders.reduce((sum, text) => sum + text.length + headerBytes, 0);
    connection.see(bytes);
    const path = headers[':path'] ?? '';
    const method = this.#options.methods.get(path);
    try {
      this.#assertSmall(bytes);
      assertGrpc(headers);
      if (method === undefined) {
        throw new ClusterError('unimplemented', 'the server does not implement this method');
      }
      if (method.open) {
        this.#assertSlow(connection);
      } else {
        this.#options.admit(headers);
        connection.prove();
      }
      this.#bodies.watch(stream, method, {
        receive: (received) => connection.see(received),
        refuse: (error) => {
          this.#options.onRefused(path, error.code);
          answer(stream, error);
        },
      });
      return true;
    } catch (error) {
      const refusal = ClusterError.from(error);
      if (method !== undefined) {
        this.#options.onRefused(path, refusal.code);
      }
      this.#refuse(stream, connection, refusal);
      return false;
    }
  }

  /** HTTP/2's own setting for this binds a client only once it has acknowledged it. */
  #assertSmall(bytes: number): void {
    const { maxHeaderBytes } = this.#options.limits;
    if (bytes > maxHeaderBytes) {
      throw new ClusterError(
        'resource_exhausted',
        `the headers have ${bytes} bytes; the limit is ${maxHeaderBytes}`,
      );
    }
  }

  #assertSlow({ peer }: Connection): void {
    if (!this.#openCalls.take(peer, performance.now())) {
      const text = `more than ${openRate.perSecond} calls a second without a key`;
      throw new ClusterError('resource_exhausted', text, { detail: { retryAfterMs: 1_000 } });
    }
  }

  #refuse(stream: ServerHttp2Stream, connection: Connection, error: ClusterError): void {
    connection.refuse();
    // Data that the client had already sent, legitimately: nobody reads it.
    connection.see(windowBytes);
    if (error.code !== 'unauthenticated' || this.#wrongKeys.take(connection.peer, performance.now())) {
      answer(stream, error);
    } else if (this.#slowed < maxSlowed) {
      this.#slowed += 1;
      const timeout = setTimeout(() => answer(stream, error), slowMs);
      stream.once('close', () => {
        this.#slowed -= 1;
        clearTimeout(timeout);
      });
    } else {
      stream.close(constants.NGHTTP2_ENHANCE_YOUR_CALM);
    }
  }
}

/** The requirements of gRPC over HTTP/2 on a request's headers. */
function assertGrpc(headers: IncomingHttpHeaders): void {
  if (headers[':method'] !== 'POST') {
    throw new ClusterError('invalid_argument', 'a call must be a POST');
  }
  if (headers['content-type']?.startsWith('application/grpc') !== true) {
    throw new ClusterError('invalid_argument', 'content-type must be application/grpc');
  }
  if (!encodings.has(headers['grpc-encoding']?.toString())) {
    throw new ClusterError('unimplemented', 'grpc-encoding must be identity, gzip or deflate');
  }
}

/**
 * Ends a stream with a status and discards what its client still sends. Deferred, since within node:http2's callbacks
 * the end of the stream would overtake the status.
 */
function answer(stream: ServerHttp2Stream, error: ClusterError): void {
  setImmediate(() => {
    if (stream.closed || stream.destroyed) {
      return;
    }
    if (stream.headersSent) {
      stream.close(constants.NGHTTP2_ENHANCE_YOUR_CALM);
      return;
    }
    const { code, details, metadata } = statusFromError(error);
    const headers = {
      [constants.HTTP2_HEADER_STATUS]: constants.HTTP_STATUS_OK,
      [constants.HTTP2_HEADER_CONTENT_TYPE]: 'application/grpc+proto',
      'grpc-status': code,
      'grpc-message': encodeURI(details),
      ...metadata.toHttp2Headers(),
    };
    stream.respond(headers, { endStream: true });
    stream.close(constants.NGHTTP2_NO_ERROR);
  });
}
