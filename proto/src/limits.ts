// The limits of a request's fields: the one table behind the protos' comments. The API and the engine both check with
// it, so neither accepts a value that the other refuses. Knows no message and no error class; pure.
//
// The floats are narrow enough for the arithmetic behind them: with healthy logits (below 1e30) no accepted value can
// overflow a 32-bit float or make a NaN, in the host's sampler or a device's.

export interface NumberLimit {
  /**
   * `float` fields are 32 bits wide: the limits are compared in that width, so that 0.01 itself is within [0.01, 2].
   */
  readonly kind: 'float' | 'integer';
  readonly min: number;
  readonly max: number;
  /** The value must be above `min`. */
  readonly minExcluded?: true;
  /** 0 lies outside of the range and is accepted too, because it means something else. */
  readonly orZero?: true;
}

const uint32Max = 0xffff_ffff;

/**
 * By the field of SamplingParams. Limits that depend on the model (draft tokens, context) are checked elsewhere.
 */
export const samplingLimits = {
  /** Clients write 1e-6 for greedy; a lower value divides logits towards infinity. */
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

/** The most entries of a repeated field. */
export const repeatedLimits = {
  /** Each is searched for in every piece of text. */
  stop: 16,
  stopTokenIds: 64,
  /** A long agent's conversation has hundreds; each costs the template a fraction of a millisecond, empty or not. */
  messages: 4_096,
  /** The longest context of any model in sight. */
  tokenIds: 2 ** 20,
} as const;

export const stopTextMaxCharacters = 256;

/** The limits of one field on the wire, checked before its bytes become objects. */
export interface FieldLimit {
  /** As the proto spells it. */
  readonly name: string;
  /** Of a repeated field. Any other may appear 16 times, since parsers must use the last of several. */
  readonly maxCount?: number;
  /** Numbers, which travel packed: as bytes that hold one varint after another. */
  readonly packed?: true;
  /** Of one text. */
  readonly maxBytes?: number;
  /** The field is a message with limits of its own. */
  readonly message?: MessageLimits;
}

/** By field number. A number that is not listed counts with the other unlisted ones of its message. */
export type MessageLimits = Readonly<Record<number, FieldLimit>>;

/** UTF-8 needs at most three bytes for each of JavaScript's characters. */
const stopTextMaxBytes = 3 * stopTextMaxCharacters;
/** The names of Kubernetes objects have at most 253. */
const nameMaxBytes = 256;

const sampling: MessageLimits = {
  9: { name: 'stop', maxCount: repeatedLimits.stop, maxBytes: stopTextMaxBytes },
  10: { name: 'stop_token_ids', maxCount: repeatedLimits.stopTokenIds, packed: true },
};

const chatRequest: MessageLimits = {
  1: { name: 'model', maxBytes: nameMaxBytes },
  2: { name: 'messages', maxCount: repeatedLimits.messages, message: {} },
  3: { name: 'sampling', message: sampling },
};

const generateRequest: MessageLimits = {
  1: { name: 'model', maxBytes: nameMaxBytes },
  3: { name: 'token_ids', message: { 1: { name: 'ids', maxCount: repeatedLimits.tokenIds, packed: true } } },
  4: { name: 'sampling', message: sampling },
};

/** By the request of InferenceService. */
export const requestLimits = {
  ChatRequest: chatRequest,
  GenerateRequest: generateRequest,
  CountTokensRequest: {
    1: { name: 'chat', message: chatRequest },
    2: { name: 'generate', message: generateRequest },
  },
  CancelRequest: {},
  ListModelsRequest: {},
} as const satisfies Readonly<Record<string, MessageLimits>>;

/** The problem with a number, as `must be a number from 0.01 to 2, not 5`; undefined if it is valid. */
export function numberProblem(value: number, limit: NumberLimit): string | undefined {
  const { kind, max, minExcluded, orZero } = limit;
  const min = kind === 'float' ? Math.fround(limit.min) : limit.min;
  // Written so that NaN, for which every comparison is false, is a problem.
  const fits = value <= max && (minExcluded === true ? value > min : value >= min);
  const isWhole = kind === 'float' || Number.isInteger(value);
  return (fits && isWhole) || (orZero === true && value === 0)
    ? undefined
    : `must be ${describeLimit(limit)}, not ${kind === 'float' ? Number(value.toPrecision(7)) : value}`;
}

/** As `0 or a number from 0.000001 to 2`: the wording of error messages and of the protos' comments. */
export function describeLimit({ kind, min, max, minExcluded, orZero }: NumberLimit): string {
  const range = minExcluded === true ? `above ${min} and at most ${max}` : `from ${min} to ${max}`;
  return `${orZero === true ? '0 or ' : ''}${kind === 'integer' ? 'a whole number' : 'a number'} ${range}`;
}
