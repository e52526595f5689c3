import { createHash } from 'node:crypto';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ClusterError } from '@mimo/core/process/errors';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { openCheckpoint } from './checkpoint.ts';
import { compile, type CompileOptions, type CompileProgress, type CompileResult } from './compile.ts';
import type { ModelConfig } from '../shards/model-config.ts';
import {
  configToJson,
  mimo7b,
  type TensorData,
  writeRandomCheckpoint,
  writeSafetensors,
} from './random-checkpoint.ts';
import { readShardManifest } from '../shards/shard.ts';

const small: ModelConfig = {
  ...mimo7b,
  hiddenSize: 32,
  layers: 1,
  queryHeads: 4,
  kvHeads: 2,
  headDim: 16,
  intermediateSize: 96,
  vocabSize: 131,
  maxPositions: 32,
  mtpLayers: 0,
  bosTokenId: null,
  eosTokenIds: [],
};
/** An embedding and a head of 20 M weights each: several bands, several jobs. */
const large: ModelConfig = { ...small, vocabSize: 625_001 };
/** Compiling the large model takes a second or two, and several times that beside other work. */
const timeoutMs = 60_000;
const { signal } = new AbortController();
let directory = '';
let modelDirectory = '';
let largeDirectory = '';
let outDirectory = '';
let outs = 0;

beforeAll(async () => {
  directory = mkdtempSync(join(tmpdir(), 'mimo-compile-'));
  modelDirectory = join(directory, 'small');
  largeDirectory = join(directory, 'large');
  await writeRandomCheckpoint({ directory: modelDirectory, config: small, seed: 3, files: 2 }, signal);
  await writeRandomCheckpoint({ directory: largeDirectory, config: large, seed: 3, files: 2 }, signal);
});
beforeEach(() => {
  outDirectory = join(directory, `out-${outs++}`);
});
afterAll(() => rmSync(directory, { recursive: true }));

function options(change: Partial<CompileOptions> = {}): CompileOptions {
  return { modelDirectory, outDirectory, tensorParallel: 2, precision: 'int8', ...change };
}

function hashRanks({ rankDirectories }: CompileResult): string[] {
  return rankDirectories.flatMap((rank) =>
    readdirSync(rank).map((file) => {
      const hash = createHash('sha256')
        .update(readFileSync(join(rank, file)))
        .digest('hex');
      return `${file} ${hash}`;
    }),
  );
}

async function readTensor(source: string, name: string): Promise<Uint8Array> {
  const { path = '', offset = 0, bytes = 0 } = (await openCheckpoint(source)).tensors.get(name) ?? {};
  return Uint8Array.from(readFileSync(path).subarray(offset, offset + bytes));
}

/** Rewrites the small checkpoint into one file, with `change` applied to each tensor. */
async function rewriteCheckpoint(
  target: string,
  config: ModelConfig,
  change: (tensor: Omit<TensorData, 'chunks'> & { readonly data: Uint8Array }) => TensorData,
): Promise<void> {
  mkdirSync(target);
  writeFileSync(join(target, 'config.json'), JSON.stringify(configToJson(config)));
  const tensors: TensorData[] = [];
  for (const { name, dtype, shape } of (await openCheckpoint(modelDirectory)).tensors.values()) {
    tensors.push(change({ name, dtype, shape, data: await readTensor(modelDirectory, name) }));
  }
  await writeSafetensors(join(target, 'model.safetensors'), tensors, signal);
}

/** Compiles for one rank and reads its weights. */
async function readWeights(source: string): Promise<Buffer> {
  const { rankDirectories } = await compile(options({ modelDirectory: source, tensorParallel: 1 }), signal);
  return readFileSync(join(rankDirectories[0] ?? '', 'weights.bin'));
}

/** The large model's quantised head, put together from all ranks: its blocks, then its scales. */
async function readHead(tensorParallel: number): Promise<Buffer> {
  const { rankDirectories } = await compile(
    options({
      modelDirectory: largeDirectory,
      tensorParallel,
      outDirectory: join(outDirectory, String(tensorParallel)),
    }),
    signal,
  );
  const blocks: Buffer[] = [];
  const scales: Buffer[] = [];
  for (const rank of rankDirectories) {
    // The head comes last in a rank's weights; each of its two parts begins on a multiple of 64.
    const { vocabRows } = await readShardManifest(rank);
    const weights = readFileSync(join(rank, 'weights.bin'));
    const scalesStart = weights.length - vocabRows * 4;
    const blocksStart = scalesStart - Math.ceil((vocabRows * 32) / 64) * 64;
    blocks.push(weights.subarray(blocksStart, blocksStart + vocabRows * 32));
    scales.push(weights.subarray(scalesStart));
  }
  return Buffer.concat([...blocks, ...scales]);
}

