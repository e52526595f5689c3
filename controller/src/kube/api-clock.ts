// The API server's time. The API server stamps the objects, so any time that is compared with a stamp uses this
// clock: this machine's clock may be minutes off, and may be set. Measured from the `Date` of its answers and
// continued by our monotonic clock. Kubelets stamp by other clocks; their stamps are never compared.

/** One API server's time, from its answers: exact to about a second after one, and to much less after several. */
export class ApiClock {
  /** The server's time minus performance.now(). Until the first answer, this machine's clock is used. */
  #offsetMs = Date.now() - performance.now();
  #lowestMs = Number.NEGATIVE_INFINITY;
  #highestMs = Number.POSITIVE_INFINITY;

  /** Unix milliseconds. Goes backwards only if the server's clock was set back. */
  nowMs(): number {
    return performance.now() + this.#offsetMs;
  }

  /** For a field of an object. */
  now(): string {
    return new Date(this.nowMs()).toISOString();
  }

  /** Takes the `Date` of an answer: the server wrote it, in whole seconds, between these two by performance.now(). */
  observe(date: string | undefined, askedMs: number, answeredMs: number): void {
    const secondMs = Date.parse(date ?? '');
    if (Number.isNaN(secondMs)) {
      return;
    }
    const lowestMs = secondMs - answeredMs;
    const highestMs = secondMs + 1_000 - askedMs;
    const agrees = lowestMs <= this.#highestMs && highestMs >= this.#lowestMs;
    this.#lowestMs = agrees ? Math.max(this.#lowestMs, lowestMs) : lowestMs;
    this.#highestMs = agrees ? Math.min(this.#highestMs, highestMs) : highestMs;
    this.#offsetMs = Math.min(Math.max(this.#offsetMs, this.#lowestMs), this.#highestMs);
  }
}
