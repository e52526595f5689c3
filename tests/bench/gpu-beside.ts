// Decoding compared with another server on the same GPU, in one run: the same checkpoint (counting-checkpoint.ts),
// prompts and sampling, here and through vLLM (gpu_vllm.py). Owns the compared shapes, the table and its goals.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, readdir, readFile, symlink, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { ClusterError } from '@mimo/core/process/errors';
import { compile } from '@mimo/worker/compiler/compile';
import { mimo7b, writeRandomCheckpoint } from '@mimo/worker/compiler/random-checkpoint';
import type { RuntimeOptions } from '@mimo/worker/runtime/runtime';
import { openLocalGroup, type LocalGroup } from '../harness/local-group.ts';
import { countingTensors } from './counting-checkpoint.ts';
import { measureEngine } from './engine-run.ts';

type Report = (result: Record<string, unknown>) => void;

const batches = [1, 8, 32, 64, 128, 256] as const;
const requests = [
  { temperature: 0, drafts: 0 },
  { temperature: 0.6, drafts: 0 },
  { temperature: 0.6, drafts: 1 },
] as const;
const longLoads = [
  [8000, 1],
  [8000, 32],
  [32_512, 1],
  [32_512, 8],
] as const;
const shortContextTokens = 512;
const decodedTokens = 96;
const chunkTokens = 512;
const maxRows = 2048;
const kvBlocks = 8192;

export interface BesideOptions {
  readonly device: Pick<RuntimeOptions, 'executionProvider' | 'libraryPath' | 'kernelDirectory' | 'without'>;
  /** On a disk of 45 GB. */
  readonly directory: string;
  /** A Python with vLLM; without it only our own figures are measured. */
  readonly python: string | undefined;
}

/** One figure of either server. */
interface Decode {
  readonly batch: number;
  readonly contextTokens: number;
  readonly temperature: number;
  readonly drafts: number;
  readonly tokensPerSecond: number;
}

/** Reports every figure, and then a row of the table a shape. */
export async function measureBeside(
  options: BesideOptions,
  report: Report,
  signal: AbortSignal,
): Promise<void> {
  const { device, directory, python } = options;
  const model = join(directory, 'counting');
  await writeRandomCheckpoint(
    { directory: model, config: mimo7b, seed: 1, files: 4, chunksOf: countingTensors() },
    signal,
  );
  const { rankDirectories } = await compile(
    {
      modelDirectory: model,
      outDirectory: join(directory, 'counting-shards'),
      precision: 'bf16',
      tensorParallel: 1,
    },
    signal,
  );
  const group = await openLocalGroup({
    directories: rankDirectories,
    implementation: 'ort-capi',
    device,
    maxRows,
    maxHeadRows: 512,
    kvBlocks,
  });
  const ours: Decode[] = [];
  try {
    measureOurs(group, (figure) => {
      ours.push(figure);
      report({ step: 'decode', by: 'ours', ...figure });
    });
  } finally {
    await group.close();
  }
  const theirs = python === undefined ? [] : await measureVllm({ python, model, directory }, report, signal);
  for (const { tokensPerSecond, ...shape } of ours) {
    const peer = theirs.find(
      (each) =>
        each.batch === shape.batch &&
        each.contextTokens === shape.contextTokens &&
        each.temperature === shape.temperature &&
        each.drafts === shape.drafts,
    );
    if (peer !== undefined) {
      const ratio = tokensPerSecond / peer.tokensPerSecond;
      report({ step: 'beside', ...shape, ours: tokensPerSecond, vllm: peer.tokensPerSecond, ratio });
    }
  }
}

/** Ahead of it by 5 % up to 32 sequences, and not behind it with more. */
export function besideGoal(row: Record<string, unknown>): Record<string, unknown> {
  const { batch, contextTokens, temperature, drafts, ratio } = row as unknown as Decode & {
    readonly ratio: number;
  };
  const goal = batch <= 32 && contextTokens === shortContextTokens ? 1.05 : 1;
  const name = `${batch} x ${contextTokens}, T ${temperature}, ${drafts} drafts: of vLLM's tokens a second`;
  return { name, goal, value: ratio, met: ratio >= goal };
}

function measureOurs(group: LocalGroup, add: (figure: Decode & Record<string, unknown>) => void): void {
  const measure = (shape: Omit<Decode, 'tokensPerSecond'>): void => {
    const { batch, temperature } = shape;
    const { decodePerSecond, stepMs, prefillPerSecond, acceptedRatio } = measureEngine({
      group,
      batch,
      promptTokens: shape.contextTokens,
      promptOf: (sequence) => promptOf(sequence, shape.contextTokens),
      tokens: decodedTokens,
      prefillChunkTokens: chunkTokens,
      kvBlocks,
      maxContextTokens: shape.contextTokens + 2 * decodedTokens,
      speculation: shape.drafts > 0 ? 'on' : 'off',
      sampling: temperature === 0 ? {} : { temperature, topP: 0.95 },
      acceptance: 0,
    });
    add({ ...shape, tokensPerSecond: decodePerSecond, stepMs, prefillPerSecond, acceptedRatio });
  };
  for (const batch of batches) {
    for (const { temperature, drafts } of requests) {
      measure({ batch, contextTokens: shortContextTokens, temperature, drafts });
    }
  }
  for (const [length, batch] of longLoads) {
    measure({ batch, contextTokens: length, temperature: 0.6, drafts: 0 });
  }
}

/** As gpu_vllm.py's. */
function promptOf(sequence: number, length: number): readonly number[] {
  return Array.from({ length }, (_, i) => 700 + (((i + 1 + sequence * 37) * 7919) % 150_000));
}

async function measureVllm(
  {
    python,
    model,
    directory,
  }: { readonly python: string; readonly model: string; readonly directory: string },
  report: Report,
  signal: AbortSignal,
): Promise<Decode[]> {
  const view = join(directory, 'counting-vllm');
  await viewForVllm(model, view);
  const figures: Decode[] = [];
  for (const drafts of [0, 1]) {
    const longs = drafts === 0 ? longLoads.map(([length, batch]) => `${length}x${batch}`).join() : '';
    const script = join(import.meta.dirname, 'gpu_vllm.py');
    const child = spawn(python, [script, view, String(drafts), batches.join(), longs], {
      stdio: ['ignore', 'pipe', 'inherit'],
      signal,
    });
    const ended = once(child, 'close');
    let rest = '';
    for await (const chunk of child.stdout.setEncoding('utf8')) {
      const lines = (rest + (chunk as string)).split('\n');
      rest = lines.pop()!;
      for (const line of lines.filter((each) => each.startsWith('{'))) {
        const figure = JSON.parse(line) as Record<string, unknown>;
        report({ by: 'vllm', ...figure });
        if (figure['step'] === 'decode') {
          figures.push(figure as unknown as Decode);
        }
      }
    }
    await ended;
    if (child.exitCode !== 0) {
      throw new ClusterError('internal', `${script}: ended with ${child.exitCode ?? child.signalCode}`);
    }
  }
  return figures;
}

/** transformers has no configuration called `mimo`; the architecture stays. */
async function viewForVllm(model: string, view: string): Promise<void> {
  await mkdir(view, { recursive: true });
  for (const file of await readdir(model)) {
    if (file !== 'config.json') {
      await symlink(join(model, file), join(view, file));
    }
  }
  const config = JSON.parse(await readFile(join(model, 'config.json'), 'utf8')) as Record<string, unknown>;
  await writeFile(join(view, 'config.json'), JSON.stringify({ ...config, model_type: 'qwen2' }));
}
