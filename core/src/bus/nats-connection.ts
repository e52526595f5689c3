// The connection of queue-nats: connecting, reconnecting forever, and creating the stream and the buckets if they are
// missing, also after a server came back empty. Knows their settings, not their contents. Uses no feature that an
// older server (2.10 and later) would ignore.

import {
  DiscardPolicy,
  jetstream,
  JetStreamApiError,
  RetentionPolicy,
  StorageType,
  type JetStreamClient,
  type JetStreamManager,
  type StreamConfig,
  type StreamInfo,
} from '@nats-io/jetstream';
import { Kvm, type KV } from '@nats-io/kv';
import { nanos, type NatsConnection } from '@nats-io/transport-node';

import { beforeAbort, pause } from '../process/abort.ts';
import { ClusterError } from '../process/errors.ts';
import type { Log } from '../process/log.ts';
import { connectNats, type NatsServers } from './nats-connect.ts';
import { QueueRefusal } from './queue-refusal.ts';
import { leaseTtlMs } from './queue.ts';
import { drainBucket, leaseBucket, requestStream, subjects } from './subjects.ts';

/** Bounds of the stream of records. */
export interface RecordLimits {
  readonly maxBytes: number;
  readonly maxRecords: number;
}

/**
 * What a connection needs. `replicas` is 3 in production and 1 locally; records older than `recordMaxAgeMs` expire.
 * Without `limits`, the stream keeps its own.
 */
export interface NatsOptions extends NatsServers {
  readonly replicas: number;
  readonly recordMaxAgeMs: number;
  readonly limits?: RecordLimits;
  readonly log: Log;
}

/** The client's objects; they survive reconnections. */
export interface NatsSession {
  readonly connection: NatsConnection;
  readonly stream: JetStreamClient;
  readonly manager: JetStreamManager;
  readonly leases: KV;
  readonly drains: KV;
}

/** How long to wait for the server's answer to a JetStream request. */
const requestTimeoutMs = 5_000;
const retryMs = 500;
const streamNotFoundCode = 10059;
const storageExceededCode = 10047;
/** A server with less room than this cannot hold a queue. */
const minBytes = 2 ** 20;

/** The error without a connection, or without an answer. */
export function unavailable(message: string, cause?: unknown): ClusterError {
  return new ClusterError('unavailable', message, { cause, detail: { retryAfterMs: 1_000 } });
}

/** A connection made in the background. Close it. */
export class NatsLink {
  readonly #options: NatsOptions;
  readonly #closing = new AbortController();
  readonly #connecting: Promise<NatsConnection>;
  readonly #ended: Promise<void>;
  readonly #opened = Promise.withResolvers<NatsSession>();
  #connected = false;
  #storeId = '';
  #leasesMadeSeconds = 0;
  #preparing: Promise<unknown> | undefined;
  #store = new AbortController();
  #connection = new AbortController();

