// The memory that kernels compute in, JavaScript's or a device's, and its native views. Interfaces only;
// host-memory.ts and cuda-device.ts hold the host's and CUDA's, provider-webgpu.ts WebGPU's.

import type { ElementType } from '../shards/element-type.ts';

/** JavaScript memory of tensors: float32, int32, int64, and the bits of halves. */
export type TensorData = Float32Array | Int32Array | BigInt64Array | Uint16Array;

/** A view of memory with dimensions. `release` frees the native side; the tensor must not be used again. */
export interface RuntimeTensor {
  /** JavaScript memory behind the view; none for device memory. */
  readonly data?: TensorData;
  release(): void;
}

/** Which side accesses memory: only runs, or also the host, in every pass (token ids, partial sums, logits). */
export type MemoryUse = 'resident' | 'exchanged';

/**
 * Elements in the execution provider's memory: JavaScript's, or a device's. Reads and writes are in order with the
 * runs. Only exchanged memory allows them; it is zero at first.
 */
export interface RuntimeMemory {
  readonly type: ElementType;
  /** A view of the elements from `start`; `dims` are outermost first. It must be released before the memory. */
  tensor(start: number, dims: readonly number[]): RuntimeTensor;
  /** Floats are rounded to the memory's type; integers must be of it. */
  write(start: number, values: Float32Array | Int32Array | BigInt64Array): void;
  /**
   * Floats only. Returns the memory itself if it is float32 in JavaScript, else a copy that the next read overwrites.
   */
  read(start: number, count: number): Float32Array;
  release(): void;
}

/** Memory of the device that holds the segments, in bytes. */
export interface MemoryInfo {
  readonly freeBytes: number;
  readonly totalBytes: number;
}

/** The memory of one runtime. */
export interface Memory {
  /**
   * A view of JavaScript memory, for values that kernels read on the host. The data is not copied (SharedArrayBuffer is
   * allowed) and stays alive as long as the tensor.
   */
  tensor(data: Float32Array | Int32Array | BigInt64Array, dims: readonly number[]): RuntimeTensor;
  /** Throws `resource_exhausted` if the device has too little free memory. The caller releases it. */
  allocate(type: ElementType, length: number, use: MemoryUse): RuntimeMemory;
  /** Undefined if no limit is known. */
  memoryInfo(): MemoryInfo | undefined;
}
