// The drain marks in a NATS key-value bucket: one key a model, its value the whole map of marked groups, changed by
// compare-and-set. So a reader has all of them from one value, and what is left behind is bounded by the models.

import type { KvEntry } from '@nats-io/kv';

import { beforeAbort, pause } from '../process/abort.ts';
import { ClusterError } from '../process/errors.ts';
import type { Log } from '../process/log.ts';
import { unavailable, type NatsLink } from './nats-connection.ts';
import { isTaken } from './nats-lease.ts';
import type { DrainMark, DrainMarks } from './queue.ts';
import { tokenFromName } from './subjects.ts';

/** Writers are few: one controller holds the lease. Losing this often against another is a fault. */
const maxAttempts = 20;
const retryMs = 500;

/** The marks of one connection; it is closed by its owner. */
export class NatsDrains {
  readonly #link: NatsLink;
  readonly #log: Log;

  constructor(link: NatsLink, log: Log) {
    this.#link = link;
    this.#log = log;
  }

  /** Changes the marks of a model. `change` returns false where there is nothing to do; it may be called again. */
  async change(model: string, change: (marks: Map<string, DrainMark>) => boolean): Promise<void> {
    const { drains } = await this.#link.session();
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
        // Another writer was quicker, or the read came from a replica that is behind.
        if (!isTaken(error)) {
          throw unavailable(`the drain marks of ${model} were not changed`, error);
        }
      }
    }
    throw unavailable(`the drain marks of ${model} are changed by others all the time`);
  }

  /** The whole map first and at every change; begins anew with each connection, since changes in between are not told. */
  async *follow(model: string, until: AbortSignal): AsyncGenerator<DrainMarks, void, undefined> {
    const key = tokenFromName(model);
    while (!until.aborted) {
      try {
        await this.#link.opened(until);
        const { drains } = await this.#link.session();
        const stop = AbortSignal.any([until, this.#link.connectionLost, this.#link.storeReplaced]);
        const first = await beforeAbort(drains.get(key), stop);
        yield marksOf(first);
        const entries = await drains.watch({ key });
        const end = (): void => entries.stop();
        stop.addEventListener('abort', end, { once: true });
        try {
          if (!stop.aborted) {
            for await (const entry of entries) {
              // The watch begins with the value that is there, which has been told.
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
        if (!until.aborted && this.#link.connected) {
          this.#log.warn({ error: ClusterError.from(error), model }, 'drain marks not followed');
        }
      }
      await pause(retryMs, until);
    }
  }
}

function marksOf(entry: KvEntry | null): DrainMarks {
  if (entry === null || entry.operation !== 'PUT') {
    return new Map();
  }
  return new Map(Object.entries(entry.json<Record<string, DrainMark>>()));
}
