// The drain marks in a NATS key-value bucket: one key a model, its value the whole map of marked groups, changed by
// compare-and-set. So a reader gets all marks from one value, and leftovers are bounded by the number of models.

import type { KvEntry } from '@nats-io/kv';

import { beforeAbort, pause } from '../../process/abort.ts';
import { ClusterError } from '../../process/errors.ts';
import type { Log } from '../../process/log.ts';
import type { DrainMark, DrainMarks, MarkedGroups } from '../drain-marks.ts';
import { isTaken, unavailable } from './errors.ts';
import type { NatsLink } from './link.ts';
import type { NatsStreams } from './streams.ts';
import { tokenFromName } from './subjects.ts';

/** There are few writers: one controller holds the lease. So many lost races in a row are a fault. */
const maxAttempts = 20;
const retryMs = 500;

/** What the marks need. */
export interface NatsDrainMarksOptions {
  readonly link: NatsLink;
  readonly streams: NatsStreams;
  readonly log: Log;
}

/** The marks behind one link. Nothing to close: iterations end with the link. */
export class NatsDrainMarks implements DrainMarks {
  readonly #link: NatsLink;
  readonly #streams: NatsStreams;
  readonly #log: Log;

  constructor({ link, streams, log }: NatsDrainMarksOptions) {
    this.#link = link;
    this.#streams = streams;
    this.#log = log;
  }

  async mark(model: string, group: string, { sinceUnixMs }: DrainMark): Promise<void> {
    await this.#change(model, (marks) => !marks.has(group) && marks.set(group, { sinceUnixMs }) === marks);
  }

  async clear(model: string, group: string): Promise<void> {
    await this.#change(model, (marks) => marks.delete(group));
  }

  /** Changes the marks of a model. `change` returns false if there is nothing to do; it may be called several times. */
  async #change(model: string, change: (marks: Map<string, DrainMark>) => boolean): Promise<void> {
    const { drains } = await this.#streams.stores();
    const key = tokenFromName(model);
    for (let attempt = 0; attempt < maxAttempts; attempt += 1) {
      try {
        const entry = await drains.get(key);
        const marks = new Map(marksOf(entry));
        if (!change(marks)) {
          return;
        }
        const value = JSON.stringify(Object.fromEntries(marks));
        await (entry === null ? drains.create(key, value) : drains.update(key, value, entry.revision));
        return;
      } catch (error) {
        // Another writer was faster, or the read came from a replica that lags.
        if (!isTaken(error)) {
          throw unavailable(`cannot change the drain marks of ${model}`, error);
        }
      }
    }
    throw unavailable(`cannot change the drain marks of ${model}: other writers keep changing them`);
  }

  /** Starts over with each connection, since a watch misses the changes in between. */
  async *follow(model: string, signal: AbortSignal): AsyncGenerator<MarkedGroups, void, undefined> {
    const until = AbortSignal.any([signal, this.#link.closing]);
    const key = tokenFromName(model);
    while (!until.aborted) {
      try {
        await this.#streams.opened(until);
        const { drains } = await this.#streams.stores();
        const stop = AbortSignal.any([until, this.#link.lost, this.#streams.storeReplaced]);
        const first = await beforeAbort(drains.get(key), stop);
        yield marksOf(first);
        const entries = await drains.watch({ key });
        const end = (): void => entries.stop();
        stop.addEventListener('abort', end, { once: true });
        try {
          if (!stop.aborted) {
            for await (const entry of entries) {
              // The watch begins with the current value, which was already delivered.
              if (entry.revision > (first?.revision ?? 0)) {
                yield marksOf(entry);
              }
            }
          }
        } finally {
          stop.removeEventListener('abort', end);
          end();
        }
      } catch (error) {
        if (!until.aborted && this.#streams.ready) {
          this.#log.warn({ error: ClusterError.from(error), model }, 'cannot follow the drain marks');
        }
      }
      await pause(retryMs, until);
    }
  }
}

function marksOf(entry: KvEntry | null): MarkedGroups {
  if (entry === null || entry.operation !== 'PUT') {
    return new Map();
  }
  return new Map(Object.entries(entry.json<Record<string, DrainMark>>()));
}
