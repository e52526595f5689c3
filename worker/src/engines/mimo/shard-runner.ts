// One rank's execution of passes: the loaded segments, the scratch rows and the KV buffers, and the sums with the other
// ranks. Owns the forward pass; knows no sequence, no sampling and no schedule. Plans come from rank 0 (step-plan.ts).
// Source: Qwen2's decoder with MiMo's MTP layer, as in models/model.py; segment signatures are in shards/shard.ts.
//
// H hidden size; T worldSize; D head dim; Q = queryHeads/T * D; W = (queryHeads + 2 kvHeads)/T * D; V vocabulary.

import * as path from 'node:path';
import { ClusterError } from '@mimo/core/process/errors';
import type { Collective } from '../../collective/collective.ts';
import type { SegmentEntry, ShardManifest } from '../../shards/shard.ts';
import type { AttentionSegment, TargetProfile } from '../../shards/target-profile.ts';
import type { Segment } from '../../runtime/kernel.ts';
import type { Runtime } from '../../runtime/runtime.ts';
import { createAttention } from './attention.ts';
import { HeadOutput } from './head-output.ts';
import type { HeadRow } from './head-rows.ts';
import { createReducer } from './reduce.ts';
import { closeScratch, createScratch, type Rows } from './scratch.ts';
import { createLayers, type LayerMemory, type Layers } from './layers.ts';
import type { ConfigurePlan, PassPlan } from './step-plan.ts';

export interface ShardRunnerOptions {
  readonly runtime: Runtime;
  /** The shard directory of one rank, as written by `compile`. */
  readonly directory: string;
  readonly manifest: ShardManifest;
  readonly collective: Collective;
}

/** The types that a configured shard computes in. */
interface Memory extends LayerMemory {
  readonly head: HeadOutput;
  readonly maxHeadRows: number;
}

/** Rows of a pass up to which launching its kernels takes about as long as running them. */
const maxReplayedRows = 256;

/** Holds the loaded shard. `configure` before the first pass; `close` frees buffers (the runtime is the caller's). */
export class ShardRunner {
  readonly manifest: ShardManifest;
  readonly #runtime: Runtime;
  readonly #collective: Collective;
  readonly #embed: Segment;
  readonly #attention: Segment;
  readonly #layers: Layers;
  readonly #final: Segment;
  readonly #head: Segment;
  /** Finds the best token on the device. */
  readonly #best: Segment | undefined;
  readonly #mtp: { readonly input: Segment; readonly final: Segment } | undefined;
  #memory: Memory | undefined;

  constructor(options: ShardRunnerOptions) {
    const { runtime, directory, manifest, collective } = options;
    this.manifest = manifest;
    this.#runtime = runtime;
    this.#collective = collective;
    const entries = new Map(manifest.segments.map((entry) => [entry.name, entry]));
    const entryOf = (name: string): SegmentEntry => {
      const entry = entries.get(name);
      if (entry === undefined) {
        throw new ClusterError('data_loss', `${directory}: the manifest has no segment ${name}`);
      }
      return entry;
    };
    const load = (name: string): Segment => {
      const entry = entryOf(name);
      return runtime.loadSegment({ ...entry, path: path.join(directory, entry.file) });
    };
    const { config, profile } = manifest;
    const attention = chooseAttention(profile, runtime, directory);
    this.#embed = load('embed');
    this.#attention = load(attention);
    this.#layers = createLayers({ runtime, directory, manifest, load, entryOf });
    this.#final = load('final');
    this.#head = load('head');
    this.#best = runtime.kernels.topK && profile.head === 'best' ? load('best') : undefined;
    this.#mtp = config.mtpLayers > 0 ? { input: load('mtp.0.input'), final: load('mtp.0.final') } : undefined;
  }

