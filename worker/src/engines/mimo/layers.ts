// A rank's layers over the rows of a pass: by segments, whose partial sums the ranks add up, or by a device's own
// kernels. Owns the weights of the layers, on the host or a device; knows no plan. Segment signatures are in
// shards/shard.ts.

import * as path from 'node:path';
import type { SegmentEntry, ShardManifest } from '../../shards/shard.ts';
import type { DeviceLayers, LayerWeights, Segment, WeightPlace } from '../../runtime/kernel.ts';
import type { Reducer } from '../../runtime/reduce.ts';
import type { Runtime } from '../../runtime/runtime.ts';
import type { Attention } from './attention.ts';
import type { Scratch } from './scratch.ts';

/** The memory that layers compute in. */
export interface LayerMemory extends Scratch {
  readonly attention: Attention;
  readonly reducer: Reducer;
}

/** `isFirst`: nothing to add to the residual yet. */
export interface LayerPlace {
  readonly layer: number;
  readonly isFirst: boolean;
}

/** All layers, the MTP layer last. `reserve` before the first run; `close` frees what they hold. */
export interface Layers {
  reserve(maxRows: number): void;
  /**
   * `residual` and `delta` in, `residual` and `delta` out, [rows, H] each; the sum of both is the hidden state. A first
   * layer has no delta.
   */
  run(at: LayerPlace, rows: number, memory: LayerMemory): void;
  close(): void;
}

export interface LayersOptions {
  readonly runtime: Runtime;
  /** Of one rank. */
  readonly directory: string;
  readonly manifest: ShardManifest;
  readonly load: (name: string) => Segment;
  readonly entryOf: (name: string) => SegmentEntry;
}

/** Loads the weights. The caller closes it. */
export function createLayers(options: LayersOptions): Layers {
  const { config } = options.manifest;
  const names = [
    ...Array.from({ length: config.layers }, (_, layer) => `layer.${layer}`),
    // The first MTP layer; further ones draft further ahead, which this engine does not.
    ...(config.mtpLayers > 0 ? ['mtp.0'] : []),
  ];
  // Only segments support partial sums of several ranks, and quantised matrices.
  const { tensorParallel, profile } = options.manifest;
  const isWhole = tensorParallel === 1 && profile.activations !== 'float';
  const device = isWhole ? createDeviceLayers(names, options) : undefined;
  return device === undefined ? new SegmentLayers(names, options) : new KernelLayers(device);
}

function createDeviceLayers(
  names: readonly string[],
  { runtime, directory, manifest, entryOf }: LayersOptions,
): DeviceLayers | undefined {
  const { config, profile } = manifest;
  const layers = names.map((name): LayerWeights => {
    const place = (segment: string, weight: string): WeightPlace => {
      const { file, offset, bytes } = entryOf(`${name}.${segment}`).weights[weight]!;
      return { path: path.join(directory, file), offset, bytes };
    };
    return {
      inputNorm: place('qkv', 'norm'),
      qkv: place('qkv', 'weight'),
      qkvBias: place('qkv', 'bias'),
      output: place('o', 'weight'),
      postNorm: place('mlp', 'norm'),
      gate: place('mlp', 'gate.weight'),
      up: place('mlp', 'up.weight'),
      down: place('mlp', 'down.weight'),
    };
  });
  return runtime.createDeviceLayers?.({
    floatType: profile.activations,
    hidden: config.hiddenSize,
    attended: config.queryHeads * config.headDim,
    qkv: (config.queryHeads + 2 * config.kvHeads) * config.headDim,
    feedForward: config.intermediateSize,
    epsilon: config.rmsNormEps,
    layers,
  });
}

interface Block {
  readonly qkv: Segment;
  readonly o: Segment;
  readonly mlp: Segment;
}

class SegmentLayers implements Layers {
  readonly #runtime: Runtime;
  readonly #blocks: readonly Block[];

  constructor(names: readonly string[], { runtime, load }: LayersOptions) {
    this.#runtime = runtime;
    this.#blocks = names.map((name) => ({
      qkv: load(`${name}.qkv`),
      o: load(`${name}.o`),
      mlp: load(`${name}.mlp`),
    }));
  }

  reserve(): void {
    // They use only the scratch rows.
  }

  run({ layer, isFirst }: LayerPlace, rows: number, memory: LayerMemory): void {
    const runtime = this.#runtime;
    const block = this.#blocks[layer]!;
    const residual = memory.residual.first(rows);
    const residualNext = memory.residualNext.first(rows);
    const delta = memory.delta.first(rows);
    const deltaNext = memory.deltaNext.first(rows);
    const deltaIn = isFirst ? memory.zero.first(rows) : delta;
    runtime.run(block.qkv, [residual, deltaIn], [residualNext, memory.qkv.first(rows)]); // [rows, W]
    memory.attention.run(layer, memory.qkv, memory.attended);
    runtime.run(block.o, [memory.attended.first(rows)], [deltaNext]); // partial [rows, H]
    memory.deltaNext.sum(rows, memory.reducer);
    runtime.run(block.mlp, [residualNext, deltaNext], [residual, delta]); // partial [rows, H]
    memory.delta.sum(rows, memory.reducer);
  }

  close(): void {
    // The runtime frees segments.
  }
}

/** Keeps the hidden state in `residual`; `delta` is never written, and stays zero. */
class KernelLayers implements Layers {
  readonly #layers: DeviceLayers;

  constructor(layers: DeviceLayers) {
    this.#layers = layers;
  }

  reserve(maxRows: number): void {
    this.#layers.reserve(maxRows);
  }

  run({ layer, isFirst }: LayerPlace, rows: number, memory: LayerMemory): void {
    const residual = memory.residual.memory;
    const qkv = memory.qkv.memory;
    const attended = memory.attended.memory;
    this.#layers.attend(layer, { residual, qkv }, { rows, isFirst });
    memory.attention.run(layer, memory.qkv, memory.attended);
    this.#layers.finish(layer, { residual, attended }, rows);
  }

  close(): void {
    this.#layers.release();
  }
}
