// Bytes of unanswered requests over all calls: what a gateway holds for clients that may never finish. Owns the
// limits of one message, of all together, and of the time that one may take; reads only gRPC's framing. If the total
// exceeds the limit, the largest request fails: a small request never pays for others.

import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import type { ServerHttp2Stream } from 'node:http2';

import { ClusterError } from '../process/errors.ts';
import { maxUnzippedBytes } from './unzip.ts';

export interface BodyLimits {
  readonly maxUnansweredBytes: number;
  /** From the stream's beginning to the end of its first message. */
  readonly bodyTimeoutMs: number;
}

/** What may be sent to a method. */
export interface BodyRule {
  readonly maxMessageBytes: number;
  /** Several messages may come; each counts until it is complete. */
  readonly requestStream: boolean;
}

/** Of the flag and the length before each message. */
const prefixBytes = 5;
/** Bodies larger than this wait for their turn: each tick reads so many bytes of all of them together. */
const smallBytes = 256 * 2 ** 10;
const tickMs = 10;
const tickBytes = 320 * 2 ** 10;
/** What a client may have sent by the time reading continues. */
const windowBytes = 65_535;
const retryAfterMs = 1_000;
/** Node publishes here when a stream's answer begins. */
const answeredChannel = 'http2.server.stream.finish';

/** What the owner does with a stream. */
export interface BodyHooks {
  readonly receive: (bytes: number) => void;
  /** Ends the stream with an error; called at most once, before its answer begins. */
  readonly refuse: (error: ClusterError) => void;
}

interface Body {
  readonly stream: ServerHttp2Stream;
  readonly rule: BodyRule;
  readonly hooks: BodyHooks;
  readonly timeout: NodeJS.Timeout;
  /** Bytes held for this stream; compressed messages count at their largest possible size. */
  bytes: number;
  readonly prefix: Buffer;
  prefixRead: number;
  /** Of the message now arriving. */
  leftBytes: number;
  messages: number;
}

