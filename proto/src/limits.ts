// What a request's fields may hold: the one table behind the protos' comments. The door and the engine both check with it,
// so neither accepts what the other refuses. Knows no message and no error class; pure.
//
// The floats are narrow enough for the arithmetic behind them: with healthy logits (below 1e30) no accepted value can
// overflow a 32-bit float or make a NaN, in the host's sampler or a device's.

export interface NumberLimit {
  /** `float` fields are 32 bits wide: the limits are compared in that width, so that 0.01 itself is within [0.01, 2]. */
  readonly kind: 'float' | 'integer';
  readonly min: number;
  readonly max: number;
  /** The value must be above `min`. */
  readonly minExcluded?: true;
  /** 0 lies outside of the range and is accepted too, because it means something else. */
  readonly orZero?: true;
}

const uint32Max = 0xffff_ffff;

/** By the field of SamplingParams. What depends on the model (its draft tokens, its context) is checked beside these. */
export const samplingLimits = {
  /** Clients write 1e-6 for greedy; what is lower divides logits towards infinity. */
  temperature: { kind: 'float', min: 1e-6, max: 2, orZero: true },
  topP: { kind: 'float', min: 0, max: 1, minExcluded: true },
  topK: { kind: 'integer', min: 0, max: uint32Max },
  minP: { kind: 'float', min: 0, max: 1 },
  /** Both ways far beyond use (0.9 to 1.3): it divides the positive logits and multiplies the negative ones. */
  repetitionPenalty: { kind: 'float', min: 0.01, max: 2 },
  presencePenalty: { kind: 'float', min: -2, max: 2 },
  frequencyPenalty: { kind: 'float', min: -2, max: 2 },
  seed: { kind: 'integer', min: 0, max: uint32Max },
  maxTokens: { kind: 'integer', min: 1, max: uint32Max },
  minTokens: { kind: 'integer', min: 0, max: uint32Max },
  logprobs: { kind: 'integer', min: 0, max: 20 },
  draftTokens: { kind: 'integer', min: 0, max: 1 },
} as const satisfies Readonly<Record<string, NumberLimit>>;

/** How much a repeated field may hold. */
export const repeatedLimits = {
  /** Each is searched for in every piece of text. */
  stop: 16,
  stopTokenIds: 64,
} as const;

export const stopTextMaxCharacters = 256;

/** What is wrong with a number, as `must be a number from 0.01 to 2, not 5`; undefined where nothing is. */
export function numberProblem(value: number, limit: NumberLimit): string | undefined {
  const { kind, max, minExcluded, orZero } = limit;
  const min = kind === 'float' ? Math.fround(limit.min) : limit.min;
  // Written so that NaN, which no comparison holds for, is a problem.
  const fits = value <= max && (minExcluded === true ? value > min : value >= min);
  const isWhole = kind === 'float' || Number.isInteger(value);
  return (fits && isWhole) || (orZero === true && value === 0)
    ? undefined
    : `must be ${describeLimit(limit)}, not ${kind === 'float' ? Number(value.toPrecision(7)) : value}`;
}

/** As `0 or a number from 0.000001 to 2`: what error messages say and the protos' comments repeat. */
export function describeLimit({ kind, min, max, minExcluded, orZero }: NumberLimit): string {
  const range = minExcluded === true ? `above ${min} and at most ${max}` : `from ${min} to ${max}`;
  return `${orZero === true ? '0 or ' : ''}${kind === 'integer' ? 'a whole number' : 'a number'} ${range}`;
}
