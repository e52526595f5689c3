// Assigns a part of every matrix to each rank. Pure: the same arguments always give the same plan.
//
// Attention: each rank takes kvHeads / T whole KV heads and exactly the query heads that read them.
// Feed-forward: intermediateSize is dealt out in whole quantisation blocks, as evenly as they go.
// Vocabulary: dealt out row by row, as evenly as they go; the padding rows therefore sit on the last rank.
// INVARIANT: the ranges of all ranks are contiguous, in rank order, without gap or overlap, and cover the whole.

import { ClusterError } from '@mimo/core/process/errors';
import type { ModelConfig } from './model-config.ts';
import type { Precision } from './target-profile.ts';

/** Weights along the input dimension that share one scale. */
export const blockSize = 32;

/** A half-open range of rows or columns. */
export interface Range {
  readonly start: number;
  readonly end: number;
}

/** Rows or columns in a range. */
export function rangeLength(range: Range): number {
  return range.end - range.start;
}

/** The slices of one rank, in rows or columns of the whole matrices. */
export interface RankPlan {
  readonly rank: number;
  readonly queryHeads: number;
  readonly kvHeads: number;
  /** Rows of q_proj; columns of o_proj. */
  readonly queryRows: Range;
  /** Rows of k_proj and of v_proj. */
  readonly kvRows: Range;
  /** Rows of gate_proj and up_proj; columns of down_proj. */
  readonly feedForward: Range;
  /** Rows of lm_head. */
  readonly vocabulary: Range;
}

/**
 * The plan of every rank, in rank order. Throws `invalid_argument` for a tensorParallel below 1, and
 * `failed_precondition`, naming every limit and value, if the ranks cannot divide the model: KV heads must divide
 * by tensorParallel, there must be a block of the feed-forward and a row of the vocabulary for each, and int8 and int4
 * need the input dimensions of all slices in whole blocks of 32.
 */
export function planShards(config: ModelConfig, tensorParallel: number, precision: Precision): RankPlan[] {
  if (!Number.isInteger(tensorParallel) || tensorParallel < 1) {
    throw new ClusterError(
      'invalid_argument',
      `tensorParallel: must be an integer from 1, is ${tensorParallel}`,
    );
  }
  const { kvHeads, queryHeads, headDim, intermediateSize, hiddenSize, vocabSize } = config;
  const rankKvHeads = kvHeads / tensorParallel;
  const rankQueryHeads = queryHeads / tensorParallel;
  const inBlocks = intermediateSize % blockSize === 0;
  const feedForwardUnit = inBlocks ? blockSize : 1;

  const problems: string[] = [];
  if (!Number.isInteger(rankKvHeads)) {
    problems.push(`tensorParallel ${tensorParallel} does not divide num_key_value_heads ${kvHeads}`);
  }
  if (intermediateSize / feedForwardUnit < tensorParallel) {
    problems.push(
      `tensorParallel ${tensorParallel} exceeds the ${intermediateSize / feedForwardUnit} blocks of intermediate_size ${intermediateSize}`,
    );
  }
  if (vocabSize < tensorParallel) {
    problems.push(`tensorParallel ${tensorParallel} exceeds vocab_size ${vocabSize}`);
  }
  if (precision === 'int8' || precision === 'int4') {
    const inputs = [
      ['hidden_size', hiddenSize],
      ['intermediate_size', intermediateSize],
      [`query heads of a rank x head_dim (${rankQueryHeads} x ${headDim})`, rankQueryHeads * headDim],
    ] as const;
    for (const [name, size] of inputs) {
      if (Number.isInteger(size) && size % blockSize !== 0) {
        problems.push(`${precision} needs ${name} in multiples of ${blockSize}, is ${size}`);
      }
    }
  }
  if (problems.length > 0) {
    throw new ClusterError('failed_precondition', problems.join('; '));
  }

  return Array.from({ length: tensorParallel }, (_, rank) => ({
    rank,
    queryHeads: rankQueryHeads,
    kvHeads: rankKvHeads,
    queryRows: { start: rank * rankQueryHeads * headDim, end: (rank + 1) * rankQueryHeads * headDim },
    kvRows: { start: rank * rankKvHeads * headDim, end: (rank + 1) * rankKvHeads * headDim },
    feedForward: balancedRange({
      total: intermediateSize,
      unit: feedForwardUnit,
      parts: tensorParallel,
      part: rank,
    }),
    vocabulary: balancedRange({ total: vocabSize, unit: 1, parts: tensorParallel, part: rank }),
  }));
}

/** Part `part` of `total` dealt out in whole units; parts differ by at most one unit. */
function balancedRange(deal: {
  readonly total: number;
  readonly unit: number;
  readonly parts: number;
  readonly part: number;
}): Range {
  const units = deal.total / deal.unit;
  const boundary = (part: number): number => Math.ceil((units * part) / deal.parts) * deal.unit;
  return { start: boundary(deal.part), end: boundary(deal.part + 1) };
}
