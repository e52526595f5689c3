// A checkpoint directory in the Hugging Face layout: its config, the location of each tensor, and a hash of its
// contents. Owns the list of MiMo's tensors and their shapes; reads headers only, and knows nothing of ranks or
// precisions.

import { createHash, type Hash } from 'node:crypto';
import { access, open, readFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { ClusterError } from '@mimo/core/process/errors';
import { type ModelConfig, parseModelConfig } from '../shards/model-config.ts';
import { readSafetensorsHeader, type TensorLocation } from './safetensors.ts';

/** An opened checkpoint: exactly the tensors that the config calls for, each of the right shape. */
export interface Checkpoint {
  readonly config: ModelConfig;
  readonly tensors: ReadonlyMap<string, TensorLocation>;
  /** Paths of the safetensors files. */
  readonly files: readonly string[];
}

/** Names of the tensors outside the layers. */
export const backboneTensors = {
  embedding: 'model.embed_tokens.weight',
  norm: 'model.norm.weight',
  head: 'lm_head.weight',
} as const;

const singleFile = 'model.safetensors';
const indexFile = 'model.safetensors.index.json';
const problemsShown = 8;

/**
 * Reads a checkpoint directory. Throws `not_found` without a config or weights, `invalid_argument` if the engine cannot
 * run the config or config and tensors disagree (missing, unknown or wrongly shaped tensors, listed by name), and
 * `data_loss` if a file is damaged.
 */
export async function openCheckpoint(directory: string): Promise<Checkpoint> {
  const config = await readModelConfig(directory);
  const located = await locateTensors(directory);
  assertTensors(config, located);
  return {
    config,
    tensors: new Map(located.map((tensor) => [tensor.name, tensor])),
    files: [...new Set(located.map((tensor) => tensor.path))].toSorted(),
  };
}

/** The config alone, as `openCheckpoint` reads it: for a directory that has no weights yet. */
export async function readModelConfig(directory: string): Promise<ModelConfig> {
  const [config, generationConfig, tokenizerConfig] = await Promise.all([
    readJson(join(directory, 'config.json')),
    readJson(join(directory, 'generation_config.json')),
    readJson(join(directory, 'tokenizer_config.json')),
  ]);
  if (config === undefined) {
    throw new ClusterError('not_found', `${directory}: has no config.json`);
  }
  return parseModelConfig({ config, generationConfig, tokenizerConfig });
}

/** The name and shape of every tensor that a checkpoint of this config holds, and no other. */
export function expectedTensors(config: ModelConfig): Map<string, readonly number[]> {
  const hidden = config.hiddenSize;
  const expected = new Map<string, readonly number[]>([
    [backboneTensors.embedding, [config.vocabSize, hidden]],
    [backboneTensors.norm, [hidden]],
  ]);
  if (!config.tiedHead) {
    expected.set(backboneTensors.head, [config.vocabSize, hidden]);
  }
  const blocks = [
    ...Array.from({ length: config.layers }, (_, layer) => `model.layers.${layer}`),
    ...Array.from({ length: config.mtpLayers }, (_, layer) => `model.mtp_layers.${layer}`),
  ];
  const query = config.queryHeads * config.headDim;
  const keyValue = config.kvHeads * config.headDim;
  for (const block of blocks) {
    expected.set(`${block}.input_layernorm.weight`, [hidden]);
    expected.set(`${block}.self_attn.q_proj.weight`, [query, hidden]);
    expected.set(`${block}.self_attn.q_proj.bias`, [query]);
    expected.set(`${block}.self_attn.k_proj.weight`, [keyValue, hidden]);
    expected.set(`${block}.self_attn.k_proj.bias`, [keyValue]);
    expected.set(`${block}.self_attn.v_proj.weight`, [keyValue, hidden]);
    expected.set(`${block}.self_attn.v_proj.bias`, [keyValue]);
    expected.set(`${block}.self_attn.o_proj.weight`, [hidden, query]);
    expected.set(`${block}.post_attention_layernorm.weight`, [hidden]);
    expected.set(`${block}.mlp.gate_proj.weight`, [config.intermediateSize, hidden]);
    expected.set(`${block}.mlp.up_proj.weight`, [config.intermediateSize, hidden]);
    expected.set(`${block}.mlp.down_proj.weight`, [hidden, config.intermediateSize]);
    if (block.startsWith('model.mtp_layers.')) {
      expected.set(`${block}.token_layernorm.weight`, [hidden]);
      expected.set(`${block}.hidden_layernorm.weight`, [hidden]);
      expected.set(`${block}.input_proj.weight`, [hidden, 2 * hidden]);
      expected.set(`${block}.final_layernorm.weight`, [hidden]);
    }
  }
  return expected;
}

function assertTensors(config: ModelConfig, located: readonly TensorLocation[]): void {
  const expected = expectedTensors(config);
  const problems: string[] = [];
  for (const tensor of located) {
    const shape = expected.get(tensor.name);
    if (shape === undefined) {
      // Writers that know tied weights may still store the copy.
      if (!(config.tiedHead && tensor.name === backboneTensors.head)) {
        problems.push(`${tensor.name} is not a tensor of this config`);
      }
    } else if (shape.join() !== tensor.shape.join()) {
      problems.push(`${tensor.name} must be [${shape.join(', ')}], is [${tensor.shape.join(', ')}]`);
    }
    expected.delete(tensor.name);
  }
  problems.push(...[...expected.keys()].map((name) => `${name} is missing`));
  if (problems.length > 0) {
    const more = problems.length > problemsShown ? `; and ${problems.length - problemsShown} more` : '';
    throw new ClusterError(
      'invalid_argument',
      `checkpoint and config disagree: ${problems.slice(0, problemsShown).join('; ')}${more}`,
    );
  }
}

async function locateTensors(directory: string): Promise<TensorLocation[]> {
  const single = join(directory, singleFile);
  if (await exists(single)) {
    return readSafetensorsHeader(single);
  }
  const index = await readJson(join(directory, indexFile));
  if (index === undefined) {
    throw new ClusterError('not_found', `${directory}: has neither ${singleFile} nor ${indexFile}`);
  }
  return locateSharded(directory, parseWeightMap(index));
}

async function locateSharded(
  directory: string,
  weightMap: ReadonlyMap<string, string>,
): Promise<TensorLocation[]> {
  const located: TensorLocation[] = [];
  for (const file of new Set(weightMap.values())) {
    located.push(...(await readSafetensorsHeader(join(directory, file))));
  }
  const fileOf = new Map<string, string>();
  for (const tensor of located) {
    const file = basename(tensor.path);
    const mapped = weightMap.get(tensor.name) ?? 'no file';
    if (mapped !== file) {
      throw new ClusterError(
        'data_loss',
        `${indexFile}: maps ${tensor.name} to ${mapped}, but ${file} holds it`,
      );
    }
    fileOf.set(tensor.name, file);
  }
  for (const [name, file] of weightMap) {
    if (!fileOf.has(name)) {
      throw new ClusterError('data_loss', `${indexFile}: maps ${name} to ${file}, which does not hold it`);
    }
  }
  return located;
}

function parseWeightMap(index: unknown): Map<string, string> {
  const map = isRecord(index) ? index['weight_map'] : undefined;
  if (!isRecord(map) || Object.keys(map).length === 0) {
    throw new ClusterError('data_loss', `${indexFile}: weight_map must be an object with an entry a tensor`);
  }
  return new Map(
    Object.entries(map).map(([name, file]) => {
      if (typeof file !== 'string' || basename(file) !== file || !file.endsWith('.safetensors')) {
        throw new ClusterError(
          'data_loss',
          `${indexFile}: weight_map of ${name} must name a .safetensors file beside it, is ${JSON.stringify(file)}`,
        );
      }
      return [name, file];
    }),
  );
}

const wholeFileMaxBytes = 64 * 2 ** 20;
const sampleBytes = 2 ** 20;
const samples = 16;

/**
 * The sha256 of a checkpoint: its config, and the name, size, header and contents of each safetensors file. Files below
 * 64 MiB are hashed whole, larger ones in 16 evenly spaced blocks of 1 MiB (the first and last included). Any training
 * step changes these blocks; a hand edit of a few weights between them may go unnoticed.
 */
export async function hashCheckpoint(checkpoint: Checkpoint, signal: AbortSignal): Promise<string> {
  const hash = createHash('sha256').update(JSON.stringify(checkpoint.config));
  for (const path of checkpoint.files) {
    const tensors = [...checkpoint.tensors.values()].filter((tensor) => tensor.path === path);
    hash.update(
      JSON.stringify(tensors.map(({ name, dtype, shape, offset }) => [name, dtype, shape, offset])),
    );
    await hashFile(hash, path, signal);
  }
  return hash.digest('hex');
}

async function hashFile(hash: Hash, path: string, signal: AbortSignal): Promise<void> {
  const file = await open(path);
  try {
    const { size } = await file.stat();
    hash.update(`${basename(path)} ${size}\n`);
    const whole = size < wholeFileMaxBytes;
    const blocks = whole ? Math.ceil(size / sampleBytes) : samples;
    const block = Buffer.alloc(sampleBytes);
    for (let i = 0; i < blocks; i++) {
      signal.throwIfAborted();
      const position = whole ? i * sampleBytes : Math.floor(((size - sampleBytes) * i) / (samples - 1));
      const { bytesRead } = await file.read(block, 0, sampleBytes, position);
      hash.update(block.subarray(0, bytesRead));
    }
  } finally {
    await file.close();
  }
}

async function readJson(path: string): Promise<unknown> {
  if (!(await exists(path))) {
    return undefined;
  }
  const text = await readFile(path, 'utf8');
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new ClusterError(
      'invalid_argument',
      `${basename(path)}: is not JSON: ${ClusterError.from(error).message}`,
      {
        cause: error,
      },
    );
  }
}

async function exists(path: string): Promise<boolean> {
  return access(path).then(
    () => true,
    () => false,
  );
}

function isRecord(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}
