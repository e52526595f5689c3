// The boundary to ONNX Runtime: sessions, the memory they compute in, synchronous runs. Owns the interface and its
// options; create-runtime.ts chooses the implementation, and no caller knows which. Knows no model and no rank.

import type { Kernels, OwnKernel } from './kernel.ts';
import type { Memory } from './memory.ts';
import type { DeviceLink } from './reduce.ts';

/** The binding through which ONNX Runtime is called. */
export type RuntimeImplementation = 'ort-capi' | 'ort-node';

/** Where segments are computed. */
export const executionProviders = ['cpu', 'cuda', 'webgpu'] as const;

export type ExecutionProvider = (typeof executionProviders)[number];

/** Loaded graphs and their runs; not shared between threads. */
export interface Runtime extends Kernels, Memory {
  readonly implementation: RuntimeImplementation;
  /** Undefined if the ranks' shares are added on the host. */
  readonly deviceLink?: DeviceLink | undefined;
  /** Frees the sessions and the tensors that were not released. Idempotent. */
  close(): void;
}

export interface RuntimeOptions {
  /** `auto`: the C API if koffi and the library can be loaded, else the package's own binding. */
  readonly implementation: RuntimeImplementation | 'auto';
  /** `cuda` needs the C API and a libonnxruntime with the CUDA provider beside it. */
  readonly executionProvider: ExecutionProvider;
  /**
   * libonnxruntime to load through the C API; default: the library bundled with onnxruntime-node, which has no CUDA.
   */
  readonly libraryPath?: string;
  /** Our own kernels to disable, for comparison. */
  readonly without?: readonly OwnKernel[];
  /** Cache directory for kernels compiled at the first use; default: none, they are compiled at every start. */
  readonly kernelDirectory?: string;
  /** Threads that compute one segment, the calling one included. */
  readonly intraOpThreads: number;
}
