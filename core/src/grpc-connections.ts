// The connections of a server that anybody may reach. Owns how many there may be, in all and of one peer, and the end of
// those that only cost: no handshake, no call, floods of frames that node:http2 answers for ever. A connection is proven
// once a stream was admitted on it; what is unproven makes room for newer ones and has little patience.

import { constants, type ServerHttp2Session, type ServerHttp2Stream } from 'node:http2';

import { Allowance, peerOf, type Rate } from './peers.ts';

export interface ConnectionLimits {
  readonly maxConnections: number;
  /** Of one peer, which may be a proxy or a NAT with many users behind it. */
  readonly maxConnectionsPerPeer: number;
}

/** Without the peer's SETTINGS by then, it does not speak HTTP/2. */
const handshakeMs = 10_000;
/** Clients that connect before their first call are given this long to make it; they connect again by themselves. */
const unprovenIdleMs = 60_000;
const unprovenStreams = 64;
const unprovenRefusals = 100;
/** Clients that measure their bandwidth ping about ten times a second; a flood has thousands. */
const pingRate: Rate = { burst: 500, perSecond: 20 };
const settingsRate: Rate = { burst: 50, perSecond: 1 };

/** All connections of a server. */
export class Connections {
  readonly #limits: ConnectionLimits;
  readonly #all = new Map<ServerHttp2Session, Connection>();
  readonly #byPeer = new Map<string, Set<Connection>>();

  constructor(limits: ConnectionLimits) {
    this.#limits = limits;
  }

  get size(): number {
    return this.#all.size;
  }

  get provenSize(): number {
    return [...this.#all.values()].filter(({ proven }) => proven).length;
  }

  /** The connection of a stream; undefined where it was refused or is gone. */
  of(stream: ServerHttp2Stream): Connection | undefined {
    return stream.session === undefined ? undefined : this.#all.get(stream.session as ServerHttp2Session);
  }

  /** Takes a new connection or, where there is no room and nobody to make some, ends it. */
  take(session: ServerHttp2Session): void {
    const peer = peerOf(session.socket.remoteAddress);
    const siblings = this.#byPeer.get(peer) ?? new Set();
    const { maxConnections, maxConnectionsPerPeer } = this.#limits;
    const isFull =
      (siblings.size >= maxConnectionsPerPeer && !makeRoom(siblings)) ||
      (this.#all.size >= maxConnections && !makeRoom(this.#all.values()));
    if (isFull) {
      session.destroy(undefined, constants.NGHTTP2_ENHANCE_YOUR_CALM);
      return;
    }
    const connection = new Connection(session, peer);
    this.#all.set(session, connection);
    siblings.add(connection);
    this.#byPeer.set(peer, siblings);
    session.once('close', () => {
      connection.forget();
      this.#all.delete(session);
      siblings.delete(connection);
      if (siblings.size === 0) {
        this.#byPeer.delete(peer);
      }
    });
  }
}

/** Ends the oldest connection that has proven nothing; false where there is none. */
function makeRoom(connections: Iterable<Connection>): boolean {
  for (const connection of connections) {
    if (!connection.proven) {
      connection.end();
      return true;
    }
  }
  return false;
}

/** One connection, as long as it lives. */
export class Connection {
  readonly peer: string;
  readonly #session: ServerHttp2Session;
  readonly #pings = new Allowance(pingRate, performance.now());
  readonly #settings = new Allowance(settingsRate, performance.now());
  #patience: NodeJS.Timeout;
  #proven = false;
  #openStreams = 0;
  #refusals = 0;

  constructor(session: ServerHttp2Session, peer: string) {
    this.#session = session;
    this.peer = peer;
    this.#patience = setTimeout(() => this.end(), handshakeMs).unref();
    session.once('remoteSettings', () => this.#awaitCall());
    session.on('remoteSettings', () => this.#spend(this.#settings));
    session.on('ping', () => this.#spend(this.#pings));
  }

  get proven(): boolean {
    return this.#proven;
  }

  /** A stream was admitted. */
  prove(): void {
    this.#proven = true;
    clearTimeout(this.#patience);
  }

  /** Counts a stream while it is open; false where an unproven connection has too many. */
  open(stream: ServerHttp2Stream): boolean {
    this.#openStreams += 1;
    stream.once('close', () => {
      this.#openStreams -= 1;
    });
    return this.#proven || this.#openStreams <= unprovenStreams;
  }

  /** A stream was refused, or reset before it was looked at: a connection that does nothing else ends. */
  refuse(): void {
    this.#refusals += 1;
    if (!this.#proven && this.#refusals > unprovenRefusals) {
      this.end();
    }
  }

  end(): void {
    this.#session.destroy(undefined, constants.NGHTTP2_ENHANCE_YOUR_CALM);
  }

  /** Lets go of the timer. */
  forget(): void {
    clearTimeout(this.#patience);
  }

  #spend(allowance: Allowance): void {
    if (!allowance.take(performance.now())) {
      this.end();
    }
  }

  #awaitCall(): void {
    clearTimeout(this.#patience);
    if (this.#proven || this.#session.destroyed) {
      return;
    }
    const look = (): void => {
      if (this.#openStreams === 0) {
        this.#session.close();
        this.end();
      } else {
        this.#patience.refresh();
      }
    };
    this.#patience = setTimeout(look, unprovenIdleMs).unref();
  }
}
