// Chooses the rows of the next step. Pure: the same arguments always give the same plan.
//
// 1. Running sequences that decode (one pending token) come first, oldest first: one row, or two with a draft.
// 2. Prefill shares the remaining rows, B. The oldest prompt may use half of them. Then every other prompt uses as many
//    as it can, shortest remaining first, and the oldest gets the rest. No prompt gets more than a chunk.
// 3. While short prompts (of at most a chunk) and longer ones are present, every other step is *quick*: longer prompts
//    get no rows in it, so that short ones do not wait for their computation.
// 4. A waiting sequence is admitted when it is due rows and there is room: a slot, and blocks for all its tokens. If
//    there is no room for it, later sequences may be admitted in `maxOvertakes` steps; then it is next.
// 5. A sequence without credit gets no rows. Once it has had none for as long as it ran before, or for `parkAfterMs`,
//    it may be *parked* if its slot or its blocks make room for another, the longest without credit first: it leaves
//    the engine and is computed again later.
// 6. If blocks are short, a sequence that must grow takes them from a sequence without credit, which is parked; else
//    from the youngest younger one, which is preempted: it releases everything and waits. Such a step admits none.
//
// BOUND, for a prompt of p tokens while there is room for all sequences; b is the least B in that time:
//   steps <= 2 * ceil((S + p) / r) + 2, r = min(chunk, floor(b / 2)), S: rows of prompts with no more tokens left.
//   Longer prompts do not count.
//   steps <= 2 * (ceil(p / r) + sum of ceil(q / r) over the older prompts' tokens q) + 2. Shorter ones do not count.
// INVARIANT: rows <= maxBatchTokens; running <= maxSequences; granted blocks <= total. In a step that is not quick the
// oldest running sequence with credit, or an older admitted one, gets a row (if one longest context fits the cache,
// and maxBatchTokens >= 2 maxSequences).

import { blocksFor, kvBlockTokens } from './kv-cache.ts';

/** A single row is computed with a neighbour (attention.ts), which uses a place in the cache. */
const minAttentionRows = 2;

/**
 * How often later sequences may overtake a waiting one that lacks room: enough for a burst of short prompts, but
 * bounded.
 */
export const maxOvertakes = 32;

/** The scheduler's view of a sequence. */
export interface SchedulerSequence {
  readonly sequenceId: number;
  /** Tokens known but not yet in the KV cache; at least 1. With 1 it decodes. */
  readonly pendingTokens: number;
  /** Positions in the KV cache. */
  readonly kvTokens: number;
  /** Blocks held; 0: it waits. */
  readonly blocks: number;
  /** Tokens it may produce. */
  readonly creditTokens: number;
  /** Time without credit; 0 if it has credit. */
  readonly stalledMs: number;
  /** Time from its admission until it ran out of credit; 0 while it waits. */
  readonly ranMs: number;
  /** The number of steps in which later sequences were admitted while there was no room for it. */
  readonly overtakes: number;
  /** It has a draft that may be verified. */
  readonly hasDraft: boolean;
}

export interface SchedulerState {
  /** Oldest first. */
  readonly sequences: readonly SchedulerSequence[];
  readonly freeBlocks: number;
  /** The previous step was a quick one. */
  readonly afterQuick: boolean;
}

export interface SchedulerLimits {
  readonly maxSequences: number;
  readonly maxBatchTokens: number;
  readonly prefillChunkTokens: number;
  /** Blocks of the longest context. */
  readonly maxSequenceBlocks: number;
  /** A sequence without credit for this long may be parked, however long it ran. */
  readonly parkAfterMs: number;
}

/** One sequence's rows in the step. */
export interface ScheduledRows {
  readonly sequenceId: number;
  /** The number of its pending tokens to compute, from the first. */
  readonly pendingRows: number;
  /** One more row, for the draft. */
  readonly withDraft: boolean;
  /** Blocks that it needs in this step. */
  readonly blocks: number;
}

