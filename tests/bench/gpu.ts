// Results on GPUs: the golden fixtures' logits in fp16 and bf16, then a full-size random MiMo-7B, compiled here:
// decode at batch 1, 8 and 32, prefill, the engine's steps with and without drafts, on one device and over several, as
// milliseconds of a pass and share of the bandwidth limit; and the same work through PyTorch transformers.
//
//   npm run bench -- gpu --library /path/libonnxruntime.so.1.30.0 [--ranks 1,2] [--peer transformers|vllm] [--python python3]
//                        [--part draws,attention,golden,host,streams,sampling,long,model,beside] [--directory DIR]
//                        [--precision bf16] [--bandwidth 3.35e12]
//   npm run bench -- gpu --provider webgpu --precision fp16
//
// CUDA needs its provider beside the library and its own libraries on the library path (docs/lab/gpu.md). A pass is the
// engine's: token ids in, the best token of each row out, or its logits; an engine step is everything but the network.

import { spawn } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { ClusterError } from '@mimo/core/process/errors';
import { startEngine, type EngineOptions } from '@mimo/worker/engines/mimo/engine-host';
import type { HeadRequest } from '@mimo/worker/engines/mimo/head-rows';
import { kvBlockTokens } from '@mimo/worker/engines/mimo/kv-cache';
import type { PassPlan, RowSpan } from '@mimo/worker/engines/mimo/step-plan';
import { compile } from '@mimo/worker/compiler/compile';
import type { ModelConfig } from '@mimo/worker/shards/model-config';
import { mimo7b, writeRandomCheckpoint } from '@mimo/worker/compiler/random-checkpoint';
import type { Precision } from '@mimo/worker/shards/target-profile';
import type { OwnKernel } from '@mimo/worker/runtime/kernel';
import {
  CompiledFixtures,
  fixtureNames,
  readExpectedIds,
  readExpectedMatrix,
  relativeError,
} from '../golden/fixture.ts';
import { openLocalGroup, promptLogits, type LocalGroup } from '../harness/local-group.ts';
import { openProcessGroup } from '../harness/process-group.ts';
import { greedySampling } from '../harness/greedy-sampling.ts';
import { measureEngine, median } from './engine-run.ts';
import { besideGoal, measureBeside } from './gpu-beside.ts';
import { compareDraws } from './gpu-draws.ts';

const contextTokens = 512;
const repetitions = 20;
const maxRows = 512;
const maxHeadRows = 512;
const longLoads = [
  [512, [1, 32, 256]],
  [8064, [1, 8, 32]],
  [32_256, [1, 8]],
] as const;
const kvBlocks = 4096;
const batches = [1, 8, 32] as const;
const samplingBatches = [1, 8, 32, 64, 128, 256] as const;
/** A draw on the host takes milliseconds of a row. */
const hostBatches = [1, 8, 32] as const;
/** Of a step of sampling: enough for a median. */
const samplingTokens = 48;
const hostTokens = 16;
/** MiMo's layer accepts about this share of drafts on mathematics (arXiv 2509.18362, table 1). */
const syntheticAcceptance = 0.9;
const engineTokens = 96;

/** What a pass computes: `batch` sequences of `rows` rows each, after `past` positions. */
interface Load {
  readonly batch: number;
  readonly rows: number;
  readonly past: number;
  readonly wants: 'best' | 'logits';
}

interface Device {
  readonly executionProvider: 'cuda' | 'webgpu';
  readonly libraryPath?: string;
  readonly without?: readonly OwnKernel[];
}

type Report = (result: Record<string, unknown>) => void;

