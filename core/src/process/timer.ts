// A timer for any length: the platform's own fires at once where it is to wait longer than 2^31 - 1 ms, which is 24.8 days.
// It counts on the monotonic clock, so that a clock that is set moves nothing.

/** A timer that has not fired yet. */
export interface Timer {
  clear(): void;
}

const longestMs = 2 ** 31 - 1;

/** Calls `act` once, in `delayMs` and never sooner. Clear it where it is not wanted any more. */
export function startTimer(delayMs: number, act: () => void): Timer {
  const dueMs = performance.now() + delayMs;
  let timeout: NodeJS.Timeout;
  const wait = (): void => {
    const leftMs = Math.ceil(dueMs - performance.now());
    timeout = setTimeout(
      () => (performance.now() < dueMs ? wait() : act()),
      Math.min(Math.max(leftMs, 0), longestMs),
    );
  };
  wait();
  return { clear: () => clearTimeout(timeout) };
}
