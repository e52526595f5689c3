// Selects the ids that remain for the draw after min-p, top-k and top-p. Pure except for scratch memory that is reused
// from row to row; knows no noise, no penalty and no sequence. The largest logit of its input row is finite; -Infinity
// marks an id that may not be drawn.
//
// Ids are ranked by logit, the lower id first at ties. Each rule keeps a prefix of that ranking, so the prefix's last
// member describes it, and each rule starts from the ids that the previous one kept. With weight = exp((logit - top) /
// temperature):
//   min-p   ids of at least `minP` times the top's weight
//   top-k   the first k
//   top-p   the shortest prefix that holds `topP` of the weight
// INVARIANT: the result equals, to the last bit, a full sort with weights added one by one in the order of the ranking
// and the whole weight added in the order of ids.
//
// Why it is cheap: ids far below the top are skipped when their weight cannot matter; a histogram of the distances from
// the top locates the end of the prefix, and only the ids around this end are sorted. Weights are approximate at first;
// if their error could change the result, everything is computed and sorted. Every loop counts ids or bins, so the
// row's length bounds the work for any content. Loops read `length` once: V8 runs others at half the speed.

import type { SequenceSampling } from './engine-api.ts';

/** Keeps ids with a logit above `value`, and of those equal to it the ids up to `lastId`. */
interface Cut {
  readonly value: number;
  readonly lastId: number;
}

/** The parameters that turn a logit into a weight. */
interface Scale {
  readonly top: number;
  readonly temperature: number;
}

/** As `lastId`: all ids whose logit is `value`. */
const allIds = 0x7fff_ffff;

const everything: Cut = { value: -Infinity, lastId: allIds };

/** In temperatures. A weight this deep is lost in a float64 sum of at most 2^18 terms that holds a 1. */
const fullDepth = 48;

/** 2^18 deeper ids together weigh less than 0.001 of the top: they seldom change the end of the nucleus. */
const nearDepth = 20;

/** 2^18 deeper ids together weigh less than 1e-9 of the top: too little to change a float32 log-probability. */
const logprobDepth = 34;

/** Relative; far more than the error of a rough weight and of the order in which 2^18 of them are added. */
const roughness = 1e-10;

/**
 * Ids are binned by the leading bits of their float32 distance from the top: to a sixteenth of itself, at every scale.
 */
const binShift = 19;
const binWeights = new Float64Array(2 ** (31 - binShift));

/** The currently listed ids, in ascending order, with scratch memory of one row's length. */
let memory = createMemory(0);
let listed = 0;

/**
 * The ids that the rules keep of a row with largest logit `top`, in ascending order. Ids below `lowest` cannot win the
 * draw and may be missing. The temperature is above 0. Valid until the next call of this module.
 */
export function listLeft(
  row: Float32Array,
  { top, lowest }: { readonly top: number; readonly lowest: number },
  { temperature, topK, topP, minP }: SequenceSampling,
): Int32Array {
  let cut = minP > 0 ? { value: top + temperature * Math.log(minP), lastId: allIds } : everything;
  if (topK > 0) {
    cut = cutByCount(row, cut, { top, count: topK });
  }
  if (topP < 1) {
    cut = cutByWeight(row, cut, { top, temperature, topP });
  }
  if (cut.value < lowest) {
    cut = { value: lowest, lastId: allIds };
  }
  // The rules have listed the ids that they keep, and a few more.
  if (topK > 0 || topP < 1) {
    keep(row, cut);
  } else {
    list(row, cut);
  }
  return memory.ids.subarray(0, listed);
}

/** The ids of the `count` largest logits, best first; fewer if fewer may be drawn. */
export function topIds(row: Float32Array, top: number, count: number): number[] {
  if (count === 0) {
    return [];
  }
  keep(row, cutByCount(row, everything, { top, count }));
  return [...rank(row, memory.ids.subarray(0, listed))];
}

/** The weight of all ids, to 1e-9 of it. */
export function wholeWeight(row: Float32Array, scale: Scale): number {
  return weighRoughly(row, everything, { ...scale, depth: logprobDepth }).weight;
}

/** The first `count` ids of `cut`. */
function cutByCount(row: Float32Array, cut: Cut, { top, count }: { top: number; count: number }): Cut {
  // The k-th best of the row's first ids is no better than the row's, so ids below it need not be listed. With this
  // many first ids, this sort and the list below are of about equal length.
  const sampleIds = Math.ceil(Math.sqrt(row.length * count));
  let bound: number | undefined;
  if (sampleIds < row.length / 4) {
    list(row.subarray(0, sampleIds), cut);
    bound = rank(row, memory.ids.subarray(0, listed))[count - 1];
  }
  list(row, bound === undefined ? cut : { value: row[bound]!, lastId: allIds });
  if (listed < count) {
    return cut;
  }
  const { ids, weights } = memory;
  for (let place = 0; place < listed; place++) {
    weights[ids[place]!] = 1;
  }
  // Whole numbers add up alike in any order.
  return endOf(row, top, { least: count, most: count })!;
}