/** Prints JSON lines, the last with everything. The signal ends it; what it wrote is removed in any case. */
export async function run(args: readonly string[], signal: AbortSignal): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: {
      library: { type: 'string' },
      provider: { type: 'string', default: 'cuda' },
      directory: { type: 'string', default: tmpdir() },
      precision: { type: 'string', default: 'bf16' },
      /**
       * Those to run; `host`: sampling without the device's sampler, for comparison; `long`: decode at long contexts;
       * `streams`: as many as the defaults take, and more.
       */
      part: { type: 'string', default: 'draws,attention,golden,host,streams,sampling,long,model' },
      /** Draws to compare with the host's. */
      draws: { type: 'string', default: '1000000' },
      /** Devices that hold the model, one run of everything for each number. */
      ranks: { type: 'string', default: '1' },
      /** Whom to run beside us: transformers over the shapes of `model`, vLLM over those of `beside`. */
      peer: { type: 'string' },
      /** That has the peer. */
      python: { type: 'string', default: 'python3' },
      /** Bytes a second of a device's memory; default: an H100 SXM's by its data sheet. */
      bandwidth: { type: 'string', default: '3.35e12' },
    },
  });
  const isCuda = values.provider === 'cuda';
  if (isCuda && values.library === undefined) {
    throw new ClusterError('invalid_argument', '--library: must name libonnxruntime, is missing');
  }
  const device: Device = {
    executionProvider: isCuda ? 'cuda' : 'webgpu',
    ...(values.library === undefined ? {} : { libraryPath: values.library }),
  };
  const results: Record<string, unknown>[] = [];
  const report: Report = (result) => {
    results.push(result);
    process.stdout.write(`${JSON.stringify(result)}\n`);
  };
  const rankCounts = values.ranks.split(',').map(Number);
  const parts = values.part.split(',');
  if (parts.includes('draws') && isCuda) {
    await compareDraws({ libraryPath: values.library!, draws: Number(values.draws) }, report);
  }
  if (parts.includes('attention') && isCuda) {
    await compareAttention(device, report, signal);
  }
  if (parts.includes('golden')) {
    await compareFixtures(device, rankCounts, report);
  }
  const { provider, precision } = values;
  const directory = await mkdtemp(join(values.directory, 'mimo-bench-gpu-'));
  try {
    if (parts.includes('beside') && isCuda) {
      const python = values.peer === 'vllm' ? values.python : undefined;
      await measureBeside({ device, directory, python }, report, signal);
    }
    if (!['model', 'sampling', 'host', 'long', 'streams'].some((part) => parts.includes(part))) {
      return;
    }
    await timed('checkpoint', report, () =>
      writeRandomCheckpoint({ directory, config: mimo7b, seed: 1, files: 4 }, signal),
    );
    for (const ranks of rankCounts) {
      const { rankDirectories } = await timed('compile', report, () =>
        compile(
          {
            modelDirectory: directory,
            outDirectory: join(directory, `shards-${ranks}`),
            precision: values.precision as Precision,
            tensorParallel: ranks,
            maxPositions: 32_768,
            threads: Math.min(8, availableParallelism()),
          },
          signal,
        ),
      );
      if (ranks === 1 && isCuda && parts.includes('host')) {
        const group = await openGroup(rankDirectories, {
          device: { ...device, without: ['sampling', 'attention'] },
          sumOnHost: false,
        });
        measureSampling(group, 'host', report);
        measureLong(group, ['attention'], report);
        await group.close();
      }
      if (ranks === 1 && isCuda && parts.includes('long')) {
        const without = ['layers'] as const;
        const group = await openGroup(rankDirectories, { device: { ...device, without }, sumOnHost: false });
        measureLong(group, without, report);
        await group.close();
      }
      if (ranks === 1 && isCuda && parts.includes('streams')) {
        await measureStreams(rankDirectories, device, report);
      }
      if (ranks === 1 && isCuda && parts.includes('model')) {
        await showBudget(rankDirectories, device, report);
      }
      if (!['sampling', 'long', 'model'].some((part) => parts.includes(part))) {
        continue;
      }
      // Where devices reach one another, also the way over the host, in short.
      for (const sumOnHost of ranks === 1 ? [false] : [false, true]) {
        const group = await timed('load', report, () => openGroup(rankDirectories, { device, sumOnHost }));
        try {
          if (parts.includes('sampling')) {
            measureSampling(group, 'device', report);
          }
          if (parts.includes('long')) {
            measureLong(group, [], report);
          }
          if (!parts.includes('model')) {
            continue;
          }
          const place = { ranks, ...(ranks === 1 ? {} : { sumOnHost }) };
          measureAll(group, { isShort: sumOnHost, bandwidth: ranks * Number(values.bandwidth) }, (result) =>
            report({ ...place, ...result }),
          );
        } finally {
          await group.close();
        }
      }
    }
  } finally {
    await rm(directory, { recursive: true, force: true });
    const goals = goalsOf(results);
    process.stdout.write(`${JSON.stringify({ bench: 'gpu', provider, precision, goals, results })}\n`);
  }
  if (values.peer === 'transformers') {
    await runPeer(values.python, report, signal);
  }
}

