// The object store of the model catalogue: created if it is missing, bounded, and recreated if it can no longer
// write. Actions on it are repeated once if it is gone, as after a server came back empty. Knows no model.

import { jetstream, StorageType, type JetStreamManager, type StreamInfo } from '@nats-io/jetstream';
import { Objm, type ObjectStore } from '@nats-io/obj';

import { beforeAbort } from '../../process/abort.ts';
import { ClusterError } from '../../process/errors.ts';
import type { Log } from '../../process/log.ts';
import type { QueueRefusal } from '../queue-refusal.ts';
import { refusalOf, unavailable } from './errors.ts';
import type { NatsLink } from './link.ts';
import type { ModelEntry } from './model-entry.ts';
import { boundStream, requestTimeoutMs } from './streams.ts';
import { modelBucket, modelTrialSubject, trialModelBucket } from './subjects.ts';

/**
 * How the store is made. A process configured with more `replicas` than the store has raises them, so a writer may
 * use 1. A process that looks with `maxBytes` bounds the store.
 */
export interface ModelStoreOptions {
  readonly replicas: number;
  readonly maxBytes?: number;
  readonly log: Log;
}

/** The store behind one link. Nothing to close: acts end with the link. */
export class ModelStore {
  readonly #link: NatsLink;
  readonly #options: ModelStoreOptions;
  /** Creation time of the store that was bounded last. */
  #boundStore = '';
  #opened: Promise<{ readonly objects: ObjectStore; readonly manager: JetStreamManager }> | undefined;

  constructor(link: NatsLink, options: ModelStoreOptions) {
    this.#link = link;
    this.#options = options;
  }

  /** The current store, with the replicas that this client requests, and bounded once per store. */
  look(signal: AbortSignal): Promise<StreamInfo> {
    return this.ask(async (objects, manager) => {
      const { streamInfo } = await objects.status();
      const { config, created } = streamInfo;
      const { replicas, maxBytes, log } = this.#options;
      if (maxBytes !== undefined && this.#boundStore !== created) {
        await boundStream(manager, config, { limits: { maxBytes, maxRecords: -1 }, log });
        this.#boundStore = created;
      }
      return config.num_replicas < replicas
        ? manager.streams.update(config.name, { num_replicas: replicas })
        : streamInfo;
    }, signal);
  }

  /** Runs an action that writes an entry, on a store that can write. */
  async write<Result>(
    act: (objects: ObjectStore) => Promise<Result>,
    entry: ModelEntry,
    signal: AbortSignal,
  ): Promise<Result> {
    const text = `the model catalogue could not store ${entry.name}`;
    const failure = await this.ask((...store) => diskFailureOf(store, text), signal);
    if (failure !== undefined) {
      await this.ask((_objects, manager) => this.#remake(manager, entry), signal).catch((error: unknown) => {
        this.#options.log.debug({ error: ClusterError.from(error) }, 'cannot recreate the model catalogue');
        signal.throwIfAborted();
        throw failure;
      });
    }
    try {
      return await this.ask(act, signal);
    } catch (error) {
      const { cause } = ClusterError.from(error);
      const refusal = cause === undefined ? undefined : refusalOf(cause, text);
      throw refusal?.reason === 'full' || refusal?.reason === 'disk_failed' ? refusal : error;
    }
  }

  /**
   * After one failed write, a store rejects all writes until its server restarts. It is therefore recreated if a
   * second store on the server accepts the entry; processes that have its other models publish them again.
   */
  async #remake(manager: JetStreamManager, { name, metadata, content }: ModelEntry): Promise<void> {
    const stream = jetstream(await this.#link.opened(this.#link.closing), { timeout: requestTimeoutMs });
    const beside = await new Objm(stream).create(trialModelBucket, {
      replicas: 1,
      storage: StorageType.File,
    });
    try {
      await beside.putBlob({ name, metadata }, content);
    } finally {
      await beside.destroy();
    }
    const { objects } = await this.#open();
    // Another process may have recreated it meanwhile.
    if ((await diskFailureOf([objects, manager])) !== undefined) {
      this.#options.log.error('model catalogue cannot write: recreating it');
      await objects.destroy();
      this.#opened = undefined;
    }
  }

  /** Runs an action on the store; repeats it once if the store is gone, as after a server came back empty. */
  async ask<Result>(
    act: (objects: ObjectStore, manager: JetStreamManager) => Promise<Result>,
    signal: AbortSignal,
  ): Promise<Result> {
    const until = AbortSignal.any([signal, this.#link.closing]);
    const once = async (): Promise<Result> => {
      until.throwIfAborted();
      this.#opened ??= this.#open();
      const { objects, manager } = await beforeAbort(this.#opened, until);
      return beforeAbort(act(objects, manager), until);
    };
    const known = this.#opened;
    try {
      return await once().catch((error: unknown) => {
        if (error instanceof ClusterError || until.aborted) {
          throw error;
        }
        this.#opened = undefined;
        if (known === undefined) {
          throw error;
        }
        return once();
      });
    } catch (error) {
      if (error instanceof ClusterError || until.aborted) {
        throw error;
      }
      this.#opened = undefined;
      const message = error instanceof Error ? error.message : String(error);
      throw unavailable(`the model catalogue did not answer: ${message}`, error);
    }
  }

  /** The store, created if it is missing. */
  async #open(): Promise<{ readonly objects: ObjectStore; readonly manager: JetStreamManager }> {
    const stream = jetstream(await this.#link.opened(this.#link.closing), { timeout: requestTimeoutMs });
    const { replicas } = this.#options;
    return {
      objects: await new Objm(stream).create(modelBucket, { replicas, storage: StorageType.File }),
      manager: await stream.jetstreamManager(),
    };
  }
}

/** Why a store on one server answers but cannot write; undefined if it can. Replicated stores repair themselves. */
async function diskFailureOf(
  [objects, manager]: readonly [ObjectStore, JetStreamManager],
  text?: string,
): Promise<QueueRefusal | undefined> {
  const { streamInfo } = await objects.status();
  const { name, num_replicas: replicas } = streamInfo.config;
  try {
    // A purge of nothing fails like any write, and at once.
    await manager.streams.purge(name, { filter: modelTrialSubject });
    return undefined;
  } catch (error) {
    const refusal = refusalOf(error, text);
    return replicas === 1 && refusal.reason === 'disk_failed' ? refusal : undefined;
  }
}
