import { mkdirSync, mkdtempSync, readdirSync, rmSync, utimesSync, writeFileSync } from 'node:fs';
import { hostname, tmpdir } from 'node:os';
import { join } from 'node:path';

import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { withFileLock } from './file-lock.ts';

describe('withFileLock', () => {
  let directory: string;
  const signal = new AbortController().signal;
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'mimo-lock-'));
  });
  afterEach(() => {
    rmSync(directory, { recursive: true });
  });

  it('runs one action at a time, gives its result and leaves nothing behind', async () => {
    let inside = 0;
    let most = 0;
    const action = async (): Promise<number> => {
      inside++;
      most = Math.max(most, inside);
      await Promise.resolve();
      await new Promise((resolve) => setImmediate(resolve));
      inside--;
      return 7;
    };
    const lock = join(directory, 'lock');
    expect(await Promise.all([1, 2, 3].map(() => withFileLock(lock, action, signal)))).toEqual([7, 7, 7]);
    expect(most).toBe(1);
    expect(readdirSync(directory)).toEqual([]);
  });

  it('lets go when the action throws', async () => {
    const lock = join(directory, 'lock');
    await expect(withFileLock(lock, () => Promise.reject(new Error('no')), signal)).rejects.toThrow('no');
    expect(await withFileLock(lock, () => Promise.resolve('yes'), signal)).toBe('yes');
  });

  it('takes over from a process of this machine that died', async () => {
    const lock = join(directory, 'lock');
    mkdirSync(lock);
    writeFileSync(join(lock, 'owner'), `${hostname()} 999999999`);
    expect(await withFileLock(lock, () => Promise.resolve('mine'), signal)).toBe('mine');
  });

  it('takes over from another machine only after a long silence', async () => {
    const lock = join(directory, 'lock');
    mkdirSync(lock);
    writeFileSync(join(lock, 'owner'), 'another-machine 1');
    const waiting = AbortSignal.timeout(300);
    await expect(withFileLock(lock, () => Promise.resolve(1), waiting)).rejects.toMatchObject({
      name: 'AbortError',
    });
    const longAgo = new Date(Date.now() - 120_000);
    utimesSync(lock, longAgo, longAgo);
    expect(await withFileLock(lock, () => Promise.resolve('mine'), signal)).toBe('mine');
  });
});
