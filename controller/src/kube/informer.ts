// A cache of one collection that stays current by list and watch, whatever happens to the connection. One loop, so
// there is never a second watch: list, follow until the server ends the watch (which it is asked to do every minute
// or so, after a bookmark), continue from the last version. A watch that outlives its own end is dead and is cut.
// Listeners get only keys.

import { beforeAbort, pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';

import { hasReason } from './api-status.ts';
import type { KubeClient, Selection } from './client.ts';
import { keyOf, type KubeObject, type ResourceType } from './resource.ts';

export interface InformerOptions<T> {
  readonly client: KubeClient;
  readonly type: ResourceType;
  readonly selection?: Selection;
  /**
   * Reads an object, which comes without `managedFields`, into what is cached; `before` is what was cached under its
   * key. If it throws, `before` stays and the error is logged; an invalid object that needs action should be parsed
   * into a value that says so.
   */
  readonly parse: (object: KubeObject, before: T | undefined) => T;
  /** Groups the values for `indexed`; undefined leaves one out. */
  readonly index?: (value: T) => string | undefined;
  readonly log: Log;
  readonly timing?: Partial<InformerTiming>;
}

export interface InformerTiming {
  /** The requested length of a watch, up to twice this. A dead connection is noticed then. */
  readonly watchSeconds: number;
  /** How long after its own end a watch counts as silent. */
  readonly graceMs: number;
  /** After the first failure in a row; doubles with each, with jitter. */
  readonly retryMinMs: number;
  readonly retryMaxMs: number;
}

const defaultTiming: InformerTiming = {
  watchSeconds: 30,
  graceMs: 5_000,
  retryMinMs: 200,
  retryMaxMs: 30_000,
};

/** After this many watches in a row that could not continue from the last version, the collection is listed again. */
const watchesBeforeList = 4;
/** A watch that ends sooner counts as failed, so that a server that ends each one at once is not flooded. */
const shortWatchMs = 500;

/** An informer's counters, for metrics and tests. */
export interface InformerCounts {
  readonly lists: number;
  readonly watches: number;
  readonly events: number;
  readonly failures: number;
}

/** A cache that stays current by itself until closed. Its age is `lastEventAgeMs`. */
export interface Informer<T> {
  /** Whether the cache was filled once. Before that, an absent object means nothing. */
  readonly synced: boolean;
  /** Time since the server last sent anything: an answer, an event, a bookmark, the end of a watch. */
  readonly lastEventAgeMs: number;
  readonly counts: InformerCounts;
  get(key: string): T | undefined;
  list(): Iterable<T>;
  /** The values whose index is this. */
  indexed(index: string): readonly T[];
  /**
   * Calls back with the key of every added, changed or removed object, and at first with all. Returns a function that
   * unsubscribes.
   */
  onChange(listener: (key: string) => void): () => void;
  /** Waits for the first fill. */
  whenSynced(signal: AbortSignal): Promise<void>;
  close(): Promise<void>;
}

/** Starts an informer; it is filled when `whenSynced` resolves. */
export function startInformer<T>(options: InformerOptions<T>): Informer<T> {
  return new ListWatchInformer(options);
}

interface Entry<T> {
  readonly resourceVersion: string;
  readonly value: T;
  readonly index: string | undefined;
}

class ListWatchInformer<T> implements Informer<T> {
  readonly #options: InformerOptions<T>;
  readonly #timing: InformerTiming;
  readonly #entries = new Map<string, Entry<T>>();
  readonly #indexes = new Map<string, Map<string, T>>();
  readonly #listeners = new Set<(key: string) => void>();
  readonly #closing = new AbortController();
  readonly #firstFill = Promise.withResolvers<void>();
  readonly #running: Promise<void>;
  readonly #counts = { lists: 0, watches: 0, events: 0, failures: 0 };
  /** Where the next watch continues; undefined: list first. */
  #version: string | undefined;
  #synced = false;
  #lastEventMs = performance.now();

  constructor(options: InformerOptions<T>) {
    this.#options = options;
    this.#timing = { ...defaultTiming, ...options.timing };
    // Closing before the first fill must not cause an unhandled rejection.
    this.#firstFill.promise.catch(() => undefined);
    this.#running = this.#run();
  }

  get synced(): boolean {
    return this.#synced;
  }

  get lastEventAgeMs(): number {
    return performance.now() - this.#lastEventMs;
  }

  get counts(): InformerCounts {
    return { ...this.#counts };
  }

  get(key: string): T | undefined {
    return this.#entries.get(key)?.value;
  }

  *list(): Iterable<T> {
    for (const { value } of this.#entries.values()) {
      yield value;
    }
  }

  indexed(index: string): readonly T[] {
    return [...(this.#indexes.get(index)?.values() ?? [])];
  }

  onChange(listener: (key: string) => void): () => void {
    this.#listeners.add(listener);
    for (const key of this.#entries.keys()) {
      this.#tell(listener, key);
    }
    return () => this.#listeners.delete(listener);
  }

  async whenSynced(signal: AbortSignal): Promise<void> {
    await beforeAbort(this.#firstFill.promise, signal);
  }

  async close(): Promise<void> {
    const canceled = new ClusterError('canceled', 'the informer is closed');
    this.#closing.abort(canceled);
    this.#firstFill.reject(canceled);
    await this.#running;
  }

  async #run(): Promise<void> {
    const closing = this.#closing.signal;
    let failures = 0;
    while (!closing.aborted) {
      const startedMs = performance.now();
      try {
        this.#version ??= await this.#fill();
        await this.#follow(this.#version);
        failures = performance.now() - startedMs < shortWatchMs ? failures + 1 : 0;
      } catch (error) {
        if (closing.aborted) {
          return;
        }
        // A watch that worked for a while and was cut is a first failure.
        failures = performance.now() - startedMs < shortWatchMs ? failures + 1 : 1;
        this.#counts.failures += 1;
        this.#fail(ClusterError.from(error), failures);
      }
      await pause(this.#retryAfterMs(failures), closing);
    }
  }

  #fail(error: ClusterError, failures: number): void {
    const { type, log } = this.#options;
    const expired = hasReason(error, 'Expired');
    // Any other rejection of a watch may be due to its version, for example after a restore of the store.
    if (expired || error.code !== 'unavailable' || failures >= watchesBeforeList) {
      this.#version = undefined;
    }
    const level = expired || failures < watchesBeforeList ? 'info' : 'warn';
    log[level]({ error, resource: type.plural, failures }, 'list or watch failed');
  }

  #retryAfterMs(failures: number): number {
    const { retryMinMs, retryMaxMs } = this.#timing;
    return failures === 0
      ? 0
      : Math.min(retryMinMs * 2 ** (failures - 1), retryMaxMs) * (0.5 + Math.random());
  }

  /** Lists, applies the differences, and returns the version from which a watch continues. */
  async #fill(): Promise<string> {
    const { client, type, selection } = this.#options;
    this.#counts.lists += 1;
    const { items, resourceVersion } = await client.list(type, selection ?? {}, this.#closing.signal);
    this.#lastEventMs = performance.now();
    const seen = new Set<string>();
    for (const object of items) {
      seen.add(keyOf(object));
      this.#put(object);
    }
    for (const key of [...this.#entries.keys()].filter((known) => !seen.has(known))) {
      this.#remove(key);
    }
    this.#synced = true;
    this.#firstFill.resolve();
    return resourceVersion;
  }

  /** Follows one watch to its end. */
  async #follow(resourceVersion: string): Promise<void> {
    const { client, type, selection } = this.#options;
    const { watchSeconds, graceMs } = this.#timing;
    const timeoutSeconds = Math.ceil(watchSeconds * (1 + Math.random()));
    const watching = new AbortController();
    const cut = (reason: unknown): void => watching.abort(reason);
    const close = (): void => cut(this.#closing.signal.reason);
    this.#closing.signal.addEventListener('abort', close, { once: true });
    const silent = setTimeout(
      () => cut(new ClusterError('unavailable', `a watch of ${type.plural} did not end in time`)),
      timeoutSeconds * 1000 + graceMs,
    );
    try {
      this.#counts.watches += 1;
      const options = { ...selection, resourceVersion, timeoutSeconds };
      for await (const event of client.watch(type, options, watching.signal)) {
        this.#lastEventMs = performance.now();
        if (event.type === 'BOOKMARK') {
          this.#version = event.resourceVersion;
          continue;
        }
        this.#counts.events += 1;
        if (event.type === 'DELETED') {
          this.#remove(keyOf(event.object));
        } else {
          this.#put(event.object);
        }
        this.#version = event.object.metadata.resourceVersion;
      }
      this.#lastEventMs = performance.now();
    } finally {
      clearTimeout(silent);
      this.#closing.signal.removeEventListener('abort', close);
    }
  }

  #put(object: KubeObject): void {
    const key = keyOf(object);
    const { resourceVersion } = object.metadata;
    const before = this.#entries.get(key);
    if (before?.resourceVersion === resourceVersion) {
      return;
    }
    // The API server's book-keeping of who set which field: often larger than the object.
    delete (object.metadata as { managedFields?: unknown }).managedFields;
    let value: T;
    try {
      value = this.#options.parse(object, before?.value);
    } catch (error) {
      this.#options.log.error(
        { error: ClusterError.from(error), resource: this.#options.type.plural, key },
        'cannot parse an object',
      );
      return;
    }
    const index = this.#options.index?.(value);
    this.#unindex(key, before);
    this.#entries.set(key, { resourceVersion, value, index });
    if (index !== undefined) {
      const values = this.#indexes.get(index) ?? new Map<string, T>();
      this.#indexes.set(index, values.set(key, value));
    }
    this.#tellAll(key);
  }

  #remove(key: string): void {
    const entry = this.#entries.get(key);
    if (entry !== undefined) {
      this.#unindex(key, entry);
      this.#entries.delete(key);
      this.#tellAll(key);
    }
  }

  #unindex(key: string, entry: Entry<T> | undefined): void {
    if (entry?.index === undefined) {
      return;
    }
    const values = this.#indexes.get(entry.index);
    values?.delete(key);
    if (values?.size === 0) {
      this.#indexes.delete(entry.index);
    }
  }

  #tellAll(key: string): void {
    for (const listener of this.#listeners) {
      this.#tell(listener, key);
    }
  }

  #tell(listener: (key: string) => void, key: string): void {
    try {
      listener(key);
    } catch (error) {
      this.#options.log.error({ error: ClusterError.from(error), key }, 'a listener failed');
    }
  }
}
