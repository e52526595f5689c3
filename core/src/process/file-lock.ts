// A lock among processes, on one machine or on a volume that several machines share, for work that must happen once,
// such as compiling a model into a cache. Owns a directory while it is held.

import { randomUUID } from 'node:crypto';
import { mkdir, readFile, readlink, rename, rm, stat, utimes, writeFile } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

const pollMs = 200;
const touchMs = 5_000;
/** A holder on another machine counts as dead if it has not touched its lock for this long. */
const staleMs = 60_000;

/** The holder of a lock. A process id is valid only within its pid namespace, and each container has its own. */
export interface LockOwner {
  readonly host: string;
  readonly pidNamespace: string;
  readonly pid: number;
  /** Of this acquisition. */
  readonly id: string;
}

/**
 * Whether the holder of a lock is dead, from successive checks. A process of this machine can be checked directly;
 * for any other, only a changing time of the lock proves life, since the clocks of two machines may differ by
 * minutes.
 */
export class HolderWatch {
  readonly #self: LockOwner;
  #seen = '';
  #seenAtMs = 0;

  constructor(self: LockOwner) {
    this.#self = self;
  }

  /** `owner` undefined: not written yet, or never. `nowMs` is a clock of this process. */
  isDead(owner: LockOwner | undefined, touchedUnixMs: number, nowMs: number): boolean {
    const seen = `${owner?.id} ${touchedUnixMs}`;
    if (seen !== this.#seen) {
      this.#seen = seen;
      this.#seenAtMs = nowMs;
    }
    const isNeighbour = owner?.host === this.#self.host && owner.pidNamespace === this.#self.pidNamespace;
    return (isNeighbour && !isAlive(owner.pid)) || nowMs - this.#seenAtMs > staleMs;
  }
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return hasCode(error, 'EPERM');
  }
}

/**
 * Runs `action` while no other process runs one under the same lock directory, whose parent must exist. Waits for the
 * holder; takes over from a dead one. The signal ends the waiting, not the action. Returns the action's result.
 */
export async function withFileLock<Result>(
  lockDirectory: string,
  action: () => Promise<Result>,
  signal: AbortSignal,
): Promise<Result> {
  const graves: string[] = [];
  try {
    await acquire(lockDirectory, graves, signal);
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
  } finally {
    await Promise.all(graves.map((grave) => rm(grave, { recursive: true, force: true })));
  }
}

/** Takes the lock; the locks of dead holders end up in `graves`. */
async function acquire(lockDirectory: string, graves: string[], signal: AbortSignal): Promise<void> {
  const self: LockOwner = {
    host: hostname(),
    pidNamespace: await readlink('/proc/self/ns/pid').catch(() => ''),
    pid: process.pid,
    id: randomUUID(),
  };
  const watch = new HolderWatch(self);
  for (;;) {
    signal.throwIfAborted();
    try {
      await mkdir(lockDirectory);
      await writeFile(ownerFile(lockDirectory), JSON.stringify(self));
      return;
    } catch (error) {
      if (!hasCode(error, 'EEXIST')) {
        throw error;
      }
    }
    const owner = await readOwner(lockDirectory);
    const touched = await stat(lockDirectory).catch(() => undefined);
    if (touched !== undefined && watch.isDead(owner, touched.mtimeMs, performance.now())) {
      // Moved, not removed: if several processes find the holder dead, only one can move the lock to this name, and a
      // late one cannot remove the next holder's lock by mistake.
      const grave = `${lockDirectory}.${owner?.id ?? 'nobody'}`;
      const moved = await rename(lockDirectory, grave).then(
        () => true,
        () => false,
      );
      if (moved) {
        graves.push(grave);
        continue;
      }
    }
    await sleep(pollMs, undefined, { signal });
  }
}

async function readOwner(lockDirectory: string): Promise<LockOwner | undefined> {
  try {
    const owner: LockOwner = JSON.parse(await readFile(ownerFile(lockDirectory), 'utf8'));
    return owner;
  } catch {
    return undefined;
  }
}

function ownerFile(lockDirectory: string): string {
  return join(lockDirectory, 'owner');
}

function hasCode(error: unknown, code: string): boolean {
  return error instanceof Error && 'code' in error && error.code === code;
}