export interface StepDecision {
  /** Sequences to leave the engine, in this order. */
  readonly parked: readonly number[];
  /** Sequences to release everything and wait, in this order. */
  readonly preempted: readonly number[];
  readonly admitted: readonly number[];
  readonly rows: readonly ScheduledRows[];
  /** Waiting sequences without room. */
  readonly blocked: readonly number[];
  /** The blocked sequences that a later one overtook in this step. */
  readonly overtaken: readonly number[];
  readonly isQuick: boolean;
}

/** A client, or its gateway, may pause for this long and then continue to read. */
const leastPatienceMs = 200;

/**
 * How long a sequence without credit keeps its place while others wait. Computing it again takes about as long as it
 * ran, so waiting that long before parking it costs at most twice the cheaper choice. And a client that reads one
 * message and stops holds a slot only briefly.
 */
export function patienceMs(
  { ranMs }: Pick<SchedulerSequence, 'ranMs'>,
  { parkAfterMs }: Pick<SchedulerLimits, 'parkAfterMs'>,
): number {
  return Math.min(parkAfterMs, Math.max(leastPatienceMs, ranMs));
}

/** Whether it may be parked for another sequence. */
export function isParkable(sequence: SchedulerSequence, limits: SchedulerLimits): boolean {
  return sequence.creditTokens === 0 && sequence.stalledMs >= patienceMs(sequence, limits);
}

/** Decides the next step. An empty plan means that nothing can run until credit or a request comes. */
export function planStep(state: SchedulerState, limits: SchedulerLimits): StepDecision {
  const { sequences } = state;
  const { prefillChunkTokens: chunk } = limits;
  const step = new Step(state, limits);
  const ready = sequences.filter(({ creditTokens }) => creditTokens > 0);
  for (const sequence of ready) {
    if (sequence.blocks > 0 && sequence.pendingTokens === 1) {
      step.give(sequence, 1, sequence.hasDraft);
    }
  }
  const unread = ready.filter(({ blocks, pendingTokens }) => blocks === 0 || pendingTokens > 1);
  const next = step.nextToAdmit;
  const short = state.afterQuick || next !== undefined ? [] : shortPrompts(unread, step, limits);
  const isQuick = short.length > 0 && short.length < unread.length;
  const prompts = isQuick ? short : unread;
  const give = (sequence: SchedulerSequence, most: number): boolean => {
    const rows = Math.min(sequence.pendingTokens, chunk, most, step.budget);
    return rows > 0 && step.give(sequence, rows, false);
  };
  const half = Math.ceil(step.budget / 2);
  const oldest = prompts.find((sequence) => give(sequence, half));
  if (next !== undefined && next !== oldest) {
    give(next, 1);
  }
  for (const sequence of prompts.toSorted((a, b) => a.pendingTokens - b.pendingTokens)) {
    if (sequence !== oldest && sequence !== next) {
      give(sequence, chunk);
    }
  }
  if (oldest !== undefined) {
    step.extend(oldest, Math.min(oldest.pendingTokens, chunk));
  }
  return step.decision(isQuick);
}

/** The short prompts that can run. The last chunk of a long prompt does not count as short. */
function shortPrompts(
  prompts: readonly SchedulerSequence[],
  step: Step,
  { prefillChunkTokens }: SchedulerLimits,
): readonly SchedulerSequence[] {
  return prompts.filter(
    (sequence) => sequence.kvTokens + sequence.pendingTokens <= prefillChunkTokens && step.canRun(sequence),
  );
}

/** A step under construction: the remaining rows and blocks, and the grants so far. */
class Step {
  budget: number;
  readonly #sequences: readonly SchedulerSequence[];
  /** Each sequence's position in the order of age. */
  readonly #ages: ReadonlyMap<SchedulerSequence, number>;
  readonly #limits: SchedulerLimits;
  readonly #rows = new Map<number, ScheduledRows>();
  readonly #parked = new Set<number>();
  readonly #preempted = new Set<number>();
  readonly #admitted = new Set<number>();
  /** Position of the oldest waiting sequence that has been overtaken often enough; later ones are not admitted. */
  readonly #lastAdmissible: number;
  #freeBlocks: number;
  #running: number;

