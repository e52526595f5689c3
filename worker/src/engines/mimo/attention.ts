// A rank's attention over the spans of a pass: the memory of keys and values, and the runs of the shared segment. Owns
// both implementations, contiguous and paged; knows no layer's weights. The leader decides each slot's capacity
// (kv-cache.ts).

import { ClusterError } from '@mimo/core/process/errors';
import { pageTokens, type ShardManifest } from '../../shards/shard.ts';
import { ropeTables } from '../../shards/rope.ts';
import { decodeHalves, encodeHalves } from '../../shards/element-type.ts';
import type { DecodeAttention, Segment } from '../../runtime/kernel.ts';
import type { RuntimeMemory, RuntimeTensor } from '../../runtime/memory.ts';
import type { Runtime } from '../../runtime/runtime.ts';
import { KvBuffers } from './kv-buffers.ts';
import type { Rows } from './scratch.ts';
import type { RowSpan } from './step-plan.ts';

/** Pages beyond the budget: the last page of every span may be almost empty. */
export function slackPages(maxSpans: number, { kernels }: Pick<Runtime, 'kernels'>): number {
  return kernels.pagedAttention ? maxSpans : 0;
}

/**
 * Keys and values of all slots. Call `place` with the spans of a pass, then `run` for each layer; `close` frees all.
 */
export interface Attention {
  release(slot: number): void;
  /**
   * Makes room for the spans' slots and places them for this pass. Returns a key of the shapes and of the values that
   * the runs read on the host: passes of equal keys and rows are the same to a device.
   */
  place(spans: readonly RowSpan[]): string;
  /** `qkv` [rows, W] to `attended` [rows, Q]; `layer` counts the MTP layer last. */
  run(layer: number, qkv: Rows, attended: Rows): void;
  close(): void;
}

export interface AttentionOptions {
  readonly runtime: Runtime;
  readonly segment: Segment;
  readonly manifest: ShardManifest;
  /** Layers that keep keys and values, the MTP layer included. */
  readonly layers: number;
  readonly maxSpans: number;
  /** Positions that all slots together may hold. */
  readonly budgetTokens: number;
}

/** The caller closes it. */
export function createAttention(options: AttentionOptions): Attention {
  return options.runtime.kernels.pagedAttention
    ? new PagedAttention(options)
    : new SequenceAttention(options);
}

/** GroupQueryAttention, one run a span: its kernel rejects several spans with more than one row and a past. */
class SequenceAttention implements Attention {
  readonly #runtime: Runtime;
  readonly #segment: Segment;
  readonly #kv: KvBuffers;
  /** By span, its positions minus one, int32 [maxSpans], and its positions, int32 [], which are read on the host. */
  readonly #lastPositions: RuntimeMemory;
  readonly #spans: readonly {
    readonly last: RuntimeTensor;
    readonly total: Int32Array;
    readonly totalTensor: RuntimeTensor;
  }[];
  #placed: readonly RowSpan[] = [];

  constructor({ runtime, segment, manifest, layers, maxSpans, budgetTokens }: AttentionOptions) {
    const { config, tensorParallel, profile } = manifest;
    this.#runtime = runtime;
    this.#segment = segment;
    this.#kv = new KvBuffers(runtime, {
      floatType: profile.activations,
      layers,
      kvHeads: config.kvHeads / tensorParallel,
      headDim: config.headDim,
      budgetTokens,
    });
    const lastPositions = runtime.allocate('int32', maxSpans, 'exchanged');
    this.#lastPositions = lastPositions;
    this.#spans = Array.from({ length: maxSpans }, (_, i) => {
      const total = new Int32Array(1);
      return { last: lastPositions.tensor(i, [1]), total, totalTensor: runtime.tensor(total, []) };
    });
  }

  release(slot: number): void {
    this.#kv.release(slot);
  }

  place(spans: readonly RowSpan[]): string {
    this.#placed = spans;
    const ends = spans.map((span) => span.start + attentionRows(span.rows));
    this.#lastPositions.write(
      0,
      Int32Array.from(ends, (end) => end - 1),
    );
    for (const [i, span] of spans.entries()) {
      this.#kv.reserve(span.slot, span.capacityTokens, span.start);
      this.#spans[i]!.total[0] = ends[i]!;
    }
    return spans.map(({ slot, rows }, i) => `${slot}.${rows}.${ends[i]}`).join();
  }

  run(layer: number, qkv: Rows, attended: Rows): void {
    let row = 0;
    for (const [i, span] of this.#placed.entries()) {
      const { key, value } = this.#kv.layer(span.slot, layer); // [1, kvHeads/T, capacity, D]
      const rows = attentionRows(span.rows);
      const { last, totalTensor } = this.#spans[i]!;
      this.#runtime.run(
        this.#segment,
        [qkv.batch(row, rows), key, value, last, totalTensor],
        [attended.batch(row, rows), key, value], // [1, rows, Q]
      );
      row += span.rows;
    }
  }

  close(): void {
    this.#kv.close();
    for (const { last, totalTensor } of this.#spans) {
      last.release();
      totalTensor.release();
    }
    this.#lastPositions.release();
  }
}

