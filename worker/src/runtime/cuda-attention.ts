// Attention of decode passes on a CUDA device (attention.cu). Owns the layout of its plan and its scratch memory; the
// engine assigns pages to spans.

import { readFileSync } from 'node:fs';
import { ClusterError } from '@mimo/core/process/errors';
import type { CudaDevice, DeviceMemory } from './cuda-device.ts';
import { compileKernels, CudaKernels } from './cuda-kernels.ts';
import { elementBytes } from '../shards/element-type.ts';
import type { DecodeAttention, DecodeLayer, DecodeShape, DecodeSpan } from './kernel.ts';
import type { RuntimeMemory } from './memory.ts';

/** Also in attention.cu: query heads of a KV head, and dimensions of a head. */
const groupHeads = 4;
const headDim = 128;

/**
 * Warps of a block, stages of a warp and blocks of a multiprocessor. Measured on an H200 (2026-11): the best for short
 * and for ragged spans; one long span alone would be 6 % faster with 8 warps and one block.
 */
const warps = 4;
const stages = 3;
const blocksOfProcessor = 2;

const stageBytes = 8192;
const unitPositions = 16 * warps;
const partBytes = 4 * (8 * headDim + 16);
const placeThreads = 256;

/** The first compute capability with copies that bypass registers. */
const firstMajor = 8;

/** From this compute capability on a kernel may start before the previous one has ended. */
const firstOverlapMajor = 9;

/** The rows of one span or two, a token and its draft. */
const mostSpanRows = 2;

/** Throws `failed_precondition` for unsupported shapes or devices, and without NVRTC. */
export function createCudaAttention(
  device: CudaDevice,
  shape: DecodeShape,
  {
    allocate,
    cacheDirectory,
  }: {
    readonly allocate: Allocate;
    readonly cacheDirectory: string | undefined;
  },
): DecodeAttention {
  const { major, architecture } = device.capability();
  if (major < firstMajor || shape.headDim !== headDim || shape.queryHeads !== groupHeads * shape.kvHeads) {
    throw new ClusterError(
      'failed_precondition',
      `decode attention takes ${groupHeads} query heads of ${headDim} to a KV head on sm_${firstMajor}0 and later; ` +
        `there are ${shape.queryHeads} of ${shape.headDim} to ${shape.kvHeads} on ${architecture}`,
    );
  }
  const text = readFileSync(new URL('attention.cu', import.meta.url), 'utf8');
  const codes = Array.from({ length: mostSpanRows }, (_, i) => {
    const defines = {
      KV_HEADS: shape.kvHeads,
      PAGE: shape.pageTokens,
      SPAN_ROWS: i + 1,
      WARPS: warps,
      STAGES: stages,
      PER_SM: blocksOfProcessor,
      FLOAT16: shape.floatType === 'float16' ? 1 : 0,
    };
    return compileKernels({ text, defines, architecture }, cacheDirectory);
  });
  return new CudaDecodeAttention(device, shape, { codes, allocate });
}

/** Of the largest plan. */
function planWords({ maxSpans, maxSpanPages }: DecodeShape): number {
  return 3 + 3 * maxSpans + mostSpanRows * maxSpans + maxSpans * maxSpanPages;
}

type Allocate = (type: 'int32' | 'float', length: number) => RuntimeMemory;

function addressOf(memory: RuntimeMemory): bigint {
  return (memory as DeviceMemory).address;
}

/** The current pass. */
interface Placed {
  readonly spans: number;
  readonly rows: number;
  readonly spanRows: number;
}

class CudaDecodeAttention implements DecodeAttention {
  readonly mostSpanRows = mostSpanRows;
  readonly #device: CudaDevice;
  readonly #shape: DecodeShape;
  /** By the largest number of rows in a span, less one. */
  readonly #kernels: readonly CudaKernels[];
  readonly #blocks: number;
  readonly #overlaps: boolean;
  readonly #plan: RuntimeMemory; // int32
  readonly #cosines: RuntimeMemory; // [positions, D / 2]
  readonly #sines: RuntimeMemory;
  readonly #words: Int32Array;
  readonly #query: bigint;
  readonly #parts: bigint;
  /** Zero before and after every pass. */
  readonly #counters: bigint;
  #placed: Placed = { spans: 0, rows: 0, spanRows: 1 };

