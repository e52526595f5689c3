import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { numberProblem, samplingLimits, type NumberLimit } from '@mimo/proto/limits';
import type { SequenceSampling } from './engine-api.ts';
import * as reference from './reference-sampler.ts';
import { argmax, drawToken, keyedUniform, type DrawContext, type DrawnToken } from './sampler.ts';

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

/** The obviously correct cuts: sort everything, then drop. Likeliest first. */
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

/** Any 32 bits, those at the edges of the format more often. */
const anyFloat = fc
  .oneof(
    fc.nat(0xffff_ffff),
    fc.constantFrom(0, 0x8000_0000, 1, 0x8000_0001, 0x7f7f_ffff, 0xff7f_ffff, 0x3f80_0000, 0xff80_0000),
    fc.constantFrom(0x7f80_0000, 0x7fc0_0000, 0xffc0_0000, 0x7f80_0001),
  )
  .map((bits) => new Float32Array(Uint32Array.of(bits).buffer)[0]!);
/** Whose penalised logits are floats, too. */
const finiteFloat = fc.oneof(
  anyFloat.map((value) => (Math.abs(value) < 3e36 || value === -Infinity ? value : 0)),
  fc.float({ min: -20, max: 20, noNaN: true }),
  fc.integer({ min: -3, max: 3 }),
);
const rowsOf = (values: fc.Arbitrary<number>): fc.Arbitrary<Float32Array> =>
  fc
    .tuple(fc.array(values, { minLength: 1, maxLength: 200 }), fc.constantFrom(1, 1, 2, 7))
    // Repeated: ties far apart.
    .map(([some, times]) =>
      Float32Array.from({ length: some.length * times }, (_, id) => some[id % some.length]!),
    );
const anyRows = fc.oneof(rowsOf(anyFloat), rowsOf(fc.oneof(finiteFloat, finiteFloat, anyFloat)));
const finiteRows = rowsOf(finiteFloat).filter((row) => row.some((value) => value > -Infinity));

/** Any sampling that the table accepts, its limits more often. */
function accepted(limit: NumberLimit): fc.Arbitrary<number> {
  const { min, max, kind } = limit;
  const ends = [min, max, kind === 'float' ? Math.fround(min) : min, 0, 1].filter(
    (value) => numberProblem(value, limit) === undefined,
  );
  const within =
    kind === 'integer'
      ? fc.oneof(fc.integer({ min, max: Math.min(max, 300) }), fc.integer({ min, max }))
      : fc.oneof(
          fc.double({ min, max, noNaN: true }).map(Math.fround),
          fc.float({ min: Math.fround(min), max, noNaN: true }),
        );
  return fc.oneof(
    fc.constantFrom(...ends),
    within.filter((value) => numberProblem(value, limit) === undefined),
  );
}

/** A plain value more often than all others, so that some parameters act alone. */
const acceptedOr = (limit: NumberLimit, value: number): fc.Arbitrary<number> =>
  fc.oneof(fc.constant(value), accepted(limit));

const contexts: fc.Arbitrary<DrawContext> = fc.record({
  sampling: fc
    .record({
      temperature: acceptedOr(samplingLimits.temperature, 1),
      topP: acceptedOr(samplingLimits.topP, 1),
      topK: acceptedOr(samplingLimits.topK, 0),
      minP: acceptedOr(samplingLimits.minP, 0),
      repetitionPenalty: acceptedOr(samplingLimits.repetitionPenalty, 1),
      presencePenalty: acceptedOr(samplingLimits.presencePenalty, 0),
      frequencyPenalty: acceptedOr(samplingLimits.frequencyPenalty, 0),
      seed: accepted(samplingLimits.seed),
      logprobs: fc.constantFrom(-1, -1, 0, 1, 20),
    })
    .map((sampling) => ({ ...plain, ...sampling })),
  position: fc.nat(2 ** 18),
  seen: fc
    .array(fc.tuple(fc.nat(250), fc.oneof(fc.nat(3), fc.nat(2 ** 18))), { maxLength: 20 })
    .map((entries) => new Map(entries)),
  forbidden: fc.array(fc.nat(250), { maxLength: 3 }),
});

/** Normally distributed over ids. */
function normal(id: number): number {
  return Math.sqrt(-2 * Math.log(keyedUniform(1, 2, id))) * Math.cos(2 * Math.PI * keyedUniform(3, 4, id));
}

