// The messages of rank 0 to the other ranks: one frame of int32 words each. Owns the frame layout; knows no tensors.
//
//   configure  [1, kvBlocks, maxRows, maxHeadRows, usableVocab, words of the device group's id, words...]
//   forward    [2, released, slots..., spans, (slot, start, rows, headRows, hiddenRow, capacityTokens)...,
//              of each head row 1 where its logits are wanted and 0 where the best token is..., tokenIds...]
//   draft      [3, the same]
//   ping       [4]
//   stop       [5]

import { ClusterError } from '@mimo/core/process/errors';
import type { HeadRequest } from './head-rows.ts';

/** Consecutive rows of one sequence in a pass. */
export interface RowSpan {
  /** Which KV buffers. */
  readonly slot: number;
  /** Positions already in the KV cache; row i stands at position start + i. */
  readonly start: number;
  readonly rows: number;
  /** The number of rows, from the last, that get logits. */
  readonly headRows: number;
  /** Draft pass: the forward pass's row whose hidden state the first row here continues. Forward pass: unused. */
  readonly hiddenRow: number;
  /** Positions that the slot's KV buffers must hold; smaller buffers grow. */
  readonly capacityTokens: number;
}

/** One pass over the group: the backbone (`forward`) or the MTP layer (`draft`). */
export interface PassPlan {
  readonly kind: 'forward' | 'draft';
  /** The request of each head row, in the order of the spans. A frame encodes `sampled` as `logits`: rank 0 draws. */
  readonly heads: readonly HeadRequest[];
  /** Slots whose KV buffers go back to the pool before the pass. */
  readonly releasedSlots: readonly number[];
  readonly spans: readonly RowSpan[];
  /** [rows of all spans]. Draft pass: the token after each row's position. */
  readonly tokenIds: Int32Array;
}

export interface ConfigurePlan {
  readonly kind: 'configure';
  readonly kvBlocks: number;
  readonly maxRows: number;
  readonly maxHeadRows: number;
  /** Ids at or above are never the best. */
  readonly usableVocab: number;
  /** The id with which the ranks' devices join a group (reduce.ts); empty: the host sums. */
  readonly deviceGroupId: Int32Array;
}

export type StepPlan = PassPlan | ConfigurePlan | { readonly kind: 'ping' } | { readonly kind: 'stop' };

const kinds = ['configure', 'forward', 'draft', 'ping', 'stop'] as const;
const spanWords = 6;

export function encodeStepPlan(plan: StepPlan): Int32Array {
  const kind = kinds.indexOf(plan.kind) + 1;
  if (plan.kind === 'ping' || plan.kind === 'stop') {
    return Int32Array.of(kind);
  }
  if (plan.kind === 'configure') {
    const { kvBlocks, maxRows, maxHeadRows, usableVocab, deviceGroupId } = plan;
    return Int32Array.of(
      kind,
      kvBlocks,
      maxRows,
      maxHeadRows,
      usableVocab,
      deviceGroupId.length,
      ...deviceGroupId,
    );
  }
  const { heads, releasedSlots, spans, tokenIds } = plan;
  const header = 3 + releasedSlots.length + spanWords * spans.length + heads.length;
  const frame = new Int32Array(header + tokenIds.length);
  frame[0] = kind;
  frame[1] = releasedSlots.length;
  frame.set(releasedSlots, 2);
  let at = 2 + releasedSlots.length;
  frame[at++] = spans.length;
  for (const span of spans) {
    frame[at++] = span.slot;
    frame[at++] = span.start;
    frame[at++] = span.rows;
    frame[at++] = span.headRows;
    frame[at++] = span.hiddenRow;
    frame[at++] = span.capacityTokens;
  }
  for (const { kind: wanted } of heads) {
    frame[at++] = wanted === 'best' ? 0 : 1;
  }
  frame.set(tokenIds, header);
  return frame;
}

/** Throws `data_loss` for a frame that `encodeStepPlan` cannot have made. */
export function decodeStepPlan(frame: Int32Array): StepPlan {
  let at = 0;
  const next = (): number => {
    const word = frame[at++];
    if (word === undefined) {
      throw new ClusterError('data_loss', `step plan: ends after ${frame.length} words`);
    }
    return word;
  };
  const kind = kinds[next() - 1];
  if (kind === undefined) {
    throw new ClusterError('data_loss', `step plan: unknown kind ${frame[0]}`);
  }
  if (kind === 'ping' || kind === 'stop') {
    return { kind };
  }
  if (kind === 'configure') {
    const size = { kvBlocks: next(), maxRows: next(), maxHeadRows: next(), usableVocab: next() };
    const words = next();
    if (frame.length - at !== words) {
      throw new ClusterError(
        'data_loss',
        `step plan: an id of ${words} words, but ${frame.length - at} follow`,
      );
    }
    return { kind, ...size, deviceGroupId: frame.slice(at) };
  }
  const releasedSlots = Array.from({ length: next() }, next);
  const spans = Array.from({ length: next() }, () => ({
    slot: next(),
    start: next(),
    rows: next(),
    headRows: next(),
    hiddenRow: next(),
    capacityTokens: next(),
  }));
  const headRows = spans.reduce((sum, span) => sum + span.headRows, 0);
  const heads = Array.from({ length: headRows }, (): HeadRequest => ({
    kind: next() === 0 ? 'best' : 'logits',
  }));
  const rows = spans.reduce((sum, span) => sum + span.rows, 0);
  if (frame.length - at !== rows) {
    throw new ClusterError('data_loss', `step plan: ${rows} rows, but ${frame.length - at} token ids`);
  }
  return { kind, heads, releasedSlots, spans, tokenIds: frame.slice(at) };
}
