// The leader's step: decide, run the backbone, choose tokens, verify drafts, run the MTP layer, report. Owns the
// sequences and the KV bookkeeping; everything here is synchronous. Knows no thread, no session and no other rank:
// passes go through a PassExecutor (step-thread.ts over the group, or a model of the test's own).
//
// Speculation with one draft token, written so that no hidden state is carried from step to step:
// after the tokens of a step are chosen, the next token of every surviving row is known: for a prompt row the next
// prompt token, for the last row the chosen one. So the MTP layer runs for exactly the surviving rows in the same
// step; slot s pairs the hidden state of row s with token s+1, and the MTP cache is as long as the backbone's. A
// draft is accepted iff the token drawn for its row equals it, so text with and without speculation is the same. A
// rejected draft's row is undone by not counting it: the next step overwrites its keys and values.

import { ClusterError } from '@mimo/core/process/errors';
import {
  lastDelta,
  type EngineFrame,
  type EngineStats,
  type ParkReason,
  type SequenceDelta,
  type SequenceEnd,
  type SequenceRequest,
} from './engine-api.ts';
import { problemOf, type ChosenToken, type HeadRow } from './head-rows.ts';
import { type DraftCost, DraftPolicy } from './draft-policy.ts';
import { kvBlockTokens, KvCache } from './kv-cache.ts';
import {
  capacityTokens,
  isParkable,
  patienceMs,
  planStep,
  type SchedulerLimits,
  type SchedulerSequence,
} from './scheduler.ts';
import { Sequence, validateRequest, type SequenceLimits } from './sequence.ts';
import { planDraft, planForward, spanOf, type StepRows } from './step-passes.ts';
import type { PassPlan } from './step-plan.ts';

/** Runs a pass over the group. Returns the requested output of each head row, valid until the next pass. */
export interface PassExecutor {
  run(plan: PassPlan): readonly HeadRow[];
}

export interface EngineLimits {
  readonly maxSequences: number;
  readonly maxBatchTokens: number;
  readonly prefillChunkTokens: number;
  readonly kvBlocks: number;
  /** Longest prompt and completion together. */
  readonly maxContextTokens: number;
  readonly vocabSize: number;
  /** Ids at or above are never drawn. */
  readonly usableVocab: number;
  readonly eosTokenIds: readonly number[];
  /** 0 where the model has no MTP layer. */
  readonly draftTokens: number;
  /** The costs that a draft must outweigh (draft-policy.ts). */
  readonly draftCosts: readonly DraftCost[];
  /** A sequence without credit for this long may be parked to free its slot and KV blocks for others. */
  readonly parkAfterMs: number;
}

/** The engine's planner and clock; tests and benches replace them. */
export interface EngineParts {
  readonly plan: typeof planStep;
  /** Milliseconds that only grow. */
  readonly clockMs: () => number;
}

