// The queue's view of each served model: the dispatcher's states, the drain marks, and whether the catalogue has the
// model. Follows them in the background and calls back on changes that may affect a decision. A burst on a calm queue
// is shown after a short delay, so that forty requests that arrive within it at zero groups lead to one decision.

import { ClusterError } from '@mimo/core/process/errors';
import { pause } from '@mimo/core/process/abort';
import type { Log } from '@mimo/core/process/log';
import type { Bus } from '@mimo/core/bus/bus';
import type { MarkedGroups } from '@mimo/core/bus/drain-marks';
import type { ModelCatalog } from '@mimo/core/bus/model-catalog';
import { queueStateFreshMs, type QueueState } from '@mimo/core/bus/signals';

import type { QueueReading } from '../decide/arrival-load.ts';
import { observeLoads, queueReading, type ObservedLoads, type QueueSight } from './queue-loads.ts';

export interface QueueWatchOptions {
  readonly bus: Pick<Bus, 'connected' | 'queueStates' | 'drainMarks'>;
  readonly catalog: Pick<ModelCatalog, 'follow'>;
  readonly log: Log;
  /** Something changed for a model. */
  readonly onChange: (model: string) => void;
}

/** The queue's view of one model. */
export interface QueueObservation extends ObservedLoads {
  readonly queue: QueueReading | 'unknown';
  readonly marks: MarkedGroups | 'unknown';
  readonly published: boolean | 'unknown';
}

/** From the first sign of a burst to the decision; a dispatcher publishes within 100 ms. */
const burstMs = 300;
const retryMs = 1_000;

/** Follows the queue for a changing set of models. Close it to end every iteration. */
export class QueueWatch {
  readonly #options: QueueWatchOptions;
  readonly #closing = new AbortController();
  readonly #models = new Map<string, ModelWatch>();
  readonly #ended: Promise<void>;
  #published: ReadonlySet<string> | undefined;

  constructor(options: QueueWatchOptions) {
    this.#options = options;
    this.#ended = this.#followCatalogue();
  }

  /** Starts following models that are new in the list, and stops following those no longer in it. */
  follow(models: Iterable<string>): void {
    const wanted = new Set(models);
    for (const [model, watch] of this.#models) {
      if (!wanted.has(model)) {
        watch.close();
        this.#models.delete(model);
      }
    }
    for (const model of wanted) {
      if (!this.#models.has(model) && !this.#closing.signal.aborted) {
        this.#models.set(model, new ModelWatch(model, this.#options, this.#closing.signal));
      }
    }
  }

  /** As of `nowMs`, by performance.now(). */
  observe(model: string, nowMs: number): QueueObservation {
    const watch = this.#models.get(model);
    const { connected } = this.#options.bus;
    return {
      ...(watch?.observe(nowMs) ?? {
        queue: 'unknown',
        loads: new Map(),
        loadsComplete: false,
        marks: 'unknown',
      }),
      published: connected && this.#published !== undefined ? this.#published.has(model) : 'unknown',
    };
  }

  async close(): Promise<void> {
    this.#closing.abort(new ClusterError('canceled', 'the queue watch is closed'));
    await Promise.all([this.#ended, ...[...this.#models.values()].map((watch) => watch.ended)]);
  }

  async #followCatalogue(): Promise<void> {
    for await (const models of this.#options.catalog.follow(this.#closing.signal)) {
      const before = this.#published ?? new Set();
      const stored = models.filter(({ isStored }) => isStored);
      this.#published = new Set(stored.map(({ name }) => name));
      for (const model of before.symmetricDifference(this.#published)) {
        this.#options.onChange(model);
      }
    }
  }
}

class ModelWatch {
  readonly ended: Promise<unknown>;
  readonly #closing = new AbortController();
  readonly #model: string;
  readonly #options: QueueWatchOptions;
  #sight: QueueSight = { state: undefined, receivedMs: 0, dispatcherSinceMs: 0 };
  /** The state before a burst that has just begun. */
  #held: QueueState | undefined;
  #burst: NodeJS.Timeout | undefined;
  #marks: MarkedGroups | undefined;

  constructor(model: string, options: QueueWatchOptions, closing: AbortSignal) {
    this.#model = model;
    this.#options = options;
    const signal = AbortSignal.any([closing, this.#closing.signal]);
    this.ended = Promise.all([
      this.#again(signal, async () => {
        for await (const state of options.bus.queueStates.follow(model, signal)) {
          this.#receive(state, performance.now());
        }
      }),
      this.#again(signal, async () => {
        for await (const marks of options.bus.drainMarks.follow(model, signal)) {
          this.#marks = marks;
          options.onChange(model);
        }
      }),
    ]).finally(() => clearTimeout(this.#burst));
  }

  close(): void {
    this.#closing.abort(new ClusterError('canceled', 'the model is no longer served'));
  }

  observe(nowMs: number): Omit<QueueObservation, 'published'> {
    const { state, receivedMs } = this.#sight;
    const fresh = state !== undefined && nowMs - receivedMs <= queueStateFreshMs;
    return {
      queue: fresh ? queueReading(this.#held ?? state) : 'unknown',
      marks: this.#options.bus.connected ? (this.#marks ?? 'unknown') : 'unknown',
      ...observeLoads(this.#sight, nowMs),
    };
  }

  #receive(state: QueueState, nowMs: number): void {
    const { state: before, dispatcherSinceMs } = this.#sight;
    if (before !== undefined && state.dispatcherEpoch < before.dispatcherEpoch) {
      // It has lost its lease without knowing. Epochs also start over in an emptied store, but only briefly.
      if (nowMs - this.#sight.receivedMs <= queueStateFreshMs) {
        return;
      }
    }
    const same = before?.dispatcherEpoch === state.dispatcherEpoch;
    this.#sight = { state, receivedMs: nowMs, dispatcherSinceMs: same ? dispatcherSinceMs : nowMs };
    if (before === undefined || hasChangedForGroups(before, state)) {
      this.#options.onChange(this.#model);
    }
    if (this.#burst === undefined && state.waitingTokens > (before?.waitingTokens ?? 0)) {
      this.#held = before ?? { ...state, waitingRequests: 0, waitingTokens: 0, oldestWaitingMs: 0 };
      this.#burst = setTimeout(() => {
        this.#burst = undefined;
        this.#held = undefined;
        this.#options.onChange(this.#model);
      }, burstMs);
    }
  }

  async #again(signal: AbortSignal, follow: () => Promise<void>): Promise<void> {
    while (!signal.aborted) {
      try {
        await follow();
      } catch (error) {
        this.#options.log.warn(
          { error: ClusterError.from(error), model: this.#model },
          'cannot follow the queue',
        );
      }
      await pause(retryMs, signal);
    }
  }
}

/** Whether the difference may affect gates, drains or marks; the load itself is checked in bursts and rounds. */
function hasChangedForGroups(before: QueueState, after: QueueState): boolean {
  return groupEssence(before) !== groupEssence(after);
}

function groupEssence({ groups }: QueueState): string {
  return JSON.stringify(
    groups.map(({ group, routable, draining, inFlightRequests }) => [
      group,
      routable,
      draining,
      draining && inFlightRequests === 0,
    ]),
  );
}
