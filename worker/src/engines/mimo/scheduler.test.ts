import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { blocksFor, kvBlockTokens } from './kv-cache.ts';
import {
  isParkable,
  maxOvertakes,
  planStep,
  type SchedulerLimits,
  type SchedulerSequence,
  type SchedulerState,
} from './scheduler.ts';

const limits: SchedulerLimits = {
  maxSequences: 4,
  maxBatchTokens: 16,
  prefillChunkTokens: 8,
  maxSequenceBlocks: 8,
  parkAfterMs: 2000,
};

function sequence(sequenceId: number, more: Partial<SchedulerSequence> = {}): SchedulerSequence {
  return {
    sequenceId,
    pendingTokens: 1,
    kvTokens: 10,
    blocks: 1,
    creditTokens: 9,
    stalledMs: 0,
    ranMs: 60_000,
    overtakes: 0,
    hasDraft: false,
    ...more,
  };
}

function waiting(sequenceId: number, more: Partial<SchedulerSequence> = {}): SchedulerSequence {
  return sequence(sequenceId, { kvTokens: 0, blocks: 0, ...more });
}

function plan(sequences: readonly SchedulerSequence[], more: Partial<SchedulerState> = {}) {
  return planStep({ sequences, freeBlocks: 8, afterQuick: false, ...more }, limits);
}

const rowsOf = (decision: ReturnType<typeof planStep>) =>
  decision.rows.map(({ sequenceId, pendingRows, withDraft }) => [
    sequenceId,
    pendingRows + (withDraft ? 1 : 0),
  ]);

const arbitrarySequence = fc.record({
  pendingTokens: fc.oneof(fc.constant(1), fc.integer({ min: 1, max: 300 })),
  kvTokens: fc.nat(300),
  creditTokens: fc.constantFrom(0, 1, 9),
  stalledMs: fc.constantFrom(0, 1999, 2000, 3000),
  ranMs: fc.constantFrom(0, 500, 60_000),
  overtakes: fc.constantFrom(0, 0, 0, maxOvertakes),
  hasDraft: fc.boolean(),
  isRunning: fc.boolean(),
});

/** A random state of the engine. */
const states = fc
  .record({
    sequences: fc.array(arbitrarySequence, { maxLength: 10 }),
    spareBlocks: fc.nat(8),
    afterQuick: fc.boolean(),
  })
  .map(({ sequences: drawn, spareBlocks, afterQuick }) => {
    let slots = limits.maxSequences;
    const sequences = drawn.map(({ isRunning, ...each }, sequenceId) => {
      if (!isRunning || slots === 0) {
        return waiting(sequenceId, { ...each, kvTokens: 0, hasDraft: false });
      }
      slots -= 1;
      const most = limits.maxSequenceBlocks * kvBlockTokens - each.pendingTokens - 1;
      const kvTokens = Math.max(0, Math.min(each.kvTokens, most));
      const blocks = blocksFor(Math.max(1, kvTokens), limits.maxSequenceBlocks);
      const hasDraft = each.hasDraft && each.pendingTokens === 1;
      return sequence(sequenceId, { ...each, kvTokens, blocks, hasDraft });
    });
    const held = sequences.reduce((sum, { blocks }) => sum + blocks, 0);
    // The cache holds at least one longest context.
    const freeBlocks = Math.max(0, limits.maxSequenceBlocks - held) + spareBlocks;
    return { sequences, freeBlocks, afterQuick };
  });

