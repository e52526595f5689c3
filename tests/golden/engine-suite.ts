// The engine against the oracle, for one runtime implementation; run by one test file per implementation, because
// ONNX Runtime's environment is one per process. Owns the comparisons and their tolerances.

import { afterAll, describe, expect, it } from 'vitest';
import type { SequenceRequest, SequenceSampling } from '@mimo/worker/engines/mimo/engine-api';
import { Engine, type EngineLimits } from '@mimo/worker/engines/mimo/engine';
import { bestToken, chooseToken, type HeadRequest, type HeadRow } from '@mimo/worker/engines/mimo/head-rows';
import { kvBlockTokens } from '@mimo/worker/engines/mimo/kv-cache';
import type { RuntimeImplementation } from '@mimo/worker/runtime/runtime';
import {
  CompiledFixtures,
  fixtureNames,
  readExpectedIds,
  readExpectedMatrix,
  relativeError,
  type FixtureName,
} from './fixture.ts';
import { openLocalGroup, promptLogits, testLimits, type LocalGroup } from '../harness/local-group.ts';
import { greedySampling } from '../harness/greedy-sampling.ts';

/** float32 on both sides, sums in another order. */
const floatTolerance = 1e-4;
/** Weights, activations, keys and values rounded to 11 bits. */
const halfTolerance = 1e-2;

const greedy = greedySampling({ maxTokens: 256 });

const sampled: SequenceSampling = { ...greedy, temperature: 0.6, topP: 0.95, maxTokens: 64 };

type CompileChoice = Parameters<CompiledFixtures['compile']>[1];

/** Runs requests to their end, checking the bookkeeping after each step; completions by request. */
function complete(
  group: LocalGroup,
  requests: readonly Partial<SequenceRequest>[],
  limits: Partial<EngineLimits> = {},
): { completions: number[][]; engine: Engine } {
  const engine = new Engine(group, testLimits(group.manifest, limits));
  const completions: number[][] = requests.map(() => []);
  for (const [sequenceId, request] of requests.entries()) {
    const defaults = { sequenceId, tokenIds: [], resumedTokens: 0, sampling: greedy, creditTokens: Infinity };
    engine.submit({ ...defaults, ...request });
  }
  for (let frame = engine.step(); frame !== undefined; frame = engine.step()) {
    engine.checkIntegrity();
    for (const { sequenceId, tokenIds, finish } of frame.deltas) {
      completions[sequenceId]!.push(...tokenIds);
      expect(finish?.kind).not.toBe('error');
    }
  }
  expect(engine.stats()).toMatchObject({ runningSequences: 0, waitingSequences: 0, kvBlocksUsed: 0 });
  return { completions, engine };
}

/** A pass over the prompt's first rows, one for each request; the answers in memory of their own. */
function askHeads(
  group: LocalGroup,
  promptIds: readonly number[],
  heads: readonly HeadRequest[],
): readonly HeadRow[] {
  const rows = heads.length;
  const span = { slot: 0, start: 0, rows, headRows: rows, hiddenRow: 0, capacityTokens: 64 };
  const tokenIds = Int32Array.from(promptIds.slice(0, rows));
  const answers = group.run({ kind: 'forward', heads, releasedSlots: [], spans: [span], tokenIds });
  return answers.map((row) => structuredClone(row));
}

