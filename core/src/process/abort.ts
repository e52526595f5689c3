// Waiting that ends with a signal. Both functions take their listener off the signal again, so that a long-lived signal
// does not collect them.

import { setTimeout as sleep } from 'node:timers/promises';

/** Waits for a promise, or rejects with the signal's reason where that fires first. The promise itself goes on. */
export async function beforeAbort<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  signal.throwIfAborted();
  const { promise: aborted, reject } = Promise.withResolvers<never>();
  const abort = (): void => reject(signal.reason);
  signal.addEventListener('abort', abort, { once: true });
  try {
    return await Promise.race([promise, aborted]);
  } finally {
    signal.removeEventListener('abort', abort);
  }
}

/** Waits, or less where the signal fires; never rejects. */
export async function pause(waitMs: number, signal: AbortSignal): Promise<void> {
  await sleep(waitMs, undefined, { signal }).catch(() => undefined);
}