/** The token's own, then those of the alternatives that may be drawn. */
function logprobsOf({ logprob }: DrawnToken): (readonly [number, number])[] {
  const all = logprob === undefined ? [] : [logprob, ...logprob.top];
  return all.filter((each) => each.logprob > -Infinity).map((each) => [each.tokenId, each.logprob]);
}

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

  it('draws what the reference sampler draws, with the same log-probabilities, from any finite row', () => {
    fc.assert(
      fc.property(finiteRows, contexts, (row, draw) => {
        fc.pre(row.some((value, id) => value > -Infinity && !draw.forbidden.includes(id)));
        const drawn = drawToken(row.slice(), draw);
        const expected = reference.drawToken(row.slice(), draw);
        expect(drawn.tokenId).toBe(expected.tokenId);
        const [logprobs, expectedLogprobs] = [logprobsOf(drawn), logprobsOf(expected)];
        expect(logprobs.map(([id]) => id)).toEqual(expectedLogprobs.map(([id]) => id));
        for (const [index, [, logprob]] of logprobs.entries()) {
          const [, expectedLogprob] = expectedLogprobs[index]!;
          const error = Math.abs(logprob - expectedLogprob);
          expect(error).toBeLessThanOrEqual(1e-8 * Math.max(1, Math.abs(expectedLogprob)));
        }
      }),
      { numRuns: 3000 },
    );
  });

  it('terminates for any bits and any accepted sampling: with an allowed id, or with the fault of the row', () => {
    fc.assert(
      fc.property(anyRows, contexts, (row, draw) => {
        const scratch = row.slice();
        const { tokenId, logprob } = drawToken(scratch, draw);
        expect(tokenId).toSatisfy((id: number) => Number.isInteger(id) && id >= 0 && id < row.length);
        const allowed = [...row].filter((_, id) => !draw.forbidden.includes(id));
        const isDrawable =
          allowed.some((value) => value > -Infinity) && allowed.every((value) => value < Infinity);
        expect(Number.isFinite(scratch[tokenId])).toBe(isDrawable);
        expect(logprob !== undefined).toBe(isDrawable && draw.sampling.logprobs >= 0);
        // A float32 field of the wire takes it.
        expect(Number.isFinite(Math.fround(logprob?.logprob ?? 0))).toBe(true);
      }),
      {
        numRuns: 3000,
        // A top of -0 once put a distance into a bin that does not exist.
        examples: [[Float32Array.of(-0, 0, 0, 0, -0, 0, 0, 0), context({ temperature: 1e-6, logprobs: 1 })]],
      },
    );
  });

  it('draws what the reference sampler draws from a whole vocabulary, on every path through the cuts', () => {
    const length = 151_680;
    const usual = Float32Array.from({ length }, (_, id) => 2.2 * normal(id) - 2);
    usual.set(
      Float32Array.from({ length: 60 }, (_, rank) => 20 - rank * 0.4),
      5_000,
    );
    const tied = new Float32Array(length).fill(1.5);
    const coarse = Float32Array.from({ length }, (_, id) => Math.round(normal(id)) / 2);
    const cases: readonly (readonly [Float32Array, Partial<SequenceSampling>])[] = [
      [usual, {}],
      [usual, { temperature: 1, topP: 0.999 }],
      [usual, { topK: 20 }],
      [usual, { topK: 100_000, temperature: 2 }],
      [usual, { topP: 1 - 2 ** -24 }],
      [tied, {}],
      [tied, { topP: 0.5 }],
      [tied, { topP: 0.5, topK: 1000 }],
      [coarse, { temperature: 2 }],
      [coarse, { temperature: 2, topK: 70_000, minP: 0.01 }],
    ];
    for (const [row, sampling] of cases) {
      const draw = context({ temperature: 0.6, topP: Math.fround(0.95), ...sampling }, { position: 77 });
      expect(drawToken(row.slice(), draw)).toEqual(reference.drawToken(row.slice(), draw));
    }
  });

  it('limits a penalised logit to the largest float, and keeps an Infinity', () => {
    const largest = 3.4028234663852886e38;
    const sampling = { repetitionPenalty: 0.01, temperature: 0 };
    const seen = new Map([
      [0, 0],
      [1, 0],
      [2, 1],
    ]);
    const row = Float32Array.of(1e38, -1e38, -Infinity, 5);
    expect(drawToken(row, context(sampling, { seen })).tokenId).toBe(0);
    expect([...row]).toEqual([largest, Math.fround(Math.fround(-1e38) * 0.01), -Infinity, 5]);
    const broken = Float32Array.of(1, Infinity, 5);
    expect(broken[drawToken(broken, context(sampling, { seen })).tokenId]).toBe(Infinity);
  });

  it('terminates with a repetition penalty of 1e-40, which once made infinities and hung the step thread', () => {
    expect(numberProblem(1e-40, samplingLimits.repetitionPenalty)).toBeDefined();
    const row = Float32Array.from({ length: 640 }, (_, id) => Math.sin(id) * 8);
    const seen = new Map(Array.from({ length: 12 }, (_, i) => [i * 7 + 1, 0] as const));
    for (const cut of [{ topP: 0.95 }, { logprobs: 3 }, { topK: 50 }]) {
      const sampling = { temperature: 0.6, repetitionPenalty: Math.fround(1e-40), ...cut };
      const scratch = row.slice();
      const { tokenId } = drawToken(scratch, context(sampling, { seen }));
      expect(Number.isFinite(scratch[tokenId])).toBe(true);
    }
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

  it('chooses the likeliest id at temperature 0, the lowest at a tie, and never a forbidden one', () => {
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
  it('is uniform over each part of its key, and differs between neighbours', () => {
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
  it('returns the lowest index of the largest value', () => {
    expect(argmax(Float32Array.of(-5, -1, -1))).toBe(1);
    expect(argmax(Float32Array.of(-Infinity, -Infinity))).toBe(0);
  });
});