  constructor({ sequences, freeBlocks }: SchedulerState, limits: SchedulerLimits) {
    this.#sequences = sequences;
    this.#ages = new Map(sequences.map((sequence, age) => [sequence, age]));
    this.#limits = limits;
    this.budget = limits.maxBatchTokens;
    this.#freeBlocks = freeBlocks;
    this.#running = sequences.filter(({ blocks }) => blocks > 0).length;
    const overtaken = sequences.findIndex(
      ({ blocks, creditTokens, overtakes }) => blocks === 0 && creditTokens > 0 && overtakes >= maxOvertakes,
    );
    this.#lastAdmissible = overtaken < 0 ? sequences.length : overtaken;
  }

  /** A sequence that has been overtaken often enough and now has room. */
  get nextToAdmit(): SchedulerSequence | undefined {
    const next = this.#sequences[this.#lastAdmissible];
    return next !== undefined && this.canRun(next) ? next : undefined;
  }

  /** Whether it runs, or could be admitted now. */
  canRun(sequence: SchedulerSequence): boolean {
    return sequence.blocks > 0 ? !this.#isGone(sequence) : this.#roomFor(sequence) !== undefined;
  }

  /** Grants it rows, and a slot and blocks as needed; false if they are not available. */
  give(sequence: SchedulerSequence, pendingRows: number, withDraft: boolean): boolean {
    const rows = pendingRows + (withDraft ? 1 : 0);
    if (this.#isGone(sequence) || this.budget < pendingRows) {
      return false;
    }
    const blocks = this.#blocksFor(sequence, rows);
    const more = Math.max(0, blocks - sequence.blocks);
    if (withDraft && (more > this.#freeBlocks || this.budget < rows)) {
      return this.give(sequence, pendingRows, false);
    }
    if (!(sequence.blocks > 0 ? this.#makeRoom(more, sequence) : this.#admit(sequence))) {
      return false;
    }
    this.#freeBlocks -= more;
    this.budget -= rows;
    const { sequenceId } = sequence;
    this.#rows.set(sequenceId, {
      sequenceId,
      pendingRows,
      withDraft,
      blocks: Math.max(blocks, sequence.blocks),
    });
    return true;
  }

  /** Grants a scheduled prompt as many more rows as it can use without new blocks, up to `mostRows` in total. */
  extend(sequence: SchedulerSequence, mostRows: number): void {
    const given = this.#rows.get(sequence.sequenceId);
    if (given === undefined) {
      return;
    }
    const more = Math.min(mostRows - given.pendingRows, this.budget);
    const pendingRows = given.pendingRows + more;
    if (more > 0 && this.#blocksFor(sequence, pendingRows) <= given.blocks) {
      this.#rows.set(sequence.sequenceId, { ...given, pendingRows });
      this.budget -= more;
    }
  }

