import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { mimo7b } from '../compiler/random-checkpoint.ts';
import { planShards, type Range, type RankPlan, rangeLength } from './shard-plan.ts';

const modelAndRanks = fc
  .record({
    tensorParallel: fc.integer({ min: 1, max: 8 }),
    rankKvHeads: fc.integer({ min: 1, max: 4 }),
    group: fc.integer({ min: 1, max: 8 }),
    headDim: fc.constantFrom(16, 32, 64, 128),
    intermediateSize: fc.integer({ min: 256, max: 5_000 }),
    vocabSize: fc.integer({ min: 8, max: 5_000 }),
  })
  .map(({ tensorParallel, rankKvHeads, group, ...sizes }) => {
    const kvHeads = rankKvHeads * tensorParallel;
    return { tensorParallel, config: { ...mimo7b, ...sizes, kvHeads, queryHeads: kvHeads * group } };
  });

function expectCover(ranges: readonly Range[], total: number): void {
  let end = 0;
  for (const range of ranges) {
    expect(range.start).toBe(end);
    expect(range.end).toBeGreaterThan(range.start);
    ({ end } = range);
  }
  expect(end).toBe(total);
}

function slices(plans: readonly RankPlan[], pick: (plan: RankPlan) => Range): Range[] {
  return plans.map(pick);
}

describe('planShards', () => {
  it('splits MiMo-7B for 1, 2, 4 and 8 ranks as the reference lists', () => {
    for (const tensorParallel of [1, 2, 4, 8]) {
      const plans = planShards(mimo7b, tensorParallel, 'int8');
      for (const plan of plans) {
        expect(plan.queryHeads).toBe(32 / tensorParallel);
        expect(plan.kvHeads).toBe(8 / tensorParallel);
        expect(rangeLength(plan.queryRows)).toBe(4096 / tensorParallel);
        expect(rangeLength(plan.kvRows)).toBe(1024 / tensorParallel);
        expect(rangeLength(plan.feedForward)).toBe(11_008 / tensorParallel);
        expect(rangeLength(plan.vocabulary)).toBe(151_680 / tensorParallel);
      }
    }
  });

  it('covers every matrix exactly once, in rank order', () => {
    fc.assert(
      fc.property(modelAndRanks, ({ config, tensorParallel }) => {
        const plans = planShards(config, tensorParallel, 'fp32');
        expect(plans.map(({ rank }) => rank)).toEqual(
          Array.from({ length: tensorParallel }, (_, rank) => rank),
        );
        expectCover(
          slices(plans, (plan) => plan.queryRows),
          config.queryHeads * config.headDim,
        );
        expectCover(
          slices(plans, (plan) => plan.kvRows),
          config.kvHeads * config.headDim,
        );
        expectCover(
          slices(plans, (plan) => plan.feedForward),
          config.intermediateSize,
        );
        expectCover(
          slices(plans, (plan) => plan.vocabulary),
          config.vocabSize,
        );
      }),
    );
  });

  it('keeps query heads with the KV head that they read, and shares differ by one unit at most', () => {
    fc.assert(
      fc.property(modelAndRanks, ({ config, tensorParallel }) => {
        const plans = planShards(config, tensorParallel, 'fp32');
        const group = config.queryHeads / config.kvHeads;
        for (const { queryRows, kvRows } of plans) {
          expect(queryRows).toEqual({ start: kvRows.start * group, end: kvRows.end * group });
        }
        const unit = config.intermediateSize % 32 === 0 ? 32 : 1;
        for (const [pick, most] of [
          [(plan: RankPlan) => plan.feedForward, unit],
          [(plan: RankPlan) => plan.vocabulary, 1],
        ] as const) {
          const lengths = slices(plans, pick).map(rangeLength);
          expect(Math.max(...lengths) - Math.min(...lengths)).toBeLessThanOrEqual(most);
        }
      }),
    );
  });

  it('cuts int8 and int4 inputs between blocks only', () => {
    const inBlocks = modelAndRanks.filter(
      ({ config, tensorParallel }) =>
        config.intermediateSize % 32 === 0 &&
        ((config.queryHeads / tensorParallel) * config.headDim) % 32 === 0,
    );
    fc.assert(
      fc.property(inBlocks, fc.constantFrom('int8' as const, 'int4' as const), (model, precision) => {
        for (const plan of planShards(model.config, model.tensorParallel, precision)) {
          for (const { start, end } of [plan.queryRows, plan.feedForward]) {
            expect([start % 32, end % 32]).toEqual([0, 0]);
          }
        }
      }),
    );
  });

  it.each([
    [{}, 3, 'fp32', /tensorParallel 3 does not divide num_key_value_heads 8/],
    [{}, 16, 'fp32', /tensorParallel 16 does not divide num_key_value_heads 8/],
    [{ vocabSize: 3 }, 4, 'fp32', /tensorParallel 4 exceeds vocab_size 3/],
    [{ intermediateSize: 64 }, 4, 'fp32', /tensorParallel 4 exceeds the 2 blocks of intermediate_size 64/],
    [{ intermediateSize: 100 }, 1, 'int8', /int8 needs intermediate_size in multiples of 32, is 100/],
    [{ hiddenSize: 100 }, 1, 'int4', /int4 needs hidden_size in multiples of 32, is 100/],
    [
      { headDim: 16, queryHeads: 8 },
      8,
      'int8',
      /int8 needs query heads of a rank x head_dim \(1 x 16\) .* is 16/,
    ],
  ] as const)('rejects %j on %i ranks in %s', (change, tensorParallel, precision, message) => {
    const plan = (): unknown => planShards({ ...mimo7b, ...change }, tensorParallel, precision);
    expect(plan).toThrow(
      expect.objectContaining({ code: 'failed_precondition', message: expect.stringMatching(message) }),
    );
  });

  it.each([0, -1, 1.5, Number.NaN])('rejects tensorParallel %d', (tensorParallel) => {
    expect(() => planShards(mimo7b, tensorParallel, 'fp32')).toThrow(
      expect.objectContaining({ code: 'invalid_argument' }),
    );
  });
});
