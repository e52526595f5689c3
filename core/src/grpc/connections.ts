// The connections of a server that anybody can reach. Owns their limits, in total and per peer, and ends those that
// only cost: no handshake, no call, floods of frames. A connection is proven once a stream was admitted on it;
// unproven ones make room for newer ones and have short time limits. Streams are grpc/gate.ts's, which reports what
// they did.
//
// Most floods never reach JavaScript: HTTP/2 answers pings and settings, unpacks headers that it then ignores, and
// drops empty frames. So bytes are compared: those from the socket, minus those of the headers and bodies that
// JavaScript saw.

import { constants, type ServerHttp2Session, type ServerHttp2Stream } from 'node:http2';
import type { Socket } from 'node:net';

import type { PacedSocket } from './paced-socket.ts';
import { Allowance, PeerAllowances, peerOf, type Rate } from './peers.ts';

export interface ConnectionLimits {
  readonly maxConnections: number;
  /** Of one peer, which may be a proxy or a NAT with many users behind it. */
  readonly maxConnectionsPerPeer: number;
}

/** A peer that sent no SETTINGS by then does not speak HTTP/2. */
const handshakeMs = 10_000;
/** Time for the headers of a call on an unproven connection; they fit into a few packets. */
const headersMs = 10_000;
/** Clients that connect early have this long for their first call; they reconnect by themselves. */
const unprovenIdleMs = 60_000;
const unprovenStreams = 64;
const unprovenRefusals = 100;
/** Rate of new connections of one peer, beyond as many as its limit. */
const connectsPerSecond = 50;
/**
 * Connections ended for abuse; a peer that has used these up can open new ones only slowly, and so can others at its
 * address.
 */
const abuseRate: Rate = { burst: 5, perSecond: 0.5 };
const suspectRate: Rate = { burst: 2, perSecond: 1 };
/** Streams that a peer reset itself: all users of a proxy may leave at once. */
const resetRate: Rate = { burst: 10_000, perSecond: 1_000 };
const maxPeers = 4_096;
/** Clients that measure their bandwidth ping about ten times a second; a flood has thousands. */
const pingRate: Rate = { burst: 500, perSecond: 20 };
const settingsRate: Rate = { burst: 50, perSecond: 1 };
/**
 * Bytes that carried no headers or bodies. A reader of 80,000 tokens a second sends less than 1 MB/s of window
 * updates.
 */
const unprovenBytes: Rate = { burst: 128 * 2 ** 10, perSecond: 16 * 2 ** 10 };
const provenBytes: Rate = { burst: 4 * 2 ** 20, perSecond: 2 * 2 ** 20 };
/**
 * Bytes read in one turn of the event loop: enough for several calls, 3 ms of the costliest headers; unproven, one
 * call.
 */
const turnBytes = { proven: 16 * 2 ** 10, unproven: 4 * 2 ** 10 };
/** How often unproven connections are checked for unfinished headers. */
const lookMs = 1_000;

/** All connections of a server. Close it. */
export class Connections {
  readonly #limits: ConnectionLimits;
  readonly #all = new Map<ServerHttp2Session, Connection>();
  readonly #byPeer = new Map<string, Set<Connection>>();
  readonly #connects: PeerAllowances;
  readonly #abuses = new PeerAllowances(abuseRate, maxPeers);
  readonly #suspects = new PeerAllowances(suspectRate, maxPeers);
  readonly #resets = new PeerAllowances(resetRate, maxPeers);
  readonly #looking: NodeJS.Timeout;

  constructor(limits: ConnectionLimits) {
    this.#limits = limits;
    // Twice: a peer whose connections all broke reopens them at once.
    const rate = { burst: 2 * limits.maxConnectionsPerPeer, perSecond: connectsPerSecond };
    this.#connects = new PeerAllowances(rate, maxPeers);
    this.#looking = setInterval(() => this.#look(), lookMs).unref();
  }

  get size(): number {
    return this.#all.size;
  }