/** All bodies of a server. Close it. */
export class Bodies {
  readonly #limits: BodyLimits;
  readonly #open = new Map<ServerHttp2Stream, Body>();
  readonly #refused = new WeakSet<ServerHttp2Stream>();
  readonly #answered = (message: unknown): void => {
    const { stream } = message as { readonly stream: ServerHttp2Stream };
    // More requests of the stream may follow.
    if (this.#open.get(stream)?.rule.requestStream === false) {
      this.#release(stream);
    }
  };
  /** Large bodies waiting for a turn, in order. */
  readonly #waiting = new Set<Body>();
  #tick: NodeJS.Timeout | undefined;
  #tickBytes = 0;
  #bytes = 0;

  constructor(limits: BodyLimits) {
    this.#limits = limits;
    subscribe(answeredChannel, this.#answered);
  }

  get bytes(): number {
    return this.#bytes;
  }

  close(): void {
    clearTimeout(this.#tick);
    unsubscribe(answeredChannel, this.#answered);
  }

  /** Counts what a stream receives. */
  watch(stream: ServerHttp2Stream, rule: BodyRule, hooks: BodyHooks): void {
    const { bodyTimeoutMs } = this.#limits;
    const late = (): void =>
      this.#end(
        body,
        new ClusterError('deadline_exceeded', `the request was not complete after ${bodyTimeoutMs} ms`),
      );
    const body: Body = {
      stream,
      rule,
      hooks,
      timeout: setTimeout(late, bodyTimeoutMs).unref(),
      bytes: 0,
      prefix: Buffer.alloc(prefixBytes),
      prefixRead: 0,
      leftBytes: 0,
      messages: 0,
    };
    this.#open.set(stream, body);
    // Not with a listener: rejected data must not reach grpc-js, which would unzip and parse it all the same.
    const emit = stream.emit.bind(stream) as (event: string, ...args: unknown[]) => boolean;
    const emitReceived = (event: string, ...args: unknown[]): boolean => {
      if (event === 'data') {
        const chunk = args[0] as Buffer;
        hooks.receive(chunk.length);
        if (this.#open.has(stream)) {
          this.#receive(body, chunk);
        }
      }
      const isBody = event === 'data' || event === 'end';
      if (!isBody || !this.#refused.has(stream)) {
        return emit(event, ...args);
      }
      if (event === 'end' && stream.closed) {
        // As Node does on this event; otherwise the stream would keep its session, and the session its socket, forever.
        stream.destroy();
      }
      return false;
    };
    Object.assign(stream, { emit: emitReceived });
    stream.once('close', () => this.#release(stream));
  }

  #receive(body: Body, chunk: Buffer): void {
    this.#hold(body, chunk.length);
    let at = 0;
    while (at < chunk.length && this.#open.has(body.stream)) {
      if (body.leftBytes > 0) {
        const bytes = Math.min(body.leftBytes, chunk.length - at);
        body.leftBytes -= bytes;
        at += bytes;
      } else {
        body.prefix[body.prefixRead] = chunk[at]!;
        body.prefixRead += 1;
        at += 1;
        if (body.prefixRead < prefixBytes) {
          continue;
        }
        this.#begin(body);
      }
      if (body.leftBytes === 0) {
        this.#complete(body);
      }
    }
    if (this.#open.has(body.stream)) {
      this.#pace(body, chunk.length);
    }
  }

  /** Stops reading a large body once this tick's share is used up. */
  #pace(body: Body, bytes: number): void {
    if (body.bytes <= smallBytes) {
      return;
    }
    this.#tickBytes += bytes;
    this.#tick ??= setTimeout(() => this.#nextTick(), tickMs).unref();
    if (this.#tickBytes >= tickBytes && body.leftBytes > 0) {
      body.stream.pause();
      this.#waiting.add(body);
    }
  }

  #nextTick(): void {
    this.#tick = undefined;
    this.#tickBytes = 0;
    let expectedBytes = 0;
    for (const body of this.#waiting) {
      if (expectedBytes >= tickBytes) {
        break;
      }
      this.#waiting.delete(body);
      body.stream.resume();
      expectedBytes += windowBytes;
    }
    if (this.#waiting.size > 0) {
      this.#tick = setTimeout(() => this.#nextTick(), tickMs).unref();
    }
  }

  #begin(body: Body): void {
    const isCompressed = body.prefix[0] === 1;
    const length = body.prefix.readUInt32BE(1);
    const { maxMessageBytes, requestStream } = body.rule;
    body.prefixRead = 0;
    body.leftBytes = length;
    if (length > maxMessageBytes) {
      this.#end(
        body,
        new ClusterError(
          'resource_exhausted',
          `the request has ${length} bytes; the limit is ${maxMessageBytes}`,
        ),
      );
    } else if (body.messages > 0 && !requestStream) {
      this.#end(
        body,
        new ClusterError('invalid_argument', 'the call has a second request; it takes only one'),
      );
    } else if (body.prefix[0]! > 1) {
      const text = `the flag before the request must be 0 or 1, not ${body.prefix[0]}`;
      this.#end(body, new ClusterError('invalid_argument', text));
    } else if (isCompressed) {
      this.#hold(body, maxUnzippedBytes(length, maxMessageBytes));
    }
  }

  #complete(body: Body): void {
    body.messages += 1;
    clearTimeout(body.timeout);
    if (body.rule.requestStream) {
      this.#bytes -= body.bytes;
      body.bytes = 0;
    }
  }

  /** Counts bytes; while the total exceeds the limit, the largest body fails. */
  #hold(body: Body, bytes: number): void {
    body.bytes += bytes;
    this.#bytes += bytes;
    const { maxUnansweredBytes } = this.#limits;
    while (this.#bytes > maxUnansweredBytes) {
      const largest = [...this.#open.values()].reduce(
        (most, next) => (next.bytes > most.bytes ? next : most),
        body,
      );
      const text = `unanswered requests take ${this.#bytes} bytes; the limit is ${maxUnansweredBytes}`;
      this.#end(largest, new ClusterError('resource_exhausted', text, { detail: { retryAfterMs } }));
    }
  }

  #end(body: Body, error: ClusterError): void {
    this.#release(body.stream);
    this.#refused.add(body.stream);
    body.hooks.refuse(error);
  }

  #release(stream: ServerHttp2Stream): void {
    const body = this.#open.get(stream);
    if (body !== undefined) {
      this.#open.delete(stream);
      this.#waiting.delete(body);
      clearTimeout(body.timeout);
      this.#bytes -= body.bytes;
      body.bytes = 0;
    }
  }
}
