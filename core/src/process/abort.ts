// Waiting that ends with a signal. Both functions remove their listener again, so that a long-lived signal does not
// collect listeners.

import { setTimeout as sleep } from 'node:timers/promises';

/** Waits for a promise, or rejects with the signal's reason if the signal fires first. The promise itself continues. */
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

/** Waits until the time is over or the signal fires; never rejects. */
export async function pause(waitMs: number, signal: AbortSignal): Promise<void> {
  await sleep(waitMs, undefined, { signal }).catch(() => undefined);
}