/** Compiles, and aborts once 0.3 of the work is done. */
async function compileInterrupted(change: Partial<CompileOptions> = {}): Promise<void> {
  const interruption = new AbortController();
  const stopped = compile(
    options({
      ...change,
      threads: 1,
      onProgress: ({ doneBytes, totalBytes }) => {
        if (doneBytes >= totalBytes * 0.3) {
          interruption.abort(new ClusterError('canceled', 'interrupted'));
        }
      },
    }),
    interruption.signal,
  );
  await expect(stopped).rejects.toThrow(expect.objectContaining({ code: 'canceled' }));
}

describe('compile', { timeout: timeoutMs }, () => {
  it('leaves one complete directory per rank and nothing else', async () => {
    const result = await compile(options(), signal);
    expect(result.upToDate).toBe(false);
    expect(readdirSync(outDirectory).toSorted()).toEqual(['rank-0', 'rank-1']);
    const manifests = await Promise.all(result.rankDirectories.map(readShardManifest));
    expect(manifests.map(({ key }) => key)).toEqual([result.key, result.key]);
    expect(manifests.map(({ vocabStart, vocabRows }) => [vocabStart, vocabRows])).toEqual([
      [0, 66],
      [66, 65],
    ]);
    const names = ['embed', 'attention', 'layer.0.qkv', 'layer.0.o', 'layer.0.mlp', 'final', 'head'];
    expect(manifests[1]?.segments.map(({ name }) => name)).toEqual(names);
    const bytes = result.rankDirectories.map((rank) =>
      ['weights.bin', 'embedding.bin'].reduce((sum, file) => sum + statSync(join(rank, file)).size, 0),
    );
    expect(result.rankBytes).toEqual(bytes);
  });

  it('stores the embedding once for all ranks, as the checkpoint has it', async () => {
    const { rankDirectories } = await compile(options(), signal);
    const files = rankDirectories.map((rank) => join(rank, 'embedding.bin'));
    expect(new Set(files.map((file) => statSync(file).ino)).size).toBe(1);
    const tensor = (await openCheckpoint(modelDirectory)).tensors.get('model.embed_tokens.weight');
    const stored = readFileSync(tensor?.path ?? '').subarray(
      tensor?.offset,
      (tensor?.offset ?? 0) + (tensor?.bytes ?? 0),
    );
    expect(readFileSync(files[0] ?? '').equals(stored)).toBe(true);
  });

  it('records the location of every weight in the manifest, for runtimes that do not use the graphs', async () => {
    const { rankDirectories } = await compile(options({ precision: 'bf16', tensorParallel: 1 }), signal);
    const [rank = ''] = rankDirectories;
    const { segments } = await readShardManifest(rank);
    const read = (segment: string, weight: string): Buffer => {
      const { file, offset, bytes } = segments.find(({ name }) => name === segment)!.weights[weight]!;
      return readFileSync(join(rank, file)).subarray(offset, offset + bytes);
    };
    const layer = 'model.layers.0';
    for (const [segment, weight, ...sources] of [
      ['layer.0.qkv', 'norm', 'input_layernorm.weight'],
      [
        'layer.0.qkv',
        'weight',
        'self_attn.q_proj.weight',
        'self_attn.k_proj.weight',
        'self_attn.v_proj.weight',
      ],
      ['layer.0.qkv', 'bias', 'self_attn.q_proj.bias', 'self_attn.k_proj.bias', 'self_attn.v_proj.bias'],
      ['layer.0.o', 'weight', 'self_attn.o_proj.weight'],
      ['layer.0.mlp', 'norm', 'post_attention_layernorm.weight'],
      ['layer.0.mlp', 'gate.weight', 'mlp.gate_proj.weight'],
      ['layer.0.mlp', 'up.weight', 'mlp.up_proj.weight'],
      ['layer.0.mlp', 'down.weight', 'mlp.down_proj.weight'],
    ] as const) {
      const stored = await Promise.all(
        sources.map((source) => readTensor(modelDirectory, `${layer}.${source}`)),
      );
      expect(read(segment, weight).equals(Buffer.concat(stored)), `${segment} ${weight}`).toBe(true);
    }
  });

  it('writes the same quantised weights for every number of ranks', async () => {
    expect((await readHead(1)).equals(await readHead(2))).toBe(true);
  });

  it('writes the same shards for F32 weights as for equal BF16 weights', async () => {
    const f32Directory = join(directory, 'f32');
    await rewriteCheckpoint(f32Directory, small, ({ data, ...tensor }) => {
      const values = Uint32Array.from(new Uint16Array(data.buffer), (half) => half << 16);
      return { ...tensor, dtype: 'F32', chunks: [new Uint8Array(values.buffer)] };
    });
    expect((await readWeights(f32Directory)).equals(await readWeights(modelDirectory))).toBe(true);
  });

  it('uses the embedding as the head when they are tied', async () => {
    const tiedDirectory = join(directory, 'tied');
    const copiedDirectory = join(directory, 'copied');
    await writeRandomCheckpoint(
      { directory: tiedDirectory, config: { ...small, tiedHead: true }, seed: 9 },
      signal,
    );
    const embedding = await readTensor(tiedDirectory, 'model.embed_tokens.weight');
    await rewriteCheckpoint(copiedDirectory, small, ({ data, ...tensor }) => {
      const tied = tensor.name === 'lm_head.weight' || tensor.name === 'model.embed_tokens.weight';
      return { ...tensor, chunks: [tied ? embedding : data] };
    });
    // The head's blocks and scales come last.
    const headBytes = small.vocabSize * (32 + 4);
    const [tied, copied] = [await readWeights(tiedDirectory), await readWeights(copiedDirectory)];
    expect(tied.subarray(-headBytes).equals(copied.subarray(-headBytes))).toBe(true);
  });

  it('does nothing when complete shards of the same key exist', async () => {
    const first = await compile(options(), signal);
    const progress: CompileProgress[] = [];
    const second = await compile(options({ onProgress: (seen) => progress.push(seen) }), signal);
    expect(second).toEqual({ ...first, upToDate: true });
    expect(progress).toEqual([]);
  });

  it('compiles again when a file of the shards is truncated', async () => {
    const first = await compile(options(), signal);
    const whole = hashRanks(first);
    truncateSync(join(first.rankDirectories[1] ?? '', 'weights.bin'), 1_000);
    const second = await compile(options(), signal);
    expect(second.upToDate).toBe(false);
    expect(hashRanks(second)).toEqual(whole);
  });

  it('changes the key with every option that changes the shards', async () => {
    const changes: Partial<CompileOptions>[] = [
      {},
      { tensorParallel: 1 },
      { precision: 'int4' },
      { accuracyLevel: 0 },
      { mtpHidden: 'post-norm' },
      { maxPositions: 16 },
    ];
    const keys: string[] = [];
    for (const change of changes) {
      keys.push((await compile(options(change), signal)).key);
    }
    expect(new Set(keys).size).toBe(changes.length);
  });

  it('replaces the shards of a larger group', async () => {
    await compile(options(), signal);
    await compile(options({ tensorParallel: 1 }), signal);
    expect(readdirSync(outDirectory)).toEqual(['rank-0']);
  });

  it('reports bytes that only grow and end at the total', async () => {
    const seen: CompileProgress[] = [];
    await compile(options({ onProgress: (progress) => seen.push(progress) }), signal);
    const done = seen.map(({ doneBytes }) => doneBytes);
    expect(done).toEqual(done.toSorted((a, b) => a - b));
    expect(seen.at(-1)?.doneBytes).toBe(seen.at(-1)?.totalBytes);
  });
});