  constructor(options: NatsOptions) {
    this.#options = options;
    this.#connecting = connectNats(options);
    this.#opened.promise.catch(() => undefined);
    this.#ended = this.#run().catch((error: unknown) => {
      this.#opened.reject(error);
      if (!this.#closing.signal.aborted) {
        options.log.error({ error: ClusterError.from(error) }, 'queue connection ended');
      }
    });
  }

  /** Whether the stream and the buckets can be used now. */
  get connected(): boolean {
    return this.#connected;
  }

  /** Creation time of the stream: another time means another stream. Empty until the first connection. */
  get storeId(): string {
    return this.#storeId;
  }

  /** Creation time of the bucket of leases: another time means another bucket, whose revisions start over. */
  get leasesMadeSeconds(): number {
    return this.#leasesMadeSeconds;
  }

  /** Fires when the stream was replaced: its sequences start over, so its followers must too. */
  get storeReplaced(): AbortSignal {
    return this.#store.signal;
  }

  /** Fires when the current connection is lost: changes during the disconnection are not reported. */
  get connectionLost(): AbortSignal {
    return this.#connection.signal;
  }

  /** Fires when `close` is called. */
  get closing(): AbortSignal {
    return this.#closing.signal;
  }

  /** The session once there is one; rejects when the signal fires first. */
  opened(signal: AbortSignal): Promise<NatsSession> {
    return beforeAbort(this.#opened.promise, signal);
  }

  /** The session if it is connected; else fails with `unavailable`. */
  async session(): Promise<NatsSession> {
    if (!this.#connected) {
      throw new QueueRefusal('disconnected', 'the queue is not connected');
    }
    return this.#opened.promise;
  }

  /**
   * Creates the stream and the buckets if they are missing, and notices a replaced stream. Callers share one attempt.
   */
  async prepareAgain(): Promise<void> {
    const { connection } = await this.session();
    this.#preparing ??= this.#prepare(connection).finally(() => (this.#preparing = undefined));
    await this.#preparing;
  }

  /** Fires `closing`, waits for the closing steps, and disconnects. */
  async close(before: () => Promise<void>): Promise<void> {
    if (!this.#closing.signal.aborted) {
      this.#closing.abort(new ClusterError('canceled', 'the queue is closed'));
      this.#connected = false;
      await before();
      await this.#opened.promise.then(({ connection }) => connection.close()).catch(() => undefined);
    }
    await this.#ended;
  }

  async #run(): Promise<void> {
    const connecting = this.#connecting;
    const connection = await beforeAbort(connecting, this.#closing.signal).catch((error: unknown) => {
      // Nobody else owns a connection that arrives after the queue was closed.
      void connecting.then((late) => late.close()).catch(() => undefined);
      throw error;
    });
    this.#opened.resolve(await this.#prepareUntilDone(connection));
    this.#options.log.info({ server: connection.getServer() }, 'queue connected');
    for await (const status of connection.status()) {
      if (status.type === 'disconnect') {
        this.#connected = false;
        this.#connection.abort();
        this.#connection = new AbortController();
        this.#options.log.warn('queue disconnected');
      } else if (status.type === 'reconnect') {
        await this.#prepareUntilDone(connection);
        this.#options.log.info({ server: connection.getServer() }, 'queue reconnected');
      }
    }
  }

  async #prepareUntilDone(connection: NatsConnection): Promise<NatsSession> {
    for (;;) {
      this.#closing.signal.throwIfAborted();
      try {
        const session = await this.#prepare(connection);
        this.#connected = !this.#closing.signal.aborted;
        return session;
      } catch (error) {
        this.#options.log.warn({ error: ClusterError.from(error) }, 'queue not ready');
        await pause(retryMs, this.#closing.signal);
      }
    }
  }

  async #prepare(connection: NatsConnection): Promise<NatsSession> {
    const { replicas, recordMaxAgeMs, limits } = this.#options;
    const stream = jetstream(connection, { timeout: requestTimeoutMs });
    const manager = await stream.jetstreamManager();
    const { created, config: found } = await manager.streams.info(requestStream).catch((error: unknown) => {
      if (error instanceof JetStreamApiError && error.code === streamNotFoundCode) {
        return manager.streams.add({
          name: requestStream,
          subjects: [subjects.allRequests],
          retention: RetentionPolicy.Limits,
          storage: StorageType.File,
          discard: DiscardPolicy.New,
          max_age: nanos(recordMaxAgeMs),
          max_msgs_per_subject: 1,
          num_replicas: replicas,
          allow_direct: true,
        });
      }
      throw error;
    });
    // What is written again replaces what was there, also in a stream from before that was so.
    const config =
      found.max_msgs_per_subject === 1
        ? found
        : (await manager.streams.update(requestStream, { max_msgs_per_subject: 1 })).config;
    if (limits !== undefined) {
      await boundStream(manager, config, { limits, log: this.#options.log });
    }
    if (this.#storeId !== created) {
      this.#storeId = created;
      this.#store.abort();
      this.#store = new AbortController();
    }
    const buckets = new Kvm(stream);
    const leases = await buckets.create(leaseBucket, { ttl: leaseTtlMs, history: 1, replicas });
    this.#leasesMadeSeconds = secondsOf((await leases.status()).streamInfo);
    const drains = await buckets.create(drainBucket, { history: 1, replicas });
    return { connection, stream, manager, leases, drains };
  }
}

/** Bounds a stream; on a server with too little room, to half of the bytes, a quarter, and so on. */
export async function boundStream(
  manager: JetStreamManager,
  { name, max_bytes: boundBytes, max_msgs: boundRecords }: StreamConfig,
  { limits, log }: { readonly limits: RecordLimits; readonly log: Log },
): Promise<void> {
  for (let maxBytes = limits.maxBytes; ; maxBytes = Math.floor(maxBytes / 2)) {
    if (boundBytes === maxBytes && boundRecords === limits.maxRecords) {
      return;
    }
    try {
      await manager.streams.update(name, { max_bytes: maxBytes, max_msgs: limits.maxRecords });
      log.info({ stream: name, maxBytes, maxRecords: limits.maxRecords }, 'stream bounded');
      return;
    } catch (error) {
      const isTooLarge = error instanceof JetStreamApiError && error.code === storageExceededCode;
      if (!isTooLarge || maxBytes < minBytes) {
        throw error;
      }
    }
  }
}

/** Creation time of a stream, by the server's clock. */
export function secondsOf({ created }: StreamInfo): number {
  return Math.floor(Date.parse(created) / 1_000);
}
