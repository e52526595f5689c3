// Erasing in turns, so that publishing is not held up: an unencrypted store overwrites each record, about 150 a second,
// and nats-server publishes to a stream while it does not erase from it. Knows neither the stream nor how to erase.
//
// The rule: a few records at once; then, while anything is being published, a pause as long as erasing them took.

import { pause } from '../../process/abort.ts';
import type { RecordPlace } from '../records.ts';

/** Enough to keep a store busy over a network: at 2 ms there and back, 8,000 a second. */
const erasesAtOnce = 16;
/** A batch that waits for a lost connection must not slow down the next one. */
const longestPauseMs = 200;

interface Waiting {
  readonly place: RecordPlace;
  readonly resolve: (wasThere: boolean) => void;
  readonly reject: (reason: unknown) => void;
}

/** What the queue needs. */
export interface EraseQueueOptions {
  /** Rejects once `signal` has aborted, and then at once. */
  readonly erase: (place: RecordPlace) => Promise<boolean>;
  readonly isPublishing: () => boolean;
  readonly signal: AbortSignal;
}

/** Records that wait to be erased, in the order of `add`. Nothing to close: it ends with its signal. */
export class EraseQueue {
  readonly #options: EraseQueueOptions;
  #waiting: Waiting[] = [];
  #isRunning = false;

  constructor(options: EraseQueueOptions) {
    this.#options = options;
  }

  /** Resolves as `erase` does: false if there was no record. */
  add(place: RecordPlace): Promise<boolean> {
    const { promise, resolve, reject } = Promise.withResolvers<boolean>();
    this.#waiting.push({ place, resolve, reject });
    if (!this.#isRunning) {
      this.#isRunning = true;
      void this.#run();
    }
    return promise;
  }

  async #run(): Promise<void> {
    const { erase, isPublishing, signal } = this.#options;
    while (this.#waiting.length > 0) {
      const batch = this.#waiting.splice(0, erasesAtOnce);
      const begin = performance.now();
      await Promise.all(batch.map(({ place, resolve, reject }) => erase(place).then(resolve, reject)));
      if (isPublishing() && !signal.aborted) {
        const tookMs = Math.min(performance.now() - begin, longestPauseMs);
        await pause(tookMs, signal).catch(() => undefined);
      }
    }
    this.#isRunning = false;
  }
}
