// HTTP/2 connections that drain: after a GOAWAY they take no new calls and the running ones finish. Node refuses pings on
// such a session, and grpc-js takes the refusal of its keep-alive ping for a dead peer and cuts off every call, on either
// side (grpc/grpc-node#3068). So a draining session answers its own pings; that a peer is dead is then for TCP and the
// calls' own limits to notice.

import { subscribe } from 'node:diagnostics_channel';
import type { Http2Session } from 'node:http2';

const guarded = new WeakSet<Http2Session>();
let subscribed = false;

/** Lets the calls of draining connections outlive keep-alive pings, in this process, from here on. Idempotent. */
export function keepDrainingCalls(): void {
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
  const pingUnlessDraining = (...args: unknown[]): boolean => {
    const answered = args.at(-1);
    if (!session.closed || session.destroyed || typeof answered !== 'function') {
      return ping(...args);
    }
    setImmediate(() => answered(null, 0, Buffer.alloc(8)));
    return true;
  };
  Object.assign(session, { ping: pingUnlessDraining });
}

function sessionOf(message: unknown): Http2Session | undefined {
  const { stream } = message as { readonly stream?: { readonly session?: Http2Session } };
  return stream?.session;
}
