// The scheduler's earlier rule, for comparison in `prefill.ts`: prompts are read strictly oldest first, and waiting
// ones are admitted in the order of their arrival. Pure. For engines whose cache never runs short: it preempts no
// sequence.

import { blocksFor } from '@mimo/worker/engines/mimo/kv-cache';
import type {
  ScheduledRows,
  SchedulerLimits,
  SchedulerSequence,
  SchedulerState,
  StepDecision,
} from '@mimo/worker/engines/mimo/scheduler';

/** Decides a step: decodes, then running prompts, then waiting ones, each up to a chunk and oldest first. */
export function planOldestFirst(state: SchedulerState, limits: SchedulerLimits): StepDecision {
  const rows: ScheduledRows[] = [];
  const admitted: number[] = [];
  let budget = limits.maxBatchTokens;
  const ready = state.sequences.filter(({ creditTokens }) => creditTokens > 0);
  const running = ready.filter(({ blocks }) => blocks > 0);
  const give = (sequence: SchedulerSequence, pendingRows: number, withDraft: boolean): void => {
    const { sequenceId, kvTokens, pendingTokens } = sequence;
    const positions =
      sequence.blocks === 0 ? pendingTokens + 1 : kvTokens + Math.max(2, pendingRows + (withDraft ? 1 : 0));
    const blocks = Math.max(blocksFor(positions, limits.maxSequenceBlocks), sequence.blocks);
    rows.push({ sequenceId, pendingRows, withDraft, blocks });
    budget -= pendingRows + (withDraft ? 1 : 0);
  };
  for (const sequence of running.filter(({ pendingTokens }) => pendingTokens === 1)) {
    give(sequence, 1, sequence.hasDraft);
  }
  let slots = limits.maxSequences - running.length;
  const prompts = ready.filter(({ blocks, pendingTokens }) => blocks === 0 || pendingTokens > 1);
  for (const sequence of prompts.toSorted((a, b) => Number(a.blocks === 0) - Number(b.blocks === 0))) {
    const pendingRows = Math.min(sequence.pendingTokens, limits.prefillChunkTokens, budget);
    if (pendingRows > 0 && (sequence.blocks > 0 || slots > 0)) {
      slots -= sequence.blocks === 0 ? 1 : 0;
      give(sequence, pendingRows, false);
      if (sequence.blocks === 0) {
        admitted.push(sequence.sequenceId);
      }
    }
  }
  return { parked: [], preempted: [], admitted, rows, blocked: [], overtaken: [], isQuick: false };
}