  /** Allocates scratch rows and the KV pool. */
  configure(plan: ConfigurePlan, blockTokens: number): void {
    const { config, tensorParallel, profile } = this.manifest;
    const reducer = createReducer(this.#runtime, this.#collective, plan.deviceGroupId);
    const scratch = createScratch(this.#runtime, {
      maxRows: plan.maxRows,
      floatType: profile.activations,
      hidden: config.hiddenSize,
      attended: (config.queryHeads / tensorParallel) * config.headDim,
      qkv: ((config.queryHeads + 2 * config.kvHeads) / tensorParallel) * config.headDim,
      sumsOnHost: reducer.crossesHost,
    });
    const attention = createAttention({
      runtime: this.#runtime,
      segment: this.#attention,
      manifest: this.manifest,
      layers: config.layers + (this.#mtp === undefined ? 0 : 1),
      maxSpans: Math.min(plan.maxRows, plan.maxHeadRows),
      budgetTokens: plan.kvBlocks * blockTokens,
    });
    const head = new HeadOutput({
      runtime: this.#runtime,
      manifest: this.manifest,
      collective: this.#collective,
      head: this.#head,
      best: this.#best,
      maxHeadRows: plan.maxHeadRows,
      usableVocab: plan.usableVocab,
    });
    this.#layers.reserve(plan.maxRows);
    this.#memory = { ...scratch, attention, head, maxHeadRows: plan.maxHeadRows, reducer };
  }

  /**
   * Runs one pass with the other ranks. Returns the requested outputs of the head rows on rank 0, nothing on other
   * ranks.
   */
  run(plan: PassPlan): readonly HeadRow[] {
    const memory = this.#memory;
    if (memory === undefined) {
      throw new ClusterError('internal', 'the shard is not configured');
    }
    assertFits(plan, memory);
    for (const slot of plan.releasedSlots) {
      memory.attention.release(slot);
    }
    if (plan.spans.length === 0) {
      return [];
    }
    const places = memory.attention.place(plan.spans);
    const rows = plan.tokenIds.length;
    memory.tokenIds.write(plan.tokenIds);
    if (plan.kind === 'draft') {
      memory.hiddenRows.write(continuedRows(plan));
    }
    const heads = memory.head.prepare(plan);
    const work = (): void => {
      const normed = plan.kind === 'forward' ? this.#forward(rows, memory) : this.#draft(rows, memory);
      memory.head.run(normed.first(rows));
    };
    // Many rows keep a device busy for longer than launching their kernels takes.
    if (!memory.reducer.crossesHost && rows <= maxReplayedRows) {
      this.#runtime.replay([plan.kind, rows, heads, places].join(), work);
    } else {
      work();
    }
    return memory.head.collect();
  }

  close(): void {
    if (this.#memory !== undefined) {
      this.#memory.attention.close();
      this.#memory.head.close();
      this.#layers.close();
      closeScratch(this.#memory);
      this.#memory = undefined;
    }
  }

  /** Returns the rows that the head reads. */
  #forward(rows: number, memory: Memory): Rows {
    this.#embedInto(memory.residual, rows, memory); // [rows, H]
    for (let layer = 0; layer < this.manifest.config.layers; layer++) {
      this.#layers.run({ layer, isFirst: layer === 0 }, rows, memory);
    }
    this.#runtime.run(
      this.#final,
      [memory.residual.first(rows), memory.delta.first(rows)],
      [memory.hidden.first(rows), memory.normed.first(rows)],
    );
    return memory.normed;
  }

  #draft(rows: number, memory: Memory): Rows {
    if (this.#mtp === undefined) {
      throw new ClusterError('internal', 'draft pass: the model has no MTP layer');
    }
    const source = this.manifest.mtpHidden === 'pre-norm' ? memory.hidden : memory.normed;
    this.#embedInto(memory.residualNext, rows, memory); // [rows, H]
    this.#runtime.run(
      this.#mtp.input,
      [source.first(memory.maxRows), memory.hiddenRows.first(rows), memory.residualNext.first(rows)],
      [memory.residual.first(rows)],
    );
    this.#layers.run({ layer: this.manifest.config.layers, isFirst: true }, rows, memory);
    this.#runtime.run(
      this.#mtp.final,
      [memory.residual.first(rows), memory.delta.first(rows)],
      [memory.residualNext.first(rows), memory.draftNormed.first(rows)],
    );
    return memory.draftNormed;
  }

  #embedInto(target: Rows, rows: number, memory: Memory): void {
    this.#runtime.run(this.#embed, [memory.tokenIds.first(rows)], [target.first(rows)]);
  }
}

/**
 * The attention of the profile that this runtime supports. Throws `failed_precondition` if it cannot compute the shard.
 */
function chooseAttention(
  { weights, activations, attention }: TargetProfile,
  { floatTypes, kernels }: Runtime,
  directory: string,
): AttentionSegment {
  const problem = (text: string): ClusterError =>
    new ClusterError('failed_precondition', `${directory}: precision ${weights} ${text}`);
  if (!floatTypes.includes(activations)) {
    throw problem(`computes in ${activations}; this runtime computes in ${floatTypes.join(' or ')}`);
  }
  const ours = kernels.pagedAttention ? 'attention.paged' : 'attention';
  if (!attention.includes(ours)) {
    throw problem(`has no segment ${ours}, which this runtime computes`);
  }
  return ours;
}

/** The forward pass's rows that a draft pass continues, [rows]. */
function continuedRows(plan: PassPlan): Int32Array {
  return Int32Array.from(
    plan.spans.flatMap(({ hiddenRow, rows }) => Array.from({ length: rows }, (_, i) => hiddenRow + i)),
  );
}

function assertFits(plan: PassPlan, { maxRows, maxHeadRows }: Memory): void {
  const rows = plan.tokenIds.length;
  const headRows = plan.heads.length;
  if (rows > maxRows || headRows > maxHeadRows) {
    throw new ClusterError(
      'internal',
      `pass: at most ${maxRows} rows and ${maxHeadRows} head rows, has ${rows} and ${headRows}`,
    );
  }
}