  decision(isQuick: boolean): StepDecision {
    const waiting = this.#sequences.filter(
      ({ sequenceId, blocks }) => blocks === 0 && !this.#admitted.has(sequenceId),
    );
    const blocked = waiting.filter(
      (sequence) => sequence.creditTokens > 0 && this.#roomFor(sequence) === undefined,
    );
    const youngest = this.#sequences.findLastIndex(({ sequenceId }) => this.#admitted.has(sequenceId));
    // A waiting sequence without credit has no slot, but is not needed here either.
    const idle = waiting.filter((sequence) => isParkable(sequence, this.#limits));
    return {
      parked: [...this.#parked, ...idsOf(idle)],
      preempted: [...this.#preempted],
      admitted: [...this.#admitted],
      rows: [...this.#rows.values()],
      blocked: idsOf(blocked),
      overtaken: idsOf(blocked.filter((sequence) => this.#ageOf(sequence) < youngest)),
      isQuick,
    };
  }

  #isGone({ sequenceId }: SchedulerSequence): boolean {
    return this.#preempted.has(sequenceId) || this.#parked.has(sequenceId);
  }

  /** A waiting sequence needs blocks for all its tokens, so that it does not run out of them at once. */
  #blocksFor({ blocks, kvTokens, pendingTokens }: SchedulerSequence, rows: number): number {
    const positions = blocks === 0 ? pendingTokens + 1 : kvTokens + Math.max(minAttentionRows, rows);
    return blocksFor(positions, this.#limits.maxSequenceBlocks);
  }

  #admit(sequence: SchedulerSequence): boolean {
    const room = this.#roomFor(sequence);
    if (room === undefined) {
      return false;
    }
    for (const stalled of room) {
      this.#release(stalled);
      this.#parked.add(stalled.sequenceId);
    }
    this.#admitted.add(sequence.sequenceId);
    this.#running += 1;
    return true;
  }

  /** The sequences to park so that a waiting one can be admitted; undefined if it cannot. */
  #roomFor(sequence: SchedulerSequence): readonly SchedulerSequence[] | undefined {
    if (this.#preempted.size > 0 || this.#ageOf(sequence) > this.#lastAdmissible) {
      return undefined;
    }
    const wanted = this.#blocksFor(sequence, 1);
    const fits = (blocks: number, running: number): boolean =>
      blocks >= wanted && running < this.#limits.maxSequences;
    let blocks = this.#freeBlocks;
    let running = this.#running;
    if (fits(blocks, running)) {
      return [];
    }
    const room: SchedulerSequence[] = [];
    const stalled = this.#sequences
      .filter((other) => other.blocks > 0 && isParkable(other, this.#limits) && !this.#isGone(other))
      .toSorted((a, b) => b.stalledMs - a.stalledMs);
    for (const other of stalled) {
      room.push(other);
      blocks += other.blocks;
      running -= 1;
      if (fits(blocks, running)) {
        return room;
      }
    }
    return undefined;
  }

  #makeRoom(blocks: number, sequence: SchedulerSequence): boolean {
    while (this.#freeBlocks < blocks) {
      const victim = this.#admitted.size > 0 ? undefined : this.#findVictim(sequence);
      if (victim === undefined) {
        return false;
      }
      this.#release(victim);
      (victim.creditTokens === 0 ? this.#parked : this.#preempted).add(victim.sequenceId);
    }
    return true;
  }

  #findVictim(sequence: SchedulerSequence): SchedulerSequence | undefined {
    const holders = this.#sequences.filter(
      (other) => other !== sequence && other.blocks > 0 && !this.#isGone(other),
    );
    return (
      holders.findLast(({ creditTokens }) => creditTokens === 0) ??
      holders.findLast((other) => this.#ageOf(other) > this.#ageOf(sequence))
    );
  }

  #ageOf(sequence: SchedulerSequence): number {
    return this.#ages.get(sequence) ?? 0;
  }

  /** Takes back its blocks and slot, and its grants of this step. */
  #release(sequence: SchedulerSequence): void {
    const planned = this.#rows.get(sequence.sequenceId);
    if (planned !== undefined) {
      this.#rows.delete(sequence.sequenceId);
      this.budget += planned.pendingRows + (planned.withDraft ? 1 : 0);
    }
    this.#freeBlocks += planned?.blocks ?? sequence.blocks;
    this.#running -= 1;
  }
}

function idsOf(sequences: readonly SchedulerSequence[]): number[] {
  return sequences.map(({ sequenceId }) => sequenceId);
}

/** Positions in `blocks`. */
export function capacityTokens(blocks: number): number {
  return blocks * kvBlockTokens;
}
