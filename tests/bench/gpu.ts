// What a CUDA device gives: the golden fixtures' logits in fp16 and bf16, then a full-size random MiMo-7B, compiled here:
// decode at batch 1, 8 and 32, verifying a draft, prefill, as milliseconds of a pass and share of the bandwidth limit.
//
//   npm run bench -- gpu --library /path/libonnxruntime.so.1.30.0 [--directory DIR] [--precision bf16] [--bandwidth 3.35e12]
//
// Needs the CUDA provider beside the library and CUDA's own libraries on the library path (docs/gpu.md). A pass is the
// engine's: token ids in, float logits on the host out; sampling is not in it.

import { mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { ClusterError } from '@mimo/core/errors';
import type { PassPlan, RowSpan } from '@mimo/worker/engine/step-plan';
import { compile } from '@mimo/worker/model/compile';
import { mimo7b, writeRandomCheckpoint } from '@mimo/worker/model/random-checkpoint';
import type { Precision } from '@mimo/worker/model/shard';
import {
  CompiledFixtures,
  fixtureNames,
  readExpectedIds,
  readExpectedMatrix,
  relativeError,
} from '../golden/fixture.ts';
import { openLocalGroup, promptLogits, type LocalGroup } from '../harness/local-group.ts';

const contextTokens = 512;
const repetitions = 20;
const maxRows = 512;

/** What a pass computes: `batch` sequences of `rows` rows each, after `past` positions. */
interface Load {
  readonly batch: number;
  readonly rows: number;
  readonly past: number;
}

/** Prints JSON lines, the last with everything. The signal ends it; what it wrote is removed in any case. */
export async function run(args: readonly string[], signal: AbortSignal): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: {
      library: { type: 'string' },
      directory: { type: 'string', default: tmpdir() },
      precision: { type: 'string', default: 'bf16' },
      /** `golden`, `model` or both. */
      part: { type: 'string', default: 'both' },
      /** Bytes a second of the device's memory; default: an H100 SXM's by its data sheet. */
      bandwidth: { type: 'string', default: '3.35e12' },
    },
  });
  if (values.library === undefined) {
    throw new ClusterError('invalid_argument', '--library: must name libonnxruntime, is missing');
  }
  const device = { executionProvider: 'cuda', libraryPath: values.library } as const;
  const results: Record<string, unknown>[] = [];
  const report = (result: Record<string, unknown>): void => {
    results.push(result);
    process.stdout.write(`${JSON.stringify(result)}\n`);
  };
  if (values.part !== 'model') {
    await compareFixtures(device, report);
  }
  if (values.part === 'golden') {
    return;
  }
  const directory = await mkdtemp(join(values.directory, 'mimo-bench-gpu-'));
  try {
    let startedMs = performance.now();
    await writeRandomCheckpoint({ directory, config: mimo7b, seed: 1, files: 4 }, signal);
    report({ step: 'checkpoint', seconds: (performance.now() - startedMs) / 1000 });
    startedMs = performance.now();
    const { rankDirectories } = await compile(
      {
        modelDirectory: directory,
        outDirectory: join(directory, 'shards'),
        precision: values.precision as Precision,
        tensorParallel: 1,
        maxPositions: 8192,
        threads: Math.min(8, availableParallelism()),
      },
      signal,
    );
    report({ step: 'compile', seconds: (performance.now() - startedMs) / 1000 });
    startedMs = performance.now();
    const group = await openLocalGroup({
      directories: rankDirectories,
      implementation: 'ort-capi',
      device,
      maxRows,
      maxHeadRows: 64,
      kvBlocks: 1024,
    });
    report({ step: 'load', seconds: (performance.now() - startedMs) / 1000 });
    try {
      measureAll(group, Number(values.bandwidth), report);
    } finally {
      await group.close();
    }
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
  process.stdout.write(`${JSON.stringify({ bench: 'gpu', precision: values.precision, results })}\n`);
}

