// One rank's execution of passes: the loaded segments, the scratch rows and the KV buffers, and the sums with the other
// ranks. Owns the forward pass; knows no sequence, no sampling and no schedule. Plans come from rank 0 (step-plan.ts).
// Source: reference mimo-architecture.md §2 and §3.2; segment signatures are in model/shard.ts.
//
// H hidden size; T worldSize; D head dim; Q = queryHeads/T * D; W = (queryHeads + 2 kvHeads)/T * D; V vocabulary.

import * as path from 'node:path';
import { ClusterError } from '@mimo/core/errors';
import type { Collective } from '../collective/collective.ts';
import { planShards } from '../model/shard-plan.ts';
import { activationType, type ShardManifest } from '../model/shard.ts';
import type { Runtime, Segment } from '../runtime/runtime.ts';
import { type Attention, createAttention } from './attention.ts';
import { closeScratch, createScratch, type Rows, type Scratch } from './scratch.ts';
import { countHeadRows, type ConfigurePlan, type PassPlan } from './step-plan.ts';

export interface ShardRunnerOptions {
  readonly runtime: Runtime;
  /** Of one rank, as `compile` wrote it. */
  readonly directory: string;
  readonly manifest: ShardManifest;
  readonly collective: Collective;
}

/** What a configured shard computes in. */
interface Memory extends Scratch {
  readonly attention: Attention;
}

/** `isFirst`: nothing to add to the residual yet. */
interface LayerPlace {
  readonly layer: number;
  readonly isFirst: boolean;
}

interface Block {
  readonly qkv: Segment;
  readonly o: Segment;
  readonly mlp: Segment;
}

/** Holds the loaded shard. `configure` before the first pass; `close` frees buffers (the runtime is the caller's). */
export class ShardRunner {
  readonly manifest: ShardManifest;
  readonly #runtime: Runtime;
  readonly #collective: Collective;
  readonly #embed: Segment;
  readonly #attention: Segment;
  readonly #blocks: readonly Block[];
  readonly #final: Segment;
  readonly #head: Segment;
  /** The first MTP layer; further ones draft further ahead, which this engine does not. */
  readonly #mtp: { readonly input: Segment; readonly block: Block; readonly final: Segment } | undefined;
  readonly #rankVocabulary: readonly number[];
  #memory: Memory | undefined;

