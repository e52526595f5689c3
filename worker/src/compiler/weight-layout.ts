// The place of each weight in one rank's files, and the part of a checkpoint tensor that goes there. Owns offsets and
// byte lengths of every storage form; pure, so a shard's layout is known before the first weight is read.

import { elementBytes, encodeHalves, type FloatType } from '../shards/element-type.ts';
import type { GraphWeight } from './onnx-graph.ts';
import { blockSize, type Range, rangeLength } from '../shards/shard-plan.ts';
import type { ElementDtype } from './safetensors.ts';

/** How the elements of a transfer are written: as the checkpoint stores them, as floats, or in quantised blocks. */
export type Form = 'stored' | FloatType | 'int8' | 'int4';

/** A rectangle of a checkpoint tensor; vectors are matrices of one column. */
export interface Part {
  readonly source: string;
  readonly rows: Range;
  readonly columns: Range;
}

/** One part and its target: its rows follow one another from `offset`. */
export interface Transfer extends Part {
  readonly form: Form;
  readonly file: string;
  readonly offset: number;
  /** Of the part's scales; quantised forms only. */
  readonly scalesOffset: number;
}

/** Values that are not from a checkpoint. */
export interface Constant {
  readonly file: string;
  readonly offset: number;
  readonly bytes: Uint8Array<ArrayBuffer>;
}

/** The rank's own weights. */
const weightsFile = 'weights.bin';
/** Weights that are equal on every rank and unquantised: the embedding. */
const sharedFile = 'embedding.bin';

/** Whether a rank's file is a hard link to rank 0's. */
export function isSharedCopy(file: string, rank: number): boolean {
  return file === sharedFile && rank > 0;
}

const alignmentBytes = 64;
/** ONNX names of the checkpoint's types. */
export const storedTypes = {
  BF16: 'bfloat16',
  F16: 'float16',
  F32: 'float',
} as const satisfies Record<ElementDtype, FloatType>;

/** Bytes of one row of `columns` in quantised blocks, without the scales. */
export function rowBytes(form: 'int8' | 'int4', columns: number): number {
  return form === 'int8' ? columns : columns / 2;
}

/** Allocates weights one after another: returns references for the graphs, and collects placements for the compile. */
export class WeightLayout {
  readonly transfers: Transfer[] = [];
  readonly constants: Constant[] = [];
  readonly #floatType: FloatType;
  readonly #fileBytes = new Map<string, number>();

  /** `floatType` is the type of every weight that is neither quantised nor kept as stored. */
  constructor(floatType: FloatType) {
    this.#floatType = floatType;
  }

  /** Bytes of each file so far. */
  get fileBytes(): ReadonlyMap<string, number> {
    return this.#fileBytes;
  }

  /** Parts of equal width one below the other, [rows, columns], in the layout's float type or as stored. */
  plain(name: string, parts: readonly Part[], stored?: ElementDtype): GraphWeight {
    const { rows, columns } = shapeOf(parts);
    const type = stored === undefined ? this.#floatType : storedTypes[stored];
    const bytes = elementBytes[type];
    const weight = this.#allocate(stored === undefined ? weightsFile : sharedFile, {
      name,
      type,
      dims: columns === 1 ? [rows] : [rows, columns],
      bytes: rows * columns * bytes,
    });
    let row = 0;
    for (const part of parts) {
      this.transfers.push({
        ...part,
        form: stored === undefined ? this.#floatType : 'stored',
        file: weight.file,
        offset: weight.offset + row * columns * bytes,
        scalesOffset: 0,
      });
      row += rangeLength(part.rows);
    }
    return weight;
  }

  /** As `plain`, in the blocks and scales that MatMulNBits expects. */
  quantized(
    name: string,
    parts: readonly Part[],
    bits: 4 | 8,
  ): { readonly blocks: GraphWeight; readonly scales: GraphWeight } {
    const { rows, columns } = shapeOf(parts);
    const form = bits === 8 ? 'int8' : 'int4';
    const rowBlocks = columns / blockSize;
    const blocks = this.#allocate(weightsFile, {
      name: `${name}.blocks`,
      type: 'uint8',
      dims: [rows, rowBlocks, rowBytes(form, blockSize)],
      bytes: rows * rowBytes(form, columns),
    });
    const scales = this.#allocate(weightsFile, {
      name: `${name}.scales`,
      type: 'float',
      dims: [rows, rowBlocks],
      bytes: rows * rowBlocks * elementBytes.float,
    });
    let row = 0;
    for (const part of parts) {
      this.transfers.push({
        ...part,
        form,
        file: weightsFile,
        offset: blocks.offset + row * rowBytes(form, columns),
        scalesOffset: scales.offset + row * rowBlocks * elementBytes.float,
      });
      row += rangeLength(part.rows);
    }
    return { blocks, scales };
  }

  constant(name: string, dims: readonly number[], values: Float32Array<ArrayBuffer>): GraphWeight {
    const type = this.#floatType;
    const encoded = type === 'float' ? values : encodeHalves(values, type);
    const bytes = new Uint8Array(encoded.buffer);
    const weight = this.#allocate(weightsFile, { name, type, dims, bytes: bytes.length });
    this.constants.push({ file: weight.file, offset: weight.offset, bytes });
    return weight;
  }

  #allocate(file: string, weight: Pick<GraphWeight, 'name' | 'type' | 'dims' | 'bytes'>): GraphWeight {
    const offset = Math.ceil((this.#fileBytes.get(file) ?? 0) / alignmentBytes) * alignmentBytes;
    this.#fileBytes.set(file, offset + weight.bytes);
    return { ...weight, file, offset };
  }
}

function shapeOf(parts: readonly Part[]): { rows: number; columns: number } {
  const rows = parts.reduce((sum, part) => sum + rangeLength(part.rows), 0);
  const columns = Math.max(...parts.map((part) => rangeLength(part.columns)));
  return { rows, columns };
}