  constructor(
    device: CudaDevice,
    shape: DecodeShape,
    { codes, allocate }: { readonly codes: readonly Uint8Array[]; readonly allocate: Allocate },
  ) {
    const { maxSpans } = shape;
    this.#device = device;
    this.#shape = shape;
    this.#overlaps = device.capability().major >= firstOverlapMajor;
    this.#kernels = codes.map((code) => new CudaKernels(device, code));
    this.#blocks = blocksOfProcessor * device.processors();
    const maxRows = mostSpanRows * maxSpans;
    this.#words = new Int32Array(planWords(shape));
    this.#plan = allocate('int32', this.#words.length);
    const { cos, sin } = shape.ropeTables();
    this.#cosines = allocate('float', cos.length);
    this.#sines = allocate('float', sin.length);
    this.#cosines.write(0, cos);
    this.#sines.write(0, sin);
    this.#query = device.allocate(maxRows * shape.queryHeads * headDim * elementBytes[shape.floatType]);
    this.#parts = device.allocate(2 * this.#blocks * partBytes);
    this.#counters = device.allocateZero(4 * maxSpans * shape.kvHeads);
  }

  place(spans: readonly DecodeSpan[]): string {
    const { kvHeads } = this.#shape;
    const count = spans.length;
    const rows = spans.reduce((sum, span) => sum + span.rows, 0);
    const width = spans.reduce((most, { pages }) => Math.max(most, pages.length), 0);
    const words = this.#words;
    words[0] = width;
    const lengths = words.subarray(1);
    const unitStarts = words.subarray(1 + count);
    const rowStarts = words.subarray(2 + 2 * count);
    const spanOfRow = words.subarray(3 + 3 * count);
    const table = words.subarray(3 + 3 * count + rows);
    unitStarts[0] = 0;
    rowStarts[0] = 0;
    for (const [i, span] of spans.entries()) {
      const length = span.start + span.rows;
      lengths[i] = length;
      unitStarts[i + 1] = unitStarts[i]! + kvHeads * Math.ceil(length / unitPositions);
      rowStarts[i + 1] = rowStarts[i]! + span.rows;
      spanOfRow.fill(i, rowStarts[i], rowStarts[i + 1]);
      table.set(span.pages, i * width);
    }
    this.#plan.write(0, words.subarray(0, 3 + 3 * count + rows + count * width));
    const spanRows = Math.max(...spans.map((span) => span.rows));
    this.#placed = { spans: count, rows, spanRows };
    return [count, rows, spanRows].join();
  }

  run({ qkv, keys, values, attended }: DecodeLayer): void {
    const { spans, rows, spanRows } = this.#placed;
    const kernels = this.#kernels[spanRows - 1]!;
    const cache = [addressOf(keys), addressOf(values)];
    const plan = [addressOf(this.#plan), BigInt(spans), BigInt(rows)];
    const overlaps = this.#overlaps;
    kernels.launch('place', { blocks: rows, threads: placeThreads, sharedBytes: 0, overlaps }, [
      addressOf(qkv),
      addressOf(this.#cosines),
      addressOf(this.#sines),
      ...plan,
      this.#query,
      ...cache,
    ]);
    const merged = warps * 4 * (groupHeads * spanRows * headDim + 16);
    const shape = {
      blocks: this.#blocks,
      threads: 32 * warps,
      sharedBytes: warps * stages * stageBytes + merged,
      overlaps,
    };
    kernels.launch('decode', shape, [
      this.#query,
      ...cache,
      ...plan,
      addressOf(attended),
      this.#parts,
      this.#counters,
    ]);
  }

  release(): void {
    [this.#plan, this.#cosines, this.#sines].forEach((memory) => memory.release());
    [this.#query, this.#parts, this.#counters].forEach((part) => this.#device.free(part));
    this.#kernels.forEach((kernels) => kernels.close());
  }
}
