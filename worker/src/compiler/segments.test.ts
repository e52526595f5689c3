// The compiled segments, run one by one through onnxruntime's public API with the ranks' partial sums added here,
// against a forward pass in double precision that follows the formulas and shares no code with them.

import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import * as ort from 'onnxruntime-node';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Checkpoint, openCheckpoint } from './checkpoint.ts';
import { compile } from './compile.ts';
import type { ModelConfig } from '../shards/model-config.ts';
import { mimo7b, writeRandomCheckpoint } from './random-checkpoint.ts';
import { readShardManifest, type ShardManifest } from '../shards/shard.ts';
import type { Precision } from '../shards/target-profile.ts';

const config: ModelConfig = {
  ...mimo7b,
  hiddenSize: 64,
  layers: 2,
  queryHeads: 8,
  kvHeads: 4,
  headDim: 16,
  // Five blocks, which no number of ranks but one divides.
  intermediateSize: 160,
  vocabSize: 131,
  ropeTheta: 10_000,
  maxPositions: 64,
  bosTokenId: null,
  eosTokenIds: [],
};
const tokenIds = [3, 130, 7, 7, 64, 0, 99];
const { signal } = new AbortController();
let directory = '';
let checkpoint: Checkpoint;

beforeAll(async () => {
  directory = mkdtempSync(join(tmpdir(), 'mimo-segments-'));
  await writeRandomCheckpoint(
    { directory: join(directory, 'checkpoint'), config, seed: 5, files: 2 },
    signal,
  );
  checkpoint = await openCheckpoint(join(directory, 'checkpoint'));
});
afterAll(() => rmSync(directory, { recursive: true }));

type Matrix = number[][];

/** A tensor as rows; matrices as the given precision makes them. */
function readTensor(name: string, precision: Precision): Matrix {
  const tensor = checkpoint.tensors.get(name);
  if (tensor === undefined) {
    throw new Error(name);
  }
  const bytes = readFileSync(tensor.path).subarray(tensor.offset, tensor.offset + tensor.bytes);
  const halves = new Uint16Array(new Uint8Array(bytes).buffer);
  const values = [...new Float32Array(Uint32Array.from(halves, (half) => half << 16).buffer)];
  const [rows = 0, columns] = tensor.shape;
  if (columns === undefined) {
    return [values];
  }
  const matrix = Array.from({ length: rows }, (_, row) => values.slice(row * columns, (row + 1) * columns));
  return precision === 'fp32' || name.includes('embed')
    ? matrix
    : matrix.map((row) => dequantized(row, precision));
}

function dequantized(row: readonly number[], precision: Precision): number[] {
  return Array.from({ length: row.length / 32 }, (_, i) => row.slice(i * 32, (i + 1) * 32)).flatMap(
    (block) => {
      const extreme = block.reduce((most, value) => (Math.abs(value) > Math.abs(most) ? value : most), 0);
      const scale = Math.fround(precision === 'int8' ? Math.abs(extreme) / 127 : extreme / -8);
      const inverse = Math.fround(1 / scale);
      const top = precision === 'int8' ? 127 : 7;
      return block.map((value) => Math.min(top, Math.floor(Math.fround(value * inverse) + 0.5)) * scale);
    },
  );
}

function product(matrix: Matrix, x: readonly number[]): number[] {
  return matrix.map((row) => row.reduce((total, weight, i) => total + weight * (x[i] ?? 0), 0));
}

function sum(a: readonly number[], b: readonly number[]): number[] {
  return a.map((value, i) => value + (b[i] ?? 0));
}

function rmsNorm(x: readonly number[], gain: readonly number[] = []): number[] {
  const meanSquare = x.reduce((total, value) => total + value * value, 0) / x.length;
  return x.map((value, i) => (value / Math.sqrt(meanSquare + config.rmsNormEps)) * (gain[i] ?? 0));
}

