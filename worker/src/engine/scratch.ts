// The rows that a rank computes in: one buffer per kind of activation, reused in every pass, and native views of its row
// ranges. Owns sizes and views; knows no segment and no sequence.

import type { ElementType, FloatType } from '../runtime/element-type.ts';
import type { CopyRange, Runtime, RuntimeMemory, RuntimeTensor } from '../runtime/runtime.ts';

/** A scratch buffer and its views by first row and row count. */
export class Rows {
  readonly width: number;
  readonly #memory: RuntimeMemory;
  readonly #views = new Map<number, RuntimeTensor>();

  constructor(memory: RuntimeMemory, width: number) {
    this.#memory = memory;
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

  /** The first rows as float32; see RuntimeMemory. */
  read(rows: number): Float32Array {
    return this.#memory.read(0, rows * this.width);
  }

  /** From the first row on. */
  write(values: Float32Array | Int32Array | BigInt64Array): void {
    this.#memory.write(0, values);
  }

  /** Copies `count` rows, from row `from` of the source, which is as wide, to row `to`. */
  copyFrom(source: Rows, { from, to, count }: CopyRange): void {
    const { width } = this;
    this.#memory.copyFrom(source.#memory, { from: from * width, to: to * width, count: count * width });
  }

  close(): void {
    this.#views.forEach((view) => view.release());
    this.#views.clear();
    this.#memory.release();
  }

  #view(start: number, rows: number, dims: readonly number[]): RuntimeTensor {
    const key = (start * 65_536 + rows) * 4 + dims.length;
    let view = this.#views.get(key);
    if (view === undefined) {
      if (this.#views.size >= maxViews) {
        this.#views.forEach((old) => old.release());
        this.#views.clear();
      }
      view = this.#memory.tensor(start * Math.max(1, this.width), dims);
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
  readonly maxHeadRows: number;
  readonly tokenIds: Rows; // int64 [rows]
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
  readonly draftHidden: Rows; // [rows, H]
  readonly draftNormed: Rows; // [rows, H]
  readonly headInput: Rows; // [headRows, H]
  readonly headOutput: Rows; // [headRows, this rank's vocabulary]
  /** Rank 0: every rank's logits as they arrive, and all of them in one row each. */
  readonly gathered: readonly Float32Array[];
  readonly logits: Float32Array; // [headRows, V]
}

/** Widths of a rank's rows, and how many there may be. */
export interface ScratchShape {
  /** Of activations. */
  readonly floatType: FloatType;
  readonly maxRows: number;
  readonly maxHeadRows: number;
  /** H */
  readonly hidden: number;
  /** W */
  readonly qkv: number;
  /** Q */
  readonly attended: number;
  /** This rank's part. */
  readonly vocabulary: number;
  /** Rank 0: every rank's part of the vocabulary; else none. */
  readonly gathered: readonly number[];
}

/** Allocates all rows. The caller ends them with `closeScratch`. */
export function createScratch(runtime: Runtime, shape: ScratchShape): Scratch {
  const { maxRows, maxHeadRows } = shape;
  const rows = (count: number, width: number, type: ElementType = shape.floatType): Rows =>
    new Rows(runtime.allocate(type, count * Math.max(1, width)), width);
  const hiddenRows = (): Rows => rows(maxRows, shape.hidden);
  const vocabulary = shape.gathered.reduce((sum, count) => sum + count, 0);
  return {
    maxRows,
    maxHeadRows,
    tokenIds: rows(maxRows, 0, 'int64'),
    residual: hiddenRows(),
    residualNext: hiddenRows(),
    delta: hiddenRows(),
    zero: hiddenRows(),
    deltaNext: hiddenRows(),
    // One more row, for attention's neighbour of a last single row.
    qkv: rows(maxRows + 1, shape.qkv),
    attended: rows(maxRows + 1, shape.attended),
    hidden: hiddenRows(),
    normed: hiddenRows(),
    draftHidden: hiddenRows(),
    draftNormed: hiddenRows(),
    headInput: rows(maxHeadRows, shape.hidden),
    headOutput: rows(maxHeadRows, shape.vocabulary, 'float'),
    gathered: shape.gathered.map((count) => new Float32Array(maxHeadRows * count)),
    logits: new Float32Array(maxHeadRows * vocabulary),
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
