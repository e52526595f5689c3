// Chooses one token from one row of logits. Pure except for the row, which is scratch. Owns penalties, the draw and
// log-probabilities; cut.ts applies min-p, top-k and top-p. Knows no sequence and no batch.
//
// Order, as in vLLM: penalties (repetition over prompt and completion; frequency and presence over the completion),
// then temperature, min-p, top-k, top-p, each over the remaining ids. Ties go to the lowest id.
//
// The draw is a Gumbel maximum: argmax of logit / temperature + noise(seed, position, token id). Deliberate difference
// from inverting a cumulative sum: a token's noise does not depend on its neighbours, so last-bit differences of the
// logits (another batch, another number of ranks) change the choice only at near-ties.
// INVARIANT: the result depends only on the row, the sampling, the position and the seen tokens. So a preempted,
// resumed or speculated sequence draws the same tokens as an uninterrupted one.
// INVARIANT: for any bits in the row and any accepted sampling it ends after work bounded by the row's length. A
// finite logit stays finite through the penalties; -Infinity marks an id that may not be drawn; NaN and Infinity are
// the model's faults.

import type { DrawRequest } from '../../runtime/kernel.ts';
import { listLeft, topIds, wholeWeight } from './cut.ts';
import type { SequenceSampling, TokenLogprob } from './engine-api.ts';

/** The inputs of one draw besides the logits. */
export interface DrawContext {
  readonly sampling: SequenceSampling;
  /** Index of the drawn token in the whole sequence, prompt included. */
  readonly position: number;
  /** Occurrences in the completion by id; prompt tokens are present, with 0 where only there. Used by penalties. */
  readonly seen: DrawRequest['seen'];
  /** Ids that may not be drawn. */
  readonly forbidden: readonly number[];
}

export interface DrawnToken {
  readonly tokenId: number;
  /** Present if the sampling requests it. */
  readonly logprob?: TokenLogprob;
}

/** Above any noise: -ln(-ln(u)) with u <= 1 - 2^-33. */
const maxNoise = 23;

/** By i: the least bits with 1 - uniform <= 2^-i. */
const leastBitsByHalvings = Float64Array.from({ length: 1 + Math.ceil(maxNoise * Math.LOG2E) }, (_, i) =>
  Math.ceil(2 ** 32 - 2 ** (32 - i) - 0.5),
);

/** The largest float32. */
const maxLogit = 2 ** 128 - 2 ** 104;

/**
 * Draws a token. `row` holds the logits of the ids that exist, and is overwritten. If it holds a NaN or an Infinity, or
 * forbids every id, nothing is drawn: it returns the id of that largest logit, and `row` holds the invalid value.
 */
export function drawToken(row: Float32Array, context: DrawContext): DrawnToken {
  const { sampling } = context;
  applyPenalties(row, context);
  for (const id of context.forbidden) {
    if (id < row.length) {
      row[id] = -Infinity;
    }
  }
  const best = argmax(row);
  if (!Number.isFinite(row[best])) {
    return { tokenId: best };
  }
  const tokenId = sampling.temperature === 0 ? best : drawByNoise(row, best, context);
  return sampling.logprobs < 0
    ? { tokenId }
    : { tokenId, logprob: describeToken(row, { tokenId, best, sampling }) };
}

/**
 * Index of the largest element, the lowest at ties; a NaN counts as the largest, as in NumPy, so that none is
 * overlooked.
 */
export function argmax(row: Float32Array): number {
  const { length } = row;
  let best = 0;
  let bestValue = -Infinity;
  for (let id = 0; id < length; id++) {
    const value = row[id]!;
    if (!(value <= bestValue)) {
      best = id;
      bestValue = value;
      if (value !== value) {
        return best;
      }
    }
  }
  return best;
}

/** Whether this sampling uses the seen tokens. */
export function hasPenalties(sampling: SequenceSampling): boolean {
  return (
    sampling.repetitionPenalty !== 1 || sampling.presencePenalty !== 0 || sampling.frequencyPenalty !== 0
  );
}

/**
 * Uniform in (0, 1), a pure function of its key: PCG3D (Jarzynski and Olano 2020, Hash Functions for GPU Rendering).
 */
