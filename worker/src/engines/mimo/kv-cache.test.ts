import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { blocksFor, KvCache, kvBlockTokens } from './kv-cache.ts';

describe('blocksFor', () => {
  it('returns the next power of two that holds the tokens, limited by the longest context', () => {
    expect([1, 64, 65, 129, 257, 10_000].map((tokens) => blocksFor(tokens, 24))).toEqual([1, 1, 2, 4, 8, 24]);
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 4096 }), (tokens) => {
        expect(blocksFor(tokens, 64) * kvBlockTokens).toBeGreaterThanOrEqual(tokens);
      }),
    );
  });
});

const owners = (cache: KvCache): number[] =>
  [0, 1, 2, 3, 4, 5].filter((id) => cache.grantOf(id) !== undefined);

function attempt<T>(grant: () => T): T | 'refused' {
  try {
    return grant();
  } catch {
    return 'refused';
  }
}

describe('KvCache', () => {
  it('keeps its invariants over any sequence of grants, growth and releases', () => {
    fc.assert(
      fc.property(
        fc.array(fc.record({ id: fc.nat(5), blocks: fc.nat(6) }), { maxLength: 60 }),
        (operations) => {
          const cache = new KvCache({ blocks: 12, slots: 4 });
          for (const { id, blocks } of operations) {
            const held = cache.grantOf(id);
            const heldBlocks = held?.blocks ?? 0;
            const granted = Math.max(blocks, heldBlocks);
            const hasSlot = held !== undefined || owners(cache).length < 4;
            const isAllowed = hasSlot && granted - heldBlocks <= cache.freeBlocks;
            const outcome = blocks === 0 ? cache.release(id) : attempt(() => cache.grant(id, blocks));
            const expected = isAllowed
              ? { slot: held?.slot ?? cache.grantOf(id)?.slot, blocks: granted }
              : 'refused';
            expect(outcome).toEqual(blocks === 0 ? held?.slot : expected);
            expect(blocks === 0 || isAllowed || cache.grantOf(id) === held, 'a refusal changes nothing').toBe(
              true,
            );
            cache.checkIntegrity();
          }
          owners(cache).forEach((id) => cache.release(id));
          cache.checkIntegrity();
          expect(cache.usedBlocks).toBe(0);
        },
      ),
    );
  });

  it('names the shortage when it rejects a grant', () => {
    const cache = new KvCache({ blocks: 3, slots: 1 });
    cache.grant(1, 2);
    expect(() => cache.grant(1, 4)).toThrow('sequence 1 wants 2 more blocks, 1 and 0 slots are free');
    expect(() => cache.grant(2, 1)).toThrow('sequence 2 wants 1 more blocks, 1 and 0 slots are free');
  });
});
