import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { PromptQueue } from './prompt-queue.ts';

const short = 1_000;
const long = 1_000_000;

/** Takes every prompt, each after the one before is done. */
function drain(queue: PromptQueue<string>, readers: number): string[] {
  const order: string[] = [];
  for (let taken = queue.take(readers); taken !== undefined; taken = queue.take(readers)) {
    order.push(taken.item);
    taken.done();
  }
  return order;
}

describe('PromptQueue', () => {
  it('returns the prompts of one tenant in order, and of several tenants in turn', () => {
    const queue = new PromptQueue<string>(2);
    for (const item of ['a1', 'a2', 'a3']) {
      queue.add({ tenant: 'a', cost: short }, item);
    }
    queue.add({ tenant: 'b', cost: short }, 'b1');
    expect(drain(queue, 2)).toEqual(['a1', 'b1', 'a2', 'a3']);
  });

  it('counts the cost of prompts: a tenant with long ones gets fewer turns', () => {
    const queue = new PromptQueue<string>(1);
    for (const item of ['A1', 'A2', 'A3']) {
      queue.add({ tenant: 'a', cost: long }, item);
    }
    for (const item of ['b1', 'b2', 'b3']) {
      queue.add({ tenant: 'b', cost: short }, item);
    }
    expect(drain(queue, 1)).toEqual(['A1', 'b1', 'b2', 'b3', 'A2', 'A3']);
  });

  it('reserves one of several readers for short prompts, and reads one prompt per lane at a time', () => {
    const queue = new PromptQueue<string>(2);
    queue.add({ tenant: 'a', cost: long }, 'A1');
    queue.add({ tenant: 'b', cost: long }, 'B1');
    // The second reader has not started yet.
    expect(queue.take(1)).toBeUndefined();
    expect(queue.hasTurn(2)).toBe(true);
    const first = queue.take(2);
    expect(first?.item).toBe('A1');
    expect(queue.hasTurn(2)).toBe(false);
    queue.add({ tenant: 'a', cost: short }, 'a1');
    queue.add({ tenant: 'a', cost: short }, 'a2');
    expect(queue.take(2)?.item).toBe('a1');
    expect(queue.take(2)).toBeUndefined();
    first?.done();
    expect(queue.take(2)?.item).toBe('B1');
  });

  it('removes a prompt that leaves', () => {
    const queue = new PromptQueue<string>(1);
    const leave = queue.add({ tenant: 'a', cost: short }, 'a1');
    queue.add({ tenant: 'a', cost: long }, 'A1');
    expect(queue.waiting('a')).toEqual({ prompts: 2, cost: short + long });
    leave();
    leave();
    expect(queue.waiting('a')).toEqual({ prompts: 1, cost: long });
    expect(queue.waiting('b')).toEqual({ prompts: 0, cost: 0 });
    expect(queue.waiting()).toEqual({ prompts: 1, cost: long });
    expect(drain(queue, 1)).toEqual(['A1']);
  });

  it('shares by cost between tenants that always wait, and returns every prompt once', () => {
    const costs = fc.array(fc.integer({ min: 1, max: long }), { minLength: 1, maxLength: 30 });
    fc.assert(
      fc.property(
        fc.array(costs, { minLength: 2, maxLength: 5 }),
        fc.integer({ min: 1, max: 3 }),
        (tenants, readers) => {
          const queue = new PromptQueue<{ tenant: number; cost: number }>(readers);
          for (const [tenant, ofTenant] of tenants.entries()) {
            for (const cost of ofTenant) {
              queue.add({ tenant: String(tenant), cost }, { tenant, cost });
            }
          }
          const served = tenants.map(() => 0);
          const total = tenants.flat().length;
          let taken = 0;
          for (let next = queue.take(readers); next !== undefined; next = queue.take(readers)) {
            const { tenant, cost } = next.item;
            served[tenant] = (served[tenant] ?? 0) + cost;
            next.done();
            taken += 1;
            const left = tenants.map((_, index) => queue.waiting(String(index)).prompts);
            const backlogged = served.filter((_, index) => (left[index] ?? 0) > 0);
            // Each of a tenant's two lanes is ahead by one prompt at most.
            expect(Math.max(0, ...backlogged) - Math.min(Infinity, ...backlogged)).toBeLessThanOrEqual(
              4 * long,
            );
          }
          expect(taken).toBe(total);
          expect(queue.waiting()).toEqual({ prompts: 0, cost: 0 });
        },
      ),
    );
  });
});
