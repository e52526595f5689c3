// The differences between execution providers of the C API: the place of memory, the access of runs to it, and whether
// the devices of a group reach one another. Owns the interface only.

import type { ElementType, FloatType } from '../shards/element-type.ts';
import type { OrtApi } from './ort-api.ts';
import type { OptionalKernels } from './kernel.ts';
import type { RuntimeTensor, TensorData } from './memory.ts';
import type { Runtime } from './runtime.ts';

/** A provider's inputs. */
export interface ProviderParts {
  readonly api: OrtApi;
  readonly env: bigint;
  /** A native view of JavaScript memory or, by an address, of the device's. */
  readonly view: (at: TensorData | bigint, dims: readonly number[], type: ElementType) => RuntimeTensor;
  /** See RuntimeOptions. */
  readonly kernelDirectory: string | undefined;
  /** A session, once one exists. */
  readonly anySession: () => bigint | undefined;
}

/** One execution provider of one runtime; Runtime documents the parts that it implements. */
export interface Provider extends Pick<
  Runtime,
  | 'allocate'
  | 'memoryInfo'
  | 'replay'
  | 'createSampler'
  | 'createDecodeAttention'
  | 'createDeviceLayers'
  | 'deviceLink'
> {
  readonly floatTypes: readonly FloatType[];
  readonly kernels: OptionalKernels;
  /** OrtMemoryInfo of views by address; null if the provider has none. */
  readonly memory: bigint | null;
  /** OrtRunOptions, or null. */
  readonly runOptions: bigint | null;
  /** Adds itself to the options of a session that is to be created. */
  configure(sessionOptions: bigint): void;
  /** Waits for or ends the device's work, before sessions and tensors are freed. */
  stop(): void;
  /** Called after sessions and tensors are freed. */
  close(): void;
}
