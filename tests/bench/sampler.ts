// `npm run bench -- sampler [--draws N] [--vocabulary N]`: the time of the step thread for choosing one token, by the
// shape of the row and by the sampling, compared with the reference sampler in the same run, with the same tokens.
// Draws are timed one by one; on a shared machine the fastest quarter is more reliable than the median. Prints one JSON
// line last.

import { parseArgs } from 'node:util';

import type { SequenceSampling } from '@mimo/worker/engines/mimo/engine-api';
import * as reference from '@mimo/worker/engines/mimo/reference-sampler';
import { drawToken, type DrawContext } from '@mimo/worker/engines/mimo/sampler';

const usualGoalMs = 0.5;
const worstGoalMs = 6;

/** The reference takes up to 0.1 s on a flat row. */
const referenceDraws = 8;

/** MiMo's recommendation, in the floats of the wire. */
const recommended: SequenceSampling = {
  temperature: Math.fround(0.6),
  topP: Math.fround(0.95),
  topK: 0,
  minP: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  seed: 7,
  stopTokenIds: [],
  maxTokens: 1,
  minTokens: 0,
  ignoreEos: false,
  logprobs: -1,
  draftTokens: 0,
};

/** `history`: distinct tokens that the penalties find in prompt and completion. */
const samplings: Readonly<Record<string, Partial<SequenceSampling> & { readonly history?: number }>> = {
  greedy: { temperature: 0 },
  recommended: {},
  'temperature 1': { temperature: 1 },
  'temperature 2': { temperature: 2 },
  'temperature 1e-6': { temperature: Math.fround(1e-6) },
  'no cut': { topP: 1 },
  'no cut, temperature 2': { topP: 1, temperature: 2 },
  'top-k 20': { topK: 20 },
  'top-k 1000, temperature 2': { topK: 1000, temperature: 2 },
  'top-k 100,000, temperature 2': { topK: 100_000, temperature: 2 },
  'min-p 0.05': { minP: Math.fround(0.05) },
  'top-p 0.5': { topP: 0.5 },
  'top-p just below 1, temperature 2': { topP: 1 - 2 ** -24, temperature: 2 },
  '20 log-probabilities': { logprobs: 20 },
  '20 log-probabilities, temperature 2': { logprobs: 20, temperature: 2 },
  'penalties, 1,000 seen': {
    repetitionPenalty: Math.fround(1.1),
    frequencyPenalty: Math.fround(0.1),
    history: 1_000,
  },
  'penalties, 32,768 seen, temperature 2': {
    repetitionPenalty: Math.fround(1.1),
    presencePenalty: 0.5,
    history: 32_768,
    temperature: 2,
  },
};

/** Uniform in (0, 1), the same in every run. */
function createUniform(): () => number {
  let state = 1;
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return (state + 0.5) / 2 ** 32;
  };
}

/** Rows by shape. A trained model's head is a few dozen ids well above a bell-shaped body. */
function createRows(length: number): Readonly<Record<string, Float32Array>> {
  const uniform = createUniform();
  const normal = (): number => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  const body = (spread: number): Float32Array => Float32Array.from({ length }, () => spread * normal() - 2);
  const withHead = (row: Float32Array, top: number, fall: number): Float32Array => {
    for (let rank = 0; rank < 60; rank++) {
      row[Math.floor(uniform() * length)] = top - fall * (Math.log2(rank + 1) + rank * 0.2);
    }
    return row;
  };
  const masked = body(1);
  masked.fill(-Infinity, length / 4, length / 2);
  const withOne = (row: Float32Array, value: number): Float32Array => {
    row[length >> 1] = value;
    return row;
  };
  return {
    peaked: withHead(body(2.2), 26, 3),
    usual: withHead(body(2.2), 20, 1),
    wide: withHead(body(2.2), 12, 0.15),
    flat: body(1),
    tied: new Float32Array(length).fill(1.5),
    'half masked': masked,
    ascending: Float32Array.from({ length }, (_, id) => (20 * id) / length),
    'any finite': Float32Array.from({ length }, () => (uniform() - 0.5) * 2 * 3.4e38),
    'a NaN': withOne(body(2.2), Number.NaN),
    'an Infinity': withOne(body(2.2), Infinity),
    'all masked': new Float32Array(length).fill(-Infinity),
  };
}

