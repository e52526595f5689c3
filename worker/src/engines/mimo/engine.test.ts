import assert from 'node:assert/strict';
import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { SequenceDelta, SequenceRequest, SequenceSampling } from './engine-api.ts';
import { Engine, type EngineLimits, type PassExecutor } from './engine.ts';
import { bestToken, chooseToken, type ChosenToken, type HeadRow } from './head-rows.ts';
import { kvBlockTokens } from './kv-cache.ts';
import { drawToken, keyedUniform } from './sampler.ts';
import type { PassPlan } from './step-plan.ts';

const vocabSize = 50;
const eosTokenId = 49;

const greedy: SequenceSampling = {
  temperature: 0,
  topP: 1,
  topK: 0,
  minP: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  seed: 7,
  stopTokenIds: [],
  maxTokens: 20,
  minTokens: 0,
  ignoreEos: false,
  logprobs: -1,
  draftTokens: 1,
};

const limits: EngineLimits = {
  maxSequences: 4,
  maxBatchTokens: 24,
  prefillChunkTokens: 16,
  kvBlocks: 8,
  maxContextTokens: 8 * kvBlockTokens,
  vocabSize,
  usableVocab: vocabSize,
  eosTokenIds: [eosTokenId],
  draftTokens: 1,
  draftCosts: [{ sequences: 4, share: 0 }],
  parkAfterMs: 2000,
};

/** The logits of a language model that is a hash of the whole prefix. */
function hashLogits(prefix: readonly number[]): Float32Array {
  const state = prefix.reduce((hash, id, i) => Math.imul(hash ^ (id + 31 * i), 0x9e3779b1) >>> 0, 17);
  // The end-of-text token is made rare, so that sequences have some length.
  return Float32Array.from(
    { length: vocabSize },
    (_, id) => 8 * keyedUniform(state, 0, id) - (id === eosTokenId ? 3 : 0),
  );
}

/**
 * That model behind the pass interface: it keeps what each slot's cache would hold, checks every span against it, and
 * drafts the right token about two times in three.
 */
class HashModel implements PassExecutor {
  readonly #slots = new Map<number, { backbone: number[]; mtp: number[] }>();
  #rows: { slot: number; position: number }[] = [];