describe('planStep', () => {
  it('decodes first, then prefills in chunks: half for the oldest, the rest for the shortest', () => {
    const running = [
      sequence(1, { pendingTokens: 30 }),
      sequence(2),
      sequence(3, { hasDraft: true }),
      sequence(4, { pendingTokens: 29 }),
    ];
    expect(rowsOf(plan(running))).toEqual([
      [2, 1],
      [3, 2],
      [1, 7],
      [4, 6],
    ]);
    expect(rowsOf(plan([...running.slice(0, 3), sequence(4, { pendingTokens: 31 })]))[3]).toEqual([4, 6]);
    expect(rowsOf(plan([sequence(1, { pendingTokens: 30 }), waiting(2, { pendingTokens: 31 })]))).toEqual([
      [1, 8],
      [2, 8],
    ]);
  });

  it('gives the oldest prompt the rows that no other can use', () => {
    const decision = planStep(
      { sequences: [sequence(1, { pendingTokens: 30 })], freeBlocks: 8, afterQuick: false },
      { ...limits, prefillChunkTokens: 12 },
    );
    expect(rowsOf(decision)).toEqual([[1, 12]]);
  });

  it('keeps a step that can finish short prompts quick, but not two in a row', () => {
    const sequences = [
      sequence(1, { pendingTokens: 300 }),
      waiting(2, { pendingTokens: 300 }),
      waiting(3, { pendingTokens: 3 }),
      waiting(4, { pendingTokens: 2 }),
    ];
    const quick = plan(sequences);
    expect(quick.isQuick).toBe(true);
    expect(rowsOf(quick)).toEqual([
      [3, 3],
      [4, 2],
    ]);
    const full = plan(sequences, { freeBlocks: 20, afterQuick: true });
    expect(full.isQuick).toBe(false);
    expect(rowsOf(full)).toEqual([
      [1, 8],
      [4, 2],
      [3, 3],
      [2, 3],
    ]);
    expect(plan(sequences.slice(2)).isQuick, 'nothing longer is there').toBe(false);
    const slots = [5, 6, 7].map((id) => sequence(id));
    expect(plan([...slots, ...sequences]).isQuick, 'no slot for a short one').toBe(false);
  });

  it('admits with blocks for all tokens, the shortest first', () => {
    const prompts = [5, 6, 7].map((id) => waiting(id, { pendingTokens: id === 6 ? 200 : 5 }));
    const decision = plan(prompts, { freeBlocks: 4 });
    expect(decision).toMatchObject({
      preempted: [],
      parked: [],
      admitted: [5, 7],
      blocked: [6],
      overtaken: [6],
    });
    expect(decision.rows[0]).toEqual({ sequenceId: 5, pendingRows: 5, withDraft: false, blocks: 1 });
    expect(plan(prompts, { freeBlocks: 6, afterQuick: true })).toMatchObject({
      admitted: [5, 7, 6],
      blocked: [],
      overtaken: [],
    });
    const slots = [1, 2, 3].map((id) => sequence(id));
    expect(plan([...slots, ...prompts])).toMatchObject({ admitted: [5], blocked: [6, 7], overtaken: [] });
  });

  it('keeps a sequence waiting while it is due no rows, without counting it as blocked', () => {
    const prompts = [1, 2, 3].map((id) => waiting(id, { pendingTokens: 100 }));
    expect(plan(prompts)).toMatchObject({ admitted: [1, 2], blocked: [] });
  });

  it('stops overtaking a sequence once it was overtaken often enough', () => {
    const prompts = [
      waiting(1, { pendingTokens: 5 }),
      waiting(2, { pendingTokens: 300, overtakes: maxOvertakes }),
      waiting(3, { pendingTokens: 5 }),
    ];
    expect(plan(prompts, { freeBlocks: 4 })).toMatchObject({ admitted: [1], blocked: [2, 3] });
    // Once there is room it is admitted at once, even if no other sequence would have waited for it.
    const readers = [10, 11].map((id) => sequence(id, { pendingTokens: 100 }));
    expect(plan([...readers, ...prompts.slice(1)], { freeBlocks: 9 })).toMatchObject({
      admitted: [2],
      isQuick: false,
    });
  });

  it('skips sequences without credit, running or waiting', () => {
    const decision = plan([
      sequence(1, { creditTokens: 0 }),
      sequence(2),
      waiting(3, { creditTokens: 0 }),
      waiting(4),
    ]);
    expect(rowsOf(decision)).toEqual([
      [2, 1],
      [4, 1],
    ]);
    expect(decision).toMatchObject({ parked: [], blocked: [] });
  });

  it('grows by doubling, and preempts the youngest when no blocks are free', () => {
    const full = { kvTokens: 64, blocks: 1 };
    const grown = { sequenceId: 1, pendingRows: 1, withDraft: false, blocks: 2 };
    expect(plan([sequence(1, full)], { freeBlocks: 1 }).rows).toEqual([grown]);
    const decision = plan([sequence(1, full), sequence(2), sequence(3), waiting(9)], { freeBlocks: 0 });
    expect(decision).toMatchObject({ preempted: [3], admitted: [], blocked: [9] });
    expect(decision.rows[0]).toEqual(grown);
    expect(rowsOf(decision)).toEqual([
      [1, 1],
      [2, 1],
    ]);
  });

  it('takes blocks from a sequence without credit before any other, and drops a draft rather than do so', () => {
    const running = [sequence(1, { creditTokens: 0 }), sequence(2, { kvTokens: 64 }), sequence(3)];
    expect(plan(running, { freeBlocks: 0 })).toMatchObject({ parked: [1], preempted: [] });
    const drafting = plan([sequence(1, { kvTokens: 62, hasDraft: true }), sequence(2)], { freeBlocks: 0 });
    expect(rowsOf(drafting)[0]).toEqual([1, 2]);
  });

  it('parks sequences to admit others, the longest without credit first and no more than needed', () => {
    const stalled = [3000, 9000, 2000, 1999].map((stalledMs, id) =>
      sequence(id, { creditTokens: 0, stalledMs }),
    );
    expect(plan(stalled).parked, 'nobody comes').toEqual([]);
    const prompt = waiting(9, { pendingTokens: 5 });
    expect(plan([...stalled, prompt])).toMatchObject({ parked: [1], admitted: [9], blocked: [] });
    expect(plan([...stalled, prompt, waiting(8)])).toMatchObject({ parked: [1, 0], admitted: [9, 8] });
    const long = waiting(9, { pendingTokens: 130 });
    expect(plan([...stalled, long], { freeBlocks: 1 })).toMatchObject({ parked: [1, 0, 2], admitted: [9] });
    expect(plan([...stalled, long], { freeBlocks: 0 }), 'all would not do').toMatchObject({
      parked: [],
      blocked: [9],
    });
    expect(plan([waiting(1, { creditTokens: 0, stalledMs: 2000 })]).parked, 'it waits for nothing').toEqual([
      1,
    ]);
  });

  it.each([
    { ranMs: 0, patience: 200 },
    { ranMs: 199, patience: 200 },
    { ranMs: 700, patience: 700 },
    { ranMs: 2001, patience: 2000 },
  ])('parks who ran for $ranMs ms after $patience ms without credit', ({ ranMs, patience }) => {
    const parkedAfter = (stalledMs: number): readonly number[] =>
      plan([
        ...Array.from({ length: limits.maxSequences }, (_, id) =>
          sequence(id, id === 0 ? { creditTokens: 0, stalledMs, ranMs } : {}),
        ),
        waiting(9),
      ]).parked;
    expect([parkedAfter(patience - 1), parkedAfter(patience)]).toEqual([[], [0]]);
  });

  it('stays within rows, sequences and blocks, and gives the oldest with credit a row, whatever the state', () => {
    fc.assert(
      fc.property(states, (state) => {
        const decision = planStep(state, limits);
        const { sequences } = state;
        const gone = new Set([...decision.preempted, ...decision.parked]);
        const admitted = new Set(decision.admitted);
        const scheduled = new Map(decision.rows.map((rows) => [rows.sequenceId, rows]));
        expect(scheduled.size).toBe(decision.rows.length);
        expect(gone.size).toBe(decision.preempted.length + decision.parked.length);
        expect(decision.preempted.length === 0 || admitted.size === 0).toBe(true);
        expect(state.afterQuick && decision.isQuick).toBe(false);

        const rows = decision.rows.reduce(
          (sum, each) => sum + each.pendingRows + (each.withDraft ? 1 : 0),
          0,
        );
        expect(rows).toBeLessThanOrEqual(limits.maxBatchTokens);
        const held = sequences.map((each) =>
          gone.has(each.sequenceId) ? 0 : (scheduled.get(each.sequenceId)?.blocks ?? each.blocks),
        );
        const total = state.freeBlocks + sequences.reduce((sum, { blocks }) => sum + blocks, 0);
        expect(held.reduce((sum, blocks) => sum + blocks, 0)).toBeLessThanOrEqual(total);
        expect(held.filter((blocks) => blocks > 0).length).toBeLessThanOrEqual(limits.maxSequences);

        for (const { sequenceId, pendingRows, withDraft, blocks } of decision.rows) {
          const from = sequences[sequenceId]!;
          expect(pendingRows).toBeGreaterThan(0);
          expect(pendingRows).toBeLessThanOrEqual(Math.min(from.pendingTokens, limits.prefillChunkTokens));
          expect(withDraft && !from.hasDraft).toBe(false);
          expect(from.creditTokens).toBeGreaterThan(0);
          expect(gone.has(sequenceId)).toBe(false);
          expect(admitted.has(sequenceId)).toBe(from.blocks === 0);
          expect(blocks).toBeGreaterThanOrEqual(from.blocks);
          expect(blocks * kvBlockTokens).toBeGreaterThanOrEqual(
            from.kvTokens + Math.max(2, pendingRows + (withDraft ? 1 : 0)),
          );
        }
        for (const sequenceId of decision.parked) {
          expect(sequences[sequenceId]!.creditTokens).toBe(0);
        }
        const oldest = sequences.find(
          ({ sequenceId, creditTokens, blocks }) =>
            creditTokens > 0 && (blocks > 0 || admitted.has(sequenceId)),
        );
        expect(decision.isQuick || oldest === undefined || scheduled.has(oldest.sequenceId)).toBe(true);
        expect(decision.isQuick && rows === 0).toBe(false);
        const stalled = sequences.filter(
          (each) => each.blocks > 0 && isParkable(each, limits) && !gone.has(each.sequenceId),
        );
        const isRoom = held.filter((blocks) => blocks > 0).length < limits.maxSequences || stalled.length > 0;
        const fresh = sequences.find(
          ({ blocks, creditTokens, pendingTokens }) =>
            blocks === 0 && creditTokens > 0 && pendingTokens < kvBlockTokens,
        );
        const spare = total - held.reduce((sum, blocks) => sum + blocks, 0);
        // Nothing runs: only a sequence that has been overtaken often enough may then block a prompt that fits.
        const isBarred = sequences.some(({ overtakes, blocks }) => blocks === 0 && overtakes >= maxOvertakes);
        const isLeft = fresh !== undefined && rows === 0 && isRoom && spare > 0;
        expect(isLeft && !isBarred).toBe(false);
      }),
      { numRuns: 3000 },
    );
  });

  it('keeps its bounds on the wait of short and of long prompts under any arrivals', () => {
    fc.assert(
      fc.property(arrivals(60), fc.boolean(), (coming, afterQuick) => {
        for (const done of simulate(coming, { afterQuick, maxSequences: 60 })) {
          const most = Math.min(limits.prefillChunkTokens, Math.floor(done.leastRows / 2));
          const { prompt, shorterRows, olderSteps } = done;
          const ownSteps = Math.ceil(prompt / most);
          expect(done.steps).toBeLessThanOrEqual(2 * Math.ceil((shorterRows + prompt) / most) + 2);
          expect(done.steps).toBeLessThanOrEqual(2 * (olderSteps(most) + ownSteps) + 2);
        }
      }),
      { numRuns: 400 },
    );
  });

  it('limits how often a sequence without room is overtaken, and completes every sequence', () => {
    fc.assert(
      fc.property(arrivals(120), (coming) => {
        for (const { overtakes } of simulate(coming, {
          afterQuick: false,
          maxSequences: limits.maxSequences,
        })) {
          expect(overtakes).toBeLessThanOrEqual(maxOvertakes);
        }
      }),
      { numRuns: 100 },
    );
  });
});

