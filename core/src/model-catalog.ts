// Which models the cluster has, and the small files of each that a gateway needs: tokenizer and configuration, never
// weights. One object a model in the NATS object store MODELS, the digests of its files in its metadata: the store shows
// an object only once all of it is there, so a reader never sees half a model. Does not know what the files mean.

import { createHash, randomUUID } from 'node:crypto';
import { mkdir, rename, rm, stat, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';

import {
  jetstream,
  JetStreamApiError,
  StorageType,
  type JetStreamManager,
  type StreamInfo,
} from '@nats-io/jetstream';
import { Objm, type ObjectInfo, type ObjectStore } from '@nats-io/obj';

import { beforeAbort, pause } from './abort.ts';
import { ClusterError } from './errors.ts';
import type { Log } from './log.ts';
import { connectNats, type NatsServers } from './nats-connect.ts';
import { modelBucket } from './subjects.ts';

/** What a catalogue needs. `replicas` of the store: whoever asks for more raises it, so a writer may say 1. */
export interface ModelCatalogOptions extends NatsServers {
  readonly replicas: number;
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
}

/**
 * The catalogue. Methods wait for the server until their signal fires and fail with `unavailable` where it does not
 * answer. Close it to end its iterations and leave the server.
 */
export interface ModelCatalog {
  /**
   * Puts a model in, or its new files in place of the old ones, in one act; equal files are left as they are. Fails with
   * `invalid_argument` where names or sizes are out of bounds, `aborted` where other writers of the model kept winning.
   */
  publish(model: ModelFiles, signal: AbortSignal): Promise<CatalogModel>;
  /** Takes a model out; one that is not there is taken out too, for those who knew it from a store that was lost. */
  remove(name: string, signal: AbortSignal): Promise<void>;
  /**
   * The whole set, ordered by name, first as it is and again within about a second of a change. A server that comes back
   * empty takes nothing away: what was known stays until it is published again or removed. To publish it again is
   * the writer's business, since whoever begins to follow then knows nothing of it.
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
    const content = Buffer.concat(sorted.map(([, bytes]) => bytes));
    const put = async (objects: ObjectStore): Promise<boolean> => {
      const last = await objects.info(name);
      if (last?.deleted === false && last.metadata?.['digest'] === digest) {
        return true;
      }
      try {
        await objects.putBlob({ name, metadata }, content, { previousRevision: last?.revision ?? 0 });
        return true;
      } catch (error) {
        if (error instanceof JetStreamApiError && wrongLastSequenceCodes.has(error.code)) {
          return false;
        }
        throw error;
      }
    };
    for (let attempt = 0; attempt < publishAttempts; attempt++) {
      if (await this.#ask(put, signal)) {
        return { name, digest, identity };
      }
    }
    throw new ClusterError(
      'aborted',
      `model ${name} was not published: others published it at the same time`,
    );
  }

  remove(name: string, signal: AbortSignal): Promise<void> {
    return this.#ask(async (objects) => {
      const info = await objects.info(name);
      if (info === null) {
        await objects.putBlob({ name }, null);
      }
      if (info?.deleted !== true) {
        await objects.delete(name);
      }
    }, signal);
  }

  async *follow(signal: AbortSignal): AsyncGenerator<readonly CatalogModel[], void, undefined> {
    const until = AbortSignal.any([signal, this.#closing.signal]);
    let seen: { readonly storeId: string; readonly sequence: number } | undefined;
    let known: Models = new Map();
    /** Known from a store that was lost, while the present one has no word of them. */
    let carried: Models = new Map();
    while (!until.aborted) {
      try {
        const { created: storeId, state } = await this.#look(until);
        if (seen?.storeId !== storeId || seen.sequence !== state.last_seq) {
          const lost = seen !== undefined && seen.storeId !== storeId ? known : carried;
          const present = await this.#ask(listModels, until);
          carried = await this.#ask((objects) => withoutWord(objects, lost, present), until);
          const models = new Map([...carried, ...present]);
          const changed = seen === undefined || !isEqual(known, models);
          seen = { storeId, sequence: state.last_seq };
          known = models;
          if (changed) {
            yield [...models]
              .map(([name, model]) => ({ name, ...model }))
              .toSorted((a, b) => (a.name < b.name ? -1 : 1));
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

  /** The store as it is, with as many copies as this side asks for. */
  #look(signal: AbortSignal): Promise<StreamInfo> {
    return this.#ask(async (objects, manager) => {
      const { streamInfo } = await objects.status();
      const { config } = streamInfo;
      return config.num_replicas < this.#options.replicas
        ? manager.streams.update(config.name, { num_replicas: this.#options.replicas })
        : streamInfo;
    }, signal);
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

/** A store's models by name. */
type Models = ReadonlyMap<string, Omit<CatalogModel, 'name'>>;

async function listModels(objects: ObjectStore): Promise<Models> {
  const infos = await objects.list();
  return new Map(
    infos.flatMap(({ name, metadata }) => {
      const { digest, identity = '' } = metadata ?? {};
      return digest ? [[name, { digest, identity }]] : [];
    }),
  );
}

/** Those of a lost store's models that the present store neither has nor has removed. */
async function withoutWord(objects: ObjectStore, lost: Models, present: Models): Promise<Models> {
  const kept = new Map<string, Omit<CatalogModel, 'name'>>();
  for (const [name, model] of lost) {
    if (!present.has(name) && (await objects.info(name)) === null) {
      kept.set(name, model);
    }
  }
  return kept;
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
  return a.size === b.size && [...a].every(([name, { digest }]) => b.get(name)?.digest === digest);
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
