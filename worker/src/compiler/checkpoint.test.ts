// Damaged and contradictory checkpoints, each made from a sound one by one change.

import { mkdtempSync, readFileSync, renameSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { expectedTensors, hashCheckpoint, openCheckpoint } from './checkpoint.ts';
import type { ModelConfig } from '../shards/model-config.ts';
import {
  configToJson,
  mimo7b,
  type TensorData,
  writeRandomCheckpoint,
  writeSafetensors,
} from './random-checkpoint.ts';

const config: ModelConfig = {
  ...mimo7b,
  hiddenSize: 32,
  layers: 1,
  queryHeads: 2,
  kvHeads: 1,
  headDim: 16,
  intermediateSize: 64,
  vocabSize: 40,
  bosTokenId: null,
  eosTokenIds: [],
};
const { signal } = new AbortController();
let directory = '';

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'mimo-checkpoint-'));
});
afterEach(() => rmSync(directory, { recursive: true }));

interface Header {
  [name: string]: { dtype: string; shape: number[]; data_offsets: [number, number] };
}

/** Rewrites the header of a file as text, its length field with it. */
function changeHeader(change: (header: string) => string, file = 'model.safetensors'): void {
  const bytes = readFileSync(join(directory, file));
  const dataStart = 8 + Number(bytes.readBigUInt64LE());
  const header = Buffer.from(change(bytes.toString('utf8', 8, dataStart)));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(header.length));
  writeFileSync(join(directory, file), Buffer.concat([length, header, bytes.subarray(dataStart)]));
}

function changeEntry(name: string, change: (entry: Header[string]) => void): void {
  changeHeader((text) => {
    const header: Header = JSON.parse(text);
    const entry = header[name];
    expect(entry).toBeDefined();
    if (entry !== undefined) {
      change(entry);
    }
    return JSON.stringify(header);
  });
}

/** Writes every expected tensor as zeros, in the shapes that `change` leaves. */
async function writeZeros(change: (shapes: Map<string, readonly number[]>) => void): Promise<void> {
  const shapes = expectedTensors(config);
  change(shapes);
  const tensors = [...shapes].map(([name, shape]): TensorData => {
    const bytes = shape.reduce((product, dim) => product * dim, 2);
    return { name, dtype: 'BF16', shape, chunks: [new Uint8Array(bytes)] };
  });
  writeFileSync(join(directory, 'config.json'), JSON.stringify(configToJson(config)));
  await writeSafetensors(join(directory, 'model.safetensors'), tensors, signal);
}

function changeJson(file: string, change: (json: Record<string, unknown>) => void): void {
  const json: Record<string, unknown> = JSON.parse(readFileSync(join(directory, file), 'utf8'));
  change(json);
  writeFileSync(join(directory, file), JSON.stringify(json));
}

function changeWeightMap(change: (map: Record<string, unknown>) => void): void {
  changeJson('model.safetensors.index.json', (index) =>
    change(index['weight_map'] as Record<string, unknown>),
  );
}

function truncated(bytes: number): () => void {
  return () => truncateSync(join(directory, 'model.safetensors'), bytes);
}

function badJson(file: string): () => void {
  return () => writeFileSync(join(directory, file), '{"a":');
}

async function hash(): Promise<string> {
  return hashCheckpoint(await openCheckpoint(directory), signal);
}

const norm = 'model.norm.weight';
const embedding = 'model.embed_tokens.weight';

