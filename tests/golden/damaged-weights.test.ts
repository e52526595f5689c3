// Shards with a NaN, as a failing disk leaves them: the sequence that reads it ends with the cause. The sequences
// beside it, and later ones in its slot and KV blocks, return the same tokens as alone.

import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import type { SequenceDelta, SequenceSampling } from '@mimo/worker/engines/mimo/engine-api';
import { Engine } from '@mimo/worker/engines/mimo/engine';
import { afterAll, describe, expect, it } from 'vitest';

import { greedySampling } from '../harness/greedy-sampling.ts';
import { openLocalGroup, testLimits, type LocalGroup } from '../harness/local-group.ts';
import { CompiledFixtures, readExpectedIds } from './fixture.ts';

const name = 'quantised';
const { promptIds } = readExpectedIds(name);
/** The last one, which is never drawn: prompts alone can hold it. */
const damagedId = 130;
const usableVocab = damagedId;
const hiddenSize = 32;

const fixtures = new CompiledFixtures();
afterAll(() => fixtures.remove());

/** Every rank holds the whole embedding, in bfloat16. */
function damage(directory: string): void {
  const path = join(directory, 'embedding.bin');
  const bytes = readFileSync(path);
  const row = damagedId * hiddenSize * 2;
  bytes.fill(Buffer.from(Uint16Array.of(0x7fc0).buffer), row, row + hiddenSize * 2);
  writeFileSync(path, bytes);
}

/** All that the engine reports of prompts that run together. */
function complete(
  group: LocalGroup,
  prompts: readonly (readonly number[])[],
  sampling: SequenceSampling,
): readonly SequenceDelta[] {
  // Two slots, so that a waiting sequence takes over the slot of the first one to end.
  const engine = new Engine(group, testLimits(group.manifest, { maxSequences: 2, usableVocab }));
  for (const [sequenceId, tokenIds] of prompts.entries()) {
    engine.submit({ sequenceId, tokenIds, resumedTokens: 0, sampling, creditTokens: Infinity });
  }
  const deltas: SequenceDelta[] = [];
  for (let frame = engine.step(); frame !== undefined; frame = engine.step()) {
    engine.checkIntegrity();
    deltas.push(...frame.deltas);
  }
  return deltas;
}

function tokensOf(deltas: readonly SequenceDelta[], sequenceId: number): number[] {
  return deltas.filter((delta) => delta.sequenceId === sequenceId).flatMap(({ tokenIds }) => tokenIds);
}

describe.each([
  ['fp32', 1],
  ['fp32', 2],
  ['int8', 1],
  ['int8', 2],
  ['int4', 1],
] as const)('a NaN in the weights, %s on %i ranks', (precision, tensorParallel) => {
  it.each<[string, Partial<SequenceSampling>]>([
    ['greedy', {}],
    ['sampled', { temperature: 2, topP: 0.95 }],
    ['with log-probabilities and drafts', { temperature: 0.6, logprobs: 5, draftTokens: 1 }],
  ])('ends the sequence that reads it, and harms no other: %s', async (_, changes) => {
    const directories = await fixtures.compile(name, { precision, tensorParallel });
    directories.forEach(damage);
    const group = await openLocalGroup({ directories, implementation: 'ort-capi', usableVocab });
    try {
      const sampling = greedySampling({ ...changes, maxTokens: 40 });
      const undisturbed = complete(group, [promptIds], sampling);
      expect(undisturbed.at(-1)?.finish?.kind).toBe('length');
      const alone = tokensOf(undisturbed, 0);
      const poisoned = [...promptIds.slice(0, 10), damagedId];
      const deltas = complete(group, [promptIds, poisoned, promptIds, promptIds], sampling);
      const finish = deltas.findLast(({ sequenceId }) => sequenceId === 1)?.finish;
      expect(finish).toMatchObject({ kind: 'error', code: 'data_loss' });
      expect(JSON.stringify(finish)).toContain('no token at position 11: the model computed NaN');
      expect([0, 2, 3].map((sequenceId) => tokensOf(deltas, sequenceId))).toEqual([alone, alone, alone]);
    } finally {
      await group.close();
    }
  });
});
