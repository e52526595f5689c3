// The reference for sampler.ts: the same rule, written plainly, with full sorts. For tests and the benchmark only;
// finite rows only, since its loops end by comparing floats.

import type { SequenceSampling, TokenLogprob } from './engine-api.ts';
import { hasPenalties, keyedUniform, type DrawContext, type DrawnToken } from './sampler.ts';

/** exp of anything lower adds nothing to a float64 sum of at most 2^18 terms that starts at 1. */
const negligible = -48;

/** Above any noise: -ln(-ln(u)) with u <= 1 - 2^-33. */
const maxNoise = 23;

const powersOfHalf = Float64Array.from({ length: 1 + Math.ceil(maxNoise * Math.LOG2E) }, (_, i) => 2 ** -i);

/**
 * Width below the maximum, in temperatures, of the first search for candidates, and its growth: a search costs a tenth
 * of a millisecond at 151,680 ids, sorting ten times too many candidates costs more.
 */
const firstWidth = 2;
const widthGrowth = 1.5;
const lastWidth = 64;

/** Draws a token. `row` holds the logits of the ids that exist, and is overwritten. */
export function drawToken(row: Float32Array, context: DrawContext): DrawnToken {
  const { sampling } = context;
  applyPenalties(row, context);
  for (const id of context.forbidden) {
    if (id < row.length) {
      row[id] = -Infinity;
    }
  }
  const best = argmax(row);
  const tokenId = sampling.temperature === 0 ? best : drawByNoise(row, best, context);
  return sampling.logprobs < 0 ? { tokenId } : { tokenId, logprob: describeToken(row, tokenId, sampling) };
}

/** Index of the largest element, the lowest at ties. */
function argmax(row: Float32Array): number {
  let best = 0;
  let bestValue = -Infinity;
  for (let id = 0; id < row.length; id++) {
    const value = row[id]!;
    if (value > bestValue) {
      best = id;
      bestValue = value;
    }
  }
  return best;
}

function applyPenalties(row: Float32Array, { sampling, seen }: DrawContext): void {
  if (!hasPenalties(sampling)) {
    return;
  }
  const { repetitionPenalty, presencePenalty, frequencyPenalty } = sampling;
  for (const [id, count] of seen) {
    if (id < row.length) {
      const value = row[id]!;
      const repeated = value > 0 ? value / repetitionPenalty : value * repetitionPenalty;
      row[id] = repeated - frequencyPenalty * count - (count > 0 ? presencePenalty : 0);
    }
  }
}

function drawByNoise(row: Float32Array, best: number, context: DrawContext): number {
  const { temperature, topK, topP, minP, seed } = context.sampling;
  const floor = minP > 0 ? row[best]! + temperature * Math.log(minP) : -Infinity;
  const cut = (topK > 0 && topK < row.length) || topP < 1;
  let winner = best;
  let winnerScore = score(best);
  const consider = (id: number): void => {
    const candidate = score(id);
    if (candidate > winnerScore || (candidate === winnerScore && id < winner)) {
      winner = id;
      winnerScore = candidate;
    }
  };
  if (cut) {
    candidates(row, { best, floor, sampling: context.sampling }).forEach(consider);
    return winner;
  }
  for (let id = 0; id < row.length; id++) {
    const value = row[id]!;
    const behind = winnerScore - value / temperature;
    if (value >= floor && behind < maxNoise && mayWin(keyedUniform(seed, context.position, id), behind)) {
      consider(id);
    }
  }
  return winner;

  function score(id: number): number {
    return row[id]! / temperature - Math.log(-Math.log(keyedUniform(seed, context.position, id)));
  }
}

/**
 * Whether noise of `uniform` can make up for being `behind`. It does iff 1 - uniform < 1 - exp(-exp(-behind)), which is
 * less than exp(-behind); that bound, rounded up to a power of two, spares nearly every id two logarithms.
 */
