// How fast the engine decodes and reads prompts: a random model of half a billion parameters, batch 1 and 8, one rank
// with two threads and two ranks with one, speculation off, on, and with drafts that are made right.
//
//   npm run bench -- engine [--precision int8] [--tokens 24] [--prompt 256] [--directory DIR]
//   npm run bench -- engine --model mimo-7b --tokens 8 --prompt 32     the full size: minutes, 30 GB of disk, 15 GB of memory
//
// Random weights accept no drafts, so "speculation on" shows its cost; the synthetic mode makes a share of them right.
// Times are medians over steps, which forgives a machine that others use too; CPU milliseconds forgive more.

import { mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, cpus, tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { ClusterError } from '@mimo/core/process/errors';
import { compile } from '@mimo/worker/compiler/compile';
import type { ModelConfig } from '@mimo/worker/shards/model-config';
import { mimo7b, writeRandomCheckpoint } from '@mimo/worker/compiler/random-checkpoint';
import type { Precision } from '@mimo/worker/shards/target-profile';
import { openLocalGroup } from '../harness/local-group.ts';
import { measureEngine, type EngineFigures, type Speculation } from './engine-run.ts';

/** MiMo's proportions at 0.54 B parameters. */
const half: ModelConfig = {
  hiddenSize: 2048,
  layers: 8,
  queryHeads: 16,
  kvHeads: 4,
  headDim: 128,
  intermediateSize: 5504,
  vocabSize: 32_000,
  mtpLayers: 1,
  rmsNormEps: 1e-5,
  ropeTheta: 640_000,
  maxPositions: 4096,
  tiedHead: false,
  bosTokenId: null,
  eosTokenIds: [],
};

/** What may be measured. The batches of the full size keep its run within minutes. */
const models = {
  half: { config: half, parameters: 0.54e9, ranks: [1, 2], batches: [1, 8] },
  'mimo-7b': { config: mimo7b, parameters: 7.83e9, ranks: [2], batches: [1] },
} as const;

/** MiMo's layer accepts about this share of drafts on mathematics (arXiv 2509.18362, table 1). */
const syntheticAcceptance = 0.85;
const prefillChunkTokens = 64;

/** Prints a table and, last, one JSON line. The signal ends it; what it wrote is removed in any case. */
export async function run(args: readonly string[], signal: AbortSignal): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: {
      precision: { type: 'string', default: 'int8' },
      model: { type: 'string', default: 'half' },
      tokens: { type: 'string', default: '24' },
      prompt: { type: 'string', default: '256' },
      directory: { type: 'string', default: tmpdir() },
    },
  });
  const precision = values.precision as Precision;
  const tokens = Number(values.tokens);
  const promptTokens = Number(values.prompt);
  if (!Number.isInteger(tokens) || tokens < 4 || !Number.isInteger(promptTokens) || promptTokens < 1) {
    throw new ClusterError(
      'invalid_argument',
      `--tokens: from 4, --prompt: from 1, are ${tokens} and ${promptTokens}`,
    );
  }
  const chosen = models[values.model as keyof typeof models];
  if (chosen === undefined) {
    throw new ClusterError(
      'invalid_argument',
      `--model must be one of ${Object.keys(models).join(', ')}, is ${values.model}`,
    );
  }
  const directory = await mkdtemp(join(values.directory, 'mimo-bench-engine-'));
  const results: Record<string, unknown>[] = [];
  try {
    await writeRandomCheckpoint({ directory, config: chosen.config, seed: 1 }, signal);
    for (const tensorParallel of chosen.ranks) {
      const outDirectory = join(directory, `tp-${tensorParallel}`);
      const { rankDirectories } = await compile(
        { modelDirectory: directory, outDirectory, precision, tensorParallel },
        signal,
      );
      const group = await openLocalGroup({
        directories: rankDirectories,
        implementation: 'ort-capi',
        threads: tensorParallel === 1 ? 2 : 1,
        maxRows: 2 * prefillChunkTokens,
        kvBlocks: 256,
      });
      try {
        for (const batch of chosen.batches) {
          for (const speculation of ['off', 'on', 'synthetic'] as const) {
            signal.throwIfAborted();
            const figures = measureEngine({
              group,
              batch,
              promptTokens,
              tokens,
              prefillChunkTokens,
              kvBlocks: 256,
              speculation,
              acceptance: syntheticAcceptance,
            });
            results.push({ tensorParallel, batch, speculation, ...figures });
            printRow({ tensorParallel, batch, speculation }, figures);
          }
        }
      } finally {
        await group.close();
      }
    }
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
  const machine = { cores: availableParallelism(), cpu: cpus()[0]?.model };
  const summary = {
    bench: 'engine',
    model: values.model,
    parameters: chosen.parameters,
    precision,
    promptTokens,
    tokens,
    results,
    ...machine,
  };
  process.stdout.write(`${JSON.stringify(summary)}\n`);
}

function printRow(
  of: { tensorParallel: number; batch: number; speculation: Speculation },
  measured: EngineFigures,
): void {
  const { decodePerSecond, prefillPerSecond, stepMs, cpuMsPerToken, acceptedRatio } = measured;
  process.stdout.write(
    `TP=${of.tensorParallel} batch ${of.batch} speculation ${of.speculation.padEnd(9)} ` +
      `decode ${decodePerSecond.toFixed(1).padStart(6)} tok/s  step ${stepMs.toFixed(1).padStart(6)} ms  ` +
      `${cpuMsPerToken.toFixed(1).padStart(6)} cpu-ms/tok  ` +
      `prefill ${prefillPerSecond.toFixed(0).padStart(5)} tok/s  accepted ${acceptedRatio.toFixed(2)}\n`,
  );
}