export function keyedUniform(seed: number, position: number, tokenId: number): number {
  return (keyedBits(seed, position, tokenId) + 0.5) / 4_294_967_296;
}

/** The 32 bits behind `keyedUniform`. */
function keyedBits(seed: number, position: number, tokenId: number): number {
  let x = (Math.imul(seed, 1_664_525) + 1_013_904_223) | 0;
  let y = (Math.imul(position, 1_664_525) + 1_013_904_223) | 0;
  let z = (Math.imul(tokenId, 1_664_525) + 1_013_904_223) | 0;
  x = (x + Math.imul(y, z)) | 0;
  y = (y + Math.imul(z, x)) | 0;
  z = (z + Math.imul(x, y)) | 0;
  x ^= x >>> 16;
  y ^= y >>> 16;
  z ^= z >>> 16;
  x = (x + Math.imul(y, z)) | 0;
  y = (y + Math.imul(z, x)) | 0;
  z = (z + Math.imul(x, y)) | 0;
  return z >>> 0;
}

function applyPenalties(row: Float32Array, { sampling, seen }: DrawContext): void {
  if (!hasPenalties(sampling)) {
    return;
  }
  const { repetitionPenalty, presencePenalty, frequencyPenalty } = sampling;
  for (const [id, count] of seen) {
    const value = row[id];
    if (Number.isFinite(value)) {
      const repeated = value! > 0 ? value! / repetitionPenalty : value! * repetitionPenalty;
      const penalised = repeated - frequencyPenalty * count - (count > 0 ? presencePenalty : 0);
      row[id] = Math.min(Math.max(penalised, -maxLogit), maxLogit);
    }
  }
}

function drawByNoise(row: Float32Array, best: number, { sampling, position }: DrawContext): number {
  const { temperature, seed } = sampling;
  const top = row[best]!;
  let winner = best;
  let winnerScore = top / temperature + noiseOf(keyedBits(seed, position, best));
  let leastBits = leastWinning(winnerScore - top / temperature);
  // Lower ids cannot win, by a margin of 1 for rounding.
  const ids = listLeft(row, { top, lowest: (winnerScore - maxNoise - 1) * temperature }, sampling);
  const { length } = ids;
  for (let place = 0; place < length; place++) {
    const id = ids[place]!;
    const bits = keyedBits(seed, position, id);
    const scaled = row[id]! / temperature;
    if (bits >= leastBits && bits >= leastWinning(winnerScore - scaled)) {
      const score = scaled + noiseOf(bits);
      if (score > winnerScore || (score === winnerScore && id < winner)) {
        winner = id;
        winnerScore = score;
        leastBits = leastWinning(winnerScore - top / temperature);
      }
    }
  }
  return winner;
}

/** Gumbel noise. */
function noiseOf(bits: number): number {
  return -Math.log(-Math.log((bits + 0.5) / 4_294_967_296));
}

/**
 * The least bits whose noise can make up for being `behind`. It does iff 1 - uniform < 1 - exp(-exp(-behind)), which
 * is less than exp(-behind); that bound, rounded up to a power of two, spares nearly every id two logarithms.
 */
function leastWinning(behind: number): number {
  if (behind <= 0) {
    return 0;
  }
  return behind < maxNoise ? leastBitsByHalvings[Math.floor(behind * Math.LOG2E)]! : 2 ** 32;
}

/** Log-probabilities after penalties and temperature (1 where greedy), before the cuts. */
function describeToken(
  row: Float32Array,
  {
    tokenId,
    best,
    sampling,
  }: { readonly tokenId: number; readonly best: number; readonly sampling: SequenceSampling },
): TokenLogprob {
  const temperature = sampling.temperature === 0 ? 1 : sampling.temperature;
  const top = row[best]!;
  const logWeight = Math.log(wholeWeight(row, { top, temperature }));
  const logprob = (id: number): number => (row[id]! - top) / temperature - logWeight;
  const alternatives = topIds(row, top, sampling.logprobs);
  return {
    tokenId,
    logprob: logprob(tokenId),
    top: alternatives.map((id) => ({ tokenId: id, logprob: logprob(id) })),
  };
}
