import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { SequenceSampling } from './engine-api.ts';
import { argmax, drawToken, keyedUniform, type DrawContext } from './sampler.ts';

const plain: SequenceSampling = {
  temperature: 1,
  topP: 1,
  topK: 0,
  minP: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  seed: 1,
  stopTokenIds: [],
  maxTokens: 1,
  minTokens: 0,
  ignoreEos: false,
  logprobs: -1,
  draftTokens: 0,
};

function context(sampling: Partial<SequenceSampling>, more: Partial<DrawContext> = {}): DrawContext {
  return { sampling: { ...plain, ...sampling }, position: 5, seen: new Map(), forbidden: [], ...more };
}

/** The obviously right cuts: sort everything, then drop. Likeliest first. */
function keptSlowly(
  row: Float32Array,
  { temperature, minP, topK, topP }: SequenceSampling,
): { id: number; p: number }[] {
  const best = Math.max(...row);
  let kept = [...row]
    .map((value, id) => ({ id, p: Math.exp((value - best) / temperature), value }))
    .filter(({ value }) => value > -Infinity && value >= best + temperature * Math.log(minP))
    .toSorted((a, b) => b.value - a.value || a.id - b.id);
  kept = topK > 0 ? kept.slice(0, topK) : kept;
  const mass = kept.reduce((sum, { p }) => sum + p, 0);
  let before = 0;
  kept = kept.filter(({ p }) => {
    const isInside = before < topP * mass;
    before += p;
    return isInside;
  });
  const rest = kept.reduce((sum, { p }) => sum + p, 0);
  return kept.map(({ id, p }) => ({ id, p: p / rest }));
}

function drawSlowly(row: Float32Array, { sampling, position }: DrawContext): number {
  const scored = keptSlowly(row, sampling).map(({ id }) => ({
    id,
    score: row[id]! / sampling.temperature - Math.log(-Math.log(keyedUniform(sampling.seed, position, id))),
  }));
  return scored.reduce((a, b) => (b.score > a.score ? b : a)).id;
}

const rows = fc
  .array(fc.oneof(fc.float({ min: -20, max: 20, noNaN: true }), fc.constant(-Infinity)), {
    minLength: 1,
    maxLength: 300,
  })
  .map((values) => Float32Array.of(3, ...values));

const cuts = fc.record({
  temperature: fc.constantFrom(0.1, 0.6, 1, 2),
  topP: fc.constantFrom(1, 0.95, 0.5, 0.05),
  topK: fc.constantFrom(0, 1, 3, 50, 1000),
  minP: fc.constantFrom(0, 0.05, 0.5, 1),
  seed: fc.nat(),
});

