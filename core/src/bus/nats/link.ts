// A process's connection to NATS: the one owner of its life. Connecting in the background, with retries forever;
// credentials, read again for each connection; whether the server can be reached at this moment; and the end: steps
// that release resources, a flush, and closing. Does not know what the connection is used for: everything else uses a
// link.

import {
  connect,
  type Authenticator,
  type NatsConnection,
  type ReconnectToServerHandler,
} from '@nats-io/transport-node';

import { beforeAbort } from '../../process/abort.ts';
import { channelUntil, type Channel } from '../../process/channel.ts';
import { ClusterError } from '../../process/errors.ts';
import type { Log } from '../../process/log.ts';
import { authenticatorFromFile, parseCredentials, splitServer } from './credentials.ts';

/** The servers' addresses, and how this client introduces itself. */
export interface NatsServers {
  /** `nats://host:port` or `host:port`; with `user:password@` or `token@` before the host if the servers require it. */
  readonly servers: readonly string[];
  /** The client's name in the servers' own tools. */
  readonly clientName: string;
  /**
   * Instead, a file: a .creds file from `nsc`, or one line with `user:password` or a token. Read again for each
   * connection, so it may change while the process runs.
   */
  readonly credentialsFile?: string;
}

/** What a link needs. */
export interface NatsLinkOptions extends NatsServers {
  readonly log: Log;
}

/** Steps before leaving, and the last messages, may take this long together. */
const leaveMs = 1_000;

/** A connection that is made in the background and, once it is lost, made again. Close it. */
export class NatsLink {
  readonly #log: Log;
  readonly #closing = new AbortController();
  readonly #connecting: Promise<NatsConnection>;
  readonly #opened = Promise.withResolvers<NatsConnection>();
  readonly #ended: Promise<void>;
  readonly #watchers = new Set<Channel<NatsConnection>>();
  readonly #leaveSteps: (() => Promise<void>)[] = [];
  #connection: NatsConnection | undefined;
  #lost = new AbortController();
  #closed: Promise<void> | undefined;

  /** Throws `invalid_argument` if the credentials file cannot be read. */
  constructor(options: NatsLinkOptions) {
    this.#log = options.log;
    this.#connecting = connectForEver(options);
    this.#opened.promise.catch(() => undefined);
    this.#ended = this.#run().catch((error: unknown) => {
      this.#opened.reject(error);
      if (!this.closing.aborted) {
        this.#log.error({ error: ClusterError.from(error) }, 'NATS connection ended');
      }
    });
  }

  /** The connection while the server can be reached; undefined otherwise, and once the link is closed. */
  get connection(): NatsConnection | undefined {
    return this.closing.aborted ? undefined : this.#connection;
  }

  /**
   * Fires when the present connection is lost: subscriptions continue on the next one, but miss messages in between.
   */
  get lost(): AbortSignal {
    return this.#lost.signal;
  }

  /** Fires when `close` is called. */
  get closing(): AbortSignal {
    return this.#closing.signal;
  }

  /**
   * The first connection, whenever that is; the same object comes back after a loss. Rejects when the signal fires
   * first.
   */
  opened(signal: AbortSignal): Promise<NatsConnection> {
    return beforeAbort(this.#opened.promise, signal);
  }

  /** Yields each time the server has been reached, the present connection first, until the link is closed. */
  connections(): AsyncIterable<NatsConnection> {
    const channel = channelUntil<NatsConnection>(this.closing);
    this.#watchers.add(channel);
    if (this.#connection !== undefined) {
      channel.push(this.#connection);
    }
    return channel;
  }

  /** Adds a step that releases something before the link leaves the server. */
  beforeLeaving(step: () => Promise<void>): void {
    this.#leaveSteps.push(step);
  }

  /**
   * Fires `closing`, runs the steps, sends what was not sent yet, and leaves the server. Does not wait for one that is
   * away.
   */
  close(): Promise<void> {
    this.#closed ??= this.#close();
    return this.#closed;
  }

  async #close(): Promise<void> {
    this.#closing.abort(new ClusterError('canceled', 'the connection to NATS is closed'));
    const limit = AbortSignal.timeout(leaveMs);
    const leave = async (): Promise<void> => {
      await Promise.all(this.#leaveSteps.map((step) => step()));
      await this.#connection?.flush();
    };
    await beforeAbort(leave(), limit).catch(() => undefined);
    await this.#opened.promise.then((connection) => connection.close()).catch(() => undefined);
    await this.#ended;
  }

  async #run(): Promise<void> {
    const connection = await beforeAbort(this.#connecting, this.closing).catch((error: unknown) => {
      // Nobody else owns a connection that arrives after the link was closed.
      void this.#connecting.then((late) => late.close()).catch(() => undefined);
      throw error;
    });
    this.#log.info({ server: connection.getServer() }, 'NATS connected');
    this.#opened.resolve(connection);
    this.#enter(connection);
    for await (const { type } of connection.status()) {
      if (type === 'disconnect') {
        this.#leave();
        this.#log.warn('NATS disconnected');
      } else if (type === 'reconnect') {
        this.#log.info({ server: connection.getServer() }, 'NATS reconnected');
        this.#enter(connection);
      }
    }
    this.#leave();
  }

  #enter(connection: NatsConnection): void {
    this.#connection = connection;
    for (const watcher of this.#watchers) {
      watcher.push(connection);
    }
  }

  #leave(): void {
    this.#connection = undefined;
    this.#lost.abort();
    this.#lost = new AbortController();
  }
}

function connectForEver({ servers, clientName, credentialsFile = '' }: NatsServers): Promise<NatsConnection> {
  const parts = servers.map(splitServer);
  const inUrl = parts.find(({ credentials }) => credentials !== '')?.credentials;
  let authenticator: Authenticator | undefined;
  if (credentialsFile !== '') {
    authenticator = authenticatorFromFile(credentialsFile);
  } else if (inUrl !== undefined) {
    authenticator = parseCredentials(inUrl);
  }
  return connect({
    servers: parts.map(({ address }) => address),
    name: clientName,
    waitOnFirstConnect: true,
    maxReconnectAttempts: -1,
    // The client would wait by the wall clock: after it is set back by five minutes, it would not dial for five
    // minutes.
    reconnectDelayHandler: () => Number.NEGATIVE_INFINITY,
    reconnectToServer: dialPause(parts.length),
    // A server that stopped answering is noticed within 15 s; the default takes minutes.
    pingInterval: 5_000,
    maxPingOut: 2,
    // By default the client gives up after two rejections; but new credentials may be on their way, here or at the
    // server.
    ignoreAuthErrorAbort: true,
    ...(authenticator === undefined ? {} : { authenticator }),
  });
}

/** The client chooses the next server; it dials the same server again after 250 to 500 ms at the earliest. */
function dialPause(servers: number): ReconnectToServerHandler {
  let nextMs = 0;
  return ([server]) => {
    const nowMs = performance.now();
    const delay = Math.max(0, nextMs - nowMs);
    nextMs = nowMs + delay + (250 + 250 * Math.random()) / servers;
    return server === undefined ? null : { server, delay };
  };
}
