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
import type { Runtime, RuntimeTensor, Segment } from '../runtime/runtime.ts';
import { type Attention, createAttention } from './attention.ts';
import { bestToken, chooseToken, type HeadRequest, type HeadRow } from './head-rows.ts';
import { closeScratch, createScratch, type Rows, type Scratch } from './scratch.ts';
import type { ConfigurePlan, PassPlan } from './step-plan.ts';

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
  /** Ids at or above are never chosen. */
  readonly usableVocab: number;
  /** This rank's ids below are usable, counted from its first; on the host, int64 [1]. */
  readonly usableIds: number;
  readonly usableEnd: RuntimeTensor;
  /** Devices add the ranks' shares, or the host does; with one rank nobody. */
  readonly sums: 'none' | 'device' | 'host';
}

/** Rows of a pass up to which telling a device what to do takes about as long as doing it. */
const maxReplayedRows = 128;

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
  /** Where the device looks for the best token. */
  readonly #best: Segment | undefined;
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
    const attention = runtime.kernels.pagedAttention ? 'attention.paged' : 'attention';
    if (!entries.has(attention)) {
      throw new ClusterError(
        'failed_precondition',
        `${directory}: precision ${precision} has no segment ${attention}, which this runtime computes`,
      );
    }
    this.#embed = load('embed');
    this.#attention = load(attention);
    this.#blocks = Array.from({ length: config.layers }, (_, i) => loadBlock(`layer.${i}`));
    this.#final = load('final');
    this.#head = load('head');
    this.#best = runtime.kernels.topK && entries.has('best') ? load('best') : undefined;
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
    const { config, tensorParallel, vocabStart, vocabRows, precision } = this.manifest;
    const floatType = activationType(precision);
    const { rank, worldSize } = this.#collective;
    const leads = rank === 0;
    if (plan.deviceGroupId.length > 0) {
      const watch = (waitedMs: number): void => this.#collective.watch(waitedMs);
      this.#runtime.joinGroup(plan.deviceGroupId, { rank, worldSize, watch });
    }
    const sums = worldSize === 1 ? 'none' : plan.deviceGroupId.length > 0 ? 'device' : 'host';
    const scratch = createScratch(this.#runtime, {
      maxRows: plan.maxRows,
      maxHeadRows: plan.maxHeadRows,
      floatType,
      hidden: config.hiddenSize,
      attended: (config.queryHeads / tensorParallel) * config.headDim,
      qkv: ((config.queryHeads + 2 * config.kvHeads) / tensorParallel) * config.headDim,
      vocabulary: vocabRows,
      gathered: leads ? this.#rankVocabulary : [],
      sumsOnHost: sums === 'host',
    });
    const attention = createAttention({
      runtime: this.#runtime,
      segment: this.#attention,
      manifest: this.manifest,
      layers: config.layers + (this.#mtp === undefined ? 0 : 1),
      maxSpans: Math.min(plan.maxRows, plan.maxHeadRows),
      budgetTokens: plan.kvBlocks * blockTokens,
    });
    const usableIds = Math.min(vocabRows, Math.max(0, plan.usableVocab - vocabStart));
    const usableEnd = this.#runtime.tensor(BigInt64Array.of(BigInt(usableIds)), [1]);
    const { usableVocab } = plan;
    this.#memory = { ...scratch, attention, usableVocab, usableIds, usableEnd, sums };
  }

  /** Runs one pass with the other ranks. Rank 0 gets what the plan asks of its head rows, other ranks get nothing. */
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
    const headRows = rowsWithHead(plan);
    memory.tokenIds.write(plan.tokenIds);
    memory.headRows.write(headRows);
    if (plan.kind === 'draft') {
      memory.hiddenRows.write(continuedRows(plan));
    }
    const wantsBest =
      this.#best !== undefined && memory.usableIds > 0 && plan.heads.some(({ kind }) => kind === 'best');
    const work = (): void => {
      const normed = plan.kind === 'forward' ? this.#forward(rows, memory) : this.#draft(rows, memory);
      if (headRows.length > 0) {
        this.#runHead(normed.first(rows), headRows.length, { memory, wantsBest });
      }
    };
    // Many rows keep a device busy for longer than it takes to tell it what to do.
    if (memory.sums !== 'host' && rows <= maxReplayedRows) {
      this.#runtime.replay([plan.kind, wantsBest, rows, headRows.length, places].join(), work);
    } else {
      work();
    }
    return this.#collectHeads(plan.heads, memory);
  }

  close(): void {
    if (this.#memory !== undefined) {
      this.#memory.attention.close();
      this.#memory.usableEnd.release();
      closeScratch(this.#memory);
      this.#memory = undefined;
    }
  }

  /** Returns the rows that the head takes. */
  #forward(rows: number, memory: Memory): Rows {
    this.#embedInto(memory.residual, rows, memory); // [rows, H]
    for (const [layer, block] of this.#blocks.entries()) {
      this.#runBlock(block, { layer, isFirst: layer === 0 }, rows, memory);
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
    this.#runBlock(this.#mtp.block, { layer: this.#blocks.length, isFirst: true }, rows, memory);
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

  /** Adds the ranks' shares of the first rows, in place. */
  #addRanks(shares: Rows, rows: number, { sums }: Memory): void {
    if (sums === 'device') {
      shares.sum(rows, this.#runtime);
    } else if (sums === 'host') {
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
    this.#addRanks(memory.deltaNext, rows, memory);
    runtime.run(block.mlp, [residualNext, deltaNext], [residual, delta]); // partial [rows, H]
    this.#addRanks(memory.delta, rows, memory);
  }

  #runHead(
    normed: RuntimeTensor,
    headRows: number,
    { memory, wantsBest }: { memory: Memory; wantsBest: boolean },
  ): void {
    const output = memory.headOutput.first(headRows); // [headRows, this rank's vocabulary]
    this.#runtime.run(this.#head, [normed, memory.headRows.first(headRows)], [output]);
    if (wantsBest) {
      this.#runtime.run(this.#best!, [output, memory.usableEnd], [memory.best.first(headRows)]);
    }
  }

  /** Rank 0: the answers to the requests; other ranks take part, and get nothing. */
  #collectHeads(heads: readonly HeadRequest[], memory: Memory): readonly HeadRow[] {
    const best = heads.some(({ kind }) => kind === 'best') ? this.#gatherBest(heads, memory) : undefined;
    const logits = wholeRuns(heads).flatMap((run) => this.#gatherLogits(run, memory));
    if (this.#collective.rank !== 0) {
      return [];
    }
    let whole = 0;
    return heads.map((head, row) => {
      if (head.kind === 'best') {
        return { tokenId: best![2 * row]!, logit: best![2 * row + 1]! };
      }
      const all = logits[whole++]!;
      return head.kind === 'logits' ? all : chooseToken(all.subarray(0, memory.usableVocab), head.draw);
    });
  }

  /** Rank 0: ids and logits of the best tokens, [headRows, 2], where they are asked for; other ranks: nothing. */
  #gatherBest(heads: readonly HeadRequest[], memory: Memory): Float32Array {
    const local =
      this.#best !== undefined && memory.usableIds > 0
        ? memory.best.read(heads.length)
        : this.#findBest(heads, memory);
    if (this.#collective.worldSize === 1) {
      return local;
    }
    const parts = memory.gathered.map((part) => part.subarray(0, local.length));
    this.#collective.gather(
      local,
      this.#rankVocabulary.map(() => local.length),
      parts,
    );
    const best = new Float32Array(parts.length === 0 ? 0 : local.length);
    for (let at = 0; at < best.length; at += 2) {
      // The first at ties: ranks hold ascending ids. A NaN is not overlooked.
      const winner = parts.reduce((most, part) =>
        part[at + 1]! > most[at + 1]! || Number.isNaN(part[at + 1]) ? part : most,
      );
      best.set(winner.subarray(at, at + 2), at);
    }
    return best;
  }

  /** This rank's best tokens, looked for on the host; with none usable, id 0 of minus infinity. */
  #findBest(heads: readonly HeadRequest[], { headOutput, usableIds }: Memory): Float32Array {
    const { width } = headOutput;
    const logits = headOutput.read(heads.length);
    const best = new Float32Array(2 * heads.length);
    for (const [row, { kind }] of heads.entries()) {
      if (kind === 'best') {
        const { tokenId, logit } = bestToken(logits.subarray(row * width, row * width + usableIds));
        best.set([this.manifest.vocabStart + tokenId, logit], 2 * row);
      }
    }
    return best;
  }

  /** Rank 0: all logits of the run's head rows, [V] each; other ranks: nothing. */
  #gatherLogits({ start, rows }: RowRun, memory: Memory): readonly Float32Array[] {
    const { vocabSize } = this.manifest.config;
    const local = memory.headOutput.read(rows, start);
    let whole = local;
    if (this.#collective.worldSize > 1) {
      whole = memory.logits.subarray(start * vocabSize, (start + rows) * vocabSize);
      const lengths = this.#rankVocabulary.map((count) => rows * count);
      const parts = memory.gathered.map((part, r) => part.subarray(0, lengths[r]));
      this.#collective.gather(local, lengths, parts);
      let column = 0;
      for (const [r, part] of parts.entries()) {
        const width = this.#rankVocabulary[r]!;
        for (let row = 0; row < rows; row++) {
          whole.set(part.subarray(row * width, (row + 1) * width), row * vocabSize + column);
        }
        column += width;
      }
    }
    return this.#collective.rank === 0
      ? Array.from({ length: rows }, (_, row) => whole.subarray(row * vocabSize, (row + 1) * vocabSize))
      : [];
  }
}