/**
 * Rows that attention computes for a span. The kernel adds in a different order for one row than for more, and int8
 * rounding turns that last bit into 0.05 of logit. So a single row gets a neighbour with arbitrary content, and every
 * row's result is the same to the bit alone, in a chunk or beside a draft. Later rows overwrite the neighbour's output
 * and its place in the cache. Measured: 2 rows cost 1.4 times one at 512 positions (Zen 4, 2026-11).
 */
function attentionRows(rows: number): number {
  return Math.max(2, rows);
}

interface Pool {
  readonly memory: RuntimeMemory;
  readonly tensor: RuntimeTensor; // [pages, pageTokens, kvHeads, D]
}

/** PagedAttention, one run for all spans: a pool of pages a layer, and a table of each slot's. */
class PagedAttention implements Attention {
  readonly #runtime: Runtime;
  readonly #segment: Segment;
  readonly #pools: readonly { readonly keys: Pool; readonly values: Pool }[];
  readonly #free: number[];
  readonly #slots = new Map<number, number[]>();
  /** int32: starts [spans + 1], past [spans] and table [spans, n] of a pass, one after another. */
  readonly #places: RuntimeMemory;
  /** Most rows of a span, most positions of one, and no lower bound; read on the host. */
  readonly #bounds = new Int32Array(3);
  readonly #boundsTensor: RuntimeTensor;
  /** The segment's inputs; empty if `#decode` computes the attention. */
  #placed: { readonly rows: number; readonly tensors: readonly RuntimeTensor[] } | undefined;
  /** For passes whose spans have few rows, if there is one. */
  readonly #decode: DecodeAttention | undefined;