/** What the results must show, where they were measured. */
function goalsOf(results: readonly Record<string, unknown>[]) {
  const least: Readonly<Record<string, number>> = { sampled: 0.97, penalties: 0.9, logprobs: 0.9 };
  return results.flatMap((result) => {
    const { step, on, asked, batch, ofGreedy, kind, different, unfinished, failures } = result;
    if (step === 'sampling' && on === 'device' && asked !== 'greedy') {
      const goal = least[asked as string]!;
      const value = ofGreedy as number;
      return [
        {
          name: `${asked as string} at batch ${batch as number}, of greedy`,
          goal,
          value,
          met: value >= goal,
        },
      ];
    }
    if (step === 'beside') {
      return [besideGoal(result)];
    }
    if (step === 'draws' && kind === 'all') {
      return [{ name: 'draws unlike the host', goal: 0, value: different, met: different === 0 }];
    }
    if (step === 'streams') {
      const value = (unfinished as number) + Object.keys(failures as object).length;
      return [{ name: 'streams that failed', goal: 0, value, met: value === 0 }];
    }
    return [];
  });
}

/** What the engine makes of the device's memory: the KV cache that fits, and the answer to one that does not. */
async function showBudget(directories: readonly string[], device: Device, report: Report): Promise<void> {
  const options: EngineOptions = {
    shardDirectories: directories,
    group: { kind: 'in-process' },
    executionProvider: device.executionProvider,
    ...(device.libraryPath === undefined ? {} : { runtimeLibrary: device.libraryPath }),
    maxSequences: 64,
  };
  for (const kvBytes of ['auto', 100 * 2 ** 30] as const) {
    try {
      const engine = await startEngine({ ...options, kvBytes });
      const { info } = engine;
      await engine.close();
      report({ step: 'budget', kvBytes, kvTokens: info.kvBlocks * kvBlockTokens });
    } catch (error) {
      const { code, message } = ClusterError.from(error);
      report({ step: 'budget', kvBytes, code, message });
    }
  }
}

async function timed<T>(step: string, report: Report, work: () => Promise<T>): Promise<T> {
  const startedMs = performance.now();
  const result = await work();
  report({ step, seconds: (performance.now() - startedMs) / 1000 });
  return result;
}

function openGroup(
  directories: readonly string[],
  { device, sumOnHost }: { readonly device: Device; readonly sumOnHost: boolean },
): Promise<LocalGroup> {
  const size = { maxRows, maxHeadRows, kvBlocks };
  if (directories.length === 1) {
    return openLocalGroup({ directories, implementation: 'ort-capi', device, ...size });
  }
  return openProcessGroup({
    directories,
    device,
    ...size,
    sumOnHost,
    environmentOf: (rank) => ({ CUDA_VISIBLE_DEVICES: String(rank) }),
  });
}

/** Heads of MiMo's size, which the fixtures have not, over few layers. */
const wideHeads: ModelConfig = {
  ...mimo7b,
  hiddenSize: 512,
  layers: 3,
  queryHeads: 8,
  kvHeads: 2,
  intermediateSize: 768,
  vocabSize: 2048,
  maxPositions: 2048,
  bosTokenId: 2046,
  eosTokenIds: [2047],
};

/**
 * Attention of our own over spans of one row, of two, and of both, beside ONNX Runtime's over the same and whole
 * prompts: the relative error of the logits, where the reference is float32 on the CPU.
 */
