import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import * as path from 'node:path';
import { afterAll, expect, it } from 'vitest';
import { createRuntime } from '../../runtime/create-runtime.ts';
import { ShardRunner } from './shard-runner.ts';
import { createSingleRankCollective } from '../../collective/collective.ts';
import { compile } from '../../compiler/compile.ts';
import { mimo7b, writeRandomCheckpoint } from '../../compiler/random-checkpoint.ts';
import { readShardManifest } from '../../shards/shard.ts';

const directory = mkdtempSync(path.join(tmpdir(), 'mimo-attention-'));
afterAll(() => rmSync(directory, { recursive: true, force: true }));

it('rejects a bf16 shard when the provider has no bfloat16 kernels, naming both', async () => {
  const config = {
    ...mimo7b,
    hiddenSize: 64,
    layers: 1,
    queryHeads: 4,
    kvHeads: 2,
    headDim: 16,
    intermediateSize: 96,
    vocabSize: 128,
    maxPositions: 64,
    bosTokenId: 1,
    eosTokenIds: [2],
  };
  const signal = AbortSignal.timeout(30_000);
  await writeRandomCheckpoint({ directory, config, seed: 1 }, signal);
  const { rankDirectories } = await compile(
    {
      modelDirectory: directory,
      outDirectory: path.join(directory, 'shards'),
      precision: 'bf16',
      tensorParallel: 1,
      threads: 1,
    },
    signal,
  );
  const [shard] = rankDirectories as [string];
  const runtime = await createRuntime({
    implementation: 'ort-capi',
    executionProvider: 'cpu',
    intraOpThreads: 1,
  });
  const manifest = await readShardManifest(shard);
  expect(manifest.segments.find(({ name }) => name === 'attention.paged')?.inputs).toEqual([
    'qkv',
    'keys',
    'values',
    'starts',
    'past',
    'table',
    'bounds',
  ]);
  expect(
    () => new ShardRunner({ runtime, directory: shard, manifest, collective: createSingleRankCollective() }),
  ).toThrow(/precision bf16 computes in bfloat16; this runtime computes in float or float16/);
  runtime.close();
});
