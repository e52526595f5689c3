// The keys waiting for work: each at most once, never one in work, and after failures with growing delays.
// Owns order, delays and de-duplication; does not know what a key means.

import { ClusterError } from '@mimo/core/process/errors';

export interface WorkQueueOptions {
  /** Before the second try of a key; doubles with each failure in a row. */
  readonly retryMinMs: number;
  readonly retryMaxMs: number;
}

/** One key in work. It is handed out again only after `done` or `failed`, and then also if it was added meanwhile. */
export interface Work {
  readonly key: string;
  /** How long the key waited to be taken. */
  readonly waitedMs: number;
  /** The work is done: resets the key's failures. */
  done(): void;
  /** The work failed: the key comes back after its back-off; returns how long that is. */
  failed(): number;
}

interface Delayed {
  readonly dueMs: number;
  readonly timer: NodeJS.Timeout;
}

/** A queue of keys for any number of consumers. Close it to stop its timers. */
export class WorkQueue {
  readonly #options: WorkQueueOptions;
  /** Ready keys in order, with the time at which each was added. */
  readonly #ready = new Map<string, number>();
  readonly #working = new Set<string>();
  /** Added while in work: ready when that ends. */
  readonly #again = new Set<string>();
  readonly #delayed = new Map<string, Delayed>();
  readonly #failures = new Map<string, number>();
  readonly #takers = new Set<() => void>();
  #closed = false;

  constructor(options: WorkQueueOptions) {
    this.#options = options;
  }

  /** Keys ready to be taken. */
  get length(): number {
    return this.#ready.size;
  }

  /** Makes a key ready; a ready key keeps its place. */
  add(key: string): void {
    if (this.#closed || this.#ready.has(key)) {
      return;
    }
    if (this.#working.has(key)) {
      this.#again.add(key);
      return;
    }
    this.#ready.set(key, performance.now());
    this.#wakeOne();
  }

  /** Makes a key ready later; the earlier of two times counts. */
  addAfter(key: string, delayMs: number): void {
    const dueMs = performance.now() + delayMs;
    const before = this.#delayed.get(key);
    if (this.#closed || (before !== undefined && before.dueMs <= dueMs)) {
      return;
    }
    clearTimeout(before?.timer);
    const timer = setTimeout(() => {
      this.#delayed.delete(key);
      this.add(key);
    }, delayMs);
    this.#delayed.set(key, { dueMs, timer });
  }

  /** Waits for the next key; rejects when the signal fires or the queue is closed. */
  async take(signal: AbortSignal): Promise<Work> {
    for (;;) {
      if (signal.aborted) {
        // This consumer may have been woken for a key.
        this.#wakeOne();
        signal.throwIfAborted();
      }
      if (this.#closed) {
        throw new ClusterError('canceled', 'the work queue is closed');
      }
      const [next] = this.#ready;
      if (next !== undefined) {
        return this.#begin(...next);
      }
      await this.#added(signal);
    }
  }

  /** Drops every key; waiting consumers are rejected. */
  close(): void {
    this.#closed = true;
    for (const { timer } of this.#delayed.values()) {
      clearTimeout(timer);
    }
    this.#delayed.clear();
    this.#ready.clear();
    this.#again.clear();
    for (const taker of this.#takers) {
      taker();
    }
  }

  #wakeOne(): void {
    const [taker] = this.#ready.size > 0 ? this.#takers : [];
    taker?.();
  }

  #begin(key: string, addedMs: number): Work {
    this.#ready.delete(key);
    this.#working.add(key);
    let over = false;
    const end = (): boolean => {
      const first = !over;
      over = true;
      if (first) {
        this.#working.delete(key);
        if (this.#again.delete(key)) {
          this.add(key);
        }
      }
      return first;
    };
    return {
      key,
      waitedMs: performance.now() - addedMs,
      done: () => {
        if (end()) {
          this.#failures.delete(key);
        }
      },
      failed: () => {
        if (!end()) {
          return 0;
        }
        const failures = this.#failures.get(key) ?? 0;
        this.#failures.set(key, failures + 1);
        const { retryMinMs, retryMaxMs } = this.#options;
        const delayMs = Math.min(retryMinMs * 2 ** failures, retryMaxMs);
        this.addAfter(key, delayMs);
        return delayMs;
      },
    };
  }

  async #added(signal: AbortSignal): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    const wake = (): void => {
      this.#takers.delete(wake);
      resolve();
    };
    this.#takers.add(wake);
    signal.addEventListener('abort', wake, { once: true });
    await promise;
    signal.removeEventListener('abort', wake);
  }
}
