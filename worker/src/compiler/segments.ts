// Builds the graphs of one rank's segments and the layout of their weights (the contract is in shard.ts). Owns the
// choice of operators for MiMo. Pure: touches no file, and the same arguments always give the same bytes.
//
// Source: Qwen2's forward pass, and the MTP block of Xiaomi's vLLM fork (hidden half first in `input_proj`).
// Deliberate difference: q, k, v are one product over their stacked rows; gate and up stay two.
// H hidden size; Q query rows of the rank; K its KV rows; F its feed-forward rows; V its vocabulary rows.

import { backboneTensors } from './checkpoint.ts';
import { elementTypes, encodeModel } from './onnx-graph.ts';
import {
  addAndNormalize,
  allOf,
  columnsOf,
  createSegment,
  linear,
  type RankSpec,
  rowsOf,
  type Segment,
  whole,
} from './segment.ts';
import { ropeTables } from '../shards/rope.ts';
import { pageTokens, type SegmentEntry } from '../shards/shard.ts';
import { rangeLength } from '../shards/shard-plan.ts';
import { WeightLayout } from './weight-layout.ts';

/** One rank's segments, in the order in which a step runs them, and the layout that their weights refer to. */
export interface RankSegments {
  readonly segments: readonly { readonly entry: SegmentEntry; readonly model: Uint8Array }[];
  readonly layout: WeightLayout;
}

/** Builds every segment of one rank. */
export function buildSegments(spec: RankSpec): RankSegments {
  const layout = new WeightLayout(spec.profile.activations);
  const segments: { entry: SegmentEntry; model: Uint8Array }[] = [];
  const add = (name: string, fill: (segment: Segment) => void): void => {
    const segment = createSegment(spec, layout);
    fill(segment);
    const { inputs, outputs, weights, nodes } = segment;
    const entry = {
      name,
      file: `${name}.onnx`,
      inputs: inputs.map((value) => value.name),
      outputs: outputs.map((value) => value.name),
      weights: Object.fromEntries(
        weights.map((weight) => [
          weight.name,
          { file: weight.file, offset: weight.offset, bytes: weight.bytes },
        ]),
      ),
    };
    segments.push({ entry, model: encodeModel({ name, inputs, outputs, weights, nodes }) });
  };

  add('embed', fillEmbed);
  for (const name of spec.profile.attention) {
    add(name, (segment) => fillAttention(segment, name === 'attention.paged'));
  }
  for (let layer = 0; layer < spec.config.layers; layer++) {
    addBlock(add, `layer.${layer}`, `model.layers.${layer}`);
  }
  add('final', (segment) => fillFinal(segment, backboneTensors.norm));
  add('head', fillHead);
  if (spec.profile.head === 'best') {
    add('best', fillBest);
  }
  for (let layer = 0; layer < spec.config.mtpLayers; layer++) {
    const source = `model.mtp_layers.${layer}`;
    add(`mtp.${layer}.input`, (segment) => fillDraftInput(segment, source));
    addBlock(add, `mtp.${layer}`, source);
    add(`mtp.${layer}.final`, (segment) => fillFinal(segment, `${source}.final_layernorm.weight`));
  }
  return { segments, layout };
}

function addBlock(
  add: (name: string, fill: (segment: Segment) => void) => void,
  name: string,
  source: string,
): void {
  add(`${name}.qkv`, (segment) => fillQkv(segment, source));
  add(`${name}.o`, (segment) => fillOutput(segment, source));
  add(`${name}.mlp`, (segment) => fillMlp(segment, source));
}

function fillEmbed(segment: Segment): void {
  const { config, embeddingDtype } = segment.spec;
  const { hiddenSize, vocabSize } = config;
  segment.input('tokenIds', ['rows'], 'int32');
  const type = segment.spec.profile.activations;
  const parts = [whole(backboneTensors.embedding, vocabSize, hiddenSize)];
  // WebGPU, which computes fp16 shards, has no bfloat16 to cast from.
  const table =
    type === 'float16'
      ? segment.layout.plain('embedding', parts)
      : segment.layout.plain('embedding', parts, embeddingDtype); // [vocab, H]
  const isStored = table.type === type;
  segment.node({
    op: 'Gather',
    inputs: [segment.weight(table), 'tokenIds'],
    outputs: [isStored ? 'hidden' : 'row'],
    ints: { axis: 0 },
  });
  if (!isStored) {
    segment.node({ op: 'Cast', inputs: ['row'], outputs: ['hidden'], ints: { to: elementTypes[type] } });
  }
  segment.output('hidden', ['rows', hiddenSize]);
}

