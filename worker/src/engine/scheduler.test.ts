import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { blocksFor, kvBlockTokens } from './kv-cache.ts';
import { planStep, type SchedulerLimits, type SchedulerSequence, type SchedulerState } from './scheduler.ts';

const limits: SchedulerLimits = {
  maxSequences: 4,
  maxBatchTokens: 16,
  prefillChunkTokens: 8,
  maxSequenceBlocks: 8,
};

function sequence(sequenceId: number, more: Partial<SchedulerSequence> = {}): SchedulerSequence {
  return { sequenceId, pendingTokens: 1, kvTokens: 10, blocks: 1, creditTokens: 9, hasDraft: false, ...more };
}

function plan(state: Partial<SchedulerState>) {
  return planStep({ running: [], waiting: [], freeBlocks: 8, ...state }, limits);
}

const rowsOf = (decision: ReturnType<typeof planStep>) =>
  decision.rows.map(({ sequenceId, pendingRows, withDraft }) => [
    sequenceId,
    pendingRows + (withDraft ? 1 : 0),
  ]);

const arbitrarySequence = fc.record({
  pendingTokens: fc.oneof(fc.constant(1), fc.integer({ min: 1, max: 300 })),
  kvTokens: fc.nat(400),
  creditTokens: fc.constantFrom(0, 1, 9),
  hasDraft: fc.boolean(),
});

/** Any state that the engine could be in. */
const states = fc
  .record({
    running: fc.array(arbitrarySequence, { maxLength: 4 }),
    waiting: fc.array(arbitrarySequence, { maxLength: 6 }),
    spareBlocks: fc.nat(8),
  })
  .map(({ running, waiting, spareBlocks }) => {
    let sequenceId = 0;
    const cut = (kvTokens: number, pendingTokens: number): number =>
      Math.max(0, Math.min(kvTokens, limits.maxSequenceBlocks * kvBlockTokens - pendingTokens - 1));
    const state = {
      running: running.map((each) => {
        const kvTokens = cut(each.kvTokens, each.pendingTokens);
        const blocks = blocksFor(Math.max(1, kvTokens), limits.maxSequenceBlocks);
        const hasDraft = each.hasDraft && each.pendingTokens === 1;
        return sequence(sequenceId++, Object.assign(each, { kvTokens, blocks, hasDraft }));
      }),
      waiting: waiting.map((each) =>
        sequence(sequenceId++, Object.assign(each, { kvTokens: 0, blocks: 0, hasDraft: false })),
      ),
    };
    const held = state.running.reduce((sum, { blocks }) => sum + blocks, 0);
    // The cache holds at least one longest context.
    return Object.assign(state, { freeBlocks: Math.max(0, limits.maxSequenceBlocks - held) + spareBlocks });
  });

