// Keep-alive pings, as grpc-js sends them on either side, without ending healthy connections.
//
// grpc-js uses a timer: it ends every call of a connection whose ping is not answered in time. But the answer may be
// unread because this process was paused or busy, and a peer short of CPU answers late while it keeps sending. So
// grpc-js's pings are answered here, and the peer is watched instead: it is lost if it sent nothing at all, not even
// answers to pings, in 20 checks a second apart (300 for a client). A paused process does not check.
//
// On a draining connection (after a GOAWAY it accepts no new calls and running ones finish) Node rejects pings, which
// grpc-js also treats as a dead peer (grpc/grpc-node#3068). There, TCP and the calls' own limits notice a dead peer.

import { subscribe } from 'node:diagnostics_channel';
import { constants, type Http2Session } from 'node:http2';

const lookMs = 1_000;
/**
 * Checks until a silent peer is lost. A loaded machine may delay a process for seconds, but rarely longer than this. A
 * client gets more: it may make thousands of calls in one turn, seconds of CPU time, which take more than a minute
 * beside fifty busy processes. If it is gone, waiting costs little, since streams without credit are parked; and a
 * gateway waits for as long where only a stream is unread (`MIMO_GATEWAY_CLIENT_STALL`).
 */
export const lostAfterLooks = { server: 20, client: 300 };

/** Counts the checks at which a peer had sent nothing new. */
export class PeerWatch {
  readonly #heardBytes: number;
  readonly #lostAfter: number;
  #silentLooks = 0;

  constructor(heardBytes: number, peer: keyof typeof lostAfterLooks) {
    this.#heardBytes = heardBytes;
    this.#lostAfter = lostAfterLooks[peer];
  }

  /** The result of a check, given the bytes read from the peer so far. */
  look(heardBytes: number): 'heard' | 'silent' | 'lost' {
    if (heardBytes !== this.#heardBytes) {
      return 'heard';
    }
    this.#silentLooks += 1;
    return this.#silentLooks < this.#lostAfter ? 'silent' : 'lost';
  }
}

const guarded = new WeakSet<Http2Session>();
let subscribed = false;

/** Protects the calls of living connections from keep-alive pings, in this process, from now on. Idempotent. */
export function keepLivingCalls(): void {
  if (!subscribed) {
    subscribed = true;
    subscribe('http2.client.stream.start', guard);
    subscribe('http2.server.stream.start', guard);
  }
}

function guard(message: unknown): void {
  const session = sessionOf(message);
  if (session === undefined || guarded.has(session)) {
    return;
  }
  guarded.add(session);
  const ping = session.ping.bind(session) as unknown as (...args: unknown[]) => boolean;
  let looking: NodeJS.Timeout | undefined;
  const stop = (): void => {
    clearInterval(looking);
    looking = undefined;
  };
  session.once('close', stop);
  const watchPeer = (onLost: () => void): void => {
    const isServer = session.type === constants.NGHTTP2_SESSION_SERVER;
    const watch = new PeerWatch(session.socket.bytesRead, isServer ? 'client' : 'server');
    looking = setInterval(() => {
      const found = session.closed ? 'heard' : watch.look(session.socket.bytesRead);
      if (found !== 'silent') {
        stop();
      }
      if (found === 'lost') {
        onLost();
      }
    }, lookMs).unref();
    ping((error: Error | null) => {
      if (error === null) {
        stop();
      }
    });
  };
  const answerAndWatch = (...args: unknown[]): boolean => {
    const answered = args.at(-1);
    if (session.destroyed || typeof answered !== 'function') {
      return ping(...args);
    }
    if (!session.closed && looking === undefined) {
      // A second answer, an error, makes grpc-js end the calls as for a dropped connection.
      watchPeer(() => answered(new Error('the peer is silent')));
    }
    setImmediate(() => answered(null, 0, Buffer.alloc(8)));
    return true;
  };
  Object.assign(session, { ping: answerAndWatch });
}

function sessionOf(message: unknown): Http2Session | undefined {
  const { stream } = message as { readonly stream?: { readonly session?: Http2Session } };
  return stream?.session;
}