  run(plan: PassPlan): readonly HeadRow[] {
    plan.releasedSlots.forEach((slot) => this.#slots.delete(slot));
    const rows: { slot: number; position: number }[] = [];
    const logits: Float32Array[] = [];
    for (const span of plan.spans) {
      const slot = this.#slots.get(span.slot) ?? { backbone: [], mtp: [] };
      this.#slots.set(span.slot, slot);
      const cache = plan.kind === 'forward' ? slot.backbone : slot.mtp;
      assert.ok(span.start <= cache.length, 'a span starts where the cache ends');
      assert.ok(span.start + Math.max(2, span.rows) <= span.capacityTokens);
      cache.length = span.start;
      for (let i = 0; i < span.rows; i++) {
        cache.push(plan.tokenIds[rows.length]!);
        if (plan.kind === 'draft') {
          const position = span.start + i;
          const hidden = this.#rows[span.hiddenRow + i];
          assert.deepEqual(hidden, { slot: span.slot, position }, 'a draft row follows its hidden state');
        }
        rows.push({ slot: span.slot, position: span.start + i });
      }
      if (plan.kind === 'forward' && slot.mtp.length > 0) {
        const ahead = slot.backbone.slice(1, span.start + 1);
        assert.deepEqual(slot.mtp, ahead, 'the MTP cache is as long, and one token ahead');
      }
      for (let i = span.rows - span.headRows; i < span.rows; i++) {
        const end = span.start + i + 1;
        logits.push(plan.kind === 'forward' ? hashLogits(cache.slice(0, end)) : this.#draft(slot, end));
      }
    }
    assert.equal(rows.length, plan.tokenIds.length);
    if (plan.kind === 'forward') {
      this.#rows = rows;
    }
    assert.equal(logits.length, plan.heads.length);
    return plan.heads.map((head, i) =>
      head.kind === 'sampled' ? chooseToken(logits[i]!, head.draw) : bestToken(logits[i]!),
    );
  }

  #draft(slot: { backbone: number[]; mtp: number[] }, slots: number): Float32Array {
    const guess = hashLogits([slot.backbone[0]!, ...slot.mtp.slice(0, slots)]);
    return keyedUniform(slots, slot.mtp[slots - 1]!, 3) < 0.66 ? guess : guess.map((value) => -value);
  }
}

/** The obviously correct version: one sequence, one token at a time, no cache. */
function generateAlone({ sampling, tokenIds: given, resumedTokens }: SequenceRequest): number[] {
  const tokenIds = [...given];
  const promptTokens = tokenIds.length - resumedTokens;
  const stopIds = [...(sampling.ignoreEos ? [] : [eosTokenId]), ...sampling.stopTokenIds];
  while (tokenIds.length - promptTokens < sampling.maxTokens && tokenIds.length < limits.maxContextTokens) {
    const seen = new Map(
      tokenIds.map((id) => [id, tokenIds.filter((other, i) => other === id && i >= promptTokens).length]),
    );
    const forbidden = tokenIds.length - promptTokens < sampling.minTokens ? stopIds : [];
    const { tokenId } = drawToken(hashLogits(tokenIds), {
      sampling,
      position: tokenIds.length,
      seen,
      forbidden,
    });
    if (stopIds.includes(tokenId)) {
      break;
    }
    tokenIds.push(tokenId);
  }
  return tokenIds.slice(promptTokens);
}

/** Steps until nothing can run; returns every delta. */
function runOut(engine: Engine, maxSteps = 5000): SequenceDelta[] {
  const deltas: SequenceDelta[] = [];
  for (let steps = 0; ; steps++) {
    expect(steps, 'the engine comes to rest').toBeLessThan(maxSteps);
    const frame = engine.step();
    engine.checkIntegrity();
    if (frame === undefined) {
      return deltas;
    }
    deltas.push(...frame.deltas);
  }
}

function completionOf(
  deltas: readonly SequenceDelta[],
  sequenceId: number,
  resumed: readonly number[] = [],
): number[] {
  const ids = [...resumed];
  for (const delta of deltas.filter((each) => each.sequenceId === sequenceId)) {
    expect(delta.index, 'indices are contiguous').toBe(ids.length);
    ids.push(...delta.tokenIds);
  }
  return ids;
}

function request(
  sequenceId: number,
  tokenIds: readonly number[],
  more: Partial<SequenceRequest> = {},
): SequenceRequest {
  return { sequenceId, tokenIds, resumedTokens: 0, sampling: greedy, creditTokens: Infinity, ...more };
}

const samplings = fc.record({
  temperature: fc.constantFrom(0, 0.6, 1.5),
  topP: fc.constantFrom(1, 0.9, 0.3),
  topK: fc.constantFrom(0, 1, 5),
  minP: fc.constantFrom(0, 0.1),
  repetitionPenalty: fc.constantFrom(1, 1.3),
  presencePenalty: fc.constantFrom(0, 0.5),
  frequencyPenalty: fc.constantFrom(0, 0.2),
  seed: fc.nat(),
  stopTokenIds: fc.constantFrom([], [3, 4]),
  maxTokens: fc.integer({ min: 1, max: 90 }),
  minTokens: fc.constantFrom(0, 5),
  ignoreEos: fc.boolean(),
  logprobs: fc.constant(-1),
  draftTokens: fc.constantFrom(0, 1),
});

const prompts = fc.array(fc.nat(vocabSize - 1), { minLength: 1, maxLength: 100 });

describe('Engine', () => {
  it('produces the tokens that each sequence would get alone: batched, chunked, preempted and speculated', () => {
    fc.assert(
      fc.property(
        fc.array(fc.record({ tokenIds: prompts, sampling: samplings }), { minLength: 1, maxLength: 8 }),
        fc.integer({ min: 3, max: 8 }),
        fc.constantFrom(0, 2, Infinity),
        (cases, kvBlocks, sequences) => {
          const maxContextTokens = kvBlocks * kvBlockTokens;
          const engine = new Engine(new HashModel(), {
            ...limits,
            kvBlocks,
            maxContextTokens,
            draftCosts: [{ sequences, share: 0 }],
          });
          const requests = cases.map(({ tokenIds, sampling }, id) => request(id, tokenIds, { sampling }));
          requests.forEach((each) => engine.submit(each));
          const deltas = runOut(engine);
          for (const each of requests) {
            const alone = generateAlone(each).slice(0, maxContextTokens - each.tokenIds.length);
            expect(completionOf(deltas, each.sequenceId)).toEqual(alone);
            expect(
              deltas.filter((d) => d.sequenceId === each.sequenceId && d.finish !== undefined),
            ).toHaveLength(1);
          }
          expect(engine.stats()).toMatchObject({ runningSequences: 0, waitingSequences: 0, kvBlocksUsed: 0 });
        },
      ),
      { numRuns: 150 },
    );
  });

  it('resumes a completion at any token as if it had never stopped', () => {
    fc.assert(
      fc.property(prompts, samplings, fc.nat(90), (tokenIds, sampling, cut) => {
        const whole = generateAlone(request(1, tokenIds, { sampling }));
        const resumed = whole.slice(0, Math.min(cut, whole.length));
        const engine = new Engine(new HashModel(), limits);
        engine.submit(request(1, [...tokenIds, ...resumed], { sampling, resumedTokens: resumed.length }));
        expect(completionOf(runOut(engine), 1, resumed)).toEqual(whole);
      }),
    );
  });

  it('frees everything at whatever step a sequence is aborted, and produces no more than its credit', () => {
    fc.assert(
      fc.property(
        fc.array(fc.record({ tokenIds: prompts, sampling: samplings, credit: fc.nat(12) }), {
          minLength: 1,
          maxLength: 8,
        }),
        fc.array(fc.record({ id: fc.nat(7), steps: fc.nat(6), credit: fc.nat(9) }), { maxLength: 12 }),
        (cases, events) => {
          const engine = new Engine(new HashModel(), {
            ...limits,
            kvBlocks: 4,
            maxContextTokens: 4 * kvBlockTokens,
          });
          const credit = new Map<number, number>();
          const produced = new Map<number, number>();
          const stepOnce = (): boolean => {
            const frame = engine.step();
            engine.checkIntegrity();
            for (const { sequenceId, tokenIds } of frame?.deltas ?? []) {
              produced.set(sequenceId, (produced.get(sequenceId) ?? 0) + tokenIds.length);
              expect(produced.get(sequenceId)).toBeLessThanOrEqual(credit.get(sequenceId)!);
            }
            return frame !== undefined;
          };
          for (const [id, { tokenIds, sampling, credit: creditTokens }] of cases.entries()) {
            credit.set(id, creditTokens);
            engine.submit(request(id, tokenIds, { sampling, creditTokens }));
          }
          for (const { id, steps, credit: more } of events) {
            for (let i = 0; i < steps; i++) {
              stepOnce();
            }
            if (more === 0) {
              engine.abort(id);
            } else {
              credit.set(id, (credit.get(id) ?? 0) + more);
              engine.addCredit(id, more);
            }
            engine.checkIntegrity();
          }
          for (let steps = 0; stepOnce(); steps++) {
            expect(steps).toBeLessThan(5000);
          }
          cases.forEach((_, id) => engine.abort(id));
          expect(engine.stats()).toMatchObject({ runningSequences: 0, waitingSequences: 0, kvBlocksUsed: 0 });
        },
      ),
      { numRuns: 150 },
    );
  });

  it('parks a sequence when others need its place, and produces the same tokens when it is submitted again', () => {
    let parks = 0;
    fc.assert(
      fc.property(
        fc.array(
          fc.record({ tokenIds: prompts, sampling: samplings, portion: fc.integer({ min: 1, max: 30 }) }),
          {
            minLength: 5,
            maxLength: 12,
          },
        ),
        fc.integer({ min: 3, max: 8 }),
        (cases, kvBlocks) => {
          let nowMs = 0;
          const maxContextTokens = kvBlocks * kvBlockTokens;
          const engine = new Engine(
            new HashModel(),
            { ...limits, kvBlocks, maxContextTokens },
            { clockMs: () => nowMs },
          );
          const completions = cases.map((): number[] => []);
          const left = new Set(cases.keys());
          const parksBefore = parks;
          const submit = (id: number): void => {
            const { tokenIds, sampling, portion } = cases[id]!;
            const said = completions[id]!;
            const resumed = { resumedTokens: said.length, creditTokens: portion };
            engine.submit(request(id, [...tokenIds, ...said], { sampling, ...resumed }));
          };
          left.forEach(submit);
          for (let rounds = 0; left.size > 0; rounds++) {
            expect(rounds).toBeLessThan(2000);
            const frame = engine.step();
            engine.checkIntegrity();
            for (const { sequenceId, index, tokenIds, finish } of frame?.deltas ?? []) {
              expect(index).toBe(completions[sequenceId]!.length);
              completions[sequenceId]!.push(...tokenIds);
              if (finish?.kind === 'parked') {
                parks += finish.reason === 'no credit' ? 1 : Number.NaN;
                submit(sequenceId);
              } else if (finish !== undefined) {
                left.delete(sequenceId);
              }
            }
            if (frame === undefined) {
              // No sequence has credit, or none has been without it for long enough. The remaining readers read.
              nowMs += limits.parkAfterMs;
              left.forEach((id) => engine.addCredit(id, rounds % 3 === 0 ? cases[id]!.portion : 0));
            }
          }
          for (const [id, { tokenIds, sampling }] of cases.entries()) {
            const alone = generateAlone(request(id, tokenIds, { sampling }));
            expect(completions[id]).toEqual(alone.slice(0, maxContextTokens - tokenIds.length));
          }
          expect(engine.stats()).toMatchObject({
            parkedSequences: parks - parksBefore,
            runningSequences: 0,
            kvBlocksUsed: 0,
          });
        },
      ),
      { numRuns: 100 },
    );
    expect(parks).toBeGreaterThan(100);
  });

  it('keeps a sequence without credit while no other waits, and reports when it can be parked', () => {
    let nowMs = 0;
    const engine = new Engine(new HashModel(), { ...limits, maxSequences: 1 }, { clockMs: () => nowMs });
    const endless = { sampling: { ...greedy, ignoreEos: true, maxTokens: 60 } };
    engine.submit(request(1, [1, 2, 3], { ...endless, creditTokens: 5 }));
    engine.step();
    nowMs += limits.parkAfterMs;
    runOut(engine);
    expect(engine.stats()).toMatchObject({ runningSequences: 1, parkableSequences: 0 });
    expect(engine.idleMs).toBe(limits.parkAfterMs);
    nowMs += limits.parkAfterMs - 1;
    engine.submit(request(2, [4], { ...endless, creditTokens: 5 }));
    expect(engine.step()).toMatchObject({ deltas: [], stats: { waitingSequences: 1, blockedSequences: 1 } });
    expect(engine.step()).toBeUndefined();
    expect(engine.idleMs).toBe(1);
    engine.abort(2);
    runOut(engine);
    nowMs += 1;
    expect(engine.step(), 'a frame that says so, once').toMatchObject({
      deltas: [],
      stats: { parkableSequences: 1 },
    });
    expect(engine.step()).toBeUndefined();
    expect(engine.idleMs).toBe(Infinity);
    engine.submit(request(3, [4], { ...endless, creditTokens: 5 }));
    expect(runOut(engine)).toContainEqual(
      expect.objectContaining({ sequenceId: 1, finish: expect.objectContaining({ kind: 'parked' }) }),
    );
    expect(engine.stats()).toMatchObject({ runningSequences: 1, parkableSequences: 0, parkedSequences: 1 });
  });

  it('counts drafts, and produces two tokens in a step where one was accepted', () => {
    const engine = new Engine(new HashModel(), limits);
    engine.submit(request(1, [1, 2, 3], { sampling: { ...greedy, maxTokens: 60, ignoreEos: true } }));
    const deltas = runOut(engine);
    const { draftedTokens, acceptedTokens, steps } = engine.stats();
    expect(acceptedTokens).toBeGreaterThan(0);
    expect(acceptedTokens).toBeLessThan(draftedTokens);
    expect(steps).toBe(60 - acceptedTokens);
    expect(deltas.at(-1)?.finish).toEqual({
      kind: 'length',
      completionTokens: 60,
      draftedTokens,
      acceptedTokens,
    });
    expect(deltas.filter(({ tokenIds }) => tokenIds.length === 2)).toHaveLength(acceptedTokens);
  });

  it('counts every right draft, including one that ends the sequence', () => {
    const truth = generateAlone(
      request(1, [1, 2, 3], { sampling: { ...greedy, maxTokens: 60, ignoreEos: true } }),
    );
    let endedByDraft = 0;
    for (const stopTokenId of truth) {
      const right: boolean[] = [];
      const model = new HashModel();
      const run = (plan: PassPlan): readonly HeadRow[] => {
        const best = model.run(plan);
        if (plan.kind === 'draft' && plan.spans[0]!.headRows > 0) {
          const { start, rows } = plan.spans[0]!;
          // Slot s drafts the token at position s + 2; the prompt has three.
          right.push((best[0] as ChosenToken).tokenId === truth[start + rows - 1 + 2 - 3]);
        }
        return best;
      };
      const engine = new Engine({ run }, limits);
      const sampling = { ...greedy, maxTokens: 60, ignoreEos: true, stopTokenIds: [stopTokenId] };
      engine.submit(request(1, [1, 2, 3], { sampling }));
      const deltas = runOut(engine);
      const completion = deltas.flatMap(({ tokenIds }) => tokenIds);
      expect(completion).toEqual(truth.slice(0, truth.indexOf(stopTokenId)));
      expect(engine.stats()).toMatchObject({
        draftedTokens: right.length,
        acceptedTokens: right.filter(Boolean).length,
      });
      endedByDraft += right.at(-1) === true && deltas.at(-1)?.tokenIds.length === 0 ? 1 : 0;
    }
    expect(endedByDraft).toBeGreaterThan(0);
  });

  it('does not touch the MTP layer for a sequence that does not draft', () => {
    const kinds: string[] = [];
    const model = new HashModel();
    const engine = new Engine({ run: (plan) => (kinds.push(plan.kind), model.run(plan)) }, limits);
    engine.submit(request(1, [1, 2, 3], { sampling: { ...greedy, draftTokens: 0 } }));
    runOut(engine);
    expect(new Set(kinds)).toEqual(new Set(['forward']));
  });

  it.each<[string, Partial<SequenceRequest>, RegExp]>([
    ['an empty prompt', { tokenIds: [] }, /prompt must have at least 1 token, has 0/],
    ['a prompt that is all resumed', { resumedTokens: 3 }, /prompt must have at least 1 token, has 0/],
    [
      'a negative count of resumed tokens',
      { resumedTokens: -1 },
      /resumedTokens: must be an integer from 0, is -1/,
    ],
    ['an id out of the vocabulary', { tokenIds: [1, 50] }, /tokenIds\[1\]: must be in \[0, 50\), is 50/],
    ['a fraction as id', { tokenIds: [0.5] }, /tokenIds\[0\]: must be in/],
    [
      'a prompt over the context',
      { tokenIds: Array.from({ length: 512 }, () => 1) },
      /context of 512 tokens, are 512/,
    ],
    [
      'a negative temperature',
      { sampling: { ...greedy, temperature: -1 } },
      /temperature: must be 0 or a number from 0.000001 to 2, not -1/,
    ],
    [
      'temperature NaN',
      { sampling: { ...greedy, temperature: NaN } },
      /temperature: must be 0 or a number from 0.000001 to 2, not NaN/,
    ],
    [
      'top_p zero',
      { sampling: { ...greedy, topP: 0 } },
      /topP: must be a number above 0 and at most 1, not 0/,
    ],
    [
      'a negative top_k',
      { sampling: { ...greedy, topK: -1 } },
      /topK: must be a whole number from 0 to 4294967295, not -1/,
    ],
    [
      'no tokens to produce',
      { sampling: { ...greedy, maxTokens: 0 } },
      /maxTokens: must be a whole number from 1 to 4294967295, not 0/,
    ],
    [
      'too many logprobs',
      { sampling: { ...greedy, logprobs: 21 } },
      /logprobs: must be a whole number from 0 to 20, not 21/,
    ],
    ['negative credit', { creditTokens: -1 }, /creditTokens: must be at least 0, is -1/],
  ])('ends %s with invalid_argument and goes on', (_, wrong, message) => {
    const engine = new Engine(new HashModel(), limits);
    engine.submit(request(1, [1, 2, 3], wrong));
    engine.submit(request(2, [1, 2, 3]));
    const deltas = runOut(engine);
    expect(deltas.find(({ sequenceId }) => sequenceId === 1)?.finish).toMatchObject({
      kind: 'error',
      code: 'invalid_argument',
      message: expect.stringMatching(message),
    });
    expect(completionOf(deltas, 2)).toEqual(generateAlone(request(2, [1, 2, 3])));
  });

  it('ends a sequence that was complete when resumed with length, and reports an abort once', () => {
    const engine = new Engine(new HashModel(), limits);
    engine.submit(request(1, [1, 2, 3, 4], { resumedTokens: 2, sampling: { ...greedy, maxTokens: 2 } }));
    engine.submit(request(2, [1, 2, 3]));
    engine.abort(2);
    engine.abort(2);
    const finishes = runOut(engine).map(({ sequenceId, finish }) => [sequenceId, finish?.kind]);
    expect(finishes).toEqual([
      [1, 'length'],
      [2, 'aborted'],
    ]);
  });

  it.each<[ChosenToken, string]>([
    [
      { tokenId: 0, logit: NaN },
      'the model computed NaN as the logit of token 0: its weights or its kernels are damaged',
    ],
    [{ tokenId: 7, logit: Infinity }, 'the model computed Infinity as the logit of token 7'],
    [{ tokenId: 0, logit: -Infinity }, 'every token is masked: all logits are -Infinity'],
    [{ tokenId: NaN, logit: 1 }, 'token NaN was chosen, but only 50 tokens exist'],
    [{ tokenId: 50, logit: 1 }, 'token 50 was chosen, but only 50 tokens exist'],
  ])('ends a sequence that gets %j with the cause, and only that one', (chosen, problem) => {
    const model = new HashModel();
    const executor = {
      run: (plan: PassPlan): readonly HeadRow[] => {
        const [first, ...others] = model.run(plan);
        return plan.tokenIds[0] === 13 ? [chosen, ...others] : [first!, ...others];
      },
    };
    const engine = new Engine(executor, limits);
    engine.submit(request(1, [13]));
    engine.submit(request(2, [1, 2, 3]));
    const deltas = runOut(engine);
    const { message, ...finish } = deltas[0]!.finish as { message: string };
    expect(finish).toMatchObject({ kind: 'error', code: 'data_loss' });
    expect(message).toContain(`no token at position 1: ${problem}`);
    expect(completionOf(deltas, 2)).toEqual(generateAlone(request(2, [1, 2, 3])));
  });

  it('accepts no draft from an MTP layer that computes none, and writes the same text', () => {
    const model = new HashModel();
    const executor = {
      run: (plan: PassPlan): readonly HeadRow[] =>
        plan.kind === 'draft' ? model.run(plan).map(() => ({ tokenId: NaN, logit: NaN })) : model.run(plan),
    };
    const engine = new Engine(executor, limits);
    const asked = request(1, [1, 2, 3], { sampling: { ...greedy, draftTokens: 1 } });
    engine.submit(asked);
    const deltas = runOut(engine);
    expect(completionOf(deltas, 1)).toEqual(generateAlone(asked));
    expect(deltas.at(-1)?.finish?.draftedTokens).toBe(0);
  });

  it('requests only the best token of a row that needs nothing more, whatever the other rows request', () => {
    const model = new HashModel();
    const asked: string[] = [];
    const run = (plan: PassPlan): readonly HeadRow[] => {
      asked.push(`${plan.kind} ${plan.heads.map(({ kind }) => kind).join()}`);
      return model.run(plan);
    };
    const engine = new Engine({ run }, limits);
    const sampling = { ...greedy, draftTokens: 0, maxTokens: 2, ignoreEos: true };
    engine.submit(request(1, [1, 2, 3], { sampling }));
    engine.submit(request(2, [1, 2, 3], { sampling: { ...sampling, logprobs: 2 } }));
    engine.submit(request(3, [1, 2, 3], { sampling: { ...sampling, minTokens: 2, stopTokenIds: [3] } }));
    engine.submit(request(4, [1, 2, 3], { sampling: { ...sampling, temperature: 1 } }));
    runOut(engine);
    expect(new Set(asked)).toEqual(new Set(['forward best,sampled,sampled,sampled']));
  });
});