  constructor(options: ShardRunnerOptions) {
    const { runtime, directory, manifest, collective } = options;
    this.manifest = manifest;
    this.#runtime = runtime;
    this.#collective = collective;
    const entries = new Map(manifest.segments.map((entry) => [entry.name, entry]));
    const load = (name: string): Segment => {
      const entry = entries.get(name);
      if (entry === undefined) {
        throw new ClusterError('data_loss', `${directory}: the manifest has no segment ${name}`);
      }
      return runtime.loadSegment({ ...entry, path: path.join(directory, entry.file) });
    };
    const loadBlock = (prefix: string): Block => ({
      qkv: load(`${prefix}.qkv`),
      o: load(`${prefix}.o`),
      mlp: load(`${prefix}.mlp`),
    });
    const { config, tensorParallel, precision } = manifest;
    const floatType = activationType(precision);
    if (!runtime.floatTypes.includes(floatType)) {
      throw new ClusterError(
        'failed_precondition',
        `${directory}: precision ${precision} computes in ${floatType}; this runtime computes in ${runtime.floatTypes.join(' or ')}`,
      );
    }
    this.#embed = load('embed');
    this.#attention = load('attention');
    this.#blocks = Array.from({ length: config.layers }, (_, i) => loadBlock(`layer.${i}`));
    this.#final = load('final');
    this.#head = load('head');
    this.#mtp =
      config.mtpLayers > 0
        ? { input: load('mtp.0.input'), block: loadBlock('mtp.0'), final: load('mtp.0.final') }
        : undefined;
    this.#rankVocabulary = planShards(config, tensorParallel, precision).map(
      ({ vocabulary }) => vocabulary.end - vocabulary.start,
    );
  }

  /** Allocates scratch rows and the KV pool. */
  configure(plan: ConfigurePlan, blockTokens: number): void {
    const { config, tensorParallel, vocabRows, precision } = this.manifest;
    const floatType = activationType(precision);
    const leads = this.#collective.rank === 0;
    const scratch = createScratch(this.#runtime, {
      maxRows: plan.maxRows,
      maxHeadRows: plan.maxHeadRows,
      floatType,
      hidden: config.hiddenSize,
      attended: (config.queryHeads / tensorParallel) * config.headDim,
      qkv: ((config.queryHeads + 2 * config.kvHeads) / tensorParallel) * config.headDim,
      vocabulary: vocabRows,
      gathered: leads ? this.#rankVocabulary : [],
    });
    const attention = createAttention({
      runtime: this.#runtime,
      segment: this.#attention,
      manifest: this.manifest,
      layers: config.layers + (this.#mtp === undefined ? 0 : 1),
      maxSpans: Math.min(plan.maxRows, plan.maxHeadRows),
      budgetTokens: plan.kvBlocks * blockTokens,
    });
    this.#memory = { ...scratch, attention };
  }

  /**
   * Runs one pass with the other ranks. Rank 0 gets the logits of the spans' head rows in order, [headRows, V], in
   * memory that the next pass overwrites; other ranks get none.
   */
  run(plan: PassPlan): Float32Array {
    const memory = this.#memory;
    if (memory === undefined) {
      throw new ClusterError('internal', 'the shard is not configured');
    }
    assertFits(plan, memory);
    for (const slot of plan.releasedSlots) {
      memory.attention.release(slot);
    }
    if (plan.spans.length === 0) {
      return new Float32Array(0);
    }
    memory.attention.place(plan.spans);
    return plan.kind === 'forward' ? this.#forward(plan, memory) : this.#draft(plan, memory);
  }

  close(): void {
    if (this.#memory !== undefined) {
      this.#memory.attention.close();
      closeScratch(this.#memory);
      this.#memory = undefined;
    }
  }

  #forward(plan: PassPlan, memory: Memory): Float32Array {
    const rows = plan.tokenIds.length;
    this.#embedInto(plan.tokenIds, memory.residual, memory); // [rows, H]
    for (const [layer, block] of this.#blocks.entries()) {
      this.#runBlock(block, { layer, isFirst: layer === 0 }, rows, memory);
    }
    this.#runtime.run(
      this.#final,
      [memory.residual.first(rows), memory.delta.first(rows)],
      [memory.hidden.first(rows), memory.normed.first(rows)],
    );
    return this.#runHead(plan, memory.normed, memory);
  }

  #draft(plan: PassPlan, memory: Memory): Float32Array {
    if (this.#mtp === undefined) {
      throw new ClusterError('internal', 'draft pass: the model has no MTP layer');
    }
    const rows = plan.tokenIds.length;
    const source = this.manifest.mtpHidden === 'pre-norm' ? memory.hidden : memory.normed;
    let row = 0;
    for (const span of plan.spans) {
      memory.draftHidden.copyFrom(source, { from: span.hiddenRow, to: row, count: span.rows }); // [span.rows, H]
      row += span.rows;
    }
    this.#embedInto(plan.tokenIds, memory.residualNext, memory); // [rows, H]
    this.#runtime.run(
      this.#mtp.input,
      [memory.draftHidden.first(rows), memory.residualNext.first(rows)],
      [memory.residual.first(rows)],
    );
    this.#runBlock(this.#mtp.block, { layer: this.#blocks.length, isFirst: true }, rows, memory);
    this.#runtime.run(
      this.#mtp.final,
      [memory.residual.first(rows), memory.delta.first(rows)],
      [memory.residualNext.first(rows), memory.draftNormed.first(rows)],
    );
    return this.#runHead(plan, memory.draftNormed, memory);
  }

  #embedInto(tokenIds: Int32Array, target: Rows, memory: Memory): void {
    memory.tokenIds.write(BigInt64Array.from(tokenIds, BigInt));
    this.#runtime.run(this.#embed, [memory.tokenIds.first(tokenIds.length)], [target.first(tokenIds.length)]);
  }

  /** Adds the ranks' shares of the first rows, in place. */
  #addRanks(shares: Rows, rows: number): void {
    if (this.#collective.worldSize > 1) {
      const values = shares.read(rows);
      this.#collective.allReduce(values);
      shares.write(values);
    }
  }

  /**
   * `residual` and `delta` in, `residual` and `delta` out, [rows, H] each; the sum of both is the hidden state. A first
   * layer takes no delta.
   */
  #runBlock(block: Block, at: LayerPlace, rows: number, memory: Memory): void {
    const runtime = this.#runtime;
    const residual = memory.residual.first(rows);
    const residualNext = memory.residualNext.first(rows);
    const delta = memory.delta.first(rows);
    const deltaNext = memory.deltaNext.first(rows);
    const deltaIn = at.isFirst ? memory.zero.first(rows) : delta;
    runtime.run(block.qkv, [residual, deltaIn], [residualNext, memory.qkv.first(rows)]); // [rows, W]
    memory.attention.run(at.layer, memory.qkv, memory.attended);
    runtime.run(block.o, [memory.attended.first(rows)], [deltaNext]); // partial [rows, H]
    this.#addRanks(memory.deltaNext, rows);
    runtime.run(block.mlp, [residualNext, deltaNext], [residual, delta]); // partial [rows, H]
    this.#addRanks(memory.delta, rows);
  }

  #runHead(plan: PassPlan, normed: Rows, memory: Memory): Float32Array {
    const headRows = countHeadRows(plan);
    if (headRows === 0) {
      return new Float32Array(0);
    }
    let row = 0;
    let headRow = 0;
    for (const span of plan.spans) {
      row += span.rows;
      memory.headInput.copyFrom(normed, {
        from: row - span.headRows,
        to: headRow,
        count: span.headRows,
      });
      headRow += span.headRows;
    }
    const output = memory.headOutput.first(headRows); // [headRows, this rank's vocabulary]
    this.#runtime.run(this.#head, [memory.headInput.first(headRows)], [output]);
    return this.#gatherLogits(headRows, memory);
  }

  /** Rank 0: [headRows, V]; other ranks: nothing. */
  #gatherLogits(headRows: number, memory: Memory): Float32Array {
    const local = memory.headOutput.read(headRows);
    if (this.#collective.worldSize === 1) {
      return local;
    }
    const lengths = this.#rankVocabulary.map((count) => headRows * count);
    const parts = memory.gathered.map((part, r) => part.subarray(0, lengths[r]));
    this.#collective.gather(local, lengths, parts);
    let column = 0;
    for (const [r, part] of parts.entries()) {
      const width = this.#rankVocabulary[r]!;
      for (let row = 0; row < headRows; row++) {
        const logits = part.subarray(row * width, (row + 1) * width);
        memory.logits.set(logits, row * this.manifest.config.vocabSize + column);
      }
      column += width;
    }
    return memory.logits.subarray(0, parts.length === 0 ? 0 : headRows * column);
  }
}

function assertFits(plan: PassPlan, { maxRows, maxHeadRows }: Scratch): void {
  const rows = plan.tokenIds.length;
  const headRows = countHeadRows(plan);
  if (rows > maxRows || headRows > maxHeadRows) {
    throw new ClusterError(
      'internal',
      `pass: at most ${maxRows} rows and ${maxHeadRows} head rows, has ${rows} and ${headRows}`,
    );
  }
}