function fillAttention(segment: Segment, paged: boolean): void {
  const { config, plan, maxPositions } = segment.spec;
  const { headDim } = config;
  const packed = (plan.queryHeads + 2 * plan.kvHeads) * headDim;
  const cache = paged ? ['pages', pageTokens, plan.kvHeads, headDim] : [1, plan.kvHeads, 'capacity', headDim];
  const places = paged ? ['starts', 'past', 'table'] : ['seqlensK', 'totalLength'];
  const [pastKey, pastValue] = paged ? (['keys', 'values'] as const) : (['pastKey', 'pastValue'] as const);
  const [presentKey, presentValue] = paged
    ? (['keysOut', 'valuesOut'] as const)
    : (['presentKey', 'presentValue'] as const);
  segment.input('qkv', paged ? ['rows', packed] : [1, 's', packed]);
  segment.input(pastKey, cache);
  segment.input(pastValue, cache);
  if (paged) {
    segment.input('starts', ['starts'], 'int32');
    segment.input('past', ['spans'], 'int32');
    segment.input('table', ['spans', 'n'], 'int32');
    segment.input('bounds', [3], 'int32');
  } else {
    segment.input('seqlensK', [1], 'int32');
    segment.input('totalLength', [], 'int32');
  }
  const { cos, sin } = ropeTables({ headDim, ropeTheta: config.ropeTheta, positions: maxPositions });
  const dims = [maxPositions, headDim / 2];
  const cosName = segment.weight(segment.layout.constant('cos', dims, cos)); // [positions, D / 2]
  const sinName = segment.weight(segment.layout.constant('sin', dims, sin)); // [positions, D / 2]
  // PagedAttention's metadata is its input 16, after slots, sinks, norms and scales that MiMo does not have.
  const bounds = paged ? ['', '', '', '', '', '', 'bounds'] : [];
  segment.node({
    op: paged ? 'PagedAttention' : 'GroupQueryAttention',
    domain: 'com.microsoft',
    inputs: ['qkv', '', '', pastKey, pastValue, ...places, cosName, sinName, ...bounds],
    outputs: ['attended', presentKey, presentValue],
    ints: { num_heads: plan.queryHeads, kv_num_heads: plan.kvHeads, do_rotary: 1, rotary_interleaved: 0 },
  });
  const width = plan.queryHeads * headDim;
  segment.output('attended', paged ? ['rows', width] : [1, 's', width]);
  segment.output(presentKey, cache);
  segment.output(presentValue, cache);
}

function fillQkv(segment: Segment, source: string): void {
  const { config, plan } = segment.spec;
  const attention = `${source}.self_attn`;
  const rows = [
    [`${attention}.q_proj`, plan.queryRows],
    [`${attention}.k_proj`, plan.kvRows],
    [`${attention}.v_proj`, plan.kvRows],
  ] as const;
  const normed = addAndNormalize(segment, `${source}.input_layernorm.weight`, 'residualOut'); // [rows, H]
  linear(segment, {
    input: normed,
    output: 'qkv', // [rows, Q + 2 K]
    name: 'weight', // [Q + 2 K, H]
    parts: rows.map(([name, range]) => rowsOf(`${name}.weight`, range, config.hiddenSize)),
    bias: rows.map(([name, range]) => rowsOf(`${name}.bias`, range, 1)),
  });
  segment.output('residualOut', ['rows', config.hiddenSize]);
  segment.output('qkv', ['rows', rangeLength(plan.queryRows) + 2 * rangeLength(plan.kvRows)]);
}

function fillOutput(segment: Segment, source: string): void {
  const { config, plan } = segment.spec;
  segment.input('attended', ['rows', rangeLength(plan.queryRows)]);
  linear(segment, {
    input: 'attended', // [rows, Q]
    output: 'delta', // [rows, H], this rank's share of the sum
    name: 'weight', // [H, Q]
    parts: [columnsOf(`${source}.self_attn.o_proj.weight`, config.hiddenSize, plan.queryRows)],
  });
  segment.output('delta', ['rows', config.hiddenSize]);
}

function fillMlp(segment: Segment, source: string): void {
  const { config, plan } = segment.spec;
  const normed = addAndNormalize(segment, `${source}.post_attention_layernorm.weight`, 'residualOut'); // [rows, H]
  for (const name of ['gate', 'up']) {
    linear(segment, {
      input: normed,
      output: name, // [rows, F]
      name: `${name}.weight`, // [F, H]
      parts: [rowsOf(`${source}.mlp.${name}_proj.weight`, plan.feedForward, config.hiddenSize)],
    });
  }
  // QuickGelu with alpha 1 is x * sigmoid(x), SiLU.
  segment.node({
    op: 'QuickGelu',
    domain: 'com.microsoft',
    inputs: ['gate'],
    outputs: ['activated'],
    floats: { alpha: 1 },
  });
  segment.node({ op: 'Mul', inputs: ['activated', 'up'], outputs: ['product'] }); // [rows, F]
  linear(segment, {
    input: 'product',
    output: 'deltaOut', // [rows, H], this rank's share of the sum
    name: 'down.weight', // [H, F]
    parts: [columnsOf(`${source}.mlp.down_proj.weight`, config.hiddenSize, plan.feedForward)],
  });
  segment.output('residualOut', ['rows', config.hiddenSize]);
  segment.output('deltaOut', ['rows', config.hiddenSize]);
}

