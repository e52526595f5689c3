// The boundary to ONNX Runtime: sessions, the memory they compute in, synchronous runs. Owns the choice of the
// implementation and of the execution provider; nothing above it knows either. Knows no model and no rank.

import { ClusterError } from '@mimo/core/process/errors';
import type { ElementType, FloatType } from '../shards/element-type.ts';

/** Which way ONNX Runtime is called. */
export type RuntimeImplementation = 'ort-capi' | 'ort-node';

/** Where segments are computed. */
export const executionProviders = ['cpu', 'cuda', 'webgpu'] as const;

export type ExecutionProvider = (typeof executionProviders)[number];

/** JavaScript memory of tensors: float32, int32, int64, and the bits of halves. */
export type TensorData = Float32Array | Int32Array | BigInt64Array | Uint16Array;

/** A view of memory with dimensions. `release` frees the native side; the tensor must not be used again. */
export interface RuntimeTensor {
  /** JavaScript memory behind the view; none where it lies on a device. */
  readonly data?: TensorData;
  release(): void;
}

/** Who touches memory: runs alone, or the host too, in every pass (token ids, partial sums, logits). */
export type MemoryUse = 'resident' | 'exchanged';

/**
 * Elements where the execution provider computes: JavaScript memory, or a device's. Reads and writes are in order with
 * the runs, and for exchanged memory only, which is zero at first.
 */
export interface RuntimeMemory {
  readonly type: ElementType;
  /** A view of the elements from `start`; `dims` are outermost first. It must be released before the memory. */
  tensor(start: number, dims: readonly number[]): RuntimeTensor;
  /** Floats are rounded to the memory's type; integers must be of it. */
  write(start: number, values: Float32Array | Int32Array | BigInt64Array): void;
  /** Floats only. The memory itself where that is float32 in JavaScript, else a copy that the next read of it overwrites. */
  read(start: number, count: number): Float32Array;
  /** `source` is memory of the same runtime and type. Not where `kernels.pagedAttention`: nothing needs it there. */
  copyFrom(source: RuntimeMemory, range: CopyRange): void;
  release(): void;
}

