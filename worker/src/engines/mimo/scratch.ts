// The rows that a rank computes in: one buffer per kind of activation, reused in every pass, and native views of its
// row ranges. Owns sizes and views; knows no segment and no sequence.

import type { ElementType, FloatType } from '../../shards/element-type.ts';
import type { MemoryUse, RuntimeMemory, RuntimeTensor } from '../../runtime/memory.ts';
import type { Reducer } from '../../runtime/reduce.ts';
import type { Runtime } from '../../runtime/runtime.ts';

/** A scratch buffer and its views by first row and row count. */
export class Rows {
  readonly width: number;
  readonly memory: RuntimeMemory;
  readonly #views = new Map<number, RuntimeTensor>();

  constructor(memory: RuntimeMemory, width: number) {
    this.memory = memory;
    this.width = width;
  }

  /** [rows, width], or [rows] where width is 0. */
  first(rows: number): RuntimeTensor {
    return this.#view(0, rows, this.width === 0 ? [rows] : [rows, this.width]);
  }

  /** [1, rows, width] from row `start`. */
  batch(start: number, rows: number): RuntimeTensor {
    return this.#view(start, rows, [1, rows, this.width]);
  }

  /** Replaces the first rows by their sums over the ranks. */
  sum(rows: number, reducer: Reducer): void {
    reducer.sum(this.memory, rows * this.width);
  }

  /** The first rows, or those from `start` on, as float32; see RuntimeMemory. */
  read(rows: number, start = 0): Float32Array {
    return this.memory.read(start * this.width, rows * this.width);
  }

  /** From the first row on. */
  write(values: Float32Array | Int32Array | BigInt64Array): void {
    this.memory.write(0, values);
  }

  close(): void {
    this.#views.forEach((view) => view.release());
    this.#views.clear();
    this.memory.release();
  }

  #view(start: number, rows: number, dims: readonly number[]): RuntimeTensor {
    const key = (start * 65_536 + rows) * 4 + dims.length;
    let view = this.#views.get(key);
    if (view === undefined) {
      if (this.#views.size >= maxViews) {
        this.#views.forEach((old) => old.release());
        this.#views.clear();
      }
      view = this.memory.tensor(start * Math.max(1, this.width), dims);
      this.#views.set(key, view);
    }
    return view;
  }
}

/** Views are small but native; a buffer's row ranges would otherwise add up to the square of its rows. */
const maxViews = 1024;

/** Scratch of a configured shard; every buffer is reused in every pass. */
export interface Scratch {
  readonly maxRows: number;
  readonly tokenIds: Rows; // int32 [rows]
  /** Draft pass: the forward pass's rows that these continue. */
  readonly hiddenRows: Rows; // int32 [rows]
  readonly residual: Rows; // [rows, H]
  readonly residualNext: Rows; // [rows, H]
  readonly delta: Rows; // [rows, H]
  /** Never written. */
  readonly zero: Rows; // [rows, H]
  readonly deltaNext: Rows; // [rows, H]
  readonly qkv: Rows; // [rows, W]
  readonly attended: Rows; // [rows, Q]
  readonly hidden: Rows; // [rows, H]
  readonly normed: Rows; // [rows, H]
  readonly draftNormed: Rows; // [rows, H]
}

/** Widths of a rank's rows, and how many there may be. */
export interface ScratchShape {
  /** Of activations. */
  readonly floatType: FloatType;
  readonly maxRows: number;
  /** H */
  readonly hidden: number;
  /** W */
  readonly qkv: number;
  /** Q */
  readonly attended: number;
  /** Whether the host adds the ranks' partial sums. */
  readonly sumsOnHost: boolean;
}

/** Allocates all rows. The caller releases them with `closeScratch`. */
export function createScratch(runtime: Runtime, shape: ScratchShape): Scratch {
  const { maxRows } = shape;
  const rows = (
    count: number,
    width: number,
    { type = shape.floatType, use = 'resident' }: { type?: ElementType; use?: MemoryUse } = {},
  ): Rows => new Rows(runtime.allocate(type, count * Math.max(1, width), use), width);
  const hiddenRows = (use?: MemoryUse): Rows => rows(maxRows, shape.hidden, use === undefined ? {} : { use });
  const indices = (count: number): Rows => rows(count, 0, { type: 'int32', use: 'exchanged' });
  const sums = shape.sumsOnHost ? 'exchanged' : 'resident';
  return {
    maxRows,
    tokenIds: indices(maxRows),
    hiddenRows: indices(maxRows),
    residual: hiddenRows(),
    residualNext: hiddenRows(),
    delta: hiddenRows(sums),
    zero: hiddenRows('exchanged'),
    deltaNext: hiddenRows(sums),
    // One more row, for attention's neighbour of a last single row.
    qkv: rows(maxRows + 1, shape.qkv),
    attended: rows(maxRows + 1, shape.attended),
    hidden: hiddenRows(),
    normed: hiddenRows(),
    draftNormed: hiddenRows(),
  };
}

/** Releases all rows. */
export function closeScratch(scratch: Scratch): void {
  for (const part of Object.values(scratch) as readonly unknown[]) {
    if (part instanceof Rows) {
      part.close();
    }
  }
}