function rotate(head: readonly number[], position: number): number[] {
  const half = head.length / 2;
  return head.map((value, i) => {
    const angle = position * config.ropeTheta ** ((-2 * (i % half)) / head.length);
    const other = i < half ? -(head[i + half] ?? 0) : (head[i - half] ?? 0);
    return value * Math.cos(angle) + other * Math.sin(angle);
  });
}

/** One decoder block over a whole sequence, [positions, H] to [positions, H]. */
function decoderBlock(name: string, x: Matrix, precision: Precision): Matrix {
  const read = (tensor: string): Matrix => readTensor(`${name}.${tensor}`, precision);
  const [gain1] = read('input_layernorm.weight');
  const [gain2] = read('post_attention_layernorm.weight');
  const normed = x.map((row) => rmsNorm(row, gain1));
  const project = (part: string): Matrix[] => {
    const weight = read(`self_attn.${part}_proj.weight`);
    const [bias = []] = read(`self_attn.${part}_proj.bias`);
    return normed.map((row, position) => {
      const all = sum(product(weight, row), bias);
      const heads = Array.from({ length: all.length / config.headDim }, (_, head) =>
        all.slice(head * config.headDim, (head + 1) * config.headDim),
      );
      return part === 'v' ? heads : heads.map((head) => rotate(head, position));
    });
  };
  const [q, k, v] = [project('q'), project('k'), project('v')];
  const group = config.queryHeads / config.kvHeads;
  const attended = q.map((heads, position) =>
    heads.flatMap((head, h) => {
      const kvHead = Math.floor(h / group);
      const scores = k
        .slice(0, position + 1)
        .map((keys) => Math.exp((product([keys[kvHead] ?? []], head)[0] ?? 0) / Math.sqrt(config.headDim)));
      const total = scores.reduce((a, b) => a + b, 0);
      return head.map((_, d) =>
        scores.reduce((acc, score, j) => acc + (score / total) * (v[j]?.[kvHead]?.[d] ?? 0), 0),
      );
    }),
  );
  const [output, gate, up, down] = [
    read('self_attn.o_proj.weight'),
    read('mlp.gate_proj.weight'),
    read('mlp.up_proj.weight'),
    read('mlp.down_proj.weight'),
  ];
  return x.map((row, position) => {
    const middle = sum(row, product(output, attended[position] ?? []));
    const n = rmsNorm(middle, gain2);
    const ups = product(up, n);
    const activated = product(gate, n).map((g, i) => (g / (1 + Math.exp(-g))) * (ups[i] ?? 0));
    return sum(middle, product(down, activated));
  });
}

function expectedLogits(precision: Precision): { logits: Matrix; draftLogits: Matrix } {
  const read = (name: string): Matrix => readTensor(name, precision);
  const embedding = read('model.embed_tokens.weight');
  const head = read('lm_head.weight');
  const embedded = tokenIds.map((id) => embedding[id] ?? []);
  const hidden = [0, 1].reduce((x, layer) => decoderBlock(`model.layers.${layer}`, x, precision), embedded);
  const [gain] = read('model.norm.weight');
  const mtp = 'model.mtp_layers.0';
  const [hiddenGain] = read(`${mtp}.hidden_layernorm.weight`);
  const [tokenGain] = read(`${mtp}.token_layernorm.weight`);
  const [finalGain] = read(`${mtp}.final_layernorm.weight`);
  const input = read(`${mtp}.input_proj.weight`);
  const slots = hidden
    .slice(0, -1)
    .map((row, s) =>
      product(input, [...rmsNorm(row, hiddenGain), ...rmsNorm(embedded[s + 1] ?? [], tokenGain)]),
    );
  return {
    logits: hidden.map((row) => product(head, rmsNorm(row, gain))),
    draftLogits: decoderBlock(mtp, slots, precision).map((row) => product(head, rmsNorm(row, finalGain))),
  };
}

interface Shard {
  readonly manifest: ShardManifest;
  run(segment: string, inputs: Record<string, ort.Tensor>): Promise<Record<string, ort.Tensor>>;
  close(): Promise<void>;
}