/** The step loop's state. Call `step` until it returns undefined. */
export class Engine {
  readonly #executor: PassExecutor;
  readonly #limits: EngineLimits;
  readonly #schedulerLimits: SchedulerLimits;
  readonly #sequenceLimits: SequenceLimits;
  readonly #kv: KvCache;
  readonly #drafts: DraftPolicy;
  readonly #plan: typeof planStep;
  readonly #clockMs: () => number;
  /** Live sequences by id, in order of arrival: the oldest first. */
  readonly #sequences = new Map<number, Sequence>();
  /** Slots to release with the next pass. */
  #releasedSlots: number[] = [];
  /** Last deltas of sequences that ended between steps: rejected, aborted or parked. */
  #ended: SequenceDelta[] = [];
  #afterQuick = false;
  #blockedSequences = 0;
  #parkableSequences = 0;
  #counters = {
    steps: 0,
    promptTokens: 0,
    completionTokens: 0,
    draftedTokens: 0,
    acceptedTokens: 0,
    parkedSequences: 0,
  };

  constructor(executor: PassExecutor, limits: EngineLimits, parts: Partial<EngineParts> = {}) {
    this.#executor = executor;
    this.#limits = limits;
    this.#plan = parts.plan ?? planStep;
    this.#clockMs = parts.clockMs ?? (() => performance.now());
    this.#sequenceLimits = limits;
    this.#schedulerLimits = {
      maxSequences: limits.maxSequences,
      maxBatchTokens: limits.maxBatchTokens,
      prefillChunkTokens: limits.prefillChunkTokens,
      maxSequenceBlocks: Math.ceil(limits.maxContextTokens / kvBlockTokens),
      parkAfterMs: limits.parkAfterMs,
    };
    this.#drafts = new DraftPolicy(limits.draftCosts);
    this.#kv = new KvCache({ blocks: limits.kvBlocks, slots: limits.maxSequences });
  }

  /** Queues a sequence. One that cannot run ends with an `error` delta in the next step. */
  submit(request: SequenceRequest): void {
    try {
      if (this.#sequences.has(request.sequenceId)) {
        throw new ClusterError('invalid_argument', `sequenceId: ${request.sequenceId} is live`);
      }
      validateRequest(request, this.#sequenceLimits);
    } catch (error) {
      const { code, message } = ClusterError.from(error);
      const completionTokens = Math.max(0, Math.trunc(request.resumedTokens) || 0);
      this.#ended.push(lastDelta(request.sequenceId, completionTokens, { kind: 'error', code, message }));
      return;
    }
    const sequence = new Sequence(request, this.#sequenceLimits);
    if (sequence.end === undefined) {
      this.#sequences.set(sequence.id, sequence);
    } else {
      this.#ended.push(sequence.takeDelta()!);
    }
  }

  /** Frees the sequence; its `aborted` delta comes with the next step. */
  abort(sequenceId: number): void {
    this.#endOutside(sequenceId, { kind: 'aborted' });
  }

  /**
   * Releases the sequence's slot and KV blocks: it leaves the engine with a `parked` delta in the next step. Submitted
   * again with its tokens, it continues with the same text, because a choice depends only on them and the seed.
   */
  park(sequenceId: number, reason: ParkReason): void {
    if (this.#endOutside(sequenceId, { kind: 'parked', reason })) {
      this.#counters.parkedSequences += 1;
    }
  }

  addCredit(sequenceId: number, tokens: number): void {
    const sequence = this.#sequences.get(sequenceId);
    if (sequence !== undefined && tokens > 0) {
      sequence.creditTokens += tokens;
    }
  }

  /**
   * Runs one step of every runnable sequence, and reports it together with the sequences that ended since the last
   * step; undefined when nothing ran or ended and no count of blocked or parkable sequences changed. Throws the
   * executor's errors: the group is then lost.
   */
  step(): EngineFrame | undefined {
    const before = { parkable: this.#parkableSequences, blocked: this.#blockedSequences };
    const rows = this.#schedule();
    const isSame = this.#parkableSequences === before.parkable && this.#blockedSequences === before.blocked;
    if (rows.length === 0 && this.#ended.length === 0 && isSame) {
      return undefined;
    }
    if (rows.length > 0) {
      this.#counters.steps += 1;
      const chosen = this.#runPass(planForward(rows, this.#takeReleasedSlots()));
      const { draftedTokens, acceptedTokens } = this.#counters;
      const surviving = this.#takeTokens(rows, chosen);
      this.#drafts.observe({
        drafted: this.#counters.draftedTokens - draftedTokens,
        right: this.#counters.acceptedTokens - acceptedTokens,
      });
      this.#makeDrafts(rows, surviving);
    }
    const deltas = [...this.#ended];
    this.#ended = [];
    for (const { sequence } of rows) {
      const delta = sequence.takeDelta();
      if (delta !== undefined) {
        deltas.push(delta);
        this.#counters.completionTokens += delta.tokenIds.length;
      }
      if (sequence.end !== undefined) {
        this.#free(sequence);
      }
    }
    return { step: this.#counters.steps, deltas, stats: this.stats() };
  }

  stats(): EngineStats {
    return {
      ...this.#counters,
      runningSequences: this.#kv.holders,
      waitingSequences: this.#sequences.size - this.#kv.holders,
      blockedSequences: this.#blockedSequences,
      parkableSequences: this.#parkableSequences,
      kvBlocks: this.#kv.totalBlocks,
      kvBlocksUsed: this.#kv.usedBlocks,
    };
  }

  /** Throws `internal` if bookkeeping and sequences disagree. Tests call it after each step. */
  checkIntegrity(): void {
    this.#kv.checkIntegrity();
    for (const sequence of this.#sequences.values()) {
      const blocks = this.#kv.grantOf(sequence.id)?.blocks ?? 0;
      if (sequence.end !== undefined) {
        throw new ClusterError(
          'internal',
          `sequence ${sequence.id}: live after its end ${sequence.end.kind}`,
        );
      }
      if (sequence.kvTokens > capacityTokens(blocks) || sequence.pendingTokens < 1) {
        throw new ClusterError(
          'internal',
          `sequence ${sequence.id}: ${sequence.kvTokens} of ${sequence.tokenIds.length} tokens in ${blocks} blocks`,
        );
      }
    }
    const holders = [...this.#sequences.keys()].filter((id) => this.#kv.grantOf(id) !== undefined);
    if (holders.length !== this.#kv.holders) {
      throw new ClusterError(
        'internal',
        `${this.#kv.holders} hold KV blocks, ${holders.length} of them live`,
      );
    }
  }

  /**
   * Milliseconds until the next sequence without credit may be parked; Infinity if all have credit.
   */
  get idleMs(): number {
    const nowMs = this.#clockMs();
    const waits = [...this.#sequences.values()]
      .filter(({ creditTokens }) => creditTokens === 0)
      .map((sequence) => this.#view(sequence, nowMs))
      .map((view) => patienceMs(view, this.#schedulerLimits) - view.stalledMs);
    return Math.min(Infinity, ...waits.filter((waitMs) => waitMs > 0));
  }

  #schedule(): StepRows[] {
    const nowMs = this.#clockMs();
    const sequences = Array.from(this.#sequences.values(), (sequence) => this.#view(sequence, nowMs));
    const { freeBlocks } = this.#kv;
    const afterQuick = this.#afterQuick;
    const decision = this.#plan({ sequences, freeBlocks, afterQuick }, this.#schedulerLimits);
    this.#afterQuick = decision.isQuick;
    this.#blockedSequences = decision.blocked.length;
    this.#parkableSequences = sequences.filter(
      (each) =>
        each.blocks > 0 &&
        isParkable(each, this.#schedulerLimits) &&
        !decision.parked.includes(each.sequenceId),
    ).length;
    for (const id of decision.parked) {
      this.park(id, 'no credit');
    }
    for (const id of decision.preempted) {
      this.#preempt(this.#sequences.get(id)!);
    }
    for (const id of decision.overtaken) {
      this.#sequences.get(id)!.overtakes += 1;
    }
    for (const id of decision.admitted) {
      const sequence = this.#sequences.get(id)!;
      sequence.overtakes = 0;
      sequence.admittedMs = nowMs;
    }
    let firstRow = 0;
    return decision.rows.map((scheduled) => {
      const sequence = this.#sequences.get(scheduled.sequenceId)!;
      const { slot, blocks } = this.#kv.grant(sequence.id, scheduled.blocks);
      const span = spanOf(sequence, scheduled, { slot, capacityTokens: capacityTokens(blocks) });
      const stepRows = { sequence, scheduled, span, firstRow };
      firstRow += span.rows;
      return stepRows;
    });
  }

  #view(sequence: Sequence, nowMs: number): SchedulerSequence {
    return {
      sequenceId: sequence.id,
      pendingTokens: sequence.pendingTokens,
      kvTokens: sequence.kvTokens,
      blocks: this.#kv.grantOf(sequence.id)?.blocks ?? 0,
      creditTokens: sequence.creditTokens,
      stalledMs: sequence.stalledMs(nowMs),
      ranMs: sequence.ranMs(nowMs),
      overtakes: sequence.overtakes,
      hasDraft: sequence.draft >= 0,
    };
  }

  /** The tokens of all head rows; the engine requests nothing else. */
  #runPass(plan: PassPlan): readonly ChosenToken[] {
    return this.#executor.run(plan).map((row) => {
      if (row instanceof Float32Array) {
        throw new ClusterError('internal', 'a pass returned logits instead of a token');
      }
      return row;
    });
  }

  /** Applies the tokens of all head rows; returns the number of rows of each sequence that stay in the cache. */
  #takeTokens(rows: readonly StepRows[], chosen: readonly ChosenToken[]): number[] {
    let headRow = 0;
    return rows.map(({ sequence, scheduled, span }) => {
      const firstHeadRow = headRow;
      headRow += span.headRows;
      const computedBefore = Math.min(sequence.promptTokens, span.start);
      let survivors = scheduled.pendingRows;
      if (span.headRows > 0) {
        this.#takeToken(sequence, chosen[firstHeadRow]!);
      }
      if (scheduled.withDraft) {
        sequence.draftedTokens += 1;
        this.#counters.draftedTokens += 1;
        if (chosen[firstHeadRow]!.tokenId === sequence.draft) {
          sequence.acceptedTokens += 1;
          this.#counters.acceptedTokens += 1;
          // A right draft may be the token that ends the sequence.
          if (sequence.end === undefined) {
            survivors += 1;
            this.#takeToken(sequence, chosen[firstHeadRow + 1]!);
          }
        }
      }
      sequence.draft = -1;
      sequence.kvTokens += survivors;
      this.#counters.promptTokens += Math.min(sequence.promptTokens, sequence.kvTokens) - computedBefore;
      return survivors;
    });
  }

  /** Appends the token, or ends the sequence if the logits were not finite. */
  #takeToken(sequence: Sequence, chosen: ChosenToken): void {
    const problem = problemOf(chosen, this.#limits.usableVocab);
    if (problem === undefined) {
      sequence.append(chosen);
    } else {
      const message = `no token at position ${sequence.tokenIds.length}: ${problem}`;
      sequence.end = { kind: 'error', code: 'data_loss', message };
    }
  }

  /** The MTP pass over the surviving rows of the sequences that draft; stores each one's next draft. */
  #makeDrafts(rows: readonly StepRows[], surviving: readonly number[]): void {
    const drafting = rows
      .map((row, i) => ({ ...row, survivors: surviving[i]! }))
      .filter(
        ({ sequence }) => this.#limits.draftTokens > 0 && sequence.drafts && sequence.end === undefined,
      );
    if (drafting.length === 0) {
      return;
    }
    const decoding = [...this.#sequences.values()].filter(
      ({ id, pendingTokens }) => pendingTokens === 1 && this.#kv.grantOf(id) !== undefined,
    );
    const plan = planDraft(drafting, this.#drafts.pays(decoding.length));
    const guesses = this.#runPass(plan);
    let headRow = 0;
    for (const [i, { sequence }] of drafting.entries()) {
      if (plan.spans[i]!.headRows > 0) {
        const guess = guesses[headRow++]!;
        sequence.draft = problemOf(guess, this.#limits.usableVocab) === undefined ? guess.tokenId : -1;
      }
    }
  }

  #endOutside(sequenceId: number, end: SequenceEnd): boolean {
    const sequence = this.#sequences.get(sequenceId);
    if (sequence === undefined) {
      return false;
    }
    sequence.end = end;
    this.#ended.push(sequence.takeDelta()!);
    this.#free(sequence);
    return true;
  }

  #preempt(sequence: Sequence): void {
    this.#releaseKv(sequence);
    sequence.kvTokens = 0;
    sequence.admittedMs = undefined;
  }

  #free(sequence: Sequence): void {
    this.#releaseKv(sequence);
    this.#sequences.delete(sequence.id);
  }

  #releaseKv(sequence: Sequence): void {
    const slot = this.#kv.release(sequence.id);
    if (slot !== undefined) {
      this.#releasedSlots.push(slot);
    }
  }

  #takeReleasedSlots(): number[] {
    const slots = this.#releasedSlots;
    this.#releasedSlots = [];
    return slots;
  }
}