function mayWin(uniform: number, behind: number): boolean {
  return behind <= 0 || 1 - uniform <= powersOfHalf[Math.floor(behind * Math.LOG2E)]!;
}

/** Ids that remain after top-k and top-p, likeliest first. */
function candidates(
  row: Float32Array,
  cut: { readonly best: number; readonly floor: number; readonly sampling: SequenceSampling },
): number[] {
  const { best, floor, sampling } = cut;
  const { temperature, topP } = sampling;
  const top = row[best]!;
  const limit = sampling.topK > 0 ? sampling.topK : row.length;
  const weight = (id: number): number => Math.exp((row[id]! - top) / temperature);
  // Without top-k the nucleus is a share of everything above the floor.
  const wholeMass = limit >= row.length ? sumOfWeights(row, { top, floor, temperature }) : undefined;
  for (let width = firstWidth; ; width = width < lastWidth ? width * widthGrowth : Infinity) {
    const lowest = Math.max(floor, top - width * temperature);
    const ids: number[] = [];
    let mass = 0;
    for (let id = 0; id < row.length; id++) {
      const value = row[id]!;
      if (value >= lowest && value > -Infinity) {
        ids.push(id);
        mass += wholeMass === undefined ? 0 : weight(id);
      }
    }
    const enough = wholeMass === undefined ? ids.length >= limit : mass >= topP * wholeMass;
    if (enough || lowest === floor) {
      ids.sort((a, b) => row[b]! - row[a]! || a - b);
      return nucleus(ids.slice(0, limit), { topP, weight, wholeMass });
    }
  }
}

/** The shortest prefix that holds `topP` of the mass. */
function nucleus(
  ids: readonly number[],
  rule: {
    readonly topP: number;
    readonly weight: (id: number) => number;
    readonly wholeMass: number | undefined;
  },
): number[] {
  if (rule.topP >= 1) {
    return [...ids];
  }
  const weights = ids.map(rule.weight);
  const wanted = rule.topP * (rule.wholeMass ?? weights.reduce((sum, weight) => sum + weight, 0));
  let mass = 0;
  const end = weights.findIndex((weight) => (mass += weight) >= wanted);
  return ids.slice(0, end < 0 ? ids.length : end + 1);
}

function sumOfWeights(
  row: Float32Array,
  scale: { readonly top: number; readonly floor: number; readonly temperature: number },
): number {
  let sum = 0;
  for (let id = 0; id < row.length; id++) {
    const value = row[id]!;
    const exponent = (value - scale.top) / scale.temperature;
    if (value >= scale.floor && exponent > negligible) {
      sum += Math.exp(exponent);
    }
  }
  return sum;
}

/** Log-probabilities after penalties and temperature (1 where greedy), before the cuts. */
function describeToken(row: Float32Array, tokenId: number, sampling: SequenceSampling): TokenLogprob {
  const temperature = sampling.temperature === 0 ? 1 : sampling.temperature;
  const best = row[argmax(row)]!;
  const logMass = Math.log(sumOfWeights(row, { top: best, floor: -Infinity, temperature }));
  const logprob = (id: number): number => (row[id]! - best) / temperature - logMass;
  const top = topIds(row, sampling.logprobs).map((id) => ({ tokenId: id, logprob: logprob(id) }));
  return { tokenId, logprob: logprob(tokenId), top };
}

/** The `count` largest, best first, by insertion: count is at most a few tens. */
function topIds(row: Float32Array, count: number): number[] {
  const ids: number[] = [];
  for (let id = 0; id < row.length; id++) {
    const value = row[id]!;
    if (ids.length === count && (count === 0 || value <= row[ids[count - 1]!]!)) {
      continue;
    }
    let at = ids.length;
    while (at > 0 && row[ids[at - 1]!]! < value) {
      at -= 1;
    }
    ids.splice(at, 0, id);
    ids.length = Math.min(ids.length, count);
  }
  return ids;
}
