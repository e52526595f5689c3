// How fast the engine decodes and reads prompts: a random model of half a billion parameters, batch 1 and 8, one rank
// with two threads and two ranks with one, speculation off, on, and with drafts that are made right.
//
//   npm run bench -- engine [--precision int8] [--tokens 24] [--prompt 256] [--directory DIR]
//   npm run bench -- engine --model mimo-7b --tokens 8 --prompt 32     the full size: minutes, 30 GB of disk, 15 GB of memory
//
// Random weights accept no drafts, so "speculation on" shows its cost. The synthetic mode knows the completion from a run
// without speculation and overwrites the draft logits with it for a share of the drafts; everything else is computed.
// Times are medians over steps, which forgives a machine that others use too; CPU milliseconds forgive more.

import { mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, cpus, tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { ClusterError } from '@mimo/core/errors';
import { Engine, type PassExecutor } from '@mimo/worker/engine/engine';
import { kvBlockTokens } from '@mimo/worker/engine/kv-cache';
import type { PassPlan } from '@mimo/worker/engine/step-plan';
import { compile } from '@mimo/worker/model/compile';
import type { ModelConfig } from '@mimo/worker/model/model-config';
import { mimo7b, writeRandomCheckpoint } from '@mimo/worker/model/random-checkpoint';
import type { Precision } from '@mimo/worker/model/shard';
import { openLocalGroup, testLimits, type LocalGroup } from '../harness/local-group.ts';
import { greedySampling } from '../harness/greedy-sampling.ts';

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

/** MiMo's layer accepts about this share of drafts on mathematics (reference mimo-architecture.md §3.7). */
const syntheticAcceptance = 0.85;
const prefillChunkTokens = 64;

type Speculation = 'off' | 'on' | 'synthetic';

interface Run {
  readonly group: LocalGroup;
  readonly batch: number;
  readonly promptTokens: number;
  readonly tokens: number;
  readonly speculation: Speculation;
  /** The completion without speculation; needed by `synthetic`. */
  readonly known: readonly number[];
}

interface Measured {
  readonly decodePerSecond: number;
  readonly prefillPerSecond: number;
  readonly stepMs: number;
  /** Of all ranks and threads, per decoded token. */
  readonly cpuMsPerToken: number;
  readonly acceptedRatio: number;
  readonly completion: readonly number[];
}

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
          let known: readonly number[] = [];
          for (const speculation of ['off', 'on', 'synthetic'] as const) {
            signal.throwIfAborted();
            const measured = measure({ group, batch, promptTokens, tokens, speculation, known });
            const { completion, ...figures } = measured;
            known = speculation === 'off' ? completion : known;
            results.push({ tensorParallel, batch, speculation, ...figures });
            printRow({ tensorParallel, batch, speculation }, measured);
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
  measured: Measured,
): void {
  const { decodePerSecond, prefillPerSecond, stepMs, cpuMsPerToken, acceptedRatio } = measured;
  process.stdout.write(
    `TP=${of.tensorParallel} batch ${of.batch} speculation ${of.speculation.padEnd(9)} ` +
      `decode ${decodePerSecond.toFixed(1).padStart(6)} tok/s  step ${stepMs.toFixed(1).padStart(6)} ms  ` +
      `${cpuMsPerToken.toFixed(1).padStart(6)} cpu-ms/tok  ` +
      `prefill ${prefillPerSecond.toFixed(0).padStart(5)} tok/s  accepted ${acceptedRatio.toFixed(2)}\n`,
  );
}

/** `batch` sequences of one prompt: all chunks of prefill, then greedy decoding. */
function measure({ group, batch, promptTokens, tokens, speculation, known }: Run): Measured {
  const executor = speculation === 'synthetic' ? withKnownDrafts(group, { promptTokens, known }) : group;
  const engine = new Engine(
    executor,
    testLimits(group.manifest, {
      maxSequences: batch,
      maxBatchTokens: 2 * prefillChunkTokens,
      prefillChunkTokens,
      kvBlocks: 256,
      maxContextTokens: 32 * kvBlockTokens,
    }),
  );
  const sampling = greedySampling({ maxTokens: tokens, draftTokens: speculation === 'off' ? 0 : 1 });
  const tokenIds = Array.from(
    { length: promptTokens },
    (_, i) => (i * 7919) % group.manifest.config.vocabSize,
  );
  for (let sequenceId = 0; sequenceId < batch; sequenceId++) {
    // With credit for one token all sequences wait for the last to be read, and then decode together.
    engine.submit({ sequenceId, tokenIds, resumedTokens: 0, sampling, creditTokens: 1 });
  }
  const completion: number[] = [];
  const prefillMs: number[] = [];
  const decodeMs: number[] = [];
  let decoded = 0;
  let decodeCpuMs = 0;
  for (;;) {
    const promptBefore = engine.stats().promptTokens;
    const startedMs = performance.now();
    const startedCpuMs = cpuMs();
    const frame = engine.step();
    const elapsedMs = performance.now() - startedMs;
    if (frame === undefined) {
      if (completion.length > 1) {
        break;
      }
      for (let sequenceId = 0; sequenceId < batch; sequenceId++) {
        engine.addCredit(sequenceId, Infinity);
      }
      continue;
    }
    const promptRows = frame.stats.promptTokens - promptBefore;
    const produced = frame.deltas.reduce((sum, delta) => sum + delta.tokenIds.length, 0);
    if (promptRows > 0) {
      prefillMs.push(elapsedMs / promptRows);
    } else if (frame.stats.runningSequences === batch) {
      decodeMs.push(elapsedMs);
      decodeCpuMs += cpuMs() - startedCpuMs;
      decoded += produced;
    }
    completion.push(
      ...frame.deltas.filter(({ sequenceId }) => sequenceId === 0).flatMap((delta) => delta.tokenIds),
    );
  }
  const { draftedTokens, acceptedTokens } = engine.stats();
  const stepMs = median(decodeMs);
  return {
    decodePerSecond: (1000 * decoded) / decodeMs.length / stepMs,
    prefillPerSecond: 1000 / median(prefillMs),
    stepMs,
    cpuMsPerToken: decodeCpuMs / decoded,
    acceptedRatio: draftedTokens === 0 ? 0 : acceptedTokens / draftedTokens,
    completion,
  };
}

/** Draft logits that name the known next token, but for a share that names another one. */
function withKnownDrafts(
  group: LocalGroup,
  { promptTokens, known }: { readonly promptTokens: number; readonly known: readonly number[] },
): PassExecutor {
  const { vocabSize } = group.manifest.config;
  let drafts = 0;
  return {
    run: (plan: PassPlan): Float32Array => {
      const logits = group.run(plan);
      if (plan.kind === 'draft') {
        let row = 0;
        for (const span of plan.spans.filter(({ headRows }) => headRows > 0)) {
          const next = known[span.start + span.rows + 1 - promptTokens] ?? 0;
          const isRight = (drafts * syntheticAcceptance) % 1 < syntheticAcceptance;
          logits[row * vocabSize + (isRight ? next : (next + 1) % vocabSize)] = Infinity;
          row += 1;
          drafts += 1;
        }
      }
      return logits;
    },
  };
}

function cpuMs(): number {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
}

function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? NaN;
}