describe('openCheckpoint', () => {
  it.each([1, 3])('opens a sound checkpoint of %i files', async (files) => {
    await writeRandomCheckpoint({ directory, config, seed: 1, files }, signal);
    const checkpoint = await openCheckpoint(directory);
    expect(checkpoint.config).toEqual(config);
    expect(checkpoint.files).toHaveLength(files);
    const shapes = [...checkpoint.tensors.values()].map(({ name, shape }) => [name, shape]);
    expect(new Map(shapes as [string, number[]][])).toEqual(expectedTensors(config));
  });

  it('knows the 451 tensors and 15,666,819,072 bytes of the real model', () => {
    const shapes = [...expectedTensors(mimo7b).values()];
    expect(shapes).toHaveLength(451);
    const bytes = shapes.reduce((sum, shape) => sum + shape.reduce((product, dim) => product * dim, 2), 0);
    expect(bytes).toBe(15_666_819_072);
  });

  it('accepts a tied head with or without its copy', async () => {
    const tied = { ...config, tiedHead: true };
    await writeRandomCheckpoint({ directory, config: tied, seed: 1 }, signal);
    expect((await openCheckpoint(directory)).tensors.has('lm_head.weight')).toBe(false);
    await writeRandomCheckpoint({ directory, config, seed: 1 }, signal);
    changeJson('config.json', (json) => (json['tie_word_embeddings'] = true));
    expect((await openCheckpoint(directory)).tensors.has('lm_head.weight')).toBe(true);
  });

  const changes: [string, () => void | Promise<void>, string, RegExp][] = [
    [
      'an empty file',
      truncated(0),
      'data_loss',
      /model.safetensors: is truncated: .* 8 bytes, the file has 0/,
    ],
    ['a cut in the header length', truncated(5), 'data_loss', /is truncated: .* the file has 5/],
    ['a cut in the header', truncated(100), 'data_loss', /header length must be at most 92 bytes, is \d+/],
    [
      'a cut in the data',
      truncated(9_000),
      'data_loss',
      /tensor \S+: data_offsets must lie within the file's \d+/,
    ],
    [
      'a header length beyond the limit',
      () => writeFileSync(join(directory, 'model.safetensors'), Buffer.alloc(64, 0x7f)),
      'data_loss',
      /header length must be at most 56 bytes, is 9187/,
    ],
    [
      'a header that is not JSON',
      () => changeHeader((text) => text.replace('{', '[')),
      'data_loss',
      /is not JSON/,
    ],
    ['a header that is no object', () => changeHeader(() => '[]'), 'data_loss', /must be a JSON object/],
    [
      'a header that is not UTF-8',
      () => {
        const file = join(directory, 'model.safetensors');
        const bytes = readFileSync(file);
        bytes[20] = 0xff;
        writeFileSync(file, bytes);
      },
      'data_loss',
      /header is not UTF-8/,
    ],
    [
      'a duplicate name',
      () => changeHeader((text) => text.replace('"lm_head.weight"', `"${norm}"`)),
      'data_loss',
      /tensor model.norm.weight appears twice/,
    ],
    [
      'an unknown dtype',
      () => changeEntry(norm, (entry) => (entry.dtype = 'F8_E4M3')),
      'data_loss',
      /tensor model.norm.weight: dtype must be one of BF16, F16, F32, is "F8_E4M3"/,
    ],
    [
      'a dtype of another width',
      () => changeEntry(norm, (entry) => (entry.dtype = 'F32')),
      'data_loss',
      /tensor model.norm.weight: F32 \[32\] takes 128 bytes, data_offsets span 64/,
    ],
    [
      'a shape of another size',
      () => changeEntry(norm, (entry) => (entry.shape = [33])),
      'data_loss',
      /tensor model.norm.weight: BF16 \[33\] takes 66 bytes, data_offsets span 64/,
    ],
    [
      'a shape that is not a list of counts',
      () => changeEntry(norm, (entry) => (entry.shape = [-32])),
      'data_loss',
      /tensor model.norm.weight: shape must be a list of counts, is \[-32\]/,
    ],
    [
      'offsets the wrong way round',
      () => changeEntry(norm, (entry) => (entry.data_offsets = [64, 0])),
      'data_loss',
      /tensor model.norm.weight: data_offsets must lie within/,
    ],
    [
      'offsets beyond the file',
      () => changeEntry(norm, (entry) => (entry.data_offsets = [1e9, 1e9 + 64])),
      'data_loss',
      /tensor model.norm.weight: data_offsets must lie within/,
    ],
    [
      'offsets missing',
      () => changeEntry(norm, (entry) => (entry.data_offsets = [] as never)),
      'data_loss',
      /tensor model.norm.weight: data_offsets must be two counts/,
    ],
    [
      'overlapping tensors',
      () => changeEntry(norm, (entry) => (entry.data_offsets = [0, 64])),
      'data_loss',
      /tensor model.embed_tokens.weight overlaps tensor model.norm.weight by 64 bytes/,
    ],
    [
      'bytes that belong to no tensor',
      () =>
        changeHeader((text) => {
          const { [norm]: _, ...rest } = JSON.parse(text) as Header;
          return JSON.stringify(rest);
        }),
      'data_loss',
      /64 bytes between \S* ?\S+ and tensor \S+ belong to no tensor/,
    ],
    [
      'bytes after the last tensor',
      () => writeFileSync(join(directory, 'model.safetensors'), 'xyz', { flag: 'a' }),
      'data_loss',
      /3 bytes after tensor \S+ belong to no tensor/,
    ],
    ['no config', () => rmSync(join(directory, 'config.json')), 'not_found', /has no config.json/],
    ['a config that is not JSON', badJson('config.json'), 'invalid_argument', /config.json: is not JSON/],
    [
      'a generation config that is not JSON',
      badJson('generation_config.json'),
      'invalid_argument',
      /generation_config.json: is not JSON/,
    ],
    [
      'no weights',
      () => rmSync(join(directory, 'model.safetensors')),
      'not_found',
      /neither model.safetensors nor model.safetensors.index.json/,
    ],
    [
      'a missing tensor',
      () => writeZeros((shapes) => shapes.delete('model.layers.0.mlp.up_proj.weight')),
      'invalid_argument',
      /model.layers.0.mlp.up_proj.weight is missing/,
    ],
    [
      'a missing bias',
      () => writeZeros((shapes) => shapes.delete('model.layers.0.self_attn.k_proj.bias')),
      'invalid_argument',
      /model.layers.0.self_attn.k_proj.bias is missing/,
    ],
    [
      'a missing MTP tensor',
      () => writeZeros((shapes) => shapes.delete('model.mtp_layers.0.input_proj.weight')),
      'invalid_argument',
      /model.mtp_layers.0.input_proj.weight is missing/,
    ],
    [
      'a missing head',
      () => writeZeros((shapes) => shapes.delete('lm_head.weight')),
      'invalid_argument',
      /lm_head.weight is missing/,
    ],
    [
      'a bias on o_proj',
      () => writeZeros((shapes) => shapes.set('model.layers.0.self_attn.o_proj.bias', [32])),
      'invalid_argument',
      /model.layers.0.self_attn.o_proj.bias is not a tensor of this config/,
    ],
    [
      'a q norm, as Qwen3 has',
      () => writeZeros((shapes) => shapes.set('model.layers.0.self_attn.q_norm.weight', [16])),
      'invalid_argument',
      /model.layers.0.self_attn.q_norm.weight is not a tensor of this config/,
    ],
    [
      'a wrong shape',
      () => writeZeros((shapes) => shapes.set('model.layers.0.mlp.down_proj.weight', [64, 32])),
      'invalid_argument',
      /model.layers.0.mlp.down_proj.weight must be \[32, 64\], is \[64, 32\]/,
    ],
    [
      'another vocabulary',
      () => changeJson('config.json', (json) => (json['vocab_size'] = 41)),
      'invalid_argument',
      /model.embed_tokens.weight must be \[41, 32\], is \[40, 32\]/,
    ],
    [
      'more layers in the config',
      () => changeJson('config.json', (json) => (json['num_hidden_layers'] = 2)),
      'invalid_argument',
      /model.layers.1.input_layernorm.weight is missing.*and 4 more/,
    ],
    [
      'fewer layers in the config',
      () => changeJson('config.json', (json) => (json['num_nextn_predict_layers'] = 0)),
      'invalid_argument',
      /model.mtp_layers.0.\S+ is not a tensor of this config.*and 8 more/,
    ],
    [
      'another number of heads',
      () => changeJson('config.json', (json) => (json['num_key_value_heads'] = 2)),
      'invalid_argument',
      /k_proj.weight must be \[32, 32\], is \[16, 32\]/,
    ],
  ];

  it.each(changes)('rejects %s', async (_, change, code, message) => {
    await writeRandomCheckpoint({ directory, config, seed: 1 }, signal);
    await change();
    await expect(openCheckpoint(directory)).rejects.toThrow(
      expect.objectContaining({ code, message: expect.stringMatching(message) }),
    );
  });

  const shard = 'model-00002-of-00003.safetensors';
  const indexChanges: [string, () => void, string, RegExp][] = [
    ['a missing file', () => rmSync(join(directory, shard)), 'not_found', /model-00002-of-00003.safetensors/],
    [
      'a tensor mapped to another file',
      () => changeWeightMap((map) => (map[embedding] = shard)),
      'data_loss',
      /maps model.embed_tokens.weight to model-00002-of-00003.safetensors, but model-00001-of-00003.safetensors/,
    ],
    [
      'a tensor missing from every file',
      () => changeWeightMap((map) => (map['model.extra.weight'] = shard)),
      'data_loss',
      /maps model.extra.weight to model-00002-of-00003.safetensors, which does not hold it/,
    ],
    [
      'a tensor missing from the index',
      () => changeWeightMap((map) => delete map[embedding]),
      'data_loss',
      /maps model.embed_tokens.weight to no file, but model-00001-of-00003.safetensors holds it/,
    ],
    [
      'a file outside the directory',
      () => changeWeightMap((map) => (map[embedding] = '../model-00001-of-00003.safetensors')),
      'data_loss',
      /weight_map of model.embed_tokens.weight must name a .safetensors file beside it/,
    ],
    [
      'two files swapped',
      () => {
        renameSync(join(directory, shard), join(directory, 'other'));
        renameSync(join(directory, 'model-00001-of-00003.safetensors'), join(directory, shard));
        renameSync(join(directory, 'other'), join(directory, 'model-00001-of-00003.safetensors'));
      },
      'data_loss',
      /index.json: maps \S+ to \S+, but \S+ holds it/,
    ],
    [
      'no weight map',
      () => changeJson('model.safetensors.index.json', (index) => delete index['weight_map']),
      'data_loss',
      /weight_map must be an object/,
    ],
  ];

  it.each(indexChanges)('rejects an index with %s', async (_, change, code, message) => {
    await writeRandomCheckpoint({ directory, config, seed: 1, files: 3 }, signal);
    change();
    await expect(openCheckpoint(directory)).rejects.toThrow(
      expect.objectContaining({ code, message: expect.stringMatching(message) }),
    );
  });
});

describe('hashCheckpoint', () => {
  it('depends on the contents only: equal for copies, different after one changed byte or config field', async () => {
    await writeRandomCheckpoint({ directory, config, seed: 1, files: 2 }, signal);
    const original = await hash();
    await writeRandomCheckpoint({ directory, config, seed: 1, files: 2 }, signal);
    expect(await hash()).toBe(original);

    const file = join(directory, 'model-00002-of-00002.safetensors');
    const bytes = readFileSync(file);
    const last = bytes.length - 1;
    bytes[last] = (bytes[last] ?? 0) ^ 1;
    writeFileSync(file, bytes);
    const changed = await hash();
    expect(changed).not.toBe(original);
    changeJson('config.json', (json) => (json['rope_theta'] = 5));
    expect(await hash()).not.toBe(changed);
  });

  it('stops when its signal aborts', async () => {
    await writeRandomCheckpoint({ directory, config, seed: 1 }, signal);
    const checkpoint = await openCheckpoint(directory);
    await expect(hashCheckpoint(checkpoint, AbortSignal.abort())).rejects.toThrow(/abort/);
  });
});