/** Pages have no kernel on the CPU. */
async function openShard(rankDirectory: string): Promise<Shard> {
  const manifest = await readShardManifest(rankDirectory);
  const sessions = new Map<string, ort.InferenceSession>();
  const segments = manifest.segments.filter(({ name }) => name !== 'attention.paged');
  for (const { name, file, inputs, outputs } of segments) {
    const session = await ort.InferenceSession.create(join(rankDirectory, file), { intraOpNumThreads: 1 });
    expect([name, session.inputNames, session.outputNames]).toEqual([name, inputs, outputs]);
    sessions.set(name, session);
  }
  return {
    manifest,
    async run(segment, inputs) {
      const results = await sessions.get(segment)?.run(inputs);
      return results ?? {};
    },
    async close() {
      await Promise.all([...sessions.values()].map((session) => session.release()));
    },
  };
}

function float(matrix: Matrix): ort.Tensor {
  return new ort.Tensor('float32', Float32Array.from(matrix.flat()), [matrix.length, matrix[0]?.length ?? 0]);
}

function toMatrix(tensor: ort.Tensor | undefined): Matrix {
  const columns = tensor?.dims.at(-1) ?? 1;
  const data = [...((tensor?.data ?? []) as Float32Array)];
  return Array.from({ length: data.length / columns }, (_, row) =>
    data.slice(row * columns, (row + 1) * columns),
  );
}

/** Runs a segment on every rank with the same inputs. */
async function onAll(shards: readonly Shard[], segment: string, inputs: Record<string, ort.Tensor>) {
  return Promise.all(shards.map((shard) => shard.run(segment, inputs)));
}

function allReduce(parts: readonly (ort.Tensor | undefined)[]): Matrix {
  return parts.map(toMatrix).reduce((a, b) => a.map((row, i) => sum(row, b[i] ?? [])));
}

interface Residual {
  readonly residual: Matrix;
  readonly delta: Matrix;
}

async function runBlock(
  shards: readonly Shard[],
  name: string,
  { residual, delta }: Residual,
): Promise<Residual> {
  const rows = residual.length;
  const qkv = await onAll(shards, `${name}.qkv`, { residual: float(residual), delta: float(delta) });
  const deltas = await Promise.all(
    shards.map(async (shard, rank) => {
      const ranks = shard.manifest.tensorParallel;
      const cacheDims = [1, config.kvHeads / ranks, 16, config.headDim];
      const cache = (): ort.Tensor =>
        new ort.Tensor('float32', new Float32Array(cacheDims.reduce((a, b) => a * b)), cacheDims);
      const packed = qkv[rank]?.['qkv'];
      const attended = await shard.run('attention', {
        qkv: new ort.Tensor('float32', packed?.data as Float32Array, [1, rows, packed?.dims[1] ?? 0]),
        pastKey: cache(),
        pastValue: cache(),
        seqlensK: new ort.Tensor('int32', Int32Array.of(rows - 1), [1]),
        totalLength: new ort.Tensor('int32', Int32Array.of(rows), []),
      });
      const flat = float(toMatrix(attended['attended']));
      return (await shard.run(`${name}.o`, { attended: flat }))['delta'];
    }),
  );
  const mlp = await onAll(shards, `${name}.mlp`, {
    residual: qkv[0]?.['residualOut'] ?? float([]),
    delta: float(allReduce(deltas)),
  });
  return {
    residual: toMatrix(mlp[0]?.['residualOut']),
    delta: allReduce(mlp.map((outputs) => outputs['deltaOut'])),
  };
}

function indices(rows: readonly number[]): ort.Tensor {
  return new ort.Tensor('int32', Int32Array.from(rows), [rows.length]);
}

async function runFinal(
  shards: readonly Shard[],
  name: string,
  x: Residual,
): Promise<{ hidden: Matrix; logits: Matrix }> {
  const [final] = await onAll(shards, name, { residual: float(x.residual), delta: float(x.delta) });
  const heads = await onAll(shards, 'head', {
    normed: final?.['normed'] ?? float([]),
    headRows: indices(x.residual.map((_, row) => row)),
  });
  const parts = heads.map((head) => toMatrix(head['logits']));
  const logits = x.residual.map((_, row) => parts.flatMap((part) => part[row] ?? []));
  return { hidden: toMatrix(final?.['hidden']), logits };
}

