// The model catalogue in a NATS object store: one object a model, the digests of its files in its metadata. The store
// shows an object only once it is complete, so a reader never sees half a model. The store itself is in model-store.ts,
// what an object holds in model-entry.ts.

import { randomUUID } from 'node:crypto';
import { mkdir, readdir, readFile, rename, rm, stat, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';

import type { ObjectInfo, ObjectStore } from '@nats-io/obj';

import { beforeAbort, pause } from '../../process/abort.ts';
import { ClusterError } from '../../process/errors.ts';
import type { Log } from '../../process/log.ts';
import type { CatalogModel, ModelCatalog, ModelFiles } from '../model-catalog.ts';
import { isTaken } from './errors.ts';
import type { NatsLink } from './link.ts';
import { entryOf, parseFiles, sha256Of, type ModelEntry } from './model-entry.ts';
import { ModelStore, type ModelStoreOptions } from './model-store.ts';

/** Opens the catalogue over a link. Nothing to close: iterations end with the link. */
export function createModelCatalog(link: NatsLink, options: ModelStoreOptions): ModelCatalog {
  return new NatsModelCatalog(link, options);
}

/** If the next chunk takes longer than this, the files were replaced while they were read. */
const stallMs = 10_000;
/**
 * Followers compare the store's last sequence with the one they know at this pace: a request of a few hundred bytes
 * that cannot go silent, as a subscription can.
 */
const lookMs = 1_000;
const publishAttempts = 5;

class NatsModelCatalog implements ModelCatalog {
  readonly #link: NatsLink;
  readonly #store: ModelStore;
  readonly #log: Log;

  constructor(link: NatsLink, options: ModelStoreOptions) {
    this.#link = link;
    this.#store = new ModelStore(link, options);
    this.#log = options.log;
  }

  async publish({ name, files, identity }: ModelFiles, signal: AbortSignal): Promise<CatalogModel> {
    const entry = entryOf({ name, files, identity });
    const put = async (objects: ObjectStore): Promise<boolean> => {
      const last = await objects.info(name);
      const isThere = last?.deleted === false && last.metadata?.['digest'] === entry.digest;
      return isThere || (await putEntry(objects, entry, last?.revision ?? 0));
    };
    for (let attempt = 0; attempt < publishAttempts; attempt++) {
      if (await this.#store.write(put, entry, signal)) {
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
    await this.#store.write(put, entry, signal);
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
    return this.#store.write(take, mark, signal);
  }

  async *follow(signal: AbortSignal): AsyncGenerator<readonly CatalogModel[], void, undefined> {
    const until = AbortSignal.any([signal, this.#link.closing]);
    let seen: string | undefined;
    let known: Models = new Map();
    while (!until.aborted) {
      try {
        const { created, state } = await this.#store.look(until);
        const present = [created, state.last_seq, state.messages].join();
        if (seen !== present) {
          const models = await this.#store.ask((objects) => readModels(objects, known), until);
          const changed = seen === undefined || !isEqual(known, models);
          seen = present;
          known = models;
          if (changed) {
            yield [...models.values()].toSorted((a, b) => (a.name < b.name ? -1 : 1));
          }
        }
      } catch (error) {
        if (!until.aborted) {
          this.#log.warn({ error: ClusterError.from(error) }, 'cannot read the model catalogue');
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
    const files = await this.#store.ask((objects) => readModel(objects, { name, digest }, signal), signal);
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
}

/** False if another process wrote the model after `previousRevision`. */
async function putEntry(
  objects: ObjectStore,
  { name, metadata, content }: ModelEntry,
  previousRevision: number,
): Promise<boolean> {
  try {
    await objects.putBlob({ name, metadata }, content, { previousRevision });
    return true;
  } catch (error) {
    if (isTaken(error)) {
      return false;
    }
    throw error;
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

function isEqual(a: Models, b: Models): boolean {
  return (
    a.size === b.size &&
    [...a].every(([name, { digest, isStored }]) => {
      const other = b.get(name);
      return other?.digest === digest && other.isStored === isStored;
    })
  );
}

async function isDirectory(path: string): Promise<boolean> {
  return stat(path).then(
    (found) => found.isDirectory(),
    () => false,
  );
}