/** Consecutive head rows. */
interface RowRun {
  readonly start: number;
  readonly rows: number;
}

/** The head rows of which more than the best token is asked, as runs: each is copied and gathered at once. */
function wholeRuns(heads: readonly HeadRequest[]): readonly RowRun[] {
  const runs: { start: number; rows: number }[] = [];
  for (const [row, { kind }] of heads.entries()) {
    const last = runs.at(-1);
    if (kind === 'best') {
      continue;
    }
    if (last !== undefined && last.start + last.rows === row) {
      last.rows += 1;
    } else {
      runs.push({ start: row, rows: 1 });
    }
  }
  return runs;
}

/** The rows of the pass that get logits, [headRows]. */
function rowsWithHead(plan: PassPlan): Int32Array {
  const rows: number[] = [];
  let end = 0;
  for (const span of plan.spans) {
    end += span.rows;
    for (let row = end - span.headRows; row < end; row++) {
      rows.push(row);
    }
  }
  return Int32Array.from(rows);
}

/** The forward pass's rows that a draft pass continues, [rows]. */
function continuedRows(plan: PassPlan): Int32Array {
  return Int32Array.from(
    plan.spans.flatMap(({ hiddenRow, rows }) => Array.from({ length: rows }, (_, i) => hiddenRow + i)),
  );
}

function assertFits(plan: PassPlan, { maxRows, maxHeadRows }: Scratch): void {
  const rows = plan.tokenIds.length;
  const headRows = plan.heads.length;
  if (rows > maxRows || headRows > maxHeadRows) {
    throw new ClusterError(
      'internal',
      `pass: at most ${maxRows} rows and ${maxHeadRows} head rows, has ${rows} and ${headRows}`,
    );
  }
}