  get provenSize(): number {
    return [...this.#all.values()].filter(({ proven }) => proven).length;
  }

  close(): void {
    clearInterval(this.#looking);
  }

  /** The connection of a stream; undefined if it is gone. */
  of(stream: ServerHttp2Stream): Connection | undefined {
    return stream.session === undefined ? undefined : this.#all.get(stream.session as ServerHttp2Session);
  }

  /** Whether a new connection is accepted; if there is no room, the oldest unproven one is ended. */
  mayConnect(socket: Socket): boolean {
    const nowMs = performance.now();
    const peer = peerOf(socket.remoteAddress);
    const siblings = this.#byPeer.get(peer) ?? new Set();
    const { maxConnections, maxConnectionsPerPeer } = this.#limits;
    return (
      (this.#abuses.isSpent(peer, nowMs) ? this.#suspects : this.#connects).take(peer, nowMs) &&
      (siblings.size < maxConnectionsPerPeer || makeRoom(siblings)) &&
      (this.#all.size < maxConnections || makeRoom(this.#all.values()))
    );
  }

  /** Registers an accepted connection. */
  take(session: ServerHttp2Session, socket: PacedSocket): void {
    const peer = peerOf(socket.remoteAddress);
    const connection = new Connection({
      session,
      socket,
      peer,
      takeReset: () => this.#resets.take(peer, performance.now()),
      onAbuse: () => this.#abuses.take(peer, performance.now()),
    });
    const siblings = this.#byPeer.get(peer) ?? new Set();
    this.#all.set(session, connection);
    siblings.add(connection);
    this.#byPeer.set(peer, siblings);
    // The socket's event: a session whose peer left with unread streams may outlive its socket.
    socket.once('close', () => {
      session.destroy();
      connection.forget();
      this.#all.delete(session);
      siblings.delete(connection);
      if (siblings.size === 0) {
        this.#byPeer.delete(peer);
      }
    });
  }

  #look(): void {
    const nowMs = performance.now();
    for (const connection of this.#all.values()) {
      if (!connection.proven) {
        connection.lookAtHeaders(nowMs);
      }
    }
  }
}

/** Ends the oldest unproven connection; false if there is none. */
function makeRoom(connections: Iterable<Connection>): boolean {
  for (const connection of connections) {
    if (!connection.proven) {
      connection.end();
      return true;
    }
  }
  return false;
}

/** One connection, while it lives. */
export class Connection {
  readonly peer: string;
  readonly #session: ServerHttp2Session;
  readonly #socket: PacedSocket;
  readonly #takeReset: () => boolean;
  readonly #onAbuse: () => void;
  readonly #pings = new Allowance(pingRate, performance.now());
  readonly #settings = new Allowance(settingsRate, performance.now());
  #bytes = new Allowance(unprovenBytes, performance.now());
  #patience: NodeJS.Timeout;
  #proven = false;
  #openStreams = 0;
  /** The last stream whose headers were complete. */
  #lastStream = 0;
  #headersBeganMs: number | undefined;
  #refusals = 0;
  /** Of headers and bodies. */
  #seenBytes = 0;
  /** Bytes without use that were charged so far. */
  #chargedBytes = 0;

  constructor(parts: {
    readonly session: ServerHttp2Session;
    readonly socket: PacedSocket;
    readonly peer: string;
    /** False: the peer has reset too many streams. */
    readonly takeReset: () => boolean;
    readonly onAbuse: () => void;
  }) {
    this.#session = parts.session;
    this.#socket = parts.socket;
    this.#socket.turnBytes = () => this.#chargeTurn(performance.now());
    this.peer = parts.peer;
    this.#takeReset = parts.takeReset;
    this.#onAbuse = parts.onAbuse;
    this.#patience = setTimeout(() => this.end(), handshakeMs).unref();
    this.#session.once('remoteSettings', () => this.#awaitCall());
    this.#session.on('remoteSettings', () => this.#spend(this.#settings));
    this.#session.on('ping', () => this.#spend(this.#pings));
    this.#session.on('error', (error: NodeJS.ErrnoException) => {
      // Not HTTP/2; lost connections have the system's codes.
      if (error.code?.startsWith('ERR_HTTP2') === true) {
        this.#onAbuse();
      }
    });
  }

  get proven(): boolean {
    return this.#proven;
  }

  /** A stream was admitted. */
  prove(): void {
    if (!this.#proven) {
      this.#proven = true;
      this.#bytes = new Allowance(provenBytes, performance.now());
      clearTimeout(this.#patience);
    }
  }

  /** Counts a stream while it is open; false if an unproven connection has too many. */
  open(stream: ServerHttp2Stream): boolean {
    this.#openStreams += 1;
    this.#lastStream = stream.id ?? this.#lastStream;
    stream.once('close', () => {
      this.#openStreams -= 1;
    });
    stream.once('aborted', () => this.reset());
    return this.#proven || this.#openStreams <= unprovenStreams;
  }

  /** Ends the connection if headers started but do not end: HTTP/2 shows them only once they are complete. */
  lookAtHeaders(nowMs: number): void {
    const begun = this.#session.state.lastProcStreamID ?? 0;
    this.#headersBeganMs = begun <= this.#lastStream ? undefined : (this.#headersBeganMs ?? nowMs);
    if (this.#headersBeganMs !== undefined && nowMs - this.#headersBeganMs > headersMs) {
      this.end();
    }
  }

  /** Bytes that were of use. */
  see(bytes: number): void {
    this.#seenBytes += bytes;
  }

  /** The peer reset a stream. */
  reset(): void {
    if (!this.#takeReset()) {
      this.#endAbuse();
    }
  }

  /** A stream was rejected, or reset before it was checked: a connection with only such streams is ended. */
  refuse(): void {
    this.#refusals += 1;
    if (!this.#proven && this.#refusals > unprovenRefusals) {
      this.#endAbuse();
    }
  }

  end(): void {
    this.#session.destroy(undefined, constants.NGHTTP2_ENHANCE_YOUR_CALM);
  }

  /** Frees the timer. */
  forget(): void {
    clearTimeout(this.#patience);
  }

  /**
   * Charges what was read and brought nothing; gives how much may be read in this turn, 0 where the connection has
   * ended.
   */
  #chargeTurn(nowMs: number): number {
    const idleBytes = this.#socket.passedBytes - this.#seenBytes - this.#chargedBytes;
    if (idleBytes > 0) {
      this.#chargedBytes += idleBytes;
      if (!this.#bytes.take(nowMs, idleBytes)) {
        this.#endAbuse();
      }
    }
    return this.#session.destroyed ? 0 : turnBytes[this.#proven ? 'proven' : 'unproven'];
  }

  #endAbuse(): void {
    if (!this.#session.destroyed) {
      this.#onAbuse();
      // First, so that the stream which is being judged is not reset as if it had ended well.
      this.#socket.destroy();
      this.end();
    }
  }

  #spend(allowance: Allowance): void {
    if (!allowance.take(performance.now())) {
      this.#endAbuse();
    }
  }

  #awaitCall(): void {
    clearTimeout(this.#patience);
    if (this.#proven || this.#session.destroyed) {
      return;
    }
    const look = (): void => {
      if (this.#openStreams === 0) {
        this.end();
      } else {
        this.#patience.refresh();
      }
    };
    this.#patience = setTimeout(look, unprovenIdleMs).unref();
  }
}
