// Sampling parameters at, near and far beyond their limits, and the most expensive valid ones: each is answered, or
// rejected with the field, the range and the value.

import { Role } from '@mimo/proto/inference';
import { describeLimit, samplingLimits, type NumberLimit } from '@mimo/proto/limits';

import type { HostileSubject } from '../hostile-case.ts';
import { frame } from '../raw-call.ts';
import type { HostileWorld } from '../world.ts';

type Name = keyof typeof samplingLimits;
type Case = HostileSubject['cases'][number];

const question = [{ role: Role.USER, content: 'What is 47 + 85?' }];
const entries = Object.entries(samplingLimits) as [Name, NumberLimit][];
const floats = entries.filter(([, { kind }]) => kind === 'float');
const integers = entries.filter(([, { kind }]) => kind === 'integer');

function ask(
  world: HostileWorld,
  sampling: Parameters<HostileWorld['chat']>[0]['sampling'],
): ReturnType<Case['send']> {
  return world.chat({ messages: question, sampling: { maxTokens: 2, ...sampling } });
}

/** How the proto and its messages spell a field. */
function fieldOf(name: Name): string {
  return `sampling.${name.replaceAll(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`)}`;
}

function refused(name: Name, value: number): Case {
  const told = `${fieldOf(name)} must be ${describeLimit(samplingLimits[name])}, not `;
  return {
    name: `${name} ${value}`,
    send: (world) => ask(world, { [name]: value }),
    code: 'invalid_argument',
    message: new RegExp(RegExp.escape(told)),
  };
}

function answered(name: string, sampling: Parameters<typeof ask>[1]): Case {
  return { name, send: (world) => ask(world, sampling), code: 'ok' };
}

/** The float32 next to a value, towards an end of the line. */
function besideFloat(value: number, direction: 1 | -1): number {
  const float = Float32Array.of(value);
  const bits = new Int32Array(float.buffer);
  if (float[0] === 0) {
    return direction * 2 ** -149;
  }
  bits[0]! += value > 0 === direction > 0 ? 1 : -1;
  return float[0]!;
}

const floatCases = floats.flatMap(([name, { min, max, minExcluded }]): Case[] => {
  const lowest = minExcluded === true ? besideFloat(min, 1) : Math.fround(min);
  return [
    refused(name, besideFloat(lowest, -1)),
    answered(`${name} at its least, ${lowest}`, { [name]: lowest }),
    answered(`${name} at its most, ${max}`, { [name]: max }),
    ...[besideFloat(max, 1), NaN, Infinity, -Infinity, 3.4028234663852886e38].map((value) =>
      refused(name, value),
    ),
  ];
});

/** The smallest denormal is within a range that begins at 0 or below. */
const denormalCases = floats.map(([name, { min }]) =>
  min > 0 ? refused(name, 2 ** -149) : answered(`${name} at the smallest denormal`, { [name]: 2 ** -149 }),
);

const integerCases = integers
  .filter(([, { max }]) => max < 0xffff_ffff)
  .flatMap(([name, { max }]) => [max + 1, 0xffff_ffff].map((value) => refused(name, value)));

/** A ChatRequest whose SamplingParams are these bytes. */
function rawSampling(bytes: readonly number[]): Case['send'] {
  const model = Buffer.from('mimo-demo');
  const content = Buffer.from('What is 47 + 85?');
  // Message: role (1) user (2), content (2). ChatRequest: model (1), messages (2), sampling (3).
  const message = [0x08, Role.USER, 0x12, content.length, ...content];
  const sampling = [0x58, 2, ...bytes];
  const body = [
    0x0a,
    model.length,
    ...model,
    0x12,
    message.length,
    ...message,
    0x1a,
    sampling.length,
    ...sampling,
  ];
  return (world) =>
    world.raw({ path: '/mimo.inference.v1.InferenceService/Chat', body: frame(Uint8Array.from(body)) });
}

/** -1 as protobuf writes an int32: ten bytes. */
const minusOne = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];

const wireCases: readonly Case[] = [
  { name: 'a seed of 64 bits is taken modulo 2^32', send: rawSampling([0x40, ...minusOne]), code: 'ok' },
  { name: 'top_k -1 is 4294967295', send: rawSampling([0x18, ...minusOne]), code: 'ok' },
  {
    name: 'logprobs -1',
    send: rawSampling([0x68, ...minusOne]),
    code: 'invalid_argument',
    message: /sampling\.logprobs must be a whole number from 0 to 20, not 4294967295/,
  },
  {
    name: 'min_tokens -1',
    send: rawSampling([0x78, ...minusOne]),
    code: 'invalid_argument',
    message: /sampling\.min_tokens must be at most max_tokens, 2, not 4294967295/,
  },
  {
    name: 'a signalling NaN as temperature',
    send: rawSampling([0x0d, 0x01, 0x00, 0x80, 0x7f]),
    code: 'invalid_argument',
    message: /sampling\.temperature must be .*, not NaN/,
  },
  { name: 'a temperature of -0', send: rawSampling([0x0d, 0x00, 0x00, 0x00, 0x80]), code: 'ok' },
  {
    name: 'the last of two temperatures counts',
    send: rawSampling([0x0d, 0x00, 0x00, 0x80, 0x3f, 0x0d, 0x00, 0x00, 0x80, 0x7f]),
    code: 'invalid_argument',
    message: /sampling\.temperature must be .*, not Infinity/,
  },
  {
    name: 'a temperature cut off',
    send: rawSampling([0x0d, 0x00, 0x00]),
    code: ['invalid_argument', 'internal'],
  },
  {
    name: 'a varint that never ends',
    send: rawSampling(Array.from({ length: 12 }, () => 0xff)),
    code: ['invalid_argument', 'internal'],
  },
];

/** What made infinities or cost most, within the limits. */
const worst = {
  temperature: 2,
  repetitionPenalty: 0.01,
  presencePenalty: -2,
  frequencyPenalty: -2,
  logprobs: 20,
};

export const numbers: HostileSubject = {
  name: 'numbers',
  cases: [
    refused('repetitionPenalty', 1e-40),
    {
      name: 'a repetition penalty of 1e-40 with top_k, which hung the group',
      send: (world) => ask(world, { temperature: 0.6, repetitionPenalty: 1e-40, topK: 50, topP: 1 }),
      code: 'invalid_argument',
      message: /sampling\.repetition_penalty must be a number from 0\.01 to 2, not 9\.99/,
    },
    ...floatCases,
    ...denormalCases,
    ...integerCases,
    refused('maxTokens', 0),
    ...wireCases,
    answered('temperature 2 with top_p 0.95', { temperature: 2, topP: 0.95 }),
    answered('every parameter at its worst', worst),
    answered('every parameter at its worst, top_k 50', { ...worst, topK: 50 }),
    answered('every parameter at its worst, greedy', { ...worst, temperature: 0 }),
    answered('every cut at once', { temperature: 2, topP: 1 - 2 ** -24, topK: 0xffff_ffff, minP: 2 ** -149 }),
    answered('the least of each cut', { temperature: 1e-6, topP: 2 ** -149, topK: 1, minP: 1 }),
    answered('the lowest temperature without a cut', { temperature: 1e-6, topP: 1, repetitionPenalty: 2 }),
    answered('seed 0', { temperature: 2, seed: 0 }),
    answered('the largest seed', { temperature: 2, seed: 0xffff_ffff }),
    answered('every kind of stop before min_tokens', {
      minTokens: 2,
      temperature: 2,
      stopTokenIds: Array.from({ length: 64 }, (_, id) => id),
      ignoreEos: true,
    }),
    {
      name: 'every number wrong at once is told at once',
      send: (world) =>
        ask(world, {
          temperature: NaN,
          topP: NaN,
          minP: NaN,
          repetitionPenalty: NaN,
          presencePenalty: NaN,
          frequencyPenalty: NaN,
        }),
      code: 'invalid_argument',
      message: /temperature.*top_p.*min_p.*repetition_penalty.*presence_penalty.*frequency_penalty/,
    },
    {
      name: 'numbers are checked where a raw prompt is generated from, too',
      send: (world) =>
        world.generate({ input: { $case: 'prompt', value: 'a' }, sampling: { topP: NaN, maxTokens: 2 } }),
      code: 'invalid_argument',
      message: /sampling\.top_p must be a number above 0 and at most 1, not NaN/,
    },
  ],
};
