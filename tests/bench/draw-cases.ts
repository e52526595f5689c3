// Rows of logits and requests to draw from them, for comparing a device's sampler with the host's: every row and every
// request is derived from its numbers, so both sides generate them independently.

import type { SequenceSampling } from '@mimo/worker/engines/mimo/engine-api';
import type { DrawContext } from '@mimo/worker/engines/mimo/sampler';
import { greedySampling } from '../harness/greedy-sampling.ts';

/** Shapes of rows. A set has each of them once for every salt. */
export const rowKinds = [
  'peaked',
  'usual',
  'wide',
  'flat',
  'tied',
  'few values',
  'equal',
  'not finite',
] as const;

export type RowKind = (typeof rowKinds)[number];

/** Mulberry32: uniform in [0, 1). */
function randomFrom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), 1 | state);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return ((x ^ (x >>> 14)) >>> 0) / 4_294_967_296;
  };
}

/** Writes a row of a kind. */
export function fillRow(row: Float32Array, kind: RowKind, salt: number): void {
  const random = randomFrom(salt * 131 + rowKinds.indexOf(kind));
  const normal = (): number => {
    let sum = -6;
    for (let i = 0; i < 12; i++) {
      sum += random();
    }
    return sum;
  };
  const somewhere = (): number => Math.floor(random() * row.length);
  const fill = (value: () => number): void => {
    for (let id = 0; id < row.length; id++) {
      row[id] = value();
    }
  };
  switch (kind) {
    case 'peaked':
      fill(() => 2 * normal());
      for (let i = 0; i < 20; i++) {
        row[somewhere()] = (i === 0 ? 24 : 14) - 0.5 * i;
      }
      break;
    case 'usual':
    case 'tied':
    case 'not finite':
      // Falls fast, then slowly, as the sorted logits of a language model do.
      fill(() => 2 * normal());
      for (let i = 0; i < 1500; i++) {
        row[somewhere()] = 19 - (8 * i) / (i + 40) - 0.002 * i + 0.3 * normal();
      }
      break;
    case 'wide':
      fill(() => 3 * normal());
      break;
    case 'flat':
      fill(() => 0.1 * normal());
      break;
    case 'few values':
      fill(() => Math.floor(random() * (2 + (salt % 5))) - 1);
      break;
    case 'equal':
      row.fill(salt % 2 === 0 ? 1.5 : -0);
      break;
  }
  if (kind === 'tied') {
    // As bfloat16 has them: 8 bits of a logit.
    const bits = new Uint32Array(row.buffer, row.byteOffset, row.length);
    for (let id = 0; id < row.length; id++) {
      bits[id] = (bits[id]! + 0x7fff + ((bits[id]! >>> 16) & 1)) & 0xffff_0000;
    }
  }
  if (kind === 'not finite') {
    const breakers = [
      () => row.forEach((_, id) => (row[id] = id % 2 === 0 ? -Infinity : row[id]!)),
      () => row.fill(-Infinity).set([3, 2.5, 3], row.length - 9),
      () => (row[somewhere()] = NaN),
      () => (row[somewhere()] = Infinity),
      () => row.fill(-Infinity),
      () => row.fill(NaN),
      () => row.forEach((_, id) => (row[id] = id % 3 === 0 ? -0 : id % 3 === 1 ? 0 : -1)),
      () => (row[row.length - 1] = -Infinity),
    ];
    breakers[salt % breakers.length]!();
  }
}

/** The `index`-th request for a row: mostly as the model is used, else everything that a request may ask. */
export function drawOf(kind: RowKind, salt: number, index: number, vocabulary: number): DrawContext {
  const random = randomFrom((salt * 8 + rowKinds.indexOf(kind)) * 65_537 + index);
  const one = <T>(values: readonly T[]): T => values[Math.floor(random() * values.length)]!;
  const usual = random() < 0.4;
  const penalised = random() < 0.2;
  const id = (): number => Math.floor(random() * vocabulary);
  const sampling: SequenceSampling = greedySampling({
    temperature: usual ? 0.6 : one([0, 0.6, 1, 1, 2, 0.1, 0.01, 1e-6]),
    topP: usual ? 0.95 : one([1, 1, 0.95, 0.5, 0.999, 0.05, 0.99999]),
    topK: usual ? 0 : one([0, 0, 1, 20, 50, 1000, 100_000, vocabulary, 0xffff_ffff]),
    minP: usual ? 0 : one([0, 0, 0.05, 0.5, 1, 1e-4]),
    repetitionPenalty: penalised ? one([1, 1.1, 0.8]) : 1,
    presencePenalty: penalised ? one([0, 0.5, -1]) : 0,
    frequencyPenalty: penalised ? one([0, 0.1, -0.2]) : 0,
    seed: Math.floor(random() * 4_294_967_296),
    logprobs: random() < 0.1 ? one([0, 1, 5, 20]) : -1,
  });
  const seen = new Map<number, number>();
  if (penalised) {
    for (let i = 0; i < 300; i++) {
      seen.set(id(), Math.floor(4 * random()));
    }
  }
  const forbidden = random() < 0.1 ? [id(), id(), vocabulary + 5] : [];
  return { sampling, position: Math.floor(40_000 * random()), seen, forbidden };
}