async function runModel(shards: readonly Shard[]): Promise<{ logits: Matrix; draftLogits: Matrix }> {
  const embedded = toMatrix((await onAll(shards, 'embed', { tokenIds: indices(tokenIds) }))[0]?.['hidden']);
  const zeros = (rows: Matrix): Matrix => rows.map((row) => row.map(() => 0));
  let x: Residual = { residual: embedded, delta: zeros(embedded) };
  for (let layer = 0; layer < config.layers; layer++) {
    x = await runBlock(shards, `layer.${layer}`, x);
  }
  const { hidden, logits } = await runFinal(shards, 'final', x);
  const [input] = await onAll(shards, 'mtp.0.input', {
    hidden: float(hidden),
    hiddenRows: indices(hidden.slice(1).map((_, row) => row)),
    embedding: float(embedded.slice(1)),
  });
  const residual = toMatrix(input?.['residual']);
  const draft = await runBlock(shards, 'mtp.0', { residual, delta: zeros(residual) });
  return { logits, draftLogits: (await runFinal(shards, 'mtp.0.final', draft)).logits };
}

function relativeError(actual: Matrix, expected: Matrix): number {
  expect(actual.map((row) => row.length)).toEqual(expected.map((row) => row.length));
  const scale = Math.max(...expected.flat().map(Math.abs));
  return (
    Math.max(
      ...actual.flatMap((row, i) => row.map((value, j) => Math.abs(value - (expected[i]?.[j] ?? 0)))),
    ) / scale
  );
}

it('finds the best usable token of each row and rank in halves, the lowest id at ties', async () => {
  const { rankDirectories } = await compile(
    {
      modelDirectory: join(directory, 'checkpoint'),
      outDirectory: join(directory, 'fp16'),
      tensorParallel: 2,
      precision: 'fp16',
    },
    signal,
  );
  const shards = await Promise.all(rankDirectories.map(openShard));
  const [, second] = shards;
  const { vocabStart = 0, vocabRows = 0 } = second?.manifest ?? {};
  const row = (peaks: Record<number, number>): number[] =>
    Array.from({ length: vocabRows }, (_, id) => peaks[id] ?? -1);
  const outputs = await second?.run('best', {
    // The last has its largest logit beyond the usable ids.
    logits: float([row({ 3: 2, 9: 5 }), row({ 7: 4, 8: 4 }), row({ 20: 9, 5: 0.5 })]),
    end: new ort.Tensor('int64', BigInt64Array.of(20n), [1]),
  });
  await Promise.all(shards.map((shard) => shard.close()));
  expect(toMatrix(outputs?.['best'])).toEqual([
    [vocabStart + 9, 5],
    [vocabStart + 7, 4],
    [vocabStart + 5, 0.5],
  ]);
});

describe.each(['fp32', 'int8', 'int4'] as const)('segments in %s', { timeout: 60_000 }, (precision) => {
  it.each([1, 2, 4])('match the formulas on %i ranks', async (tensorParallel) => {
    const { rankDirectories } = await compile(
      {
        modelDirectory: join(directory, 'checkpoint'),
        outDirectory: join(directory, `${precision}-${tensorParallel}`),
        tensorParallel,
        precision,
        accuracyLevel: 0,
      },
      signal,
    );
    const shards = await Promise.all(rankDirectories.map(openShard));
    const actual = await runModel(shards);
    await Promise.all(shards.map((shard) => shard.close()));
    const expected = expectedLogits(precision);
    expect(relativeError(actual.logits, expected.logits)).toBeLessThan(1e-5);
    expect(relativeError(actual.draftLogits, expected.draftLogits)).toBeLessThan(1e-5);
  });
});
