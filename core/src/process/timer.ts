// A timer for any length: the platform's own fires at once if the delay exceeds 2^31 - 1 ms, which is 24.8 days. It
// uses the monotonic clock, so setting the clock has no effect.

/** A timer that has not fired yet. */
export interface Timer {
  clear(): void;
}

const longestMs = 2 ** 31 - 1;

/** Calls `act` once, after `delayMs` and never sooner. Clear it if it is no longer needed. */
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