async function compareAttention(device: Device, report: Report, signal: AbortSignal): Promise<void> {
  const directory = await mkdtemp(join(tmpdir(), 'mimo-bench-heads-'));
  try {
    await writeRandomCheckpoint({ directory, config: wideHeads, seed: 1 }, signal);
    const open = async (precision: Precision, on: Device | undefined): Promise<LocalGroup> => {
      const { rankDirectories } = await compile(
        { modelDirectory: directory, outDirectory: join(directory, precision), precision, tensorParallel: 1 },
        signal,
      );
      const place = on ?? { ...device, executionProvider: 'cpu' as const };
      return openLocalGroup({
        directories: rankDirectories,
        implementation: 'ort-capi',
        device: place,
        maxRows: 1600,
      });
    };
    const prompts = [701, 650].map((length, i) =>
      Array.from({ length }, (_, at) => (at * (7919 + i)) % wideHeads.vocabSize),
    );
    const reference = await open('fp32', undefined);
    const expected = promptLogits(reference, prompts, 701);
    await reference.close();
    for (const precision of ['fp16', 'bf16'] as const) {
      for (const without of [[], ['attention'], ['layers']] as const) {
        const group = await open(precision, { ...device, without });
        const relativeErrors = [701, 7, 2, 1].map((chunkTokens) =>
          promptLogits(group, prompts, chunkTokens).map((logits, i) =>
            Math.max(
              rowsError(logits.backbone, expected[i]!.backbone),
              rowsError(logits.mtp, expected[i]!.mtp),
            ),
          ),
        );
        await group.close();
        report({ step: 'attention', precision, without, chunkTokens: [701, 7, 2, 1], relativeErrors });
      }
    }
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
}

/** The largest difference of any row, relative to the row's largest logit. */
function rowsError(rows: readonly Float32Array[], expected: readonly Float32Array[]): number {
  const errors = rows.map((row, i) => {
    const wanted = expected[i]!;
    const largest = wanted.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    return row.reduce((most, value, id) => Math.max(most, Math.abs(value - wanted[id]!)), 0) / largest;
  });
  return Math.max(...errors);
}

/** The relative error of the logits, whole prompts and in chunks beside another. */
async function compareFixtures(device: Device, rankCounts: readonly number[], report: Report): Promise<void> {
  const fixtures = new CompiledFixtures();
  try {
    const isCuda = device.executionProvider === 'cuda';
    for (const precision of isCuda ? (['fp16', 'bf16'] as const) : (['fp16'] as const)) {
      const worlds = fixtureNames.flatMap((name) => {
        const { tensorParallel } = readExpectedIds(name);
        return rankCounts.filter((ranks) => tensorParallel.includes(ranks)).map((ranks) => ({ name, ranks }));
      });
      for (const { name, ranks } of worlds) {
        const directories = await fixtures.compile(name, { precision, tensorParallel: ranks });
        const group = await openGroup(directories, { device, sumOnHost: false });
        const { promptIds } = readExpectedIds(name);
        // Twice more one by one: the first time on the same keys, a device may begin to do passes again by itself.
        const errors = [promptIds.length, 7, 1, 1, 1].map((chunkTokens) => {
          const [, second] = promptLogits(group, [promptIds.toReversed(), promptIds], chunkTokens);
          const backbone = relativeError(second!.backbone, readExpectedMatrix(name, 'logits'));
          const hasMtp = group.manifest.config.mtpLayers > 0;
          return Math.max(
            backbone,
            hasMtp ? relativeError(second!.mtp, readExpectedMatrix(name, 'mtp_logits')) : 0,
          );
        });
        report({ step: 'golden', precision, name, ranks, relativeErrors: errors });
        await group.close();
      }
    }
  } finally {
    fixtures.remove();
  }
}

/** What requests ask beside the largest logit. */
const samplings = {
  greedy: {},
  sampled: { temperature: 0.6, topP: 0.95 },
  penalties: {
    temperature: 0.6,
    topP: 0.95,
    repetitionPenalty: 1.1,
    presencePenalty: 0.5,
    frequencyPenalty: 0.1,
  },
  logprobs: { temperature: 0.6, topP: 0.95, logprobs: 20 },
} as const;

/** Engine steps without drafts by how tokens are drawn, each beside greedy. */
function measureSampling(group: LocalGroup, on: 'device' | 'host', report: Report): void {
  const isHost = on === 'host';
  for (const batch of isHost ? hostBatches : samplingBatches) {
    let greedyMs = NaN;
    for (const [asked, sampling] of Object.entries(samplings)) {
      if (isHost && (asked === 'penalties' || asked === 'logprobs')) {
        continue;
      }
      const { decodePerSecond, stepMs } = measureEngine({
        group,
        batch,
        promptTokens: contextTokens,
        tokens: isHost ? hostTokens : samplingTokens,
        prefillChunkTokens: 256,
        kvBlocks,
        speculation: 'off',
        sampling,
        acceptance: 0,
      });
      greedyMs = asked === 'greedy' ? stepMs : greedyMs;
      report({ step: 'sampling', on, batch, asked, stepMs, decodePerSecond, ofGreedy: greedyMs / stepMs });
    }
  }
}

function measureAll(
  group: LocalGroup,
  { isShort, bandwidth }: { readonly isShort: boolean; readonly bandwidth: number },
  report: Report,
): void {
  for (const wants of isShort ? (['best'] as const) : (['best', 'logits'] as const)) {
    for (const batch of isShort ? [1] : batches) {
      const ms = measurePass(group, { batch, rows: 1, past: contextTokens, wants });
      report({
        step: 'decode',
        wants,
        batch,
        contextTokens,
        ms,
        tokensPerSecond: (1000 * batch) / ms,
        limitRatio: (1000 * readBytes(batch)) / bandwidth / ms,
      });
    }
  }
  for (const batch of isShort ? [] : batches) {
    const ms = measurePass(group, { batch, rows: 2, past: contextTokens, wants: 'best' });
    report({ step: 'verify', batch, rows: 2, ms });
  }
  for (const promptTokens of isShort ? [] : [512, 4096]) {
    const ms = Array.from({ length: promptTokens / maxRows }, (_, chunk) =>
      measurePass(group, { batch: 1, rows: maxRows, past: chunk * maxRows, wants: 'best' }, 5),
    ).reduce((sum, chunkMs) => sum + chunkMs, 0);
    report({
      step: 'prefill',
      promptTokens,
      chunkTokens: maxRows,
      ms,
      tokensPerSecond: (1000 * promptTokens) / ms,
    });
  }
  for (const batch of isShort ? [] : batches) {
    for (const speculation of ['off', 'on', 'synthetic'] as const) {
      const { decodePerSecond, stepMs, acceptedRatio } = measureEngine({
        group,
        batch,
        promptTokens: contextTokens,
        tokens: engineTokens,
        prefillChunkTokens: 256,
        kvBlocks,
        speculation,
        acceptance: syntheticAcceptance,
      });
      const limitRatio = (decodePerSecond * readBytes(batch)) / batch / bandwidth;
      report({ step: 'engine', batch, speculation, decodePerSecond, stepMs, acceptedRatio, limitRatio });
    }
  }
  // Frees the slots that the passes above have used.
  const releasedSlots = Array.from({ length: Math.max(...batches) }, (_, slot) => slot);
  group.run({ kind: 'forward', heads: [], releasedSlots, spans: [], tokenIds: new Int32Array(0) });
}

/**
 * As many streams as the defaults take and as many again, with the KV cache that fits by itself: prompts of 512 tokens,
 * drawn at temperature 0.6. Tells what failed.
 */
async function measureStreams(directories: readonly string[], device: Device, report: Report): Promise<void> {
  const startedMs = performance.now();
  const engine = await startEngine({
    shardDirectories: directories,
    group: { kind: 'in-process' },
    executionProvider: device.executionProvider,
    ...(device.libraryPath === undefined ? {} : { runtimeLibrary: device.libraryPath }),
  });
  const readySeconds = (performance.now() - startedMs) / 1000;
  const { maxSequences } = engine.info;
  const streams = 2 * maxSequences;
  for (const round of [1, 2]) {
    const begunMs = performance.now();
    const ended = Promise.withResolvers<void>();
    const failures = new Map<string, number>();
    let left = streams;
    let tokens = 0;
    const stop = engine.onFrame(({ deltas }) => {
      for (const { tokenIds, finish } of deltas) {
        tokens += tokenIds.length;
        if (finish?.kind === 'error' || finish?.kind === 'aborted') {
          const reason = finish.kind === 'error' ? finish.message : finish.kind;
          failures.set(reason, (failures.get(reason) ?? 0) + 1);
        }
        left -= finish === undefined ? 0 : 1;
      }
      if (left === 0) {
        ended.resolve();
      }
    });
    const sampling = greedySampling({ temperature: 0.6, topP: 0.95, maxTokens: 256, draftTokens: 0 });
    for (let stream = 0; stream < streams; stream++) {
      const tokenIds = Array.from({ length: 512 }, (_, at) => ((stream + 1) * 7919 * (at + 1)) % 150_000);
      const sequenceId = round * streams + stream;
      const request = { sequenceId, tokenIds, resumedTokens: 0, creditTokens: Infinity };
      engine.submit({ ...request, sampling: { ...sampling, seed: stream } });
    }
    await Promise.race([ended.promise, engine.failed]);
    stop();
    const seconds = (performance.now() - begunMs) / 1000;
    report({
      step: 'streams',
      round,
      streams,
      maxSequences,
      kvTokens: engine.info.kvBlocks * kvBlockTokens,
      readySeconds,
      seconds,
      tokensPerSecond: tokens / seconds,
      unfinished: left,
      failures: Object.fromEntries(failures),
    });
  }
  await engine.close();
}

/** Decode passes by context and batch. */
function measureLong(group: LocalGroup, without: readonly OwnKernel[], report: Report): void {
  for (const [past, sizes] of longLoads) {
    for (const batch of sizes) {
      for (const rows of [1, 2]) {
        const ms = measurePass(group, { batch, rows, past, wants: 'best' }, 8);
        report({ step: 'long', without, contextTokens: past, batch, rows, ms });
        const releasedSlots = Array.from({ length: batch }, (_, slot) => slot);
        group.run({ kind: 'forward', heads: [], releasedSlots, spans: [], tokenIds: new Int32Array(0) });
      }
    }
  }
}

/** What a decode pass must read: the weights, and the keys and values of the context. */
function readBytes(batch: number): number {
  const { hiddenSize, queryHeads, kvHeads, headDim, intermediateSize, vocabSize, layers } = mimo7b;
  const layerWeights =
    hiddenSize * (2 * queryHeads + 2 * kvHeads) * headDim + 3 * hiddenSize * intermediateSize;
  const weightBytes = 2 * (layers * layerWeights + vocabSize * hiddenSize);
  return weightBytes + batch * contextTokens * 2 * 2 * layers * kvHeads * headDim;
}

/** Median milliseconds of a pass, after three of warm-up. */
function measurePass(
  group: LocalGroup,
  { batch, rows, past, wants }: Load,
  times: number = repetitions,
): number {
  const spans = Array.from({ length: batch }, (_, slot): RowSpan => ({
    slot,
    start: past,
    rows,
    headRows: rows <= 2 ? rows : 1,
    hiddenRow: 0,
    capacityTokens: 256 * Math.ceil((past + rows) / 256),
  }));
  const tokenIds = Int32Array.from({ length: batch * rows }, (_, i) => (i * 7919) % mimo7b.vocabSize);
  const heads = spans.flatMap(({ headRows }) =>
    Array.from({ length: headRows }, (): HeadRequest => ({ kind: wants })),
  );
  const plan: PassPlan = { kind: 'forward', heads, releasedSlots: [], spans, tokenIds };
  const elapsed: number[] = [];
  for (let i = 0; i < times + 3; i++) {
    const startedMs = performance.now();
    group.run(plan);
    elapsed.push(performance.now() - startedMs);
  }
  return median(elapsed.slice(3));
}

/** The same shapes through transformers, as JSON lines of gpu_peer.py. */
async function runPeer(python: string, report: Report, signal: AbortSignal): Promise<void> {
  const { hiddenSize, layers, queryHeads, kvHeads, headDim, intermediateSize, vocabSize, ropeTheta } = mimo7b;
  const config = {
    hidden_size: hiddenSize,
    num_hidden_layers: layers,
    num_attention_heads: queryHeads,
    num_key_value_heads: kvHeads,
    head_dim: headDim,
    intermediate_size: intermediateSize,
    vocab_size: vocabSize,
    rope_theta: ropeTheta,
  };
  const child = spawn(
    python,
    [join(import.meta.dirname, 'gpu_peer.py'), JSON.stringify(config), String(contextTokens), batches.join()],
    { stdio: ['ignore', 'pipe', 'inherit'], signal },
  );
  let text = '';
  for await (const chunk of child.stdout.setEncoding('utf8')) {
    text += chunk as string;
  }
  for (const line of text.split('\n').filter((each) => each.startsWith('{'))) {
    report({ peer: 'transformers', ...(JSON.parse(line) as Record<string, unknown>) });
  }
}