  constructor({ runtime, segment, manifest, layers, maxSpans, budgetTokens }: AttentionOptions) {
    const { config, tensorParallel, profile, maxPositions } = manifest;
    this.#runtime = runtime;
    this.#segment = segment;
    const pages = Math.ceil(budgetTokens / pageTokens) + slackPages(maxSpans, runtime);
    const dims = [pages, pageTokens, config.kvHeads / tensorParallel, config.headDim];
    const pool = (): Pool => {
      const length = dims.reduce((product, dim) => product * dim, 1);
      const memory = runtime.allocate(profile.activations, length, 'resident');
      return { memory, tensor: memory.tensor(0, dims) };
    };
    this.#pools = Array.from({ length: layers }, () => ({ keys: pool(), values: pool() }));
    this.#free = Array.from({ length: pages }, (_, page) => page);
    const slotPages = Math.ceil(maxPositions / pageTokens) + 1;
    this.#places = runtime.allocate('int32', 1 + maxSpans * (2 + slotPages), 'exchanged');
    this.#boundsTensor = runtime.tensor(this.#bounds, [3]);
    this.#decode = runtime.createDecodeAttention?.({
      floatType: profile.activations,
      queryHeads: config.queryHeads / tensorParallel,
      kvHeads: config.kvHeads / tensorParallel,
      headDim: config.headDim,
      pageTokens,
      maxSpans,
      maxSpanPages: slotPages,
      ropeTables: () => roundedRopeTables(manifest),
    });
  }

  release(slot: number): void {
    this.#free.push(...(this.#slots.get(slot) ?? []));
    this.#slots.delete(slot);
  }

  place(spans: readonly RowSpan[]): string {
    const tables = spans.map((span) => this.#reserve(span));
    this.#placed?.tensors.forEach((tensor) => tensor.release());
    this.#placed = undefined;
    const decode = this.#decode;
    if (decode !== undefined && spans.every(({ rows }) => rows > 0 && rows <= decode.mostSpanRows)) {
      const places = spans.map(({ start, rows }, i) => {
        const pages = Math.ceil((start + rows) / pageTokens);
        return { start, rows, pages: tables[i]!.slice(0, pages) };
      });
      return `decode ${decode.place(places)}`;
    }
    const width = Math.max(...tables.map((pages) => pages.length));
    const starts = [0];
    for (const span of spans) {
      starts.push(starts.at(-1)! + span.rows);
    }
    // Unused places of the table are never read, but must be pages.
    const table = tables.flatMap((pages) => Array.from({ length: width }, (_, i) => pages[i] ?? 0));
    this.#places.write(0, Int32Array.from([...starts, ...spans.map((span) => span.start), ...table]));
    this.#bounds[0] = Math.max(...spans.map((span) => span.rows));
    // An upper bound; whole pages, so that it is the same for many passes.
    const positions = Math.max(...spans.map((span) => span.start + span.rows));
    this.#bounds[1] = pageTokens * Math.ceil(positions / pageTokens);
    const count = spans.length;
    this.#placed = {
      rows: starts.at(-1)!,
      tensors: [
        this.#places.tensor(0, [count + 1]),
        this.#places.tensor(count + 1, [count]),
        this.#places.tensor(2 * count + 1, [count, width]),
      ],
    };
    return [count, width, ...this.#bounds].join();
  }

  run(layer: number, qkv: Rows, attended: Rows): void {
    const { keys, values } = this.#pools[layer]!;
    if (this.#placed === undefined) {
      this.#decode!.run({
        qkv: qkv.memory,
        keys: keys.memory,
        values: values.memory,
        attended: attended.memory,
      });
      return;
    }
    const { rows, tensors } = this.#placed;
    this.#runtime.run(
      this.#segment,
      [qkv.first(rows), keys.tensor, values.tensor, ...tensors, this.#boundsTensor],
      [attended.first(rows), keys.tensor, values.tensor], // [rows, Q]
    );
  }

  close(): void {
    this.#placed?.tensors.forEach((tensor) => tensor.release());
    this.#decode?.release();
    this.#boundsTensor.release();
    this.#places.release();
    for (const { tensor, memory } of this.#pools.flatMap(({ keys, values }) => [keys, values])) {
      tensor.release();
      memory.release();
    }
  }

  #reserve({ slot, capacityTokens }: RowSpan): readonly number[] {
    const pages = this.#slots.get(slot) ?? [];
    this.#slots.set(slot, pages);
    while (pages.length * pageTokens < capacityTokens) {
      const page = this.#free.pop();
      if (page === undefined) {
        throw new ClusterError(
          'internal',
          `KV slot ${slot}: no page is left for ${capacityTokens} positions`,
        );
      }
      pages.push(page);
    }
    return pages;
  }
}

/** As the segment needs them: in the type of the activations. */
function roundedRopeTables({ config, maxPositions, profile }: ShardManifest): {
  readonly cos: Float32Array;
  readonly sin: Float32Array;
} {
  const { headDim, ropeTheta } = config;
  const { cos, sin } = ropeTables({ headDim, ropeTheta, positions: maxPositions });
  const type = profile.activations;
  const round = (table: Float32Array): Float32Array =>
    type === 'float' ? table : decodeHalves(encodeHalves(table, type), type);
  return { cos: round(cos), sin: round(sin) };
}