/** Declares the suite. */
export function describeEngine(implementation: RuntimeImplementation): void {
  const fixtures = new CompiledFixtures();
  afterAll(() => fixtures.remove());

  const withGroup = async (
    name: FixtureName,
    choice: CompileChoice,
    use: (group: LocalGroup) => void,
    options: { readonly usableVocab?: number } = {},
  ): Promise<void> => {
    const directories = await fixtures.compile(name, choice);
    const group = await openLocalGroup({ directories, implementation, ...options });
    try {
      use(group);
    } finally {
      await group.close();
    }
  };

  const worlds = fixtureNames.flatMap((name) =>
    readExpectedIds(name).tensorParallel.map((tensorParallel) => ({ name, tensorParallel })),
  );

  const draftingWorlds = worlds.filter(({ name }) => name !== 'four-to-one-no-mtp');

  it.each(draftingWorlds)(
    'computes the draft logits of the oracle at every slot: $name over $tensorParallel ranks, fp32',
    ({ name, tensorParallel }) =>
      withGroup(name, { precision: 'fp32', tensorParallel }, (group) => {
        const { promptIds } = readExpectedIds(name);
        for (const chunkTokens of [promptIds.length, 7, 1]) {
          const [, second] = promptLogits(group, [promptIds.slice(3), promptIds], chunkTokens);
          expect(relativeError(second!.mtp, readExpectedMatrix(name, 'mtp_logits'))).toBeLessThan(
            floatTolerance,
          );
        }
      }),
  );

  describe.each(worlds)('$name over $tensorParallel ranks, fp32', ({ name, tensorParallel }) => {
    const choice = { precision: 'fp32', tensorParallel } as const;
    const { promptIds, greedyIds } = readExpectedIds(name);

    it("computes the oracle's logits at every position: whole, chunked, one by one, and beside another prompt", () =>
      withGroup(name, choice, (group) => {
        const expected = readExpectedMatrix(name, 'logits');
        for (const chunkTokens of [promptIds.length, 7, 1]) {
          const [alone] = promptLogits(group, [promptIds], chunkTokens);
          expect(relativeError(alone!.backbone, expected)).toBeLessThan(floatTolerance);
          const [, second] = promptLogits(group, [promptIds.toReversed(), promptIds], chunkTokens);
          expect(relativeError(second!.backbone, expected)).toBeLessThan(floatTolerance);
        }
      }));

    it('continues greedily as the oracle does over 256 tokens, with and without speculation, batched and alone', () =>
      withGroup(name, choice, (group) => {
        for (const draftTokens of [0, 1]) {
          const request = { tokenIds: promptIds, sampling: { ...greedy, draftTokens } };
          expect(complete(group, [request]).completions).toEqual([greedyIds]);
          const others = [1, 2, 3].map((from) => ({ tokenIds: promptIds.slice(from), sampling: sampled }));
          expect(complete(group, [...others, request]).completions[3]).toEqual(greedyIds);
        }
      }));

    it('returns for each head row what it requested, whatever the others request, and never a padding id', () => {
      const usableVocab = 40;
      return withGroup(
        name,
        choice,
        (group) => {
          const draw = { sampling: { ...sampled, temperature: 2, topP: 1 }, seen: new Map(), forbidden: [] };
          const requests: readonly HeadRequest[] = [
            { kind: 'best' },
            { kind: 'logits' },
            { kind: 'sampled', draw: { ...draw, position: 3 } },
            { kind: 'best' },
            { kind: 'sampled', draw: { ...draw, position: 5 } },
            { kind: 'sampled', draw: { ...draw, position: 6 } },
          ];
          const logits = askHeads(
            group,
            promptIds,
            requests.map(() => ({ kind: 'logits' })),
          ) as Float32Array[];
          expect(logits[0]).toHaveLength(group.manifest.config.vocabSize);
          const wanted = requests.map((request, row) => {
            const usable = logits[row]!.slice(0, usableVocab);
            return request.kind === 'logits'
              ? logits[row]!
              : request.kind === 'best'
                ? bestToken(usable)
                : chooseToken(usable, request.draw);
          });
          expect(askHeads(group, promptIds, requests)).toEqual(wanted);
        },
        { usableVocab },
      );
    });

    it('samples the same with and without speculation, preempted or not, resumed or not', () =>
      withGroup(name, choice, (group) => {
        const requests = [1, 2, 3, 4, 5].map((seed) => ({
          tokenIds: promptIds.slice(seed),
          sampling: { ...sampled, seed, draftTokens: 0 },
        }));
        const { completions: alone } = complete(group, requests, { maxSequences: 1 });
        const drafting = requests.map(({ tokenIds, sampling }) => {
          const withDrafts: SequenceSampling = { ...sampling, draftTokens: 1 };
          return { tokenIds, sampling: withDrafts };
        });
        expect(complete(group, drafting).completions).toEqual(alone);
        // Room for three of five: their second block is taken from the youngest.
        const scarce = { kvBlocks: 3, maxContextTokens: 3 * kvBlockTokens };
        expect(complete(group, drafting, scarce).completions).toEqual(alone);
        const resumed = drafting.map(({ tokenIds, sampling }, i) => ({
          tokenIds: [...tokenIds, ...alone[i]!.slice(0, 10 * i)],
          resumedTokens: Math.min(10 * i, alone[i]!.length),
          sampling,
        }));
        expect(complete(group, resumed).completions).toEqual(alone.map((ids, i) => ids.slice(10 * i)));
      }));
  });

  it('follows the oracle of either wiring of the MTP layer', async () => {
    const { promptIds } = readExpectedIds('one-to-one');
    for (const [mtpHidden, tensor] of [
      ['pre-norm', 'mtp_logits'],
      ['post-norm', 'mtp_logits_post_norm'],
    ] as const) {
      await withGroup('one-to-one', { precision: 'fp32', tensorParallel: 1, mtpHidden }, (group) => {
        const [logits] = promptLogits(group, [promptIds], 16);
        expect(relativeError(logits!.mtp, readExpectedMatrix('one-to-one', tensor))).toBeLessThan(
          floatTolerance,
        );
      });
    }
  });

  it.each(implementation === 'ort-capi' ? worlds : [])(
    'computes the logits of the oracle for $name over $tensorParallel ranks in fp16, within its rounding',
    ({ name, tensorParallel }) =>
      withGroup(name, { precision: 'fp16', tensorParallel }, (group) => {
        const { promptIds } = readExpectedIds(name);
        for (const chunkTokens of [promptIds.length, 7, 1]) {
          const [, second] = promptLogits(group, [promptIds.toReversed(), promptIds], chunkTokens);
          expect(relativeError(second!.backbone, readExpectedMatrix(name, 'logits'))).toBeLessThan(
            halfTolerance,
          );
          const mtpError =
            group.manifest.config.mtpLayers > 0
              ? relativeError(second!.mtp, readExpectedMatrix(name, 'mtp_logits'))
              : 0;
          expect(mtpError).toBeLessThan(halfTolerance);
        }
      }),
  );

  describe.each(['int8', 'int4'] as const)('%s', (precision) => {
    const { promptIds } = readExpectedIds('quantised');

    it.each([1, 2, 4])(
      'computes the logits of the dequantised oracle over %i ranks in floats',
      (tensorParallel) =>
        withGroup('quantised', { precision, tensorParallel, accuracyLevel: 0 }, (group) => {
          for (const chunkTokens of [promptIds.length, 5, 1]) {
            const [logits] = promptLogits(group, [promptIds], chunkTokens);
            const backbone = readExpectedMatrix('quantised', `logits_${precision}`);
            const mtp = readExpectedMatrix('quantised', `mtp_logits_${precision}`);
            expect(relativeError(logits!.backbone, backbone)).toBeLessThan(floatTolerance);
            expect(relativeError(logits!.mtp, mtp)).toBeLessThan(floatTolerance);
          }
        }),
    );

    it('stays near that oracle with integer arithmetic', ({ annotate }) =>
      withGroup('quantised', { precision, tensorParallel: 1 }, (group) => {
        const [logits] = promptLogits(group, [promptIds], promptIds.length);
        const oracle = readExpectedMatrix('quantised', `logits_${precision}`);
        const drift = relativeError(logits!.backbone, oracle);
        const fromFloat = relativeError(logits!.backbone, readExpectedMatrix('quantised', 'logits'));
        void annotate(
          `relative drift: ${drift.toFixed(4)} from dequantised, ${fromFloat.toFixed(4)} from fp32`,
        );
        // 32-wide rows of a random model: activations rounded to 8 bits have few terms to average over.
        expect(drift).toBeLessThan(0.1);
      }));
  });

  // Matrix products of one row are another kernel than those of more on some processors, except with int8.
  it.each([
    ['int8', 1],
    ['int4', 2],
    ['fp32', 2],
  ] as const)('gives %s the same bits whatever the batch, from %i rows', (precision, leastRows) =>
    withGroup('quantised', { precision, tensorParallel: 2 }, (group) => {
      const { promptIds } = readExpectedIds('quantised');
      const [reference] = promptLogits(group, [promptIds], leastRows);
      for (const chunkTokens of [2, 3, 8, promptIds.length]) {
        const [, chunked] = promptLogits(group, [promptIds.toReversed(), promptIds], chunkTokens);
        expect(chunked!.backbone).toEqual(reference!.backbone);
        expect(chunked!.mtp).toEqual(reference!.mtp);
      }
    }),
  );

  it('returns the same int8 tokens alone, batched and speculated', () =>
    withGroup('quantised', { precision: 'int8', tensorParallel: 2 }, (group) => {
      const { promptIds } = readExpectedIds('quantised');
      const requests = [0, 3, 6, 9].map((from) => ({ tokenIds: promptIds.slice(from) }));
      const plain = { ...greedy, draftTokens: 0 };
      const alone = requests.map(
        (request) => complete(group, [{ ...request, sampling: plain }]).completions[0],
      );
      expect(complete(group, requests).completions).toEqual(alone);
    }));
}
