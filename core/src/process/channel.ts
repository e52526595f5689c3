// A single-reader queue of values between a callback world and a `for await`. Owns the waiting and the order; never
// drops a value. A producer notices a slow reader by the pending count.

/** An async iterable fed by `push` and ended by `close` or `fail`. It has one reader, and the producer closes it. */
export class Channel<T> implements AsyncIterable<T> {
  readonly #values: T[] = [];
  #ended = false;
  #error: unknown;
  #wake: (() => void) | undefined;

  /** Values that the reader has not taken yet. */
  get pending(): number {
    return this.#values.length;
  }

  /** Adds a value; after the end it is ignored. */
  push(value: T): void {
    if (!this.#ended) {
      this.#values.push(value);
      this.#wake?.();
    }
  }

  /** Ends the iteration after the values pushed so far. */
  close(): void {
    this.#ended = true;
    this.#wake?.();
  }

  /** Ends the iteration with an error after the values pushed so far. */
  fail(error: unknown): void {
    if (!this.#ended) {
      this.#error = error;
      this.close();
    }
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<T, void, undefined> {
    try {
      for (;;) {
        while (this.#values.length > 0) {
          yield this.#values.shift() as T;
        }
        if (this.#ended) {
          break;
        }
        const { promise, resolve } = Promise.withResolvers<void>();
        this.#wake = resolve;
        await promise;
        this.#wake = undefined;
      }
      if (this.#error !== undefined) {
        throw this.#error;
      }
    } finally {
      this.#ended = true;
      this.#values.length = 0;
    }
  }
}

/** A channel that closes when the signal fires. */
export function channelUntil<T>(signal: AbortSignal): Channel<T> {
  const channel = new Channel<T>();
  if (signal.aborted) {
    channel.close();
  } else {
    signal.addEventListener('abort', () => channel.close(), { once: true });
  }
  return channel;
}
