// Keep-alive pings, as grpc-js sends them on either side, without what they do to connections that are well.
//
// grpc-js cuts off every call of a connection whose ping is not answered in time, by a timer. But the answer may lie unread
// because this process stood still, or its turns take longer than that; and a peer that is short of processor time answers
// late while it goes on sending. So its pings are answered here, and the peer is watched instead: it is lost when it has
// said nothing at all, pings unanswered, at each of 20 looks a second apart. A process that stands still does not look.
//
// On a connection that drains (after a GOAWAY it takes no new calls and the running ones finish) Node refuses pings, which
// grpc-js takes for a dead peer, too (grpc/grpc-node#3068): whether it is dead is then for TCP and the calls' own limits to
// notice.

import { subscribe } from 'node:diagnostics_channel';
import type { Http2Session } from 'node:http2';

const lookMs = 1_000;
/** A loaded machine keeps a process waiting for seconds, and hardly for this long without a single packet. */
export const lostAfterLooks = 20;

/** Counts the looks at which a peer had said nothing more. */
export class PeerWatch {
  readonly #heardBytes: number;
  #silentLooks = 0;

  constructor(heardBytes: number) {
    this.#heardBytes = heardBytes;
  }

  /** What a look finds, with so many bytes read from the peer by then. */
  look(heardBytes: number): 'heard' | 'silent' | 'lost' {
    if (heardBytes !== this.#heardBytes) {
      return 'heard';
    }
    this.#silentLooks += 1;
    return this.#silentLooks < lostAfterLooks ? 'silent' : 'lost';
  }
}

const guarded = new WeakSet<Http2Session>();
let subscribed = false;

/** Keeps the calls of living connections from falling to keep-alive pings, in this process, from here on. Idempotent. */
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
    const watch = new PeerWatch(session.socket.bytesRead);
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
      // A second answer, an error, has grpc-js end the calls as it does where a connection drops.
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
