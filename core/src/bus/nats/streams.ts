// The stream of records and the buckets of leases and drain marks: created if they are missing, at each connection and
// again on request, also after a server came back empty. Knows their settings, not their contents. Uses no
// feature that an older server (2.10 and later) would ignore.

import {
  DiscardPolicy,
  jetstream,
  RetentionPolicy,
  StorageType,
  type JetStreamClient,
  type JetStreamManager,
  type StreamConfig,
  type StreamInfo,
} from '@nats-io/jetstream';
import { Kvm, type KV } from '@nats-io/kv';
import { nanos, type NatsConnection } from '@nats-io/transport-node';

import { beforeAbort, pause } from '../../process/abort.ts';
import { ClusterError } from '../../process/errors.ts';
import type { Log } from '../../process/log.ts';
import { leaseTtlMs } from '../leases.ts';
import { QueueRefusal } from '../queue-refusal.ts';
import { isStreamMissing, isTooLarge } from './errors.ts';
import type { NatsLink } from './link.ts';
import { drainBucket, leaseBucket, requestStream, subjects } from './subjects.ts';

/** Bounds of a stream. */
export interface StreamLimits {
  readonly maxBytes: number;
  readonly maxRecords: number;
}

/**
 * How the streams are made. `replicas` is 3 in production and 1 locally; records older than `recordMaxAgeMs` expire.
 * Without `limits`, the stream of records keeps its own.
 */
export interface StreamsOptions {
  readonly replicas: number;
  readonly recordMaxAgeMs: number;
  readonly limits?: StreamLimits;
  readonly log: Log;
}

/** The client's objects; they survive reconnections. */
export interface Stores {
  readonly connection: NatsConnection;
  readonly stream: JetStreamClient;
  readonly manager: JetStreamManager;
  readonly leases: KV;
  readonly drains: KV;
}

/** How long to wait for the server's answer to a JetStream request. */
export const requestTimeoutMs = 5_000;
const retryMs = 500;
/** A server with less room than this cannot hold a queue. */
const minBytes = 2 ** 20;

/** The streams behind one link. Nothing to close: they end with the link. */
export class NatsStreams {
  readonly #link: NatsLink;
  readonly #options: StreamsOptions;
  readonly #opened = Promise.withResolvers<Stores>();
  /** The connection that they were prepared for: it fires when that is lost. */
  #preparedFor = AbortSignal.abort();
  #preparing: Promise<Stores> | undefined;
  #storeId = '';
  #leasesMadeSeconds = 0;
  #store = new AbortController();

  constructor(link: NatsLink, options: StreamsOptions) {
    this.#link = link;
    this.#options = options;
    this.#opened.promise.catch(() => undefined);
    void this.#run();
  }

  /** Whether the stream and the buckets can be used now. */
  get ready(): boolean {
    return !this.#preparedFor.aborted && !this.#link.closing.aborted;
  }

  /** Creation time of the stream: another time means another stream. Empty until the first connection. */
  get storeId(): string {
    return this.#storeId;
  }

  /** Creation time of the bucket of leases: another time means another bucket, whose revisions start over. */
  get leasesMadeSeconds(): number {
    return this.#leasesMadeSeconds;
  }

  /** Fires when the stream of records was replaced: its sequences start over, so its followers must too. */
  get storeReplaced(): AbortSignal {
    return this.#store.signal;
  }

  /** The stores once they have been usable; rejects when the signal fires first. */
  opened(signal: AbortSignal): Promise<Stores> {
    return beforeAbort(this.#opened.promise, signal);
  }

  /** The stores if they can be used at this moment; else fails with `unavailable`. */
  async stores(): Promise<Stores> {
    if (!this.ready) {
      throw new QueueRefusal('disconnected', 'the queue is not connected');
    }
    return this.#opened.promise;
  }

  /** Creates missing stores, and notices a replaced stream. Callers share an attempt begun after their call. */
  async prepareAgain(): Promise<void> {
    const { connection } = await this.stores();
    // One that is under way may have looked before the stream was gone.
    await this.#preparing?.catch(() => undefined);
    this.#preparing ??= this.#prepare(connection).finally(() => (this.#preparing = undefined));
    await this.#preparing;
  }

  async #run(): Promise<void> {
    for await (const connection of this.#link.connections()) {
      const { lost } = this.#link;
      const stores = await this.#prepareUntilDone(connection, AbortSignal.any([lost, this.#link.closing]));
      if (stores !== undefined) {
        this.#preparedFor = lost;
        this.#opened.resolve(stores);
      }
    }
    this.#opened.reject(this.#link.closing.reason);
  }

  async #prepareUntilDone(connection: NatsConnection, until: AbortSignal): Promise<Stores | undefined> {
    while (!until.aborted) {
      try {
        const stores = await this.#prepare(connection);
        return until.aborted ? undefined : stores;
      } catch (error) {
        this.#options.log.warn({ error: ClusterError.from(error) }, 'queue not ready');
        await pause(retryMs, until);
      }
    }
    return undefined;
  }

  async #prepare(connection: NatsConnection): Promise<Stores> {
    const { replicas, recordMaxAgeMs, limits, log } = this.#options;
    const stream = jetstream(connection, { timeout: requestTimeoutMs });
    const manager = await stream.jetstreamManager();
    const { created, config: found } = await manager.streams.info(requestStream).catch((error: unknown) => {
      if (isStreamMissing(error)) {
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
    // A message written again replaces the old one, also in a stream created before this setting.
    const config =
      found.max_msgs_per_subject === 1
        ? found
        : (await manager.streams.update(requestStream, { max_msgs_per_subject: 1 })).config;
    if (limits !== undefined) {
      await boundStream(manager, config, { limits, log });
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
  { limits, log }: { readonly limits: StreamLimits; readonly log: Log },
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
      if (!isTooLarge(error) || maxBytes < minBytes) {
        throw error;
      }
    }
  }
}

/** Creation time of a stream, by the server's clock. */
export function secondsOf({ created }: StreamInfo): number {
  return Math.floor(Date.parse(created) / 1_000);
}