describe('an interrupted compile', { timeout: timeoutMs }, () => {
  it('resumes at the finished jobs and produces the same bytes', async () => {
    const whole = hashRanks(
      await compile(
        options({ modelDirectory: largeDirectory, outDirectory: join(directory, 'whole') }),
        signal,
      ),
    );
    await compileInterrupted({ modelDirectory: largeDirectory });
    expect(readdirSync(outDirectory).some((name) => name.startsWith('rank-'))).toBe(false);

    const seen: CompileProgress[] = [];
    const result = await compile(
      options({ modelDirectory: largeDirectory, onProgress: (progress) => seen.push(progress) }),
      signal,
    );
    expect((seen[0]?.doneBytes ?? 0) / (seen[0]?.totalBytes ?? 1)).toBeGreaterThan(0.3);
    expect(hashRanks(result)).toEqual(whole);
    expect(readdirSync(outDirectory).toSorted()).toEqual(['rank-0', 'rank-1']);
  });

  it('starts over when a partial file has changed', async () => {
    await compileInterrupted();
    const partial = readdirSync(outDirectory).find((name) => name.startsWith('partial-')) ?? '';
    truncateSync(join(outDirectory, partial, 'rank-0', 'weights.bin'), 64);
    const seen: CompileProgress[] = [];
    await compile(options({ onProgress: (progress) => seen.push(progress) }), signal);
    expect((seen[0]?.doneBytes ?? 0) / (seen[0]?.totalBytes ?? 1)).toBeLessThan(0.3);
  });

  it('is discarded when other options are compiled', async () => {
    await compileInterrupted();
    await compile(options({ precision: 'int4' }), signal);
    expect(readdirSync(outDirectory).toSorted()).toEqual(['rank-0', 'rank-1']);
  });

  it('leaves the earlier shards in place', async () => {
    const { key } = await compile(options(), signal);
    await compileInterrupted({ precision: 'int4' });
    expect((await readShardManifest(join(outDirectory, 'rank-1'))).key).toBe(key);
  });

  it('does not start when already aborted', async () => {
    await expect(compile(options(), AbortSignal.abort())).rejects.toThrow(/abort/);
    expect(existsSync(join(outDirectory, 'rank-0'))).toBe(false);
  });
});

