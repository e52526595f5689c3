// Writes checkpoints of random weights in the real layout, for tests and benchmarks: any config, one file or several
// with an index. Owns the safetensors writer. Streams, so a full-size checkpoint needs disk space but little memory.

import { mkdir, open, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expectedTensors } from './checkpoint.ts';
import type { ModelConfig } from '../shards/model-config.ts';
import { elementBytes, type ElementDtype } from './safetensors.ts';

/** A tensor to write; its chunks together are its data, little-endian. */
export interface TensorData {
  readonly name: string;
  readonly dtype: ElementDtype;
  readonly shape: readonly number[];
  readonly chunks: Iterable<Uint8Array>;
}

/** What to write and where. */
export interface RandomCheckpoint {
  /** Created if missing. */
  readonly directory: string;
  readonly config: ModelConfig;
  readonly seed: number;
  /** Default 1: `model.safetensors`; more: that many files and an index. */
  readonly files?: number;
  /** The bfloat16 values of tensors that are not random. */
  readonly chunksOf?: (name: string, shape: readonly number[]) => Iterable<Uint8Array> | undefined;
}

/** The architecture of MiMo-7B-RL. */
export const mimo7b: ModelConfig = {
  hiddenSize: 4096,
  layers: 36,
  queryHeads: 32,
  kvHeads: 8,
  headDim: 128,
  intermediateSize: 11_008,
  vocabSize: 151_680,
  mtpLayers: 1,
  rmsNormEps: 1e-5,
  ropeTheta: 640_000,
  maxPositions: 32_768,
  tiedHead: false,
  bosTokenId: 151_643,
  eosTokenIds: [151_645],
};

/** The fields of a Hugging Face config.json that parseModelConfig reads, for a config. */
export function configToJson(config: ModelConfig): Record<string, unknown> {
  return {
    architectures: ['MiMoForCausalLM'],
    model_type: 'mimo',
    hidden_size: config.hiddenSize,
    num_hidden_layers: config.layers,
    num_attention_heads: config.queryHeads,
    num_key_value_heads: config.kvHeads,
    head_dim: config.headDim,
    intermediate_size: config.intermediateSize,
    vocab_size: config.vocabSize,
    num_nextn_predict_layers: config.mtpLayers,
    rms_norm_eps: config.rmsNormEps,
    rope_theta: config.ropeTheta,
    max_position_embeddings: config.maxPositions,
    tie_word_embeddings: config.tiedHead,
    hidden_act: 'silu',
    torch_dtype: 'bfloat16',
    bos_token_id: config.bosTokenId,
    eos_token_id: config.eosTokenIds,
  };
}

/**
 * Writes config.json and bf16 weights: matrices and biases normal with deviation 0.02, norm gains about 1. The same
 * seed gives the same bytes. Returns the size of all tensors in bytes. The signal cancels between two chunks.
 */
export async function writeRandomCheckpoint(
  { directory, config, seed, files = 1, chunksOf }: RandomCheckpoint,
  signal: AbortSignal,
): Promise<number> {
  await mkdir(directory, { recursive: true });
  await writeFile(join(directory, 'config.json'), JSON.stringify(configToJson(config), undefined, 2));
  const tensors = [...expectedTensors(config)].map(([name, shape], index) => ({
    name,
    shape,
    dtype: 'BF16' as const,
    chunks:
      chunksOf?.(name, shape) ??
      randomChunks(shape, { norm: name.endsWith('norm.weight'), seed: seed + index }),
  }));
  const totalBytes = tensors.reduce((sum, tensor) => sum + tensorBytes(tensor), 0);
  if (files === 1) {
    await writeSafetensors(join(directory, 'model.safetensors'), tensors, signal);
    return totalBytes;
  }
  const weightMap: Record<string, string> = {};
  const groups: TensorData[][] = Array.from({ length: files }, () => []);
  let placedBytes = 0;
  for (const tensor of tensors) {
    groups[Math.floor((placedBytes / totalBytes) * files)]?.push(tensor);
    placedBytes += tensorBytes(tensor);
  }
  for (const [index, group] of groups.entries()) {
    const file = `model-${fiveDigits(index + 1)}-of-${fiveDigits(files)}.safetensors`;
    await writeSafetensors(join(directory, file), group, signal);
    for (const { name } of group) {
      weightMap[name] = file;
    }
  }
  const index = { metadata: { total_size: totalBytes }, weight_map: weightMap };
  await writeFile(join(directory, 'model.safetensors.index.json'), JSON.stringify(index));
  return totalBytes;
}

/** Writes one safetensors file, its tensors in the given order. The signal cancels between two chunks. */
export async function writeSafetensors(
  path: string,
  tensors: readonly TensorData[],
  signal: AbortSignal,
): Promise<void> {
  const header: Record<string, unknown> = { __metadata__: { format: 'pt' } };
  let end = 0;
  for (const tensor of tensors) {
    const begin = end;
    end += tensorBytes(tensor);
    header[tensor.name] = { dtype: tensor.dtype, shape: tensor.shape, data_offsets: [begin, end] };
  }
  const text = JSON.stringify(header);
  // Data starts on a multiple of 8, as the format's own library writes it.
  const json = Buffer.from(text.padEnd(Math.ceil(text.length / 8) * 8));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  const file = await open(path, 'w');
  try {
    await file.write(length);
    await file.write(json);
    for (const tensor of tensors) {
      for (const chunk of tensor.chunks) {
        signal.throwIfAborted();
        await file.write(chunk);
      }
    }
  } finally {
    await file.close();
  }
}

function fiveDigits(value: number): string {
  return String(value).padStart(5, '0');
}

function tensorBytes({ dtype, shape }: Pick<TensorData, 'dtype' | 'shape'>): number {
  return shape.reduce((product, dim) => product * dim, elementBytes[dtype]);
}

/** Values drawn once per scale; tensors use runs of it, at positions chosen by their seed. */
const poolSize = 2 ** 20;
const pools = new Map<boolean, Uint16Array<ArrayBuffer>>();

function* randomChunks(
  shape: readonly number[],
  { norm, seed }: { readonly norm: boolean; readonly seed: number },
): Iterable<Uint8Array> {
  const pool = pools.get(norm) ?? createPool(norm);
  pools.set(norm, pool);
  const random = createRandom(seed);
  let left = shape.reduce((product, dim) => product * dim, 1);
  while (left > 0) {
    const start = random() % (poolSize / 2);
    const count = Math.min(left, poolSize / 2 - (random() % 1024));
    yield new Uint8Array(pool.buffer, start * 2, count * 2);
    left -= count;
  }
}

function createPool(norm: boolean): Uint16Array<ArrayBuffer> {
  const random = createRandom(1);
  const values = Float32Array.from({ length: poolSize }, () => {
    const [a, b] = [(random() + 1) / 2 ** 32, random() / 2 ** 32];
    const normal = Math.sqrt(-2 * Math.log(a)) * Math.cos(2 * Math.PI * b);
    return norm ? 1 + 0.1 * normal : 0.02 * normal;
  });
  const bits = new Uint32Array(values.buffer);
  return Uint16Array.from(bits, (bit) => (bit + 0x8000) >>> 16);
}

/** Mulberry32: 32 bits a call. */
function createRandom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return (mixed ^ (mixed >>> 14)) >>> 0;
  };
}