function fillFinal(segment: Segment, norm: string): void {
  const { hiddenSize } = segment.spec.config;
  const normed = addAndNormalize(segment, norm, 'hidden'); // [rows, H]
  segment.output('hidden', ['rows', hiddenSize]);
  segment.output(normed, ['rows', hiddenSize]);
}

function fillHead(segment: Segment): void {
  const { config, plan } = segment.spec;
  segment.input('normed', ['rows', config.hiddenSize]);
  segment.input('headRows', ['n'], 'int32');
  segment.node({ op: 'Gather', inputs: ['normed', 'headRows'], outputs: ['chosen'], ints: { axis: 0 } });
  const isHalf = segment.spec.profile.activations !== 'float';
  linear(segment, {
    input: 'chosen', // [n, H]
    output: isHalf ? 'halfLogits' : 'logits', // [n, V]
    name: 'weight', // [V, H]
    parts: [
      rowsOf(
        config.tiedHead ? backboneTensors.embedding : backboneTensors.head,
        plan.vocabulary,
        config.hiddenSize,
      ),
    ],
  });
  if (isHalf) {
    const to = elementTypes.float;
    segment.node({ op: 'Cast', inputs: ['halfLogits'], outputs: ['logits'], ints: { to } });
  }
  segment.output('logits', ['n', rangeLength(plan.vocabulary)], 'float');
}

function fillBest(segment: Segment): void {
  const { start, end } = segment.spec.plan.vocabulary;
  segment.input('logits', ['n', end - start], 'float');
  segment.input('end', [1], 'int64');
  const constant = (output: string, ints: readonly number[]): string => {
    segment.node({ op: 'Constant', inputs: [], outputs: [output], intLists: { value_ints: ints } });
    return output;
  };
  segment.node({
    op: 'Slice',
    inputs: ['logits', constant('zero', [0]), 'end', constant('axis', [1])],
    outputs: ['usable'],
  });
  segment.node({
    op: 'TopK',
    inputs: ['usable', constant('one', [1])],
    outputs: ['value', 'index'], // [n, 1]
    ints: { axis: -1 },
  });
  segment.node({
    op: 'Add',
    inputs: ['index', constant('vocabStart', [start])],
    outputs: ['id'],
  });
  // As a float, which holds ids up to 2^24 exactly: one output is one copy to the host.
  segment.node({ op: 'Cast', inputs: ['id'], outputs: ['idValue'], ints: { to: elementTypes.float } });
  segment.node({ op: 'Concat', inputs: ['idValue', 'value'], outputs: ['best'], ints: { axis: -1 } });
  segment.output('best', ['n', 2], 'float');
}

function fillDraftInput(segment: Segment, source: string): void {
  const { hiddenSize, rmsNormEps } = segment.spec.config;
  segment.input('hidden', ['all', hiddenSize]);
  segment.input('hiddenRows', ['rows'], 'int32');
  segment.input('embedding', ['rows', hiddenSize]);
  segment.node({ op: 'Gather', inputs: ['hidden', 'hiddenRows'], outputs: ['chosen'], ints: { axis: 0 } });
  for (const [input, norm, name] of [
    ['chosen', `${source}.hidden_layernorm.weight`, 'hidden'],
    ['embedding', `${source}.token_layernorm.weight`, 'embedding'],
  ] as const) {
    const gain = segment.weight(segment.layout.plain(`${name}.norm`, [rowsOf(norm, allOf(hiddenSize), 1)])); // [H]
    segment.node({
      op: 'SimplifiedLayerNormalization',
      inputs: [input, gain],
      outputs: [`${name}.normed`],
      ints: { axis: -1 },
      floats: { epsilon: rmsNormEps },
    });
  }
  segment.node({
    op: 'Concat',
    inputs: ['hidden.normed', 'embedding.normed'],
    outputs: ['pair'], // [rows, 2 H]
    ints: { axis: -1 },
  });
  linear(segment, {
    input: 'pair',
    output: 'residual', // [rows, H]
    name: 'weight', // [H, 2 H]
    parts: [whole(`${source}.input_proj.weight`, hiddenSize, 2 * hiddenSize)],
  });
  segment.output('residual', ['rows', hiddenSize]);
}
