import { ClusterError } from '@mimo/core/process/errors';
import * as fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';

import { WorkQueue, type Work } from './work-queue.ts';

const forever = new AbortController().signal;

beforeEach(() => {
  vi.useFakeTimers();
});
afterEach(() => {
  vi.useRealTimers();
});

function createQueue(): WorkQueue {
  return new WorkQueue({ retryMinMs: 10, retryMaxMs: 60 });
}

/** The keys that can be taken at this moment. */
async function takeAll(queue: WorkQueue): Promise<Work[]> {
  const taken: Work[] = [];
  while (queue.length > 0) {
    taken.push(await queue.take(forever));
  }
  return taken;
}

const keysOf = (work: readonly Work[]): string[] => work.map(({ key }) => key);

describe('WorkQueue', () => {
  it('hands out keys in order, each once however often it was added', async () => {
    const queue = createQueue();
    for (const key of ['a', 'b', 'a', 'c', 'b']) {
      queue.add(key);
    }
    expect(queue.length).toBe(3);
    expect(keysOf(await takeAll(queue))).toEqual(['a', 'b', 'c']);
  });

  it('does not hand out a key in progress; hands it out once more afterwards if it was added meanwhile', async () => {
    const queue = createQueue();
    queue.add('a');
    const [first] = await takeAll(queue);
    queue.add('a');
    queue.add('a');
    expect(queue.length).toBe(0);
    first?.done();
    expect(keysOf(await takeAll(queue))).toEqual(['a']);
  });

  it('retries a failed key with growing delays up to the limit, and resets the delay after a success', async () => {
    const queue = createQueue();
    queue.add('a');
    const delaysMs: number[] = [];
    for (let failure = 0; failure < 5; failure += 1) {
      const work = await queue.take(forever);
      const delayMs = work.failed();
      delaysMs.push(delayMs);
      vi.advanceTimersByTime(delayMs - 1);
      expect(queue.length).toBe(0);
      vi.advanceTimersByTime(1);
      expect(queue.length).toBe(1);
    }
    expect(delaysMs).toEqual([10, 20, 40, 60, 60]);
    (await queue.take(forever)).done();
    queue.add('a');
    expect((await queue.take(forever)).failed()).toBe(10);
  });

  it('uses the earlier of two delays, in any order', async () => {
    const queue = createQueue();
    queue.addAfter('a', 100);
    queue.addAfter('a', 50);
    queue.addAfter('a', 70);
    vi.advanceTimersByTime(50);
    expect(keysOf(await takeAll(queue))).toEqual(['a']);
    vi.advanceTimersByTime(1000);
    expect(queue.length).toBe(0);
  });

  it('hands out a failed key at once when it is added again', async () => {
    const queue = createQueue();
    queue.add('a');
    (await queue.take(forever)).failed();
    queue.add('a');
    expect(queue.length).toBe(1);
  });

  it('reports how long a key waited', async () => {
    const queue = createQueue();
    queue.add('a');
    vi.advanceTimersByTime(30);
    expect((await queue.take(forever)).waitedMs).toBe(30);
  });

  it('wakes one taker per key, and releases takers on abort and on close', async () => {
    const queue = createQueue();
    const leaving = new AbortController();
    const left = queue.take(leaving.signal);
    const served = queue.take(forever);
    leaving.abort(new ClusterError('canceled', 'enough'));
    await expect(left).rejects.toMatchObject({ code: 'canceled', message: 'enough' });
    queue.add('a');
    expect((await served).key).toBe('a');
    const waiting = [queue.take(forever), queue.take(forever)];
    queue.close();
    for (const taking of waiting) {
      await expect(taking).rejects.toMatchObject({ code: 'canceled' });
    }
    queue.add('b');
    queue.addAfter('b', 1);
    vi.advanceTimersByTime(10);
    expect(queue.length).toBe(0);
    expect(vi.getTimerCount()).toBe(0);
  });

  it('passes a key on if the taker woken for it aborts at the same moment', async () => {
    const queue = createQueue();
    const leaving = new AbortController();
    const left = queue.take(leaving.signal);
    const served = queue.take(forever);
    queue.add('a');
    leaving.abort(new ClusterError('canceled', 'enough'));
    await expect(left).rejects.toMatchObject({ code: 'canceled' });
    expect((await served).key).toBe('a');
  });

  it('reports an outcome once: a second one changes nothing', async () => {
    const queue = createQueue();
    queue.add('a');
    const work = await queue.take(forever);
    work.done();
    queue.add('a');
    const again = await queue.take(forever);
    work.done();
    expect(work.failed()).toBe(0);
    queue.add('a');
    expect(queue.length).toBe(0);
    again.done();
    expect(queue.length).toBe(1);
  });

  it('never loses a key or hands it out twice at once, under any mix of takers, failures and additions', async () => {
    const step = fc.record({
      act: fc.constantFrom('add', 'addAfter', 'take', 'done', 'failed', 'advance'),
      key: fc.constantFrom('a', 'b', 'c', 'd'),
      at: fc.nat(5),
    });
    await fc.assert(
      fc.asyncProperty(fc.array(step, { maxLength: 60 }), async (steps) => {
        const queue = createQueue();
        const inWork: Work[] = [];
        /** Keys whose last addition no taker has begun with. */
        const owed = new Set<string>();
        const begin = (work: Work): void => {
          expect(keysOf(inWork)).not.toContain(work.key);
          inWork.push(work);
          owed.delete(work.key);
        };
        for (const { act, key, at } of steps) {
          if (act === 'add' || act === 'addAfter') {
            owed.add(key);
            queue[act](key, at * 20);
          } else if (act === 'take') {
            if (queue.length > 0) {
              begin(await queue.take(forever));
            }
          } else if (act === 'advance') {
            vi.advanceTimersByTime(at * 10);
          } else {
            const [work] = inWork.splice(at % Math.max(1, inWork.length), 1);
            work?.[act]();
          }
        }
        for (let round = 0; round < 3; round += 1) {
          for (const work of inWork.splice(0)) {
            work.done();
          }
          vi.advanceTimersByTime(1_000);
          while (queue.length > 0) {
            begin(await queue.take(forever));
          }
        }
        expect([...owed]).toEqual([]);
        queue.close();
      }),
      { numRuns: 300 },
    );
  });
});
