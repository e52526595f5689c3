// The models that this gateway serves now: the configured ones, which stay, and those of the catalogue, which are
// added, replaced and removed while it runs. Owns their files, their tokenizers and the lifetime of each dispatcher;
// knows nothing of requests for a model.

import { rm } from 'node:fs/promises';
import { join } from 'node:path';

import { beforeAbort, pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';
import type { CatalogModel, ModelCatalog } from '@mimo/core/bus/model-catalog';
import { tokenFromName } from '@mimo/core/bus/nats/subjects';
import type { Heartbeat } from '@mimo/proto/worker';

import { loadModel, type ServedModel } from './models.ts';
import type { PromptEncoderOptions } from './prompts/prompt-encoder.ts';
import type { Requests } from './requests.ts';

/** The set's dependencies. */
export interface ServedModelsParts {
  /** The configured models: the catalogue never replaces or removes them. */
  readonly own: readonly ServedModel[];
  readonly prompts: PromptEncoderOptions;
  readonly requests: Pick<Requests, 'countOf' | 'failWaiting' | 'endStranded'>;
  /** The groups of a model that accept requests. */
  readonly openGroups: (model: string) => readonly Heartbeat[];
  /** Runs a model's background work until the signal fires. Called once while the model is served. */
  readonly run: (model: string, signal: AbortSignal) => Promise<void>;
  readonly log: Log;
}

interface CatalogServed {
  readonly model: ServedModel;
  readonly digest: string;
  readonly directory: string;
}

interface Life {
  readonly stop: AbortController;
  readonly ended: Promise<void>;
}

/** How often to look for removed models without requests; changes of the catalogue are handled at once. */
const tickMs = 500;
/** The wait before the next try after a model could not be fetched or read. */
const retryMs = 5_000;

/** The set. Close it once its requests have ended. */
export class ServedModels {
  readonly #parts: ServedModelsParts;
  readonly #own: ReadonlyMap<string, ServedModel>;
  readonly #fetched = new Map<string, CatalogServed>();
  /** Earlier versions with groups that still serve, the newest first. */
  readonly #former = new Map<string, readonly CatalogServed[]>();
  readonly #lives = new Map<string, Life>();
  readonly #retryAtMs = new Map<string, number>();
  readonly #leaving = new Set<Promise<void>>();
  readonly #closing = new AbortController();
  readonly #caughtUp = Promise.withResolvers<void>();
  /** Undefined: not read yet. */
  #wanted: ReadonlyMap<string, CatalogModel> | undefined;
  #wake = new AbortController();
  #followed = false;

  constructor(parts: ServedModelsParts) {
    this.#parts = parts;
    this.#own = new Map(parts.own.map((model) => [model.name, model]));
    parts.own.forEach(({ name }) => this.#begin(name));
  }

  get(name: string): ServedModel | undefined {
    return this.#own.get(name) ?? this.#fetched.get(name)?.model;
  }

  /** The versions loaded under a name, the newest first: an earlier version serves for as long as its groups do. */
  versions(name: string): readonly [ServedModel, ...ServedModel[]] | undefined {
    const newest = this.get(name);
    return newest === undefined
      ? undefined
      : [newest, ...(this.#former.get(name) ?? []).map(({ model }) => model)];
  }

  all(): readonly ServedModel[] {
    return [...this.#own.values(), ...[...this.#fetched.values()].map(({ model }) => model)];
  }

  /** Models of the catalogue that are not served yet. */
  get pending(): readonly string[] {
    return [...(this.#wanted?.keys() ?? [])].filter((name) => this.get(name) === undefined);
  }

  /** Whether a name that is not served may be soon: the catalogue has it, or was not read yet. */
  mayCome(name: string): boolean {
    return this.#followed && (this.#wanted === undefined || this.#wanted.has(name));
  }

  /**
   * Follows the catalogue until the signal fires, and keeps the fetched files in `directory`, which nothing else uses.
   * A model that cannot be fetched or read is retried every few seconds; the others are served meanwhile.
   */
  async follow(catalog: ModelCatalog, directory: string, signal: AbortSignal): Promise<void> {
    this.#followed = true;
    const read = async (): Promise<void> => {
      for await (const models of catalog.follow(signal)) {
        this.#wanted = new Map(models.map((model) => [model.name, model]));
        this.#wake.abort();
      }
    };
    const reading = read();
    while (!signal.aborted) {
      this.#wake = new AbortController();
      await this.#apply(catalog, directory, signal);
      await pause(tickMs, AbortSignal.any([signal, this.#wake.signal]));
    }
    await reading;
  }

  /**
   * Resolves once every model of the catalogue's first list is served or has failed; rejects when the signal fires.
   */
  caughtUp(signal: AbortSignal): Promise<void> {
    return beforeAbort(this.#caughtUp.promise, signal);
  }

  /** Ends every dispatcher and tokenizer. */
  async close(): Promise<void> {
    this.#closing.abort();
    await Promise.all([...this.#lives.values()].map(({ ended }) => ended));
    const loaded = this.all().flatMap(({ name }) => this.versions(name) ?? []);
    await Promise.all(loaded.map(({ encoder }) => encoder.close()));
    await Promise.all(this.#leaving);
  }

  async #apply(catalog: ModelCatalog, directory: string, signal: AbortSignal): Promise<void> {
    const wanted = this.#wanted;
    if (wanted === undefined) {
      return;
    }
    for (const model of wanted.values()) {
      const isServed = this.#own.has(model.name) || this.#fetched.get(model.name)?.digest === model.digest;
      const isDue = performance.now() >= (this.#retryAtMs.get(model.name) ?? 0);
      if (!isServed && isDue && !signal.aborted) {
        await this.#load(catalog, model, { directory, signal });
      } else if (!model.isStored && isDue && !signal.aborted) {
        await this.#restore(catalog, model, signal);
      }
    }
    for (const [name, served] of this.#fetched) {
      if (!wanted.has(name)) {
        this.#fetched.delete(name);
        this.#retire(served);
        this.#keepFormer(name, () => false);
        this.#parts.log.info({ model: name }, 'model removed');
      }
    }
    for (const [name, { model }] of this.#fetched) {
      const open = new Set(this.#parts.openGroups(name).map(({ identity }) => identity));
      this.#keepFormer(name, ({ identity }) => identity !== '' && open.has(identity));
      if (model.identity !== '') {
        this.#parts.requests.endStranded(name, new Set([...open, model.identity]));
      }
    }
    this.#sweep();
    this.#caughtUp.resolve();
  }

  async #load(
    catalog: ModelCatalog,
    { name, digest, identity }: CatalogModel,
    to: { readonly directory: string; readonly signal: AbortSignal },
  ): Promise<void> {
    const { log } = this.#parts;
    const directory = join(to.directory, `${tokenFromName(name)}-${digest.slice(0, 16)}`);
    try {
      await catalog.fetch({ name, digest }, directory, to.signal);
      const model = await loadModel({ name, directory, identity }, this.#parts.prompts);
      if (this.#closing.signal.aborted) {
        await model.encoder.close();
        return;
      }
      const former = this.#fetched.get(name);
      this.#fetched.set(name, { model, digest, directory });
      this.#retryAtMs.delete(name);
      if (former !== undefined) {
        this.#former.set(name, [former, ...(this.#former.get(name) ?? [])]);
      }
      this.#begin(name);
      log.info({ model: name, digest }, former === undefined ? 'model added' : 'model changed');
    } catch (error) {
      await rm(directory, { recursive: true, force: true });
      if (!to.signal.aborted) {
        this.#retryAtMs.set(name, performance.now() + retryMs);
        log.error({ error: ClusterError.from(error), model: name, digest }, 'cannot serve a model');
      }
    }
  }

  /** Publishes again, from the fetched files, a model that the catalogue has lost. */
  async #restore(catalog: ModelCatalog, model: CatalogModel, signal: AbortSignal): Promise<void> {
    const { log } = this.#parts;
    const { name, digest } = model;
    const here = this.#fetched.get(name);
    if (here?.digest !== digest) {
      return;
    }
    // The catalogue reports it as stored within a second or two.
    this.#retryAtMs.set(name, performance.now() + retryMs);
    try {
      await catalog.restore(model, here.directory, signal);
      log.warn({ model: name, digest }, 'the catalogue had lost the model: published it again');
    } catch (error) {
      if (!signal.aborted) {
        log.error({ error: ClusterError.from(error), model: name, digest }, 'cannot publish the model again');
      }
    }
  }

  /** Starts a model's dispatcher, unless it still runs: a model may return before its last request has ended. */
  #begin(name: string): void {
    if (!this.#lives.has(name)) {
      const stop = new AbortController();
      const signal = AbortSignal.any([stop.signal, this.#closing.signal]);
      const ended = this.#parts.run(name, signal).finally(() => this.#lives.delete(name));
      this.#lives.set(name, { stop, ended });
    }
  }

  /** Retires the earlier versions of a model, except those to keep. */
  #keepFormer(name: string, isKept: (model: ServedModel) => boolean): void {
    const former = this.#former.get(name) ?? [];
    const kept = former.filter(({ model }) => isKept(model));
    former.filter((served) => !kept.includes(served)).forEach((served) => this.#retire(served));
    if (kept.length === 0) {
      this.#former.delete(name);
    } else {
      this.#former.set(name, kept);
    }
  }

  /**
   * Running requests of a removed model finish, and keep a dispatcher in case their group is lost; waiting ones fail.
   */
  #sweep(): void {
    for (const [name, { stop }] of this.#lives) {
      if (this.get(name) === undefined) {
        const removed = new ClusterError('not_found', `model ${name} was removed while the request waited`);
        this.#parts.requests.failWaiting(name, removed);
        if (this.#parts.requests.countOf(name) === 0) {
          stop.abort();
        }
      }
    }
  }

  /** Ends a tokenizer once its waiting prompts are read, then deletes its files. */
  #retire({ model, directory }: CatalogServed): void {
    const leaving = model.encoder
      .retire()
      .then(() => rm(directory, { recursive: true, force: true }))
      .finally(() => this.#leaving.delete(leaving));
    this.#leaving.add(leaving);
  }
}