/** Elements: `count` from `from` of the source, to `to` of the target. */
export interface CopyRange {
  readonly from: number;
  readonly to: number;
  readonly count: number;
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

/** Kernels that not every execution provider has. */
export interface OptionalKernels {
  /** PagedAttention; GroupQueryAttention is then not used. */
  readonly pagedAttention: boolean;
  /** TopK over a vocabulary, faster than looking through it on the host. */
  readonly topK: boolean;
}

/** Memory of the device that segments are loaded to, in bytes. */
export interface MemoryInfo {
  readonly freeBytes: number;
  readonly totalBytes: number;
}

/** How a token is drawn: what the engine's sampler is given (../engines/mimo/sampler.ts), in plain data. */
export interface DrawRequest {
  readonly sampling: {
    readonly temperature: number;
    readonly topP: number;
    readonly topK: number;
    readonly minP: number;
    readonly repetitionPenalty: number;
    readonly presencePenalty: number;
    readonly frequencyPenalty: number;
    readonly seed: number;
    readonly logprobs: number;
  };
  readonly position: number;
  /** Ids and their counts; `pairs`, where there are any, are the same one after another. */
  readonly seen: Iterable<readonly [number, number]> & { readonly pairs?: Int32Array };
  readonly forbidden: readonly number[];
}

/** What the engine's sampler answers, and the token's logit. */
export interface SampledToken {
  readonly tokenId: number;
  /** After penalties; not finite where the row has a NaN or no finite maximum. */
  readonly logit: number;
  readonly logprob?: {
    readonly tokenId: number;
    readonly logprob: number;
    readonly top: readonly { readonly tokenId: number; readonly logprob: number }[];
  };
}

/** The rows of logits that a sampler chooses from. */
export interface SamplerShape {
  readonly rowLength: number;
  /** The id of a row's first logit. */
  readonly firstId: number;
  /** Logits of a row that have ids; those after them are padding. */
  readonly usable: number;
  readonly maxRows: number;
}

/**
 * Chooses tokens where the logits lie, to the ids of the engine's sampler. For each pass: `ask`, then `run` (which may be
 * part of what is replayed, for as many rows), then `answers`. `release` it before the memories.
 */
export interface TokenSampler {
  /** Of every row in turn: how its token is drawn, or undefined for the largest logit. */
  ask(requests: readonly (DrawRequest | undefined)[]): void;
  /** `logits` holds the rows one after another. */
  run(logits: RuntimeMemory): void;
  /** Waits for the device. */
  answers(): readonly SampledToken[];
  release(): void;
}

/** What decode passes attend to, of one rank. */
export interface DecodeShape {
  readonly floatType: FloatType;
  readonly queryHeads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly pageTokens: number;
  readonly maxSpans: number;
  /** Pages that a span may have. */
  readonly maxSpanPages: number;
  /** Makes those of the rotation, [positions, headDim / 2] each. */
  readonly ropeTables: () => { readonly cos: Float32Array; readonly sin: Float32Array };
}

/** Rows of one sequence after `start` positions, and the pages that hold them. */
export interface DecodeSpan {
  readonly start: number;
  readonly rows: number;
  readonly pages: readonly number[];
}

/** Memory of one layer: qkv [rows, W], keys and values [pages, pageTokens, kvHeads, D], attended [rows, Q]. */
export interface DecodeLayer {
  readonly qkv: RuntimeMemory;
  readonly keys: RuntimeMemory;
  readonly values: RuntimeMemory;
  readonly attended: RuntimeMemory;
}

/** Attention over spans of few rows, faster than a segment's. `place` a pass, then `run` each layer. */
export interface DecodeAttention {
  readonly mostSpanRows: number;
  /** Returns a key: passes of equal keys run the same. */
  place(spans: readonly DecodeSpan[]): string;
  run(layer: DecodeLayer): void;
  release(): void;
}

/** Kernels of our own beside ONNX Runtime's. */
export type OwnKernel = 'sampling' | 'attention';

/** This rank's place in a group whose devices reach one another. */
export interface DeviceGroupMember {
  readonly rank: number;
  readonly worldSize: number;
  /** Called while a wait for the device lasts; throws when it has lasted too long or shall end. */
  readonly watch: (waitedMs: number) => void;
}

/** Loaded graphs and their runs; not shared between threads. */
export interface Runtime {
  readonly implementation: RuntimeImplementation;
  readonly kernels: OptionalKernels;
  /** Types of activations that have kernels for everything a model does. */
  readonly floatTypes: readonly FloatType[];
  /** Throws `data_loss` when the file cannot be loaded. */
  loadSegment(source: SegmentSource): Segment;
  /**
   * A view of JavaScript memory, for values that kernels read on the host. The data stays where it is (SharedArrayBuffer
   * is allowed) and stays alive as long as the tensor.
   */
  tensor(data: Float32Array | Int32Array | BigInt64Array, dims: readonly number[]): RuntimeTensor;
  /** Throws `resource_exhausted` where the device has too little left. The caller releases it. */
  allocate(type: ElementType, length: number, use: MemoryUse): RuntimeMemory;
  /** Undefined where nobody knows a limit. */
  memoryInfo(): MemoryInfo | undefined;
  /**
   * Computes into the outputs' memory; a device may still be computing on return, reads wait for it. An output may be the same memory as an input where the graph
   * allows it (attention's KV). Throws `internal` with ONNX Runtime's message.
   */
  run(segment: Segment, inputs: readonly RuntimeTensor[], outputs: readonly RuntimeTensor[]): void;
  /**
   * Does `work`, which only runs segments and sums. A device may remember what it was told under a key and do it again
   * without asking: all calls with a key must work on the same memory, with the same values where kernels read the host.
   */
  replay(key: string, work: () => void): void;
  /** Undefined where tokens are chosen on the host. The first on a machine may take some seconds. */
  createSampler(shape: SamplerShape): TokenSampler | undefined;
  /** Undefined where segments attend in decode passes too. */
  createDecodeAttention(shape: DecodeShape): DecodeAttention | undefined;
  /** For rank 0 of a group: what all ranks `joinGroup` with. Empty where devices cannot reach one another. */
  createGroupId(): Int32Array;
  /** Blocks until all ranks have joined. Throws `failed_precondition` naming what is missing. */
  joinGroup(id: Int32Array, member: DeviceGroupMember): void;
  /** Replaces the first `count` elements by the sum over the ranks that joined, in order with the runs. */
  sum(memory: RuntimeMemory, count: number): void;
  /** Frees the sessions and the tensors that were not released. Idempotent. */
  close(): void;
}

export interface RuntimeOptions {
  /** `auto`: the C API where koffi and the library can be loaded, else the package's own binding. */
  readonly implementation: RuntimeImplementation | 'auto';
  /** `cuda` takes the C API and a libonnxruntime with the CUDA provider beside it. */
  readonly executionProvider: ExecutionProvider;
  /** libonnxruntime to load through the C API; default: the one that onnxruntime-node bundles, which has no CUDA. */
  readonly libraryPath?: string;
  /** Kernels of our own that are not used, for comparison. */
  readonly without?: readonly OwnKernel[];
  /** Where kernels that are compiled at the first use are kept; default: nowhere, they are compiled at every start. */
  readonly kernelDirectory?: string;
  /** Threads that compute one segment, the calling one included. */
  readonly intraOpThreads: number;
}

/**
 * Loads ONNX Runtime. Errors: `invalid_argument` for an unknown provider or thread count, `failed_precondition` naming
 * what is missing. The caller closes it. One implementation per process: ONNX Runtime's environment is global, and
 * whoever creates it first decides about its threads.
 */
export async function createRuntime(options: RuntimeOptions): Promise<Runtime> {
  const { executionProvider, implementation } = options;
  if (!executionProviders.includes(executionProvider)) {
    throw new ClusterError(
      'invalid_argument',
      `executionProvider: must be one of ${executionProviders.join(', ')}, is ${executionProvider as string}`,
    );
  }
  if (executionProvider !== 'cpu' && implementation === 'ort-node') {
    throw new ClusterError(
      'invalid_argument',
      `executionProvider: ${executionProvider} needs runtime ort-capi, is ort-node`,
    );
  }
  if (!Number.isInteger(options.intraOpThreads) || options.intraOpThreads < 1) {
    throw new ClusterError(
      'invalid_argument',
      `intraOpThreads: must be at least 1, is ${options.intraOpThreads}`,
    );
  }
  if (implementation === 'ort-node') {
    return await createOrtNode(options);
  }
  try {
    const { createOrtCapiRuntime } = await import('./ort-capi.ts');
    return createOrtCapiRuntime(options);
  } catch (error) {
    if (error instanceof ClusterError) {
      throw error;
    }
    if (implementation === 'auto' && executionProvider === 'cpu') {
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
    // onnxruntime-node's own script fetches a CUDA library that nothing here uses, and fails without access to NuGet.
    const needs =
      'package onnxruntime-node, which npm leaves out if its install script fails (add --ignore-scripts)';
    throw missing('ort-node', needs, error);
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