type Report = (result: Record<string, unknown>) => void;

/** The relative error of the logits, whole prompts and in chunks beside another. */
async function compareFixtures(
  device: { readonly executionProvider: 'cuda'; readonly libraryPath: string },
  report: Report,
): Promise<void> {
  const fixtures = new CompiledFixtures();
  try {
    for (const precision of ['fp16', 'bf16'] as const) {
      for (const name of fixtureNames) {
        const directories = await fixtures.compile(name, { precision, tensorParallel: 1 });
        const group = await openLocalGroup({ directories, implementation: 'ort-capi', device });
        const { promptIds } = readExpectedIds(name);
        const errors = [promptIds.length, 7, 1].map((chunkTokens) => {
          const [, second] = promptLogits(group, [promptIds.toReversed(), promptIds], chunkTokens);
          const backbone = relativeError(second!.backbone, readExpectedMatrix(name, 'logits'));
          const hasMtp = group.manifest.config.mtpLayers > 0;
          return Math.max(
            backbone,
            hasMtp ? relativeError(second!.mtp, readExpectedMatrix(name, 'mtp_logits')) : 0,
          );
        });
        report({ step: 'golden', precision, name, relativeErrors: errors });
        await group.close();
      }
    }
  } finally {
    fixtures.remove();
  }
}

function measureAll(group: LocalGroup, bandwidth: number, report: Report): void {
  const { hiddenSize, queryHeads, kvHeads, headDim, intermediateSize, vocabSize, layers } = mimo7b;
  const layerWeights =
    hiddenSize * (2 * queryHeads + 2 * kvHeads) * headDim + 3 * hiddenSize * intermediateSize;
  const weightBytes = 2 * (layers * layerWeights + vocabSize * hiddenSize);
  const rowKvBytes = 2 * 2 * layers * kvHeads * headDim;
  for (const batch of [1, 2, 8, 32]) {
    const ms = measure(group, { batch, rows: 1, past: contextTokens });
    const limitMs = ((weightBytes + batch * contextTokens * rowKvBytes) / bandwidth) * 1000;
    report({
      step: 'decode',
      batch,
      contextTokens,
      ms,
      tokensPerSecond: (1000 * batch) / ms,
      limitRatio: limitMs / ms,
    });
  }
  report({ step: 'verify', rows: 2, ms: measure(group, { batch: 1, rows: 2, past: contextTokens }) });
  for (const promptTokens of [512, 4096]) {
    const ms = Array.from({ length: promptTokens / maxRows }, (_, chunk) =>
      measure(group, { batch: 1, rows: maxRows, past: chunk * maxRows }, 5),
    ).reduce((sum, chunkMs) => sum + chunkMs, 0);
    report({
      step: 'prefill',
      promptTokens,
      chunkTokens: maxRows,
      ms,
      tokensPerSecond: (1000 * promptTokens) / ms,
    });
  }
}

/** Median milliseconds of a pass, after two of warm-up. */
function measure(group: LocalGroup, { batch, rows, past }: Load, times = repetitions): number {
  const spans = Array.from({ length: batch }, (_, slot): RowSpan => ({
    slot,
    start: past,
    rows,
    headRows: rows <= 2 ? rows : 1,
    hiddenRow: 0,
    capacityTokens: past + rows <= 1024 ? 1024 : 8192,
  }));
  const tokenIds = Int32Array.from({ length: batch * rows }, (_, i) => (i * 7919) % mimo7b.vocabSize);
  const plan: PassPlan = { kind: 'forward', releasedSlots: [], spans, tokenIds };
  const elapsed: number[] = [];
  for (let i = 0; i < times + 2; i++) {
    const startedMs = performance.now();
    group.run(plan);
    elapsed.push(performance.now() - startedMs);
  }
  return elapsed.slice(2).toSorted((a, b) => a - b)[times >> 1]!;
}
