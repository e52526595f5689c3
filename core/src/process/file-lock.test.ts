import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readlinkSync,
  rmSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { hostname, tmpdir } from 'node:os';
import { join } from 'node:path';

import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { HolderWatch, withFileLock } from './file-lock.ts';

describe('withFileLock', () => {
  let directory: string;
  const signal = new AbortController().signal;
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'mimo-lock-'));
  });
  afterEach(() => {
    rmSync(directory, { recursive: true });
  });

  it('runs one action at a time, returns its result and leaves nothing behind', async () => {
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

  it('releases the lock when the action throws', async () => {
    const lock = join(directory, 'lock');
    await expect(withFileLock(lock, () => Promise.reject(new Error('no')), signal)).rejects.toThrow('no');
    expect(await withFileLock(lock, () => Promise.resolve('yes'), signal)).toBe('yes');
  });

  it('takes over from a dead process of this machine', async () => {
    const lock = join(directory, 'lock');
    mkdirSync(lock);
    const link = '/proc/self/ns/pid';
    const ownNamespace = existsSync(link) ? readlinkSync(link) : '';
    const dead = {
      host: hostname(),
      pidNamespace: ownNamespace,
      pid: 999_999_999,
      id: 'x',
    };
    writeFileSync(join(lock, 'owner'), JSON.stringify(dead));
    const results = await Promise.all(
      [1, 2, 3].map((n) => withFileLock(lock, () => Promise.resolve(n), signal)),
    );
    expect(results).toEqual([1, 2, 3]);
    expect(readdirSync(directory)).toEqual([]);
  });

  it('waits for a holder that it cannot check, and gives up when the signal fires', async () => {
    const lock = join(directory, 'lock');
    mkdirSync(lock);
    // The first process of another container, on a machine whose clock is a day late.
    const other = { host: hostname(), pidNamespace: 'pid:[1]', pid: 999_999_999, id: 'x' };
    writeFileSync(join(lock, 'owner'), JSON.stringify(other));
    const yesterday = new Date(Date.now() - 86_400_000);
    utimesSync(lock, yesterday, yesterday);
    const waiting = AbortSignal.timeout(700);
    await expect(withFileLock(lock, () => Promise.resolve(1), waiting)).rejects.toMatchObject({
      name: expect.stringMatching(/AbortError|TimeoutError/) as string,
    });
    expect(readdirSync(directory)).toEqual(['lock']);
  });
});

describe('HolderWatch', () => {
  const self = { host: 'here', pidNamespace: 'pid:[1]', pid: process.pid, id: 'self' };
  const elsewhere = { ...self, host: 'there', id: 'a' };

  it('checks a holder on the same machine directly', () => {
    const watch = new HolderWatch(self);
    expect(watch.isDead({ ...self, id: 'a' }, 0, 0)).toBe(false);
    expect(watch.isDead({ ...self, id: 'a', pid: 999_999_999 }, 0, 1)).toBe(true);
  });

  it.each([
    ['on another machine', elsewhere],
    ['in another container', { ...self, pidNamespace: 'pid:[2]', pid: 999_999_999, id: 'b' }],
    ['that never said who it is', undefined],
  ])(
    'treats a holder %s as dead once its lock was not touched for a minute by its own clock',
    (_where, owner) => {
      const watch = new HolderWatch(self);
      expect(watch.isDead(owner, 5, 1_000)).toBe(false);
      expect(watch.isDead(owner, 5, 60_000)).toBe(false);
      expect(watch.isDead(owner, 6, 61_001)).toBe(false);
      expect(watch.isDead(owner, 6, 121_001)).toBe(false);
      expect(watch.isDead(owner, 6, 121_002)).toBe(true);
    },
  );

  it('starts over with the next holder', () => {
    const watch = new HolderWatch(self);
    expect(watch.isDead(elsewhere, 5, 0)).toBe(false);
    expect(watch.isDead({ ...elsewhere, id: 'b' }, 5, 60_001)).toBe(false);
  });
});
