// The computing units: segments (ONNX graphs), and our own kernels if a device has them. Interfaces only; ort-capi.ts
// and ort-node.ts run segments, cuda-kernels.ts compiles and launches ours.

import type { FloatType } from '../shards/element-type.ts';
import type { RuntimeMemory, RuntimeTensor } from './memory.ts';

/** One loaded graph. `run` expects inputs and outputs in the order of the segment's declaration. */
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

/** Kernels that only some execution providers have. */
export interface OptionalKernels {
  /** PagedAttention; GroupQueryAttention is then not used. */
  readonly pagedAttention: boolean;
  /** TopK over a vocabulary, faster than a search on the host. */
  readonly topK: boolean;
}

/** How a token is drawn: the input of the engine's sampler (../engines/mimo/sampler.ts), as plain data. */
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
  /** Ids and their counts; `pairs`, if present, holds the same one after another. */
  readonly seen: Iterable<readonly [number, number]> & { readonly pairs?: Int32Array };
  readonly forbidden: readonly number[];
}

/** The sampler's answer, and the token's logit. */
export interface SampledToken {
  readonly tokenId: number;
  /** After penalties; not finite if the row has a NaN or no finite maximum. */
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
 * Chooses tokens in the memory of the logits; the ids equal those of the engine's sampler. For each pass: `ask`, then
 * `run` (which may be part of a replay, for as many rows), then `answers`. Call `release` before releasing the
 * memories.
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

/** The shapes of one rank's attention in decode passes. */
export interface DecodeShape {
  readonly floatType: FloatType;
  readonly queryHeads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly pageTokens: number;
  readonly maxSpans: number;
  /** Pages that a span may have. */
  readonly maxSpanPages: number;
  /** Creates the tables of the rotation, [positions, headDim / 2] each. */
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

/** Attention over spans of few rows, faster than a segment's. Call `place` for a pass, then `run` for each layer. */
export interface DecodeAttention {
  readonly mostSpanRows: number;
  /** Returns a key: passes of equal keys run the same. */
  place(spans: readonly DecodeSpan[]): string;
  run(layer: DecodeLayer): void;
  release(): void;
}

/** Bytes of a file that hold one weight, in a device's layout. */
export interface WeightPlace {
  readonly path: string;
  readonly offset: number;
  readonly bytes: number;
}

/** Weights of one layer: norms and bias [n], matrices [out, in]. */
export interface LayerWeights {
  readonly inputNorm: WeightPlace;
  readonly qkv: WeightPlace;
  readonly qkvBias: WeightPlace;
  readonly output: WeightPlace;
  readonly postNorm: WeightPlace;
  readonly gate: WeightPlace;
  readonly up: WeightPlace;
  readonly down: WeightPlace;
}

/** All layers of a model that one device holds whole. */
export interface LayersShape {
  readonly floatType: FloatType;
  readonly hidden: number;
  readonly attended: number;
  readonly qkv: number;
  readonly feedForward: number;
  /** Of the norms. */
  readonly epsilon: number;
  readonly layers: readonly LayerWeights[];
}

/** Memory of a pass: residual [rows, H], qkv [rows, W], attended [rows, Q]. */
export interface LayerRows {
  readonly residual: RuntimeMemory;
  readonly qkv: RuntimeMemory;
  readonly attended: RuntimeMemory;
}

/** The work of a layer before and after its attention, faster than segments. Call `reserve` before the first pass. */
export interface DeviceLayers {
  /** Allocates scratch memory for passes of up to this many rows. */
  reserve(maxRows: number): void;
  /** Computes qkv from residual. `isFirst`: the residual of this pass comes from no other layer. */
  attend(
    layer: number,
    io: Pick<LayerRows, 'residual' | 'qkv'>,
    at: { rows: number; isFirst: boolean },
  ): void;
  /** Adds the layer's output, computed from residual and attended, to residual. */
  finish(layer: number, io: Pick<LayerRows, 'residual' | 'attended'>, rows: number): void;
  release(): void;
}

/** Kernels of our own beside ONNX Runtime's. */
export type OwnKernel = 'sampling' | 'attention' | 'layers';

/** The kernels of one runtime. */
export interface Kernels {
  readonly kernels: OptionalKernels;
  /** Types of activations with kernels for all of a model's operations. */
  readonly floatTypes: readonly FloatType[];
  /** Throws `data_loss` when the file cannot be loaded. */
  loadSegment(source: SegmentSource): Segment;
  /**
   * Computes into the outputs' memory; a device may still be computing on return, reads wait for it. An output may be
   * the same memory as an input where the graph allows it (attention's KV). Throws `internal` with ONNX Runtime's
   * message.
   */
  run(segment: Segment, inputs: readonly RuntimeTensor[], outputs: readonly RuntimeTensor[]): void;
  /**
   * Runs `work`, which only runs segments and sums. A device may record the launches under a key and repeat them
   * without `work`. So all calls with a key must use the same memory, and the same values in memory that kernels read
   * on the host.
   */
  replay(key: string, work: () => void): void;
  /** Absent, or undefined, if tokens are chosen on the host. The first call on a machine may last some seconds. */
  createSampler?(shape: SamplerShape): TokenSampler | undefined;
  /** Absent, or undefined, if segments compute attention in decode passes too. */
  createDecodeAttention?(shape: DecodeShape): DecodeAttention | undefined;
  /** Loads the layers' weights. Absent, or undefined (and nothing is loaded), if segments compute the layers. */
  createDeviceLayers?(shape: LayersShape): DeviceLayers | undefined;
}
