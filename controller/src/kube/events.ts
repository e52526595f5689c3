// Events: what `kubectl describe` shows under an object. Owns their form, the counting of repeats and the limits.
// Never blocks and never fails, because nothing depends on an event.

import { createHash } from 'node:crypto';

import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';

import { hasReason } from './api-status.ts';
import type { KubeClient } from './client.ts';
import { resourceTypes, type KubeObject, type ObjectManifest } from './resource.ts';

/** What happened to an object. */
export interface Note {
  readonly type: 'Normal' | 'Warning';
  /** A word in UpperCamelCase, from a small set. */
  readonly reason: string;
  /** For people; cut at the API's 1024 characters. */
  readonly message: string;
}

export interface EventRecorderOptions {
  readonly client: KubeClient;
  /** Such as `mimo-controller`. */
  readonly component: string;
  /** The reporting pod. */
  readonly instance: string;
  readonly log: Log;
}

const maxMessageLength = 1024;
/** Events waiting to be sent; more are dropped. */
const maxPending = 500;
/** Series whose repeats are counted; the least recently used one is forgotten first. */
const maxSeries = 2_000;
const retryMs = 1_000;
const maxTries = 3;

interface Series {
  /** Of the event that is counted up. */
  readonly name: string;
  readonly count: number;
}

type Subject = Pick<KubeObject, 'apiVersion' | 'kind' | 'metadata'>;

/** Records events in the background. Closing it sends the waiting ones until the signal fires. */
export class EventRecorder {
  readonly #options: EventRecorderOptions;
  readonly #pending: { readonly subject: Subject; readonly note: Note; readonly time: string }[] = [];
  readonly #series = new Map<string, Series>();
  readonly #closing = new AbortController();
  #sending: Promise<void> | undefined;
  #dropped = 0;

  constructor(options: EventRecorderOptions) {
    this.#options = options;
  }

  /** Events not sent because too many waited or the API server rejected them. */
  get dropped(): number {
    return this.#dropped;
  }

  /** Records an event about an object; repeating the same event raises the count of the first. */
  record(subject: Subject, note: Note): void {
    if (this.#pending.length >= maxPending || this.#closing.signal.aborted) {
      this.#dropped += 1;
      return;
    }
    this.#pending.push({ subject, note, time: this.#options.client.clock.now() });
    this.#sending ??= this.#send().finally(() => {
      this.#sending = undefined;
    });
  }

  async close(signal: AbortSignal): Promise<void> {
    const abort = (): void => this.#closing.abort(signal.reason);
    if (signal.aborted) {
      abort();
    }
    signal.addEventListener('abort', abort, { once: true });
    await this.#sending;
    signal.removeEventListener('abort', abort);
    this.#closing.abort();
  }

  async #send(): Promise<void> {
    for (;;) {
      const next = this.#pending.shift();
      if (next === undefined) {
        return;
      }
      await this.#deliver(next.subject, next.note, next.time);
    }
  }

  async #deliver(subject: Subject, note: Note, time: string): Promise<void> {
    const closing = this.#closing.signal;
    for (let tries = 1; ; tries += 1) {
      try {
        await this.#write(subject, note, time, closing);
        return;
      } catch (caught) {
        const error = ClusterError.from(caught);
        if (closing.aborted || error.code !== 'unavailable' || tries === maxTries) {
          this.#dropped += 1;
          this.#options.log.warn({ error, reason: note.reason }, 'cannot record an event');
          return;
        }
        await pause(error.detail.retryAfterMs ?? retryMs * tries, closing);
      }
    }
  }

  async #write(subject: Subject, note: Note, time: string, signal: AbortSignal): Promise<void> {
    const { client } = this.#options;
    const message = note.message.slice(0, maxMessageLength);
    const key = [subject.metadata.uid, note.type, note.reason, message].join('\0');
    const before = this.#series.get(key);
    if (before !== undefined) {
      const count = before.count + 1;
      try {
        const change = { count, lastTimestamp: time };
        await client.patch(resourceTypes.events, before.name, change, {}, signal);
        this.#remember(key, { ...before, count });
        return;
      } catch (error) {
        // The API server forgets events after an hour: start a new one.
        if (!hasReason(error, 'NotFound')) {
          throw error;
        }
      }
    }
    const name = eventName(subject.metadata.name, key, time);
    try {
      await client.create(
        resourceTypes.events,
        this.#event(subject, { ...note, message }, name, time),
        signal,
      );
    } catch (error) {
      // An earlier try wrote it, and its answer was lost.
      if (!hasReason(error, 'AlreadyExists')) {
        throw error;
      }
    }
    this.#remember(key, { name, count: 1 });
  }

  #remember(key: string, series: Series): void {
    this.#series.delete(key);
    this.#series.set(key, series);
    if (this.#series.size > maxSeries) {
      const [longestUnused] = this.#series.keys();
      this.#series.delete(longestUnused ?? '');
    }
  }

  #event(
    { apiVersion, kind, metadata }: Subject,
    { type, reason, message }: Note,
    name: string,
    time: string,
  ): ObjectManifest {
    const { component, instance } = this.#options;
    const { uid, resourceVersion } = metadata;
    return {
      apiVersion: resourceTypes.events.apiVersion,
      kind: resourceTypes.events.kind,
      metadata: { name },
      involvedObject: {
        apiVersion,
        kind,
        name: metadata.name,
        namespace: metadata.namespace,
        uid,
        resourceVersion,
      },
      type,
      reason,
      message,
      count: 1,
      firstTimestamp: time,
      lastTimestamp: time,
      source: { component },
      reportingComponent: component,
      reportingInstance: instance,
    };
  }
}

/** One name for one event at one time, so that a repeated try creates no second event. */
function eventName(subject: string, key: string, time: string): string {
  const hash = createHash('sha256').update(key).update(time).digest('hex').slice(0, 16);
  return `${subject.slice(0, 200)}.${hash}`;
}
