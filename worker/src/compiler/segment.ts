// One segment's graph under construction, and the parts that segments share: matrix products in the profile's storage
// form, the norm of a sum, parts of checkpoint tensors. The segments themselves are in segments.ts.

import type { ModelConfig } from '../shards/model-config.ts';
import type { GraphNode, GraphValue, GraphWeight } from './onnx-graph.ts';
import type { ElementDtype } from './safetensors.ts';
import type { TargetProfile } from '../shards/target-profile.ts';
import { blockSize, type Range, type RankPlan } from '../shards/shard-plan.ts';
import type { Part, WeightLayout } from './weight-layout.ts';

/** Everything that decides one rank's graphs. */
export interface RankSpec {
  readonly config: ModelConfig;
  readonly plan: RankPlan;
  readonly profile: TargetProfile;
  /** MatMulNBits' accuracy_level: 4 computes in int8, 0 in fp32. */
  readonly accuracyLevel: 0 | 4;
  /** Positions that the RoPE tables cover. */
  readonly maxPositions: number;
  /** The embedding keeps the checkpoint's type, except in fp16 shards. */
  readonly embeddingDtype: ElementDtype;
}

/** Declares inputs residual and delta, writes their sum to `sum`; returns the name of its RMS norm, [rows, H]. */
export function addAndNormalize(segment: Segment, norm: string, sum: string): string {
  const { hiddenSize, rmsNormEps } = segment.spec.config;
  segment.input('residual', ['rows', hiddenSize]);
  segment.input('delta', ['rows', hiddenSize]);
  const gain = segment.weight(segment.layout.plain('norm', [rowsOf(norm, allOf(hiddenSize), 1)])); // [H]
  segment.node({
    op: 'SkipSimplifiedLayerNormalization',
    domain: 'com.microsoft',
    inputs: ['residual', 'delta', gain],
    outputs: ['normed', '', '', sum],
    floats: { epsilon: rmsNormEps },
  });
  return 'normed';
}

interface Linear {
  readonly input: string;
  readonly output: string;
  readonly name: string;
  /** Stacked rows of the matrix, [out, in]. */
  readonly parts: readonly Part[];
  readonly bias?: readonly Part[];
}

/** y = W x + b with weights as the profile stores them, from [rows, in] to [rows, out]. */
export function linear(segment: Segment, { input, output, name, parts, bias }: Linear): void {
  const { profile, accuracyLevel } = segment.spec;
  const { weights } = profile;
  const biasNames = bias === undefined ? [] : [segment.weight(segment.layout.plain('bias', bias))];
  if (weights !== 'int8' && weights !== 'int4') {
    // Gemm accepts the matrix in the checkpoint's layout; MatMul would need it transposed.
    const weight = segment.weight(segment.layout.plain(name, parts));
    segment.node({
      op: 'Gemm',
      inputs: [input, weight, ...biasNames],
      outputs: [output],
      ints: { transB: 1 },
    });
    return;
  }
  const bits = weights === 'int8' ? 8 : 4;
  const { blocks, scales } = segment.layout.quantized(name, parts, bits);
  const [rows = 0, rowBlocks = 0] = blocks.dims;
  const optional = bias === undefined ? [] : ['', '', ...biasNames];
  segment.node({
    op: 'MatMulNBits',
    domain: 'com.microsoft',
    inputs: [input, segment.weight(blocks), segment.weight(scales), ...optional],
    outputs: [output],
    ints: { K: rowBlocks * blockSize, N: rows, bits, block_size: blockSize, accuracy_level: accuracyLevel },
  });
}

/** One graph under construction. */
export interface Segment {
  readonly spec: RankSpec;
  readonly layout: WeightLayout;
  readonly inputs: readonly GraphValue[];
  readonly outputs: readonly GraphValue[];
  readonly weights: readonly GraphWeight[];
  readonly nodes: readonly GraphNode[];
  input(name: string, dims: GraphValue['dims'], type?: GraphValue['type']): void;
  output(name: string, dims: GraphValue['dims'], type?: GraphValue['type']): void;
  /** Adds a weight and returns its name. */
  weight(weight: GraphWeight): string;
  node(node: GraphNode): void;
}

/** An empty one; its weights go into the layout. */
export function createSegment(spec: RankSpec, layout: WeightLayout): Segment {
  const inputs: GraphValue[] = [];
  const outputs: GraphValue[] = [];
  const weights: GraphWeight[] = [];
  const nodes: GraphNode[] = [];
  const floatType = spec.profile.activations;
  return {
    spec,
    layout,
    inputs,
    outputs,
    weights,
    nodes,
    input: (name, dims, type = floatType) => void inputs.push({ name, type, dims }),
    output: (name, dims, type = floatType) => void outputs.push({ name, type, dims }),
    weight(weight) {
      weights.push(weight);
      return weight.name;
    },
    node: (node) => void nodes.push(node),
  };
}

/** All of a dimension. */
export function allOf(length: number): Range {
  return { start: 0, end: length };
}

/** A checkpoint's whole matrix, or some of its rows or columns. */
export function whole(source: string, rows: number, columns: number): Part {
  return { source, rows: allOf(rows), columns: allOf(columns) };
}

export function rowsOf(source: string, rows: Range, columns: number): Part {
  return { source, rows, columns: allOf(columns) };
}

export function columnsOf(source: string, rows: number, columns: Range): Part {
  return { source, rows: allOf(rows), columns };
}