/** The nucleus of `cut`. */
function cutByWeight(row: Float32Array, cut: Cut, { topP, ...scale }: Scale & { topP: number }): Cut {
  for (const depth of [nearDepth, fullDepth]) {
    const { weight, beyond } = weighRoughly(row, cut, { ...scale, depth });
    const tail = beyond * Math.exp(-depth);
    const end = endOf(row, scale.top, {
      least: topP * weight * (1 - roughness),
      most: topP * (weight + tail) * (1 + roughness),
    });
    if (end !== undefined) {
      return end;
    }
    if (tail < weight * roughness) {
      // Going deeper does not help.
      break;
    }
  }
  const wanted = topP * weighExactly(row, cut, scale);
  const { lastId } = walk(rank(row, memory.ids.subarray(0, listed)), { before: 0, wanted });
  return { value: row[lastId]!, lastId };
}

/** Lists the ids of `cut`. */
function list(row: Float32Array, { value: lowest, lastId }: Cut): void {
  const { length } = row;
  if (memory.ids.length < length) {
    memory = createMemory(length);
  }
  const { ids } = memory;
  let held = 0;
  for (let id = 0; id < length; id++) {
    const value = row[id]!;
    if (value >= lowest && (value > lowest || id <= lastId) && value > -Infinity) {
      ids[held] = id;
      held += 1;
    }
  }
  listed = held;
}

/** Removes ids outside `cut` from the list. */
function keep(row: Float32Array, { value: lowest, lastId }: Cut): void {
  const { ids } = memory;
  const before = listed;
  let held = 0;
  for (let place = 0; place < before; place++) {
    const id = ids[place]!;
    const value = row[id]!;
    if (value > lowest || (value === lowest && id <= lastId)) {
      ids[held] = id;
      held += 1;
    }
  }
  listed = held;
}

/**
 * Lists the ids of `cut` down to `depth` temperatures below the top, with their approximate weights. Returns the sum of
 * these weights, and an upper bound on the number of deeper ids of the cut.
 */
function weighRoughly(
  row: Float32Array,
  cut: Cut,
  { top, temperature, depth }: Scale & { readonly depth: number },
): { readonly weight: number; readonly beyond: number } {
  const deepest = top - depth * temperature;
  const isWhole = cut.value >= deepest;
  list(row, isWhole ? cut : { value: deepest, lastId: allIds });
  const { ids, weights } = memory;
  const count = listed;
  const scale = stepsPerUnit / temperature;
  let sum = 0;
  for (let place = 0; place < count; place++) {
    const id = ids[place]!;
    const weight = roughExp((top - row[id]!) * scale);
    weights[id] = weight;
    sum += weight;
  }
  return { weight: sum, beyond: isWhole ? 0 : row.length - count };
}

/**
 * Lists the ids of `cut` with a nonzero weight, and their weights. Returns the sum of the weights, added in the order
 * of ids.
 */
function weighExactly(row: Float32Array, cut: Cut, { top, temperature }: Scale): number {
  list(row, cut);
  const { ids, weights } = memory;
  const count = listed;
  let held = 0;
  let sum = 0;
  for (let place = 0; place < count; place++) {
    const id = ids[place]!;
    const exponent = (row[id]! - top) / temperature;
    if (exponent > -fullDepth) {
      const weight = Math.exp(exponent);
      ids[held] = id;
      weights[id] = weight;
      held += 1;
      sum += weight;
    }
  }
  listed = held;
  return sum;
}

/**
 * The end of the shortest prefix of the list whose weight reaches a threshold between `least` and `most`. Undefined if
 * the end depends on the exact threshold.
 */
function endOf(
  row: Float32Array,
  top: number,
  { least, most }: { readonly least: number; readonly most: number },
): Cut | undefined {
  const { ids, weights, distances, distanceBits, chosen } = memory;
  const count = listed;
  // A top of -0 becomes 0, because a distance of -0 has a sign bit, and the bits name the bin.
  const positiveTop = top + 0;
  binWeights.fill(0);
  for (let place = 0; place < count; place++) {
    const id = ids[place]!;
    distances[place] = positiveTop - row[id]!;
    binWeights[distanceBits[place]! >>> binShift]! += weights[id]!;
  }
  let bin = 0;
  let before = 0;
  while (bin < binWeights.length - 1 && before + binWeights[bin]! < least) {
    before += binWeights[bin]!;
    bin += 1;
  }
  let choices = 0;
  for (let place = 0; place < count; place++) {
    if (distanceBits[place]! >>> binShift === bin) {
      chosen[choices] = ids[place]!;
      choices += 1;
    }
  }
  const { lastId, weight } = walk(rank(row, chosen.subarray(0, choices)), { before, wanted: least });
  return weight >= most ? { value: row[lastId]!, lastId } : undefined;
}

