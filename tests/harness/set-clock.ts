// Wall clocks of processes under test: wrong from the start, and set while they run. Owns the file that such a process
// polls (set-clock.mjs); the caller that starts the process sets the environment.

import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { waitFor } from './wait-for.ts';

const preload = join(import.meta.dirname, 'set-clock.mjs');

/** The clock of one or several processes. */
export interface TestClock {
  /** What the processes are started with. */
  readonly env: Readonly<Record<string, string>>;
  /** Sets the clock, and waits until the processes of these ids have it. */
  set(aheadMs: number, pids: readonly number[]): Promise<void>;
}

/** A clock that is this far ahead, by a file in the directory. */
export function createTestClock(directory: string, name: string, aheadMs: number): TestClock {
  const file = join(directory, `${name}.clock`);
  const takenBy = (pid: number): string => `${file}.${pid}`;
  writeFileSync(file, String(aheadMs));
  return {
    env: { NODE_OPTIONS: `--import=${preload}`, MIMO_TEST_CLOCK: file },
    set: async (ms, pids) => {
      writeFileSync(file, String(ms));
      await waitFor('clocks to be set', () =>
        pids.every((pid) => existsSync(takenBy(pid)) && readFileSync(takenBy(pid), 'utf8') === String(ms)),
      );
    },
  };
}
