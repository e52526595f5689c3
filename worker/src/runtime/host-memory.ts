// Memory of the host: typed arrays of JavaScript, and the limit of this process. Owns the conversion of halves; knows
// no library.

import { totalmem } from 'node:os';
import { decodeHalves, type ElementType, encodeHalves } from '../shards/element-type.ts';
import type { MemoryInfo, RuntimeMemory, RuntimeTensor, TensorData } from './memory.ts';

/** The memory that the container's limit leaves to this process; undefined without a limit. */
export function hostMemoryInfo(
  limitBytes: number = process.constrainedMemory(),
  usedBytes: number = process.memoryUsage.rss(),
): MemoryInfo | undefined {
  // Without a limit it is 0, or the kernel's value for infinity.
  if (limitBytes === 0 || limitBytes >= totalmem()) {
    return undefined;
  }
  return { freeBytes: Math.max(0, limitBytes - usedBytes), totalBytes: limitBytes };
}

/** Makes a native view of `data`, whose elements are of `type`. */
export type CreateView = (data: TensorData, dims: readonly number[], type: ElementType) => RuntimeTensor;

/** Freed by the garbage collector, after its views. */
export class HostMemory implements RuntimeMemory {
  readonly type: ElementType;
  readonly #data: TensorData;
  readonly #createView: CreateView;

  constructor(type: ElementType, length: number, createView: CreateView) {
    this.type = type;
    this.#data = allocate(type, length);
    this.#createView = createView;
  }

  tensor(start: number, dims: readonly number[]): RuntimeTensor {
    const count = dims.reduce((product, dim) => product * dim, 1);
    return this.#createView(this.#data.subarray(start, start + count), dims, this.type);
  }

  write(start: number, values: Float32Array | Int32Array | BigInt64Array): void {
    if (values.buffer === this.#data.buffer) {
      // The array that `read` returned: it is in place already.
      return;
    }
    if (values instanceof BigInt64Array) {
      (this.#data as BigInt64Array).set(values, start);
    } else if (this.type === 'float16' || this.type === 'bfloat16') {
      (this.#data as Uint16Array).set(encodeHalves(values as Float32Array, this.type), start);
    } else {
      (this.#data as Float32Array | Int32Array).set(values, start);
    }
  }

  read(start: number, count: number): Float32Array {
    const values = this.#data.subarray(start, start + count);
    return this.type === 'float16' || this.type === 'bfloat16'
      ? decodeHalves(values as Uint16Array<ArrayBuffer>, this.type)
      : (values as Float32Array);
  }

  release(): void {}
}

function allocate(type: ElementType, length: number): TensorData {
  if (type === 'int32') {
    return new Int32Array(length);
  }
  if (type === 'int64') {
    return new BigInt64Array(length);
  }
  return type === 'float' ? new Float32Array(length) : new Uint16Array(length);
}