describe('compile rejects', { timeout: timeoutMs }, () => {
  it.each([
    [
      'model.layers.0.mlp.down_proj.weight',
      [5, 17],
      0x7fc0,
      /down_proj.weight: element \[5, 17\] is NaN/,
      () => modelDirectory,
    ],
    [
      'model.layers.0.self_attn.q_proj.bias',
      [40],
      0xff80,
      /q_proj.bias: element \[40\] is -Infinity/,
      () => modelDirectory,
    ],
    [
      'lm_head.weight',
      [500_000, 31],
      0x7f80,
      /lm_head.weight: element \[500000, 31\] is Infinity/,
      () => largeDirectory,
    ],
    [
      'model.embed_tokens.weight',
      [0, 0],
      0x7fc0,
      /embed_tokens.weight: element \[0, 0\] is NaN/,
      () => modelDirectory,
    ],
  ] as const)('a weight of %s that is not finite', async (name, index, bits, message, source) => {
    const tensor = (await openCheckpoint(source())).tensors.get(name);
    const path = tensor?.path ?? '';
    const columns = tensor?.shape[1] ?? 1;
    const element = (index[0] ?? 0) * columns + (index[1] ?? 0);
    const bytes = readFileSync(path);
    const at = (tensor?.offset ?? 0) + element * 2;
    const sound = bytes.readUInt16LE(at);
    bytes.writeUInt16LE(bits, at);
    writeFileSync(path, bytes);
    try {
      await expect(compile(options({ modelDirectory: source() }), signal)).rejects.toThrow(
        expect.objectContaining({ code: 'data_loss', message: expect.stringMatching(message) }),
      );
      expect(existsSync(join(outDirectory, 'rank-0'))).toBe(false);
    } finally {
      bytes.writeUInt16LE(sound, at);
      writeFileSync(path, bytes);
    }
  });

  it.each([
    [{ tensorParallel: 3 }, 'failed_precondition', /tensorParallel 3 does not divide num_key_value_heads 2/],
    [{ tensorParallel: 0 }, 'invalid_argument', /tensorParallel: must be an integer from 1, is 0/],
    [{ maxPositions: 33 }, 'invalid_argument', /maxPositions: .* max_position_embeddings 32, is 33/],
    [{ maxPositions: 0 }, 'invalid_argument', /maxPositions: .* is 0/],
  ] as const)('%j', async (change, code, message) => {
    await expect(compile(options(change), signal)).rejects.toThrow(
      expect.objectContaining({ code, message: expect.stringMatching(message) }),
    );
  });
});

describe('readShardManifest', { timeout: timeoutMs }, () => {
  it('rejects a directory without a manifest, another format, and missing or truncated files', async () => {
    const { rankDirectories } = await compile(options({ tensorParallel: 1, precision: 'int4' }), signal);
    const [rank = ''] = rankDirectories;
    const manifest = readFileSync(join(rank, 'shard.json'), 'utf8');
    const rejects = (code: string, message: RegExp): Promise<void> =>
      expect(readShardManifest(rank)).rejects.toThrow(
        expect.objectContaining({ code, message: expect.stringMatching(message) }),
      );
    writeFileSync(join(rank, 'shard.json'), manifest.replace(/"formatVersion": \d+/, '"formatVersion": 99'));
    await rejects('failed_precondition', /formatVersion must be \d+, is 99/);
    writeFileSync(join(rank, 'shard.json'), manifest.slice(0, 50));
    await rejects('data_loss', /shard.json: is not JSON/);
    writeFileSync(join(rank, 'shard.json'), manifest);
    truncateSync(join(rank, 'embedding.bin'), 100);
    await rejects('data_loss', /embedding.bin: must have 8384 bytes, has 100/);
    rmSync(join(rank, 'head.onnx'));
    await rejects('data_loss', /head.onnx: is missing/);
    rmSync(join(rank, 'shard.json'));
    await rejects('not_found', /has no shard.json/);
  });
});
