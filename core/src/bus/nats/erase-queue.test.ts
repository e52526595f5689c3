// The rule of the queue, with a store of the test's own that answers when it is asked to.

import { describe, expect, it } from 'vitest';

import type { RecordPlace } from '../records.ts';
import { EraseQueue } from './erase-queue.ts';

const place = (sequence: number): RecordPlace => ({ storeId: 's', sequence });
const places = (count: number): RecordPlace[] => Array.from({ length: count }, (_, index) => place(index));

describe('EraseQueue', () => {
  it('erases every record once, in order, and a bounded number at once', async () => {
    const seen: number[] = [];
    let atOnce = 0;
    let most = 0;
    const queue = new EraseQueue({
      erase: async ({ sequence }) => {
        seen.push(sequence);
        atOnce += 1;
        most = Math.max(most, atOnce);
        await new Promise(setImmediate);
        atOnce -= 1;
        return sequence % 2 === 0;
      },
      isPublishing: () => true,
      signal: new AbortController().signal,
    });
    const results = await Promise.all(places(100).map((each) => queue.add(each)));
    expect(seen).toEqual(places(100).map(({ sequence }) => sequence));
    expect(results).toEqual(seen.map((sequence) => sequence % 2 === 0));
    expect(most).toBe(16);
    expect(await queue.add(place(100))).toBe(true);
  });

  it('pauses for as long as the last batch took while a publish waits', async () => {
    const begun: number[] = [];
    const ended: number[] = [];
    const queue = new EraseQueue({
      erase: async () => {
        begun.push(performance.now());
        await new Promise((resolve) => setTimeout(resolve, 40));
        ended.push(performance.now());
        return true;
      },
      isPublishing: () => true,
      signal: new AbortController().signal,
    });
    // The first is a batch of its own, since nothing else waits yet.
    await Promise.all(places(18).map((each) => queue.add(each)));
    expect(begun.length).toBe(18);
    expect(begun[1]! - ended[0]!).toBeGreaterThan(20);
    expect(begun[17]! - Math.max(...ended.slice(1, 17))).toBeGreaterThan(20);
  });

  it('passes on a failure to its caller alone, and all of them once its signal has aborted', async () => {
    const closing = new AbortController();
    const queue = new EraseQueue({
      erase: async ({ sequence }) => {
        closing.signal.throwIfAborted();
        if (sequence === 1) {
          throw new Error('of this one');
        }
        return true;
      },
      isPublishing: () => true,
      signal: closing.signal,
    });
    const results = await Promise.allSettled(places(3).map((each) => queue.add(each)));
    expect(results.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled']);
    const late = places(40).map((each) => queue.add(each));
    closing.abort(new Error('closed'));
    const ends = await Promise.allSettled(late);
    expect(ends.slice(16).every(({ status }) => status === 'rejected')).toBe(true);
  });
});
