// The rows that a rank computes in: one buffer per kind of activation, reused in every pass, and native views of its row
// ranges. Owns sizes and views; knows no segment and no sequence.

import type { Runtime, RuntimeTensor, TensorData } from '../runtime/runtime.ts';

/** A scratch buffer and its views by first row and row count. */
export class Rows<Data extends TensorData = Float32Array> {
  readonly data: Data;
  readonly width: number;
  readonly #runtime: Runtime;
  readonly #views = new Map<number, RuntimeTensor>();

  constructor(runtime: Runtime, data: Data, width: number) {
    this.#runtime = runtime;
    this.data = data;
    this.width = width;
  }

  /** [rows, width], or [rows] where width is 0. */
  first(rows: number): RuntimeTensor {
    return this.#view(0, rows, this.width === 0 ? [rows] : [rows, this.width]);
  }

  /** The same memory as `first`. */
  firstValues(rows: number): Data {
    return this.data.subarray(0, rows * Math.max(1, this.width)) as Data;
  }

  /** [1, rows, width] from row `start`. */
  batch(start: number, rows: number): RuntimeTensor {
    return this.#view(start, rows, [1, rows, this.width]);
  }

  #view(start: number, rows: number, dims: readonly number[]): RuntimeTensor {
    const key = (start * 65_536 + rows) * 4 + dims.length;
    let view = this.#views.get(key);
    if (view === undefined) {
      if (this.#views.size >= maxViews) {
        this.#views.forEach((old) => old.release());
        this.#views.clear();
      }
      const unit = Math.max(1, this.width);
      view = this.#runtime.tensor(this.data.subarray(start * unit, (start + rows) * unit), dims);
      this.#views.set(key, view);
    }
    return view;
  }
}

/** Copies `count` rows, from row `from` of the source to row `to` of the target, which is as wide. */
export function copyRows(
  source: Rows,
  target: Rows,
  rows: { readonly from: number; readonly to: number; readonly count: number },
): void {
  const { from, to, count } = rows;
  target.data.set(
    source.data.subarray(from * source.width, (from + count) * source.width),
    to * target.width,
  );
}

/** Views are small but native; a buffer's row ranges would otherwise add up to the square of its rows. */
const maxViews = 1024;

/** Scratch of a configured shard; every buffer is reused in every pass. */
export interface Scratch {
  readonly maxRows: number;
  readonly maxHeadRows: number;
  readonly tokenIds: Rows<BigInt64Array>; // int64 [rows]
  readonly residual: Rows; // [rows, H]
  readonly residualNext: Rows; // [rows, H]
  readonly delta: Rows; // [rows, H]
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
  /** By span of the pass. */
  readonly spanScalars: readonly SpanScalars[];
}

/** GroupQueryAttention's two lengths: `seqlensK` int32 [1] is the total minus one, `total` int32 [] the total. */
export interface SpanScalars {
  readonly lastPosition: Int32Array;
  readonly lastPositionTensor: RuntimeTensor;
  readonly total: Int32Array;
  readonly totalTensor: RuntimeTensor;
}

/** Widths of a rank's rows, and how many there may be. */
export interface ScratchShape {
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

/** Allocates all rows. They live as long as the runtime that made their views. */
export function createScratch(runtime: Runtime, shape: ScratchShape): Scratch {
  const { maxRows, maxHeadRows } = shape;
  const rows = (count: number, width: number): Rows =>
    new Rows(runtime, new Float32Array(count * width), width);
  const hiddenRows = (): Rows => rows(maxRows, shape.hidden);
  const vocabulary = shape.gathered.reduce((sum, count) => sum + count, 0);
  return {
    maxRows,
    maxHeadRows,
    tokenIds: new Rows(runtime, new BigInt64Array(maxRows), 0),
    residual: hiddenRows(),
    residualNext: hiddenRows(),
    delta: hiddenRows(),
    deltaNext: hiddenRows(),
    // One more row, for attention's neighbour of a last single row.
    qkv: rows(maxRows + 1, shape.qkv),
    attended: rows(maxRows + 1, shape.attended),
    hidden: hiddenRows(),
    normed: hiddenRows(),
    draftHidden: hiddenRows(),
    draftNormed: hiddenRows(),
    headInput: rows(maxHeadRows, shape.hidden),
    headOutput: rows(maxHeadRows, shape.vocabulary),
    gathered: shape.gathered.map((count) => new Float32Array(maxHeadRows * count)),
    logits: new Float32Array(maxHeadRows * vocabulary),
    spanScalars: Array.from({ length: maxRows }, () => createSpanScalars(runtime)),
  };
}

function createSpanScalars(runtime: Runtime): SpanScalars {
  const lastPosition = new Int32Array(1);
  const total = new Int32Array(1);
  return {
    lastPosition,
    lastPositionTensor: runtime.tensor(lastPosition, [1]),
    total,
    totalTensor: runtime.tensor(total, []),
  };
}