describe('planStep', () => {
  it('decodes first, then prefills in chunks, oldest first, within the row budget', () => {
    const decision = plan({
      running: [
        sequence(1, { pendingTokens: 30 }),
        sequence(2),
        sequence(3, { hasDraft: true }),
        sequence(4, { pendingTokens: 30 }),
      ],
    });
    expect(rowsOf(decision)).toEqual([
      [2, 1],
      [3, 2],
      [1, 8],
      [4, 5],
    ]);
  });

  it('admits first come first served, with blocks for all tokens, and lets nobody overtake', () => {
    const waiting = [5, 6, 7].map((id) =>
      sequence(id, { kvTokens: 0, blocks: 0, pendingTokens: id === 6 ? 200 : 5 }),
    );
    expect(plan({ waiting, freeBlocks: 4 })).toEqual({
      preempted: [],
      admitted: [5],
      rows: [{ sequenceId: 5, pendingRows: 5, withDraft: false, blocks: 1 }],
    });
    expect(plan({ waiting, freeBlocks: 5 }).admitted).toEqual([5, 6]);
    expect(plan({ running: [1, 2, 3].map((id) => sequence(id)), waiting }).admitted).toEqual([5]);
  });

  it('leaves out what has no credit, running or waiting', () => {
    const decision = plan({
      running: [sequence(1, { creditTokens: 0 }), sequence(2)],
      waiting: [
        sequence(3, { creditTokens: 0, kvTokens: 0, blocks: 0 }),
        sequence(4, { kvTokens: 0, blocks: 0 }),
      ],
    });
    expect(rowsOf(decision)).toEqual([
      [2, 1],
      [4, 1],
    ]);
  });

  it('grows by doubling, and takes the blocks from the youngest when there are none', () => {
    const full = { kvTokens: 64, blocks: 1 };
    const waiting = [sequence(9, { kvTokens: 0, blocks: 0 })];
    const grown = { sequenceId: 1, pendingRows: 1, withDraft: false, blocks: 2 };
    expect(plan({ running: [sequence(1, full)], freeBlocks: 1 }).rows).toEqual([grown]);
    const decision = plan({ running: [sequence(1, full), sequence(2), sequence(3)], waiting, freeBlocks: 0 });
    expect(decision.preempted).toEqual([3]);
    expect(decision.admitted).toEqual([]);
    expect(decision.rows[0]).toEqual(grown);
    expect(rowsOf(decision)).toEqual([
      [1, 1],
      [2, 1],
    ]);
  });

  it('preempts a sequence without credit before any other, and drops a draft rather than preempt', () => {
    const running = [sequence(1, { creditTokens: 0 }), sequence(2, { kvTokens: 64 }), sequence(3)];
    expect(plan({ running, freeBlocks: 0 }).preempted).toEqual([1]);
    const drafting = plan({
      running: [sequence(1, { kvTokens: 62, hasDraft: true }), sequence(2)],
      freeBlocks: 0,
    });
    expect(rowsOf(drafting)[0]).toEqual([1, 2]);
  });

  it('stays within rows, sequences and blocks, and gives the oldest with credit a row, whatever the state', () => {
    fc.assert(
      fc.property(states, (state) => {
        const decision = planStep(state, limits);
        const everyone = [...state.running, ...state.waiting];
        const preempted = new Set(decision.preempted);
        const scheduled = new Map(decision.rows.map((rows) => [rows.sequenceId, rows]));
        expect(scheduled.size).toBe(decision.rows.length);

        const rows = decision.rows.reduce(
          (sum, each) => sum + each.pendingRows + (each.withDraft ? 1 : 0),
          0,
        );
        expect(rows).toBeLessThanOrEqual(limits.maxBatchTokens);
        const held = everyone.map((each) =>
          preempted.has(each.sequenceId) ? 0 : (scheduled.get(each.sequenceId)?.blocks ?? each.blocks),
        );
        const total = state.freeBlocks + state.running.reduce((sum, { blocks }) => sum + blocks, 0);
        expect(held.reduce((sum, blocks) => sum + blocks, 0)).toBeLessThanOrEqual(total);
        const running = state.running.length - preempted.size + decision.admitted.length;
        expect(running).toBeLessThanOrEqual(limits.maxSequences);

        for (const { sequenceId, pendingRows, withDraft, blocks } of decision.rows) {
          const from = everyone.find((each) => each.sequenceId === sequenceId)!;
          expect(pendingRows).toBeGreaterThan(0);
          expect(pendingRows).toBeLessThanOrEqual(Math.min(from.pendingTokens, limits.prefillChunkTokens));
          expect(withDraft && !from.hasDraft).toBe(false);
          expect(from.creditTokens).toBeGreaterThan(0);
          expect(preempted.has(sequenceId)).toBe(false);
          expect(blocks).toBeGreaterThanOrEqual(from.blocks);
          expect(blocks * kvBlockTokens).toBeGreaterThanOrEqual(
            from.kvTokens + Math.max(2, pendingRows + (withDraft ? 1 : 0)),
          );
        }
        const oldest = state.running.find(({ creditTokens }) => creditTokens > 0);
        expect(oldest === undefined || scheduled.has(oldest.sequenceId)).toBe(true);
      }),
      { numRuns: 3000 },
    );
  });
});