interface Arm {
  readonly row: string;
  readonly sampling: string;
  readonly medianMs: number;
  /** A quarter of the draws took no longer. */
  readonly quartileMs: number;
  /** Absent if the row is refused, and the reference may never end. */
  readonly referenceMs?: number;
  readonly draws: number;
  readonly sameTokens?: number;
  readonly refused: number;
}

type Draw = typeof drawToken;

let scratch: Float32Array | undefined;

/** One draw's milliseconds of this thread, and its token; undefined if the row is refused. */
function timed(
  draw: Draw,
  row: Float32Array,
  context: DrawContext,
): { ms: number; tokenId: number | undefined } {
  scratch = scratch?.length === row.length ? scratch : new Float32Array(row.length);
  scratch.set(row);
  const startedMs = performance.now();
  const { tokenId } = draw(scratch, context);
  const ms = performance.now() - startedMs;
  return { ms, tokenId: Number.isFinite(scratch[tokenId]) ? tokenId : undefined };
}

function figure(ms: number): string {
  return ms.toFixed(2).padStart(6);
}

function quantile(draws: readonly { readonly ms: number }[], share: number): number {
  const sorted = draws.map(({ ms }) => ms).toSorted((a, b) => a - b);
  return sorted[Math.floor(share * sorted.length)] ?? 0;
}

/** Runs the benchmark. */
export async function run(args: readonly string[], signal: AbortSignal): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: { draws: { type: 'string', default: '40' }, vocabulary: { type: 'string', default: '151680' } },
  });
  const draws = Number(values.draws);
  const length = Number(values.vocabulary);
  const arms: Arm[] = [];
  for (const [rowName, row] of Object.entries(createRows(length))) {
    for (const [name, { history = 0, ...sampling }] of Object.entries(samplings)) {
      signal.throwIfAborted();
      const seen = new Map(Array.from({ length: history }, (_, i) => [(i * 4_691) % length, i % 3] as const));
      const context = (position: number): DrawContext => ({
        sampling: { ...recommended, ...sampling },
        position,
        seen,
        forbidden: [0, 1],
      });
      const drawn = Array.from({ length: draws }, (_, position) => timed(drawToken, row, context(position)));
      const refused = drawn.filter(({ tokenId }) => tokenId === undefined).length;
      const again = Array.from({ length: refused > 0 ? 0 : Math.min(draws, referenceDraws) }, (_, position) =>
        timed(reference.drawToken, row, context(position)),
      );
      const arm: Arm = {
        row: rowName,
        sampling: name,
        medianMs: quantile(drawn, 0.5),
        quartileMs: quantile(drawn, 0.25),
        draws,
        refused,
        ...(again.length > 0 && {
          referenceMs: quantile(again, 0.5),
          sameTokens:
            again.filter(({ tokenId }, position) => tokenId === drawn[position]!.tokenId).length /
            again.length,
        }),
      };
      arms.push(arm);
      console.log(
        `${rowName.padEnd(12)} ${name.padEnd(38)} ${figure(arm.medianMs)} ms, quartile ${figure(arm.quartileMs)}` +
          (arm.referenceMs === undefined
            ? `, refused ${refused} of ${draws}`
            : `; reference ${figure(arm.referenceMs)} ms, same tokens ${arm.sameTokens}`),
      );
    }
  }
  const usual = arms.find(({ row, sampling }) => row === 'usual' && sampling === 'recommended')!;
  const worst = arms.reduce((most, arm) => (arm.quartileMs > most.quartileMs ? arm : most));
  const same = Math.min(...arms.map(({ sameTokens }) => sameTokens ?? 1));
  const goals = [
    {
      name: 'usual row, recommended sampling: fastest quarter, ms',
      goal: usualGoalMs,
      value: usual.quartileMs,
      met: usual.quartileMs <= usualGoalMs,
    },
    {
      name: `worst, ${worst.row} row, ${worst.sampling}: fastest quarter, ms`,
      goal: worstGoalMs,
      value: worst.quartileMs,
      met: worst.quartileMs <= worstGoalMs,
    },
    { name: "share of tokens that are the reference's", goal: 1, value: same, met: same === 1 },
  ];
  console.log(
    JSON.stringify({ bench: 'sampler', vocabulary: length, draws, node: process.version, arms, goals }),
  );
}
