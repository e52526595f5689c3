import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { assertWeightsFit, fitKvBlocks, reservedShare } from './memory-budget.ts';

const gib = 2 ** 30;
const blockBytes = 9 * 2 ** 20;

describe('fitKvBlocks', () => {
  it('returns as many blocks as fit the rank with the least memory, and never more than can be used', () => {
    const size = fc.integer({ min: 4 * gib, max: 200 * gib });
    const memory = fc.tuple(size, size).map(([a, b]) => ({
      freeBytes: Math.min(a, b),
      totalBytes: Math.max(a, b),
    }));
    fc.assert(
      fc.property(
        fc.array(memory, { minLength: 1, maxLength: 8 }),
        fc.integer({ min: 1, max: 100_000 }),
        fc.nat(2 * gib),
        (memories, blocks, slackBytes) => {
          const spare = (count: number): number =>
            Math.min(
              ...memories.map(
                ({ freeBytes, totalBytes }) =>
                  freeBytes - reservedShare * totalBytes - slackBytes - count * blockBytes,
              ),
            );
          const need = { kind: 'auto', blocks, blockBytes, slackBytes } as const;
          fc.pre(spare(1) >= 0);
          const fitting = fitKvBlocks(need, memories);
          expect(spare(fitting)).toBeGreaterThanOrEqual(0);
          expect(fitting === blocks || spare(fitting + 1) < 0).toBe(true);
        },
      ),
    );
  });

  it('rejects memories too small for a single block', () => {
    const need = { kind: 'auto', blocks: 4, blockBytes, slackBytes: gib } as const;
    const memory = { freeBytes: 2 * gib + blockBytes - 1, totalBytes: 10 * gib };
    expect(() => fitKvBlocks(need, [memory])).toThrow(/^KV cache: rank 0 needs 1\.01 GiB for 1 blocks;/);
    expect(fitKvBlocks(need, [{ ...memory, freeBytes: 2 * gib + blockBytes }])).toBe(1);
  });

  it('names the rank, the need and the limit when a given size does not fit', () => {
    const memories = [
      { freeBytes: 60 * gib, totalBytes: 80 * gib },
      { freeBytes: 12 * gib, totalBytes: 80 * gib },
    ];
    const need = { kind: 'given', blocks: 1000, blockBytes, slackBytes: 0 } as const;
    expect(fitKvBlocks(need, memories.slice(0, 1))).toBe(1000);
    expect(() => fitKvBlocks(need, memories)).toThrow(
      'KV cache: rank 1 needs 8.79 GiB for 1000 blocks; after the weights 12.00 GiB of 80.00 GiB are free, of which 8.00 GiB are kept for activations',
    );
  });

  it('returns 1 GiB when no limit is known, and accepts a given size unchecked', () => {
    const need = { kind: 'auto', blocks: 1_000_000, blockBytes, slackBytes: 0 } as const;
    expect(fitKvBlocks(need, [undefined, undefined])).toBe(Math.floor(gib / blockBytes));
    expect(fitKvBlocks({ ...need, blockBytes: 3 * gib }, [undefined])).toBe(1);
    expect(fitKvBlocks({ ...need, kind: 'given' }, [undefined])).toBe(1_000_000);
  });
});

it('rejects weights that are larger than the free memory', () => {
  expect(() => assertWeightsFit(15 * gib, { freeBytes: 14.5 * gib, totalBytes: 16 * gib })).toThrow(
    'weights: take 15.00 GiB; 14.50 GiB of 16.00 GiB are free',
  );
  expect(() => assertWeightsFit(15 * gib, { freeBytes: 15 * gib, totalBytes: 16 * gib })).not.toThrow();
  expect(() => assertWeightsFit(15 * gib, undefined)).not.toThrow();
});