interface Arrival {
  readonly atStep: number;
  readonly prompt: number;
  readonly completion: number;
}

function arrivals(maxLength: number): fc.Arbitrary<Arrival[]> {
  const arrival = fc.record({
    atStep: fc.nat(60),
    prompt: fc.oneof(fc.integer({ min: 1, max: 12 }), fc.integer({ min: 100, max: 400 })),
    completion: fc.integer({ min: 1, max: 30 }),
  });
  return fc
    .array(arrival, { minLength: 1, maxLength })
    .map((all) => all.toSorted((a, b) => a.atStep - b.atStep));
}

/** A completed prefill: its duration, and the other work in its steps. */
interface ReadPrompt {
  readonly prompt: number;
  readonly steps: number;
  /** The fewest rows that prefill had in a step meanwhile. */
  readonly leastRows: number;
  /** Rows of other prompts with no more tokens left. */
  readonly shorterRows: number;
  /** Steps that the older prompts took at this many rows a step. */
  readonly olderSteps: (rows: number) => number;
  readonly overtakes: number;
}

/** Steps through arrivals with a cache that never runs short, until everything has ended. */
function simulate(
  coming: readonly Arrival[],
  options: Pick<SchedulerState, 'afterQuick'> & Pick<SchedulerLimits, 'maxSequences'>,
): ReadPrompt[] {
  interface Live extends Arrival {
    readonly id: number;
    readonly older: readonly number[];
    kvTokens: number;
    steps: number;
    leastRows: number;
    shorterRows: number;
    overtakes: number;
    isRunning: boolean;
  }
  const read: ReadPrompt[] = [];
  const live: Live[] = [];
  const left = coming.map((arrival, id) => ({ ...arrival, id }));
  const pendingOf = ({ prompt, kvTokens }: Live): number => Math.max(1, prompt - kvTokens);
  let { afterQuick } = options;
  // Enough for a decode row of each sequence and as many again, as an engine's options require.
  const maxBatchTokens = Math.max(limits.maxBatchTokens, 2 * options.maxSequences);
  for (let step = 0; left.length + live.length > 0; step++) {
    expect(step, 'everything ends').toBeLessThan(50_000);
    while (left[0] !== undefined && left[0].atStep <= step) {
      const older = live.filter(({ kvTokens, prompt }) => kvTokens < prompt).map(pendingOf);
      const state = { kvTokens: 0, steps: 0, leastRows: Infinity, shorterRows: 0, overtakes: 0 };
      live.push({ ...left.shift()!, ...state, older, isRunning: false });
    }
    const sequences = live.map((each) =>
      sequence(each.id, {
        pendingTokens: pendingOf(each),
        kvTokens: each.kvTokens,
        blocks: each.isRunning ? blocksFor(Math.max(each.prompt + 1, each.kvTokens + 2), 64) : 0,
        overtakes: each.overtakes,
      }),
    );
    const decision = planStep(
      { sequences, freeBlocks: 10_000, afterQuick },
      { ...limits, maxSequences: options.maxSequences, maxBatchTokens, maxSequenceBlocks: 64 },
    );
    afterQuick = decision.isQuick;
    const rows = new Map(decision.rows.map(({ sequenceId, pendingRows }) => [sequenceId, pendingRows]));
    const reading = live.filter(({ kvTokens, prompt }) => kvTokens < prompt);
    const decodeRows = live.length - reading.length;
    for (const each of reading) {
      each.steps += 1;
      each.leastRows = Math.min(each.leastRows, maxBatchTokens - decodeRows);
      each.shorterRows += reading
        .filter((other) => other !== each && pendingOf(other) <= pendingOf(each))
        .reduce((sum, other) => sum + (rows.get(other.id) ?? 0), 0);
      each.overtakes += decision.overtaken.includes(each.id) ? 1 : 0;
    }
    for (const each of live) {
      const given = rows.get(each.id) ?? 0;
      each.isRunning ||= given > 0;
      const wasReading = each.kvTokens < each.prompt;
      each.kvTokens += given;
      if (wasReading && each.kvTokens >= each.prompt) {
        const { prompt, steps, leastRows, shorterRows, overtakes, older } = each;
        const olderSteps = (most: number): number =>
          older.reduce((sum, tokens) => sum + Math.ceil(tokens / most), 0);
        read.push({ prompt, steps, leastRows, shorterRows, overtakes, olderSteps });
      }
    }
    for (const each of live.filter(({ kvTokens, prompt, completion }) => kvTokens >= prompt + completion)) {
      live.splice(live.indexOf(each), 1);
    }
  }
  expect(read).toHaveLength(coming.length);
  return read;
}
