// The boundary to ONNX Runtime: sessions, tensors over JavaScript memory, synchronous runs. Owns the choice of the
// implementation and of the execution provider; nothing above it knows either. Knows no model and no rank.

import { ClusterError } from '@mimo/core/errors';

/** Which way ONNX Runtime is called. */
export type RuntimeImplementation = 'ort-capi' | 'ort-node';

/** Element types that cross the boundary: float32, int32, int64. */
export type TensorData = Float32Array | Int32Array | BigInt64Array;

/**
 * A view of JavaScript memory with dimensions, outermost first. The data stays where it is (SharedArrayBuffer is
 * allowed) and stays alive as long as the tensor. `release` frees the native side; the tensor must not be used again.
 */
export interface RuntimeTensor {
  readonly data: TensorData;
  release(): void;
}

/** One loaded graph. `run` takes inputs and outputs in the order in which the segment was declared. */
export interface Segment {
  readonly name: string;
}

/** What to load: a graph file, and the order of its inputs and outputs. */
export interface SegmentSource {
  readonly name: string;
  readonly path: string;
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
}

/** Loaded graphs and their runs; not shared between threads. */
export interface Runtime {
  readonly implementation: RuntimeImplementation;
  /** Throws `data_loss` when the file cannot be loaded. */
  loadSegment(source: SegmentSource): Segment;
  tensor(data: TensorData, dims: readonly number[]): RuntimeTensor;
  /**
   * Computes synchronously into the outputs' memory. An output may be the same memory as an input where the graph
   * allows it (attention's KV). Throws `internal` with ONNX Runtime's message.
   */
  run(segment: Segment, inputs: readonly RuntimeTensor[], outputs: readonly RuntimeTensor[]): void;
  /** Frees the sessions and the tensors that were not released. Idempotent. */
  close(): void;
}

export interface RuntimeOptions {
  /** `auto`: the C API where koffi and the library can be loaded, else the package's own binding. */
  readonly implementation: RuntimeImplementation | 'auto';
  /** `cpu` is the only provider so far. */
  readonly executionProvider: 'cpu';
  /** Threads that compute one segment, the calling one included. */
  readonly intraOpThreads: number;
}

/**
 * Loads ONNX Runtime. Errors: `invalid_argument` for an unknown provider or thread count, `failed_precondition` naming
 * what is missing. The caller closes it. One implementation per process: ONNX Runtime's environment is global, and
 * whoever creates it first decides about its threads.
 */
export async function createRuntime(options: RuntimeOptions): Promise<Runtime> {
  if (options.executionProvider !== 'cpu') {
    throw new ClusterError(
      'invalid_argument',
      `executionProvider: must be cpu, is ${String(options.executionProvider)}`,
    );
  }
  if (!Number.isInteger(options.intraOpThreads) || options.intraOpThreads < 1) {
    throw new ClusterError(
      'invalid_argument',
      `intraOpThreads: must be at least 1, is ${options.intraOpThreads}`,
    );
  }
  if (options.implementation === 'ort-node') {
    return await createOrtNode(options);
  }
  try {
    const { createOrtCapiRuntime } = await import('./ort-capi.ts');
    return createOrtCapiRuntime(options);
  } catch (error) {
    if (options.implementation === 'auto') {
      return await createOrtNode(options);
    }
    throw missing('ort-capi', 'packages koffi and onnxruntime-node', error);
  }
}

async function createOrtNode(options: RuntimeOptions): Promise<Runtime> {
  try {
    const { createOrtNodeRuntime } = await import('./ort-node.ts');
    return createOrtNodeRuntime(options);
  } catch (error) {
    throw missing('ort-node', 'package onnxruntime-node', error);
  }
}

function missing(implementation: RuntimeImplementation, needs: string, cause: unknown): ClusterError {
  const reason = cause instanceof Error ? cause.message : String(cause);
  return new ClusterError(
    'failed_precondition',
    `runtime ${implementation} is not available on ${process.platform}-${process.arch}; it needs the ${needs}: ${reason}`,
    { cause },
  );
}
