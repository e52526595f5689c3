// Which models the cluster has, and the small files of each that a gateway needs: tokenizer and configuration, never
// weights. One object a model in the NATS object store MODELS, the digests of its files in its metadata: the store shows
// an object only once all of it is there, so a reader never sees half a model. Does not know what the files mean.

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
 * What a catalogue needs. `replicas` of the store: whoever asks for more raises it, so a writer may say 1. Who follows with
 * `maxBytes` bounds the store.
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
  /** Of the groups that are to run it: model-identity.ts. Empty: nobody said. */
  readonly identity: string;
}

/** A model of the catalogue. Another digest is another content. */
export interface CatalogModel {
  readonly name: string;
  /** SHA-256 of the files' names, sizes and digests, and of the identity; hex. */
  readonly digest: string;
  readonly identity: string;
  /** False: known from before the store lost it, and neither published again nor removed since. */
  readonly isStored: boolean;
}

/**
 * The catalogue. Methods wait for the server until their signal fires and fail with `unavailable` where it does not
 * answer. Close it to end its iterations and leave the server.
 */
export interface ModelCatalog {
  /**
   * Puts a model in, or its new files in place of the old ones, in one act; equal files are left as they are. Fails with
   * `invalid_argument` where names or sizes are out of bounds, `aborted` where other writers of the model kept winning,
   * `resource_exhausted` where the store has no room for it.
   */
  publish(model: ModelFiles, signal: AbortSignal): Promise<CatalogModel>;
  /**
   * Publishes what `fetch` brought into a directory once more, the same in all. Where the store has any word of the model,
   * that stands. Fails with `data_loss` where the files are not what the digest says.
   */
  restore(model: CatalogModel, directory: string, signal: AbortSignal): Promise<void>;
  /** Takes a model out; one that is not there is taken out too, for those who knew it from a store that was lost. */
  remove(name: string, signal: AbortSignal): Promise<void>;
  /**
   * The whole set, ordered by name, first as it is and again within about a second of a change. A store that is deleted,
   * emptied or lost takes nothing away: what was known stays, as not stored, until it is published again or removed. To
   * publish it again is for those who have its files: who begins to follow then knows nothing of it.
   */
  follow(signal: AbortSignal): AsyncIterable<readonly CatalogModel[]>;
  /**
   * Brings a model's files into a directory that appears whole, or not at all; one that is there already is taken for
   * it. Fails with `not_found` where the catalogue has no model of this name and digest (any more), `data_loss` where the
   * files are not what their digests say.
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

/** How long the server has to answer one request. */
const requestTimeoutMs = 5_000;
/** Files whose next piece takes longer than this were replaced while they were read. */
const stallMs = 10_000;
/**
 * Followers compare the store's last sequence with the one they know at this pace: a request of a few hundred bytes that
 * cannot go silent, as a subscription can.
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
  /** When the store that was bounded last was made. */
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
      `model ${name} was not published: others published it at the same time`,
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
      throw new ClusterError('data_loss', `model ${name}: its files are not what their digest says any more`);
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
          this.#options.log.warn({ error: ClusterError.from(error) }, 'model catalogue not read');
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
    // A connection that has not come yet is closed when it comes; nobody need wait for it.
    await (this.#connected ? leaving : undefined);
  }

  /** The store as it is, with as many copies as this side asks for, and bounded once it is known to be another one. */
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

  /** Runs an act that writes an entry, on a store that can write. */
  async #write<Result>(
    act: (objects: ObjectStore) => Promise<Result>,
    entry: Entry,
    signal: AbortSignal,
  ): Promise<Result> {
    const text = `the model catalogue did not store ${entry.name}`;
    const failure = await this.#ask((...store) => diskFailureOf(store, text), signal);
    if (failure !== undefined) {
      await this.#ask((_objects, manager) => this.#remake(manager, entry), signal).catch((error: unknown) => {
        this.#options.log.debug({ error: ClusterError.from(error) }, 'model catalogue not made anew');
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
   * A store whose server could not write for a moment never will again, until the server is restarted. It is made anew where
   * a store beside it takes the entry; what else it held is published again by those who have it.
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
    // Somebody else may have made it anew meanwhile.
    if ((await diskFailureOf([objects, manager])) !== undefined) {
      this.#options.log.error('model catalogue stores nothing: it is made anew');
      await objects.destroy();
      this.#opened = undefined;
    }
  }

  /** Runs an act on the store; once more where the store was not there any more, as on a server that came back empty. */
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
      throw new ClusterError('unavailable', `the model catalogue does not answer: ${messageOf(error)}`, {
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

/** A model as it is written. */
interface Entry {
  readonly name: string;
  readonly metadata: Record<string, string>;
  readonly content: Uint8Array;
}

/** Fails with `invalid_argument` where names or sizes are out of bounds. */
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

/** False where somebody else wrote the model after `previousRevision`. */
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

/** Why a store on one server cannot write, though it answers; undefined where it can. Those on several repair themselves. */
async function diskFailureOf(
  [objects, manager]: readonly [ObjectStore, JetStreamManager],
  text?: string,
): Promise<QueueRefusal | undefined> {
  const { streamInfo } = await objects.status();
  const { name, num_replicas: replicas } = streamInfo.config;
  try {
    // Purging nothing fails like all that writes, and at once.
    await manager.streams.purge(name, { filter: modelTrialSubject });
    return undefined;
  } catch (error) {
    const refusal = refusalOf(error, text);
    return replicas === 1 && refusal.reason === 'disk_failed' ? refusal : undefined;
  }
}

/** Models by name. */
type Models = ReadonlyMap<string, CatalogModel>;

/** A store's models, and those of the known ones that it neither has nor has removed. */
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
      // A list that was read while a model was replaced may lack it.
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
  // Told by the reader too, who is there for as long as anybody waits.
  found?.error.catch(() => undefined);
  if (found?.info.metadata?.['digest'] !== digest) {
    await found?.data.cancel();
    throw new ClusterError('not_found', `the catalogue has no model ${name} of digest ${digest}`);
  }
  const described = parseFiles(found.info);
  const content = await readAll(found.data, { name, bytes: found.info.size, signal });
  const files = new Map<string, Uint8Array>();
  let at = 0;
  for (const file of described) {
    const bytes = content.subarray(at, (at += file.bytes));
    if (sha256Of(bytes) !== file.sha256) {
      throw new ClusterError('data_loss', `model ${name}: ${file.name} is not what its digest says`);
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
    throw new ClusterError('unavailable', `model ${of.name} changed or broke off while it was read`, {
      cause: error,
    });
  }
  return content;
}

/** What an object's metadata says of its files; fails with `data_loss` where it does not fit its digest or its size. */
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
    // Said below.
  }
  throw new ClusterError('data_loss', `model ${name}: the catalogue's entry contradicts itself`);
}

/** Why a model cannot be in the catalogue; undefined where it can. */
function problemWith(name: string, files: readonly CatalogFile[]): string | undefined {
  const bytes = files.reduce((sum, file) => sum + file.bytes, 0);
  if (name === '' || Buffer.byteLength(name) > maxNameBytes) {
    return `its name must have 1 to ${maxNameBytes} bytes`;
  }
  if (files.length === 0 || files.length > maxFiles) {
    return `it must have 1 to ${maxFiles} files, not ${files.length}`;
  }
  if (bytes > maxModelBytes) {
    return `its files have ${bytes} bytes together, over the limit of ${maxModelBytes}`;
  }
  const wrong = files.find((file) => !fileName.test(file.name));
  return wrong === undefined ? undefined : `${JSON.stringify(wrong.name)} is no plain file name`;
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
