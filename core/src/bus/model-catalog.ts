// The models of the cluster, and the small files of each that a gateway needs: tokenizer and configuration, never
// weights.
// One object a model in the NATS object store MODELS, with the digests of its files in its metadata. The store shows
// an object only once it is complete, so a reader never sees half a model. Does not know what the files mean.

import { createHash, randomUUID } from 'node:crypto';
import { mkdir, readdir, readFile, rename, rm, stat, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';

import {
  jetstream,
  JetStreamApiError,
  StorageType,
  type JetStreamManager,
  type StreamInfo,
} from '@nats-io/jetstream';
import { Objm, type ObjectInfo, type ObjectStore } from '@nats-io/obj';

import { beforeAbort, pause } from '../process/abort.ts';
import { ClusterError } from '../process/errors.ts';
import type { Log } from '../process/log.ts';
import { connectNats, type NatsServers } from './nats-connect.ts';
import { boundStream } from './nats-connection.ts';
import { refusalOf, type QueueRefusal } from './queue-refusal.ts';
import { modelBucket, modelTrialSubject, trialModelBucket } from './subjects.ts';

/**
 * What a catalogue needs. A client that asks for more `replicas` than the store has raises them, so a writer may say
 * 1. A follower with `maxBytes` bounds the store.
 */
export interface ModelCatalogOptions extends NatsServers {
  readonly replicas: number;
  readonly maxBytes?: number;
  readonly log: Log;
}

/** A model as it is published: 1 to 16 files by their plain names, 64 MiB together. */
export interface ModelFiles {
  readonly name: string;
  readonly files: ReadonlyMap<string, Uint8Array>;
  /** The identity of the groups that shall run it (model-identity.ts); empty if unknown. */
  readonly identity: string;
}

/** A model of the catalogue. A different digest means different content. */
export interface CatalogModel {
  readonly name: string;
  /** SHA-256 of the files' names, sizes and digests, and of the identity; hex. */
  readonly digest: string;
  readonly identity: string;
  /** False: the store lost it, and nobody has published it again or removed it since. */
  readonly isStored: boolean;
}

/**
 * The catalogue. Methods wait for the server until their signal fires, and fail with `unavailable` if it does not
 * answer. Close it to end its iterations and leave the server.
 */
export interface ModelCatalog {
  /**
   * Adds a model or replaces its files, atomically; equal files are left as they are. Fails with `invalid_argument`
   * if names or sizes are out of bounds, `aborted` if other writers of the model kept winning, `resource_exhausted`
   * if the store is full.
   */
  publish(model: ModelFiles, signal: AbortSignal): Promise<CatalogModel>;
  /**
   * Publishes the files that `fetch` wrote into a directory again, unchanged. An entry of the model in the store
   * takes precedence. Fails with `data_loss` if the files do not match the digest.
   */
  restore(model: CatalogModel, directory: string, signal: AbortSignal): Promise<void>;
  /** Removes a model, even one that the store lost, so that followers forget it. */
  remove(name: string, signal: AbortSignal): Promise<void>;
  /**
   * The whole set, ordered by name: once at the start, and again within about a second of a change. If the store is
   * deleted, emptied or lost, known models stay, marked as not stored, until somebody publishes them again or removes
   * them. Only a process with the files can publish again; a new follower does not know these models.
   */
  follow(signal: AbortSignal): AsyncIterable<readonly CatalogModel[]>;
  /**
   * Writes a model's files into a directory that appears complete or not at all; an existing directory counts as
   * complete. Fails with `not_found` if the catalogue has no (or no longer a) model of this name and digest,
   * `data_loss` if the files do not match their digests.
   */
  fetch(model: Pick<CatalogModel, 'name' | 'digest'>, directory: string, signal: AbortSignal): Promise<void>;
  close(): Promise<void>;
}

/** Opens the catalogue; returns at once and connects in the background. */
export function createModelCatalog(options: ModelCatalogOptions): ModelCatalog {
  return new NatsModelCatalog(options);
}

const maxFiles = 16;
/** MiMo's tokenizer.json has 7 to 11 MB. */
const maxModelBytes = 64 * 2 ** 20;
const maxNameBytes = 256;
const fileName = /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/;

/** How long to wait for the server's answer to one request. */
const requestTimeoutMs = 5_000;
/** If the next chunk takes longer than this, the files were replaced while they were read. */
const stallMs = 10_000;
/**
 * Followers compare the store's last sequence with the one they know at this pace: a request of a few hundred bytes
 * that cannot go silent, as a subscription can.
 */
const lookMs = 1_000;
const publishAttempts = 5;
const wrongLastSequenceCodes = new Set([10071, 10164]);

interface CatalogFile {
  readonly name: string;
  readonly sha256: string;
  readonly bytes: number;
}

class NatsModelCatalog implements ModelCatalog {
  readonly #options: ModelCatalogOptions;
  readonly #closing = new AbortController();
  readonly #connecting: ReturnType<typeof connectNats>;
  #connected = false;
  /** Creation time of the store that was bounded last. */
  #boundStore = '';
  #opened: Promise<{ readonly objects: ObjectStore; readonly manager: JetStreamManager }> | undefined;

  constructor(options: ModelCatalogOptions) {
    this.#options = options;
    this.#connecting = connectNats(options);
    this.#connecting.then(
      () => (this.#connected = true),
      () => undefined,
    );
  }

  async publish({ name, files, identity }: ModelFiles, signal: AbortSignal): Promise<CatalogModel> {
    const entry = entryOf({ name, files, identity });
    const put = async (objects: ObjectStore): Promise<boolean> => {
      const last = await objects.info(name);
      const isThere = last?.deleted === false && last.metadata?.['digest'] === entry.digest;
      return isThere || (await putEntry(objects, entry, last?.revision ?? 0));
    };
    for (let attempt = 0; attempt < publishAttempts; attempt++) {
      if (await this.#write(put, entry, signal)) {
        return { name, digest: entry.digest, identity, isStored: true };
      }
    }
    throw new ClusterError(
      'aborted',
      `model ${name} was not published: other processes published it at the same time`,
    );
  }

  async restore(
    { name, digest, identity }: CatalogModel,
    directory: string,
    signal: AbortSignal,
  ): Promise<void> {
    const files = new Map<string, Uint8Array>();
    for (const file of await readdir(directory)) {
      files.set(file, await readFile(join(directory, file)));
    }
    const entry = entryOf({ name, files, identity });
    if (entry.digest !== digest) {
      throw new ClusterError('data_loss', `model ${name}: its files no longer match their digest`);
    }
    const put = async (objects: ObjectStore): Promise<boolean> =>
      (await objects.info(name)) !== null || putEntry(objects, entry, 0);
    await this.#write(put, entry, signal);
  }

  remove(name: string, signal: AbortSignal): Promise<void> {
    const mark = { name, metadata: {}, content: new Uint8Array() };
    const take = async (objects: ObjectStore): Promise<void> => {
      const info = await objects.info(name);
      if (info === null) {
        await objects.putBlob({ name }, mark.content);
      }
      if (info?.deleted !== true) {
        await objects.delete(name);
      }
    };
    return this.#write(take, mark, signal);
  }

  async *follow(signal: AbortSignal): AsyncGenerator<readonly CatalogModel[], void, undefined> {
    const until = AbortSignal.any([signal, this.#closing.signal]);
    let seen: string | undefined;
    let known: Models = new Map();
    while (!until.aborted) {
      try {
        const { created, state } = await this.#look(until);
        const present = [created, state.last_seq, state.messages].join();
        if (seen !== present) {
          const models = await this.#ask((objects) => readModels(objects, known), until);
          const changed = seen === undefined || !isEqual(known, models);
          seen = present;
          known = models;
          if (changed) {
            yield [...models.values()].toSorted((a, b) => (a.name < b.name ? -1 : 1));
          }
        }
      } catch (error) {
        if (!until.aborted) {
          this.#options.log.warn({ error: ClusterError.from(error) }, 'cannot read the model catalogue');
        }
      }
      await pause(lookMs, until);
    }
  }

  async fetch(
    { name, digest }: Pick<CatalogModel, 'name' | 'digest'>,
    directory: string,
    signal: AbortSignal,
  ): Promise<void> {
    if (await isDirectory(directory)) {
      return;
    }
    const files = await this.#ask((objects) => readModel(objects, { name, digest }, signal), signal);
    const partial = `${directory}.${randomUUID()}`;
    await mkdir(partial, { recursive: true });
    try {
      for (const [file, bytes] of files) {
        await writeFile(join(partial, file), bytes);
      }
      await mkdir(dirname(directory), { recursive: true });
      await rename(partial, directory);
    } catch (error) {
      await rm(partial, { recursive: true, force: true });
      if (!(await isDirectory(directory))) {
        throw error;
      }
    }
  }

  async close(): Promise<void> {
    this.#closing.abort(new ClusterError('canceled', 'the model catalogue is closed'));
    const leaving = this.#connecting.then((connection) => connection.close()).catch(() => undefined);
    // A connection that is still being made is closed when it arrives; nobody waits for it.
    await (this.#connected ? leaving : undefined);
  }

  /** The current store, with the replicas that this client asks for, and bounded once per store. */
  #look(signal: AbortSignal): Promise<StreamInfo> {
    return this.#ask(async (objects, manager) => {
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
  async #write<Result>(
    act: (objects: ObjectStore) => Promise<Result>,
    entry: Entry,
    signal: AbortSignal,
  ): Promise<Result> {
    const text = `the model catalogue could not store ${entry.name}`;
    const failure = await this.#ask((...store) => diskFailureOf(store, text), signal);
    if (failure !== undefined) {
      await this.#ask((_objects, manager) => this.#remake(manager, entry), signal).catch((error: unknown) => {
        this.#options.log.debug({ error: ClusterError.from(error) }, 'cannot recreate the model catalogue');
        signal.throwIfAborted();
        throw failure;
      });
    }
    try {
      return await this.#ask(act, signal);
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
  async #remake(manager: JetStreamManager, { name, metadata, content }: Entry): Promise<void> {
    const stream = jetstream(await this.#connecting, { timeout: requestTimeoutMs });
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
  async #ask<Result>(
    act: (objects: ObjectStore, manager: JetStreamManager) => Promise<Result>,
    signal: AbortSignal,
  ): Promise<Result> {
    const until = AbortSignal.any([signal, this.#closing.signal]);
    const once = async (): Promise<Result> => {
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
      throw new ClusterError('unavailable', `the model catalogue did not answer: ${messageOf(error)}`, {
        cause: error,
        detail: { retryAfterMs: 1_000 },
      });
    }
  }

  /** The store, made where it is missing. */
  async #open(): Promise<{ readonly objects: ObjectStore; readonly manager: JetStreamManager }> {
    const stream = jetstream(await this.#connecting, { timeout: requestTimeoutMs });
    const { replicas } = this.#options;
    return {
      objects: await new Objm(stream).create(modelBucket, { replicas, storage: StorageType.File }),
      manager: await stream.jetstreamManager(),
    };
  }
}

/** A model in its written form. */
interface Entry {
  readonly name: string;
  readonly metadata: Record<string, string>;
  readonly content: Uint8Array;
}

/** Fails with `invalid_argument` if names or sizes are out of bounds. */
function entryOf({ name, files, identity }: ModelFiles): Entry & { readonly digest: string } {
  const sorted = [...files].toSorted(([a], [b]) => (a < b ? -1 : 1));
  const described = sorted.map(([file, bytes]) => ({
    name: file,
    sha256: sha256Of(bytes),
    bytes: bytes.length,
  }));
  const problem = problemWith(name, described);
  if (problem !== undefined) {
    throw new ClusterError(
      'invalid_argument',
      `model ${JSON.stringify(name)} cannot be published: ${problem}`,
    );
  }
  const digest = digestOf(described, identity);
  const metadata = { digest, identity, files: JSON.stringify(described) };
  return { name, digest, metadata, content: Buffer.concat(sorted.map(([, bytes]) => bytes)) };
}

/** False if another process wrote the model after `previousRevision`. */
async function putEntry(
  objects: ObjectStore,
  { name, metadata, content }: Entry,
  previousRevision: number,
): Promise<boolean> {
  try {
    await objects.putBlob({ name, metadata }, content, { previousRevision });
    return true;
  } catch (error) {
    if (error instanceof JetStreamApiError && wrongLastSequenceCodes.has(error.code)) {
      return false;
    }
    throw error;
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

/** Models by name. */
type Models = ReadonlyMap<string, CatalogModel>;

/** The store's models, plus the known ones that the store lost. */
async function readModels(objects: ObjectStore, known: Models): Promise<Models> {
  const models = new Map<string, CatalogModel>();
  const add = ({ name, metadata, deleted }: ObjectInfo): void => {
    const { digest, identity = '' } = metadata ?? {};
    if (digest && !deleted) {
      models.set(name, { name, digest, identity, isStored: true });
    }
  };
  (await objects.list()).forEach(add);
  for (const [name, model] of known) {
    if (!models.has(name)) {
      // A list that was read during a replacement may lack the model.
      const info = await objects.info(name);
      if (info === null) {
        models.set(name, { ...model, isStored: false });
      } else {
        add(info);
      }
    }
  }
  return models;
}

/** The files of a model, each checked. */
async function readModel(
  objects: ObjectStore,
  { name, digest }: Pick<CatalogModel, 'name' | 'digest'>,
  signal: AbortSignal,
): Promise<ReadonlyMap<string, Uint8Array>> {
  const found = await objects.get(name);
  // The reader reports it too, and lives as long as anybody waits.
  found?.error.catch(() => undefined);
  if (found?.info.metadata?.['digest'] !== digest) {
    await found?.data.cancel();
    throw new ClusterError('not_found', `the catalogue has no model ${name} with digest ${digest}`);
  }
  const described = parseFiles(found.info);
  const content = await readAll(found.data, { name, bytes: found.info.size, signal });
  const files = new Map<string, Uint8Array>();
  let at = 0;
  for (const file of described) {
    const bytes = content.subarray(at, (at += file.bytes));
    if (sha256Of(bytes) !== file.sha256) {
      throw new ClusterError('data_loss', `model ${name}: ${file.name} does not match its digest`);
    }
    files.set(file.name, bytes);
  }
  return files;
}

async function readAll(
  data: ReadableStream<Uint8Array>,
  of: { readonly name: string; readonly bytes: number; readonly signal: AbortSignal },
): Promise<Uint8Array> {
  const reader = data.getReader();
  const content = new Uint8Array(of.bytes);
  let at = 0;
  try {
    for (;;) {
      const stalled = AbortSignal.timeout(stallMs);
      const { done, value } = await beforeAbort(reader.read(), AbortSignal.any([of.signal, stalled]));
      if (done) {
        break;
      }
      content.set(value, at);
      at += value.length;
    }
  } catch (error) {
    await reader.cancel().catch(() => undefined);
    of.signal.throwIfAborted();
    throw new ClusterError('unavailable', `model ${of.name} was replaced or cut short while it was read`, {
      cause: error,
    });
  }
  return content;
}

/**
 * The files according to an object's metadata; fails with `data_loss` if the metadata contradicts its digest or size.
 */
function parseFiles(info: ObjectInfo): readonly CatalogFile[] {
  const { name, size, metadata } = info;
  try {
    const files: readonly CatalogFile[] = JSON.parse(metadata?.['files'] ?? '');
    const bytes = files.reduce((sum, file) => sum + file.bytes, 0);
    if (
      digestOf(files, metadata?.['identity'] ?? '') === metadata?.['digest'] &&
      bytes === size &&
      problemWith(name, files) === undefined
    ) {
      return files;
    }
  } catch {
    // Reported below.
  }
  throw new ClusterError('data_loss', `model ${name}: the catalogue's entry contradicts itself`);
}

/** Why the catalogue rejects a model; undefined if it accepts it. */
function problemWith(name: string, files: readonly CatalogFile[]): string | undefined {
  const bytes = files.reduce((sum, file) => sum + file.bytes, 0);
  if (name === '' || Buffer.byteLength(name) > maxNameBytes) {
    return `its name must have 1 to ${maxNameBytes} bytes`;
  }
  if (files.length === 0 || files.length > maxFiles) {
    return `it must have 1 to ${maxFiles} files, not ${files.length}`;
  }
  if (bytes > maxModelBytes) {
    return `its files have ${bytes} bytes in total, over the limit of ${maxModelBytes}`;
  }
  const wrong = files.find((file) => !fileName.test(file.name));
  return wrong === undefined ? undefined : `${JSON.stringify(wrong.name)} is not a plain file name`;
}

function digestOf(files: readonly CatalogFile[], identity: string): string {
  const described = files.map(({ name, sha256, bytes }) => [name, sha256, bytes]);
  return sha256Of(Buffer.from(JSON.stringify([identity, described])));
}

function sha256Of(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex');
}

function isEqual(a: Models, b: Models): boolean {
  return (
    a.size === b.size &&
    [...a].every(([name, { digest, isStored }]) => {
      const other = b.get(name);
      return other?.digest === digest && other.isStored === isStored;
    })
  );
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

async function isDirectory(path: string): Promise<boolean> {
  return stat(path).then(
    (found) => found.isDirectory(),
    () => false,
  );
}
