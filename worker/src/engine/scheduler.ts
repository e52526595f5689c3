// Which rows run in the next step. Pure: the same arguments always give the same plan.
//
// 1. Running sequences that decode (one pending token), oldest first: one row, or two with a draft.
// 2. Running sequences that prefill, oldest first: a chunk within what is left of the row budget.
// 3. Waiting sequences, first come first served: admitted while a slot, rows and blocks for all their tokens are there;
//    the first that does not fit ends the step's admissions, so none is overtaken for ever.
// A sequence without credit keeps what it holds and gets no rows. Where blocks are short, a sequence that must grow
// takes them from a sequence without credit, else from the youngest younger one; that one is preempted: it gives all
// back and is computed again later. Nobody is admitted in a step that preempted.
//
// INVARIANT: rows <= maxBatchTokens; running <= maxSequences; granted blocks <= total; the oldest sequence with credit
// gets a row in every step (where one sequence's longest context fits the cache, and maxBatchTokens >= 2 maxSequences).

import { blocksFor, kvBlockTokens } from './kv-cache.ts';

/** A single row is computed with a neighbour (shard-runner.ts), which takes a place in the cache. */
const minAttentionRows = 2;

/** What the scheduler sees of a sequence. */
export interface SchedulerSequence {
  readonly sequenceId: number;
  /** Tokens known but not yet in the KV cache; at least 1. With 1 it decodes. */
  readonly pendingTokens: number;
  /** Positions in the KV cache. */
  readonly kvTokens: number;
  /** Blocks held. */
  readonly blocks: number;
  /** Tokens it may produce. */
  readonly creditTokens: number;
  /** A draft is at hand and may be verified. */
  readonly hasDraft: boolean;
}

export interface SchedulerState {
  /** Oldest first. */
  readonly running: readonly SchedulerSequence[];
  /** Oldest first. */
  readonly waiting: readonly SchedulerSequence[];
  readonly freeBlocks: number;
}

export interface SchedulerLimits {
  readonly maxSequences: number;
  readonly maxBatchTokens: number;
  readonly prefillChunkTokens: number;
  /** Blocks of the longest context. */
  readonly maxSequenceBlocks: number;
}

/** One sequence's rows in the step. */
export interface ScheduledRows {
  readonly sequenceId: number;
  /** Of its pending tokens, the first so many. */
  readonly pendingRows: number;
  /** One more row, for the draft. */
  readonly withDraft: boolean;
  /** Blocks that it must hold. */
  readonly blocks: number;
}

export interface StepDecision {
  /** To give back everything and wait, in this order. */
  readonly preempted: readonly number[];
  readonly admitted: readonly number[];
  readonly rows: readonly ScheduledRows[];
}

/** Decides the next step. An empty plan means that nothing can run until credit or a request comes. */
export function planStep(state: SchedulerState, limits: SchedulerLimits): StepDecision {
  const preempted = new Set<number>();
  const admitted: number[] = [];
  const rows = new Map<number, ScheduledRows>();
  let freeBlocks = state.freeBlocks;
  let budget = limits.maxBatchTokens;

  const schedule = (sequence: SchedulerSequence, pendingRows: number, draft: boolean): void => {
    const kvTokens = sequence.kvTokens + Math.max(minAttentionRows, pendingRows + (draft ? 1 : 0));
    const blocks = blocksFor(kvTokens, limits.maxSequenceBlocks);
    const more = Math.max(0, blocks - sequence.blocks);
    if (draft && (more > freeBlocks || budget < pendingRows + 1)) {
      schedule(sequence, pendingRows, false);
      return;
    }
    if (!makeRoom(more, sequence)) {
      return;
    }
    freeBlocks -= more;
    budget -= pendingRows + (draft ? 1 : 0);
    rows.set(sequence.sequenceId, {
      sequenceId: sequence.sequenceId,
      pendingRows,
      withDraft: draft,
      blocks: Math.max(blocks, sequence.blocks),
    });
  };

  const makeRoom = (blocks: number, sequence: SchedulerSequence): boolean => {
    while (freeBlocks < blocks) {
      const victim = findVictim(state.running, sequence, preempted);
      if (victim === undefined) {
        return false;
      }
      const planned = rows.get(victim.sequenceId);
      if (planned !== undefined) {
        rows.delete(victim.sequenceId);
        budget += planned.pendingRows + (planned.withDraft ? 1 : 0);
      }
      freeBlocks += planned?.blocks ?? victim.blocks;
      preempted.add(victim.sequenceId);
    }
    return true;
  };

  const ready = state.running.filter((sequence) => sequence.creditTokens > 0);
  for (const sequence of ready) {
    if (sequence.pendingTokens === 1 && !preempted.has(sequence.sequenceId) && budget > 0) {
      schedule(sequence, 1, sequence.hasDraft);
    }
  }
  for (const sequence of ready) {
    if (sequence.pendingTokens > 1 && !preempted.has(sequence.sequenceId) && budget > 0) {
      schedule(sequence, Math.min(sequence.pendingTokens, limits.prefillChunkTokens, budget), false);
    }
  }
  if (preempted.size > 0) {
    return { preempted: [...preempted], admitted, rows: [...rows.values()] };
  }
  for (const sequence of state.waiting) {
    if (sequence.creditTokens === 0) {
      continue;
    }
    const blocks = blocksFor(sequence.pendingTokens + 1, limits.maxSequenceBlocks);
    if (
      state.running.length + admitted.length >= limits.maxSequences ||
      budget === 0 ||
      blocks > freeBlocks
    ) {
      break;
    }
    const pendingRows = Math.min(sequence.pendingTokens, limits.prefillChunkTokens, budget);
    admitted.push(sequence.sequenceId);
    freeBlocks -= blocks;
    budget -= pendingRows;
    rows.set(sequence.sequenceId, { sequenceId: sequence.sequenceId, pendingRows, withDraft: false, blocks });
  }
  return { preempted: [], admitted, rows: [...rows.values()] };
}

function findVictim(
  running: readonly SchedulerSequence[],
  sequence: SchedulerSequence,
  preempted: ReadonlySet<number>,
): SchedulerSequence | undefined {
  const younger = running.slice(running.indexOf(sequence) + 1);
  const holders = (from: readonly SchedulerSequence[]): readonly SchedulerSequence[] =>
    from.filter((other) => other !== sequence && other.blocks > 0 && !preempted.has(other.sequenceId));
  return holders(running).findLast((other) => other.creditTokens === 0) ?? holders(younger).at(-1);
}

/** Positions that `blocks` hold. */
export function capacityTokens(blocks: number): number {
  return blocks * kvBlockTokens;
}