/** Adds the weights of ranked ids to `before`, one by one, until the sum reaches `wanted`; returns the end. */
function walk(
  ranked: Int32Array,
  { before, wanted }: { readonly before: number; readonly wanted: number },
): { readonly lastId: number; readonly weight: number } {
  const { weights } = memory;
  const { length } = ranked;
  let weight = before;
  let lastId = -1;
  for (let at = 0; at < length && weight < wanted; at++) {
    lastId = ranked[at]!;
    weight += weights[lastId]!;
  }
  return { lastId, weight };
}

/** exp in steps of 1/32 and of 1/32768, deep enough for every approximate pass. */
const fineSteps = 1024;
const stepsPerUnit = 32 * fineSteps;
const coarseExp = Float64Array.from({ length: 64 * 32 }, (_, i) => Math.exp(-i / 32));
const fineExp = Float64Array.from({ length: fineSteps }, (_, i) => Math.exp(-i / stepsPerUnit));

/** exp(-steps / stepsPerUnit), in a fifth of the time of Math.exp; its relative error is below 1e-14. */
function roughExp(steps: number): number {
  // V8 truncates `| 0` fast.
  const whole = steps | 0;
  const rest = (whole - steps) * (1 / stepsPerUnit);
  return coarseExp[whole >> 10]! * fineExp[whole & (fineSteps - 1)]! * (1 + rest * (1 + rest * 0.5));
}

const digitBits = 11;
const digitMask = 2 ** digitBits - 1;
const digitStarts = new Int32Array(2 ** digitBits);

/** Ranks ids that are in ascending order: a stable radix sort. Valid until the next call. */
function rank(row: Float32Array, ids: Int32Array): Int32Array {
  let [from, to] = memory.sorting;
  const { length: count } = ids;
  const bits = new Int32Array(row.buffer, row.byteOffset, row.length);
  const first = count > 0 ? rankKey(bits[ids[0]!]!) : 0;
  const { ids: fromIds, keys } = from;
  let differing = 0;
  for (let place = 0; place < count; place++) {
    const id = ids[place]!;
    const key = rankKey(bits[id]!);
    fromIds[place] = id;
    keys[place] = key;
    differing |= key ^ first;
  }
  for (let shift = 0; shift < 32; shift += digitBits) {
    if (((differing >>> shift) & digitMask) !== 0) {
      sortByDigit({ from, to, count, shift });
      [from, to] = [to, from];
    }
  }
  return from.ids.subarray(0, count);
}

/** A float32's bits as an unsigned number, smaller the larger the float, alike for 0 and -0. */
function rankKey(bits: number): number {
  return bits >= 0 || bits === -0x8000_0000 ? 0x7fff_ffff - (bits & 0x7fff_ffff) : bits;
}

interface KeyedIds {
  readonly ids: Int32Array;
  readonly keys: Int32Array;
}

function sortByDigit({
  from: { ids, keys },
  to: { ids: toIds, keys: toKeys },
  count,
  shift,
}: {
  readonly from: KeyedIds;
  readonly to: KeyedIds;
  readonly count: number;
  readonly shift: number;
}): void {
  digitStarts.fill(0);
  for (let place = 0; place < count; place++) {
    digitStarts[(keys[place]! >>> shift) & digitMask]! += 1;
  }
  let start = 0;
  for (let digit = 0; digit <= digitMask; digit++) {
    const size = digitStarts[digit]!;
    digitStarts[digit] = start;
    start += size;
  }
  for (let place = 0; place < count; place++) {
    const key = keys[place]!;
    const digit = (key >>> shift) & digitMask;
    const at = digitStarts[digit]!;
    digitStarts[digit] = at + 1;
    toIds[at] = ids[place]!;
    toKeys[at] = key;
  }
}

function createMemory(length: number) {
  const distances = new Float32Array(length);
  const createKeyed = (): KeyedIds => ({ ids: new Int32Array(length), keys: new Int32Array(length) });
  return {
    /** By position: ids, and their distance below the top. */
    ids: new Int32Array(length),
    distances,
    distanceBits: new Int32Array(distances.buffer),
    /** By id. */
    weights: new Float64Array(length),
    /** The candidate ids for the end of a prefix. */
    chosen: new Int32Array(length),
    sorting: [createKeyed(), createKeyed()] as const,
  };
}
