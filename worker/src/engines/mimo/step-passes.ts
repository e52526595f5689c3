// The rows of one step as plans of its two passes: the backbone over all of them, MTP over those that survive. Pure:
// reads sequences and changes none. engine.ts applies the results of the passes, and explains why MTP runs in the same
// step.

import type { HeadRequest } from './head-rows.ts';
import type { ScheduledRows } from './scheduler.ts';
import type { Sequence } from './sequence.ts';
import type { PassPlan, RowSpan } from './step-plan.ts';

/** A sequence's rows of the step, with their data for the MTP pass. */
export interface StepRows {
  readonly sequence: Sequence;
  readonly scheduled: ScheduledRows;
  readonly span: RowSpan;
  /** First row of the forward pass. */
  readonly firstRow: number;
}

/** The scheduled rows after the cached ones; the last of them yields the next token, a draft's row the one after. */
export function spanOf(
  sequence: Sequence,
  { pendingRows, withDraft }: ScheduledRows,
  granted: Pick<RowSpan, 'slot' | 'capacityTokens'>,
): RowSpan {
  const rows = pendingRows + (withDraft ? 1 : 0);
  const isLast = pendingRows === sequence.pendingTokens;
  return {
    ...granted,
    start: sequence.kvTokens,
    rows,
    headRows: isLast ? rows - pendingRows + 1 : 0,
    hiddenRow: 0,
  };
}

/** The backbone over all rows: pending tokens, and after them a draft if one is verified. */
export function planForward(rows: readonly StepRows[], releasedSlots: readonly number[]): PassPlan {
  const tokenIds = rows.flatMap(({ sequence, scheduled, span }) => [
    ...sequence.tokenIds.slice(span.start, span.start + scheduled.pendingRows),
    ...(scheduled.withDraft ? [sequence.draft] : []),
  ]);
  return {
    kind: 'forward',
    heads: rows.flatMap(({ sequence, scheduled, span }) => [
      ...(span.headRows > 0 ? [sequence.nextHead()] : []),
      ...(scheduled.withDraft ? [sequence.nextHead(sequence.draft)] : []),
    ]),
    releasedSlots,
    spans: rows.map(({ span }) => span),
    tokenIds: Int32Array.from(tokenIds),
  };
}

/**
 * MTP over the rows that stay in the cache, once their tokens are applied. A sequence with one pending token requests a
 * draft if that `pays` and it may still produce two tokens.
 */
export function planDraft(
  rows: readonly (StepRows & { readonly survivors: number })[],
  pays: boolean,
): PassPlan {
  const spans = rows.map(({ sequence, span, firstRow, survivors }): RowSpan => {
    const wantsDraft = pays && sequence.pendingTokens === 1 && sequence.allowance >= 2;
    return { ...span, rows: survivors, headRows: wantsDraft ? 1 : 0, hiddenRow: firstRow };
  });
  const tokenIds = rows.flatMap(({ sequence, span, survivors }) =>
    sequence.tokenIds.slice(span.start + 1, span.start + 1 + survivors),
  );
  return {
    kind: 'draft',
    heads: spans.flatMap(({ headRows }): HeadRequest[] => (headRows > 0 ? [{ kind: 'best' }] : [])),
    releasedSlots: [],
    spans,
    tokenIds: Int32Array.from(tokenIds),
  };
}
