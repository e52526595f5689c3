// Waiting for a condition in tests, and inspecting processes. Owns the polling interval; knows no part of the cluster.

import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

const pollMs = 20;
/** Far above what anything takes: a busy machine is no failure. */
const defaultTimeoutMs = 90_000;

/** The same for `vi.waitFor`. */
export const patience = { timeout: defaultTimeoutMs, interval: pollMs };

/**
 * Polls until the condition holds; fails, naming `what`, after the time-out. Errors of the condition count as "not
 * yet".
 */
export async function waitFor(
  what: string,
  condition: () => boolean | Promise<boolean>,
  timeoutMs = defaultTimeoutMs,
): Promise<void> {
  const giveUpAt = performance.now() + timeoutMs;
  let lastError: unknown;
  for (;;) {
    try {
      if (await condition()) {
        return;
      }
    } catch (error) {
      lastError = error;
    }
    if (performance.now() > giveUpAt) {
      throw new Error(`waited ${timeoutMs} ms in vain for ${what}`, { cause: lastError });
    }
    await sleep(pollMs);
  }
}

/** Whether a process runs; one that has ended but was not waited for does not. */
export function isAlive(pid: number): boolean {
  try {
    const state = readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ')[1]?.[0];
    return state !== 'Z' && state !== 'X';
  } catch {
    return false;
  }
}
