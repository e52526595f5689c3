// A lock among processes, on one machine or on a volume that several share: for work that must be done once, such as
// compiling a model into a cache. Owns a directory while it is held. Knows nothing of the work.

import { mkdir, readFile, rm, stat, utimes, writeFile } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

const pollMs = 200;
const touchMs = 5_000;
/** A holder on another machine cannot be asked, so it is dead once it has not touched its lock for this long. */
const staleMs = 60_000;

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return error instanceof Error && 'code' in error && error.code === 'EPERM';
  }
}

async function isAbandoned(lockDirectory: string): Promise<boolean> {
  try {
    const { mtimeMs } = await stat(lockDirectory);
    const [host, pid] = (await readFile(join(lockDirectory, 'owner'), 'utf8').catch(() => '')).split(' ');
    return (host === hostname() && !isAlive(Number(pid))) || Date.now() - mtimeMs > staleMs;
  } catch {
    // Released between our attempt and this look.
    return false;
  }
}

async function acquire(lockDirectory: string, signal: AbortSignal): Promise<void> {
  for (;;) {
    signal.throwIfAborted();
    try {
      await mkdir(lockDirectory);
      await writeFile(join(lockDirectory, 'owner'), `${hostname()} ${process.pid}`);
      return;
    } catch (error) {
      if (!(error instanceof Error && 'code' in error && error.code === 'EEXIST')) {
        throw error;
      }
    }
    if (await isAbandoned(lockDirectory)) {
      await rm(lockDirectory, { recursive: true, force: true });
    } else {
      await sleep(pollMs, undefined, { signal });
    }
  }
}

/**
 * Runs `action` while no other process runs one under the same lock directory, whose parent must exist. Waits for the
 * holder; takes over from one that died. The signal ends the waiting, not the action. Gives what the action gives.
 */
export async function withFileLock<Result>(
  lockDirectory: string,
  action: () => Promise<Result>,
  signal: AbortSignal,
): Promise<Result> {
  await acquire(lockDirectory, signal);
  const touch = setInterval(() => {
    const now = new Date();
    utimes(lockDirectory, now, now).catch(() => undefined);
  }, touchMs);
  try {
    return await action();
  } finally {
    clearInterval(touch);
    await rm(lockDirectory, { recursive: true, force: true });
  }
}