describe('drawToken', () => {
  it('draws what sorting the whole vocabulary would draw', () => {
    fc.assert(
      fc.property(rows, cuts, fc.nat(40_000), (row, sampling, position) => {
        const drawn = drawToken(row.slice(), context(sampling, { position }));
        expect(drawn).toEqual({ tokenId: drawSlowly(row, context(sampling, { position })) });
      }),
      { numRuns: 1000 },
    );
  });

  it.each<[string, Partial<SequenceSampling>]>([
    ['temperature alone', { temperature: 1.3 }],
    ['top_p', { topP: 0.8 }],
    ['top_k and min_p', { topK: 6, minP: 0.05, temperature: 0.7 }],
  ])('draws with the right frequencies over positions and over seeds: %s', (_, sampling) => {
    const row = Float32Array.of(1, 2, 0.5, -1, 2.5, 0, 1.5, -3, 0.7, 1.1);
    const expected = keptSlowly(row, { ...plain, ...sampling });
    const draws = 20_000;
    for (const vary of ['position', 'seed'] as const) {
      const counts = new Map<number, number>();
      for (let i = 0; i < draws; i++) {
        const { tokenId } = drawToken(
          row.slice(),
          context({ ...sampling, seed: vary === 'seed' ? i : 1 }, { position: vary === 'seed' ? 9 : i }),
        );
        counts.set(tokenId, (counts.get(tokenId) ?? 0) + 1);
      }
      const chiSquare = expected.reduce(
        (sum, { id, p }) => sum + ((counts.get(id) ?? 0) - draws * p) ** 2 / (draws * p),
        0,
      );
      expect([...counts.values()].reduce((sum, count) => sum + count, 0)).toBe(draws);
      expect([...counts.keys()].every((id) => expected.some((each) => each.id === id))).toBe(true);
      // Nine degrees of freedom at most: beyond 34 once in ten thousand.
      expect(chiSquare).toBeLessThan(34);
    }
  });

  it('takes the likeliest at temperature 0, the lowest id at a tie, and never a forbidden one', () => {
    const row = Float32Array.of(0, 7, 3, 7, -1);
    expect(drawToken(row.slice(), context({ temperature: 0 })).tokenId).toBe(1);
    expect(drawToken(row.slice(), context({ temperature: 0 }, { forbidden: [1, 99] })).tokenId).toBe(3);
    for (let position = 0; position < 200; position++) {
      const { tokenId } = drawToken(
        row.slice(),
        context({ temperature: 2 }, { position, forbidden: [1, 3] }),
      );
      expect([0, 2, 4]).toContain(tokenId);
    }
  });

  it('penalises as vLLM does: repetition by prompt and completion, frequency and presence by the completion', () => {
    const row = Float32Array.of(2, -2, 2, 1);
    const seen = new Map([
      [0, 0],
      [1, 3],
      [2, 1],
    ]);
    const sampling = {
      repetitionPenalty: 2,
      frequencyPenalty: 0.5,
      presencePenalty: 0.25,
      temperature: 0,
      logprobs: 4,
    };
    drawToken(row, context(sampling, { seen }));
    expect([...row]).toEqual([1, -4 - 1.5 - 0.25, 1 - 0.5 - 0.25, 1]);
  });

  it('reports log-probabilities after penalties and temperature and before the cuts', () => {
    const row = Float32Array.of(1, 3, 2, 0, -1);
    for (const temperature of [0, 0.5]) {
      const divisor = temperature === 0 ? 1 : temperature;
      const logMass = Math.log([...row].reduce((sum, value) => sum + Math.exp(value / divisor), 0));
      const { tokenId, logprob } = drawToken(row.slice(), context({ temperature, topK: 1, logprobs: 3 }));
      expect(tokenId).toBe(1);
      expect(logprob?.logprob).toBeCloseTo(3 / divisor - logMass, 12);
      expect(logprob?.top.map((each) => each.tokenId)).toEqual([1, 2, 0]);
      expect(logprob?.top[2]?.logprob).toBeCloseTo(1 / divisor - logMass, 12);
    }
    expect(drawToken(row.slice(), context({ logprobs: 0 })).logprob?.top).toEqual([]);
  });
});

describe('keyedUniform', () => {
  it('is uniform over each part of its key, and no two neighbours agree', () => {
    const bins = 64;
    const draws = 64_000;
    const keys = [
      (i: number) => [i, 1, 2],
      (i: number) => [1, i, 2],
      (i: number) => [1, 2, i],
      (i: number) => [i, i, i],
    ];
    for (const key of keys) {
      const counts = new Float64Array(bins);
      let products = 0;
      let last = 0.5;
      for (let i = 0; i < draws; i++) {
        const [seed, position, tokenId] = key(i) as [number, number, number];
        const u = keyedUniform(seed, position, tokenId);
        counts[Math.floor(u * bins)]! += 1;
        products += (u - 0.5) * (last - 0.5);
        last = u;
      }
      const chiSquare = counts.reduce((sum, count) => sum + (count - draws / bins) ** 2 / (draws / bins), 0);
      // 63 degrees of freedom: beyond 114 once in ten thousand.
      expect(chiSquare).toBeLessThan(114);
      expect(Math.abs((12 * products) / draws)).toBeLessThan(4 / Math.sqrt(draws));
    }
  });
});

describe('argmax', () => {
  it('is the lowest index of the largest value', () => {
    expect(argmax(Float32Array.of(-5, -1, -1))).toBe(1);
    expect(argmax(Float32Array.of(-Infinity, -Infinity))).toBe(0);
  });
});
