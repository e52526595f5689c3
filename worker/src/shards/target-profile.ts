// The types and kernels of a shard's computation. The compiler chooses a profile once and writes it into the
// manifest; the engine checks it once against its runtime. Nothing else derives an element type or a kernel from a
// precision.

import type { FloatType } from './element-type.ts';

/**
 * How matrices are stored: fp32 as the reference, int8 block 32 (default on CPUs), int4 block 32 (speed); fp16 and bf16
 * for GPUs.
 */
export const precisions = ['fp32', 'fp16', 'bf16', 'int8', 'int4'] as const;

export type Precision = (typeof precisions)[number];

/** A shard's segments of attention: over contiguous caches, or over pages. */
export type AttentionSegment = 'attention' | 'attention.paged';

export interface TargetProfile {
  readonly weights: Precision;
  /** The type of activations, keys and values: of every float input and output of a segment, the logits aside. */
  readonly activations: FloatType;
  /** The attention segments of the shard; a runtime uses the one that it has a kernel for. */
  readonly attention: readonly AttentionSegment[];
  /** `best`: the shard also has the segment that finds the best token in the memory of the logits. */
  readonly head: 'logits' | 'best';
}

const forProcessors = { activations: 'float', attention: ['attention'], head: 'logits' } as const;

/** The profile of each precision. Only GPUs have kernels for bfloat16 and pages. */
const profiles: Readonly<Record<Precision, Omit<TargetProfile, 'weights'>>> = {
  fp32: forProcessors,
  int8: forProcessors,
  int4: forProcessors,
  fp16: { activations: 'float16', attention: ['attention', 'attention.paged'], head: 'best' },
  bf16: { activations: 'bfloat16', attention: ['attention.paged'], head: 'best' },
};

/** The compiler's choice for matrices of a precision. */
export function profileOf(weights: Precision): TargetProfile {
  return { weights, ...profiles[weights] };
}
