// One rank's head: from the rows of a pass to their requested outputs. Owns the memory of logits and answers, and the
// place where tokens are chosen: in the device's sampler, in the segment `best`, or on the host of rank 0 from all
// ranks' logits.

import type { Collective } from '../../collective/collective.ts';
import { planShards } from '../../shards/shard-plan.ts';
import type { ShardManifest } from '../../shards/shard.ts';
import type { Segment, TokenSampler } from '../../runtime/kernel.ts';
import type { RuntimeTensor } from '../../runtime/memory.ts';
import type { Runtime } from '../../runtime/runtime.ts';
import { bestToken, chooseToken, type ChosenToken, type HeadRequest, type HeadRow } from './head-rows.ts';
import { Rows } from './scratch.ts';
import type { PassPlan } from './step-plan.ts';

export interface HeadOptions {
  readonly runtime: Runtime;
  readonly manifest: ShardManifest;
  readonly collective: Collective;
  readonly head: Segment;
  /** Finds the best token on a device without a sampler. */
  readonly best: Segment | undefined;
  readonly maxHeadRows: number;
  /** Ids at or above are never chosen. */
  readonly usableVocab: number;
}

/** For each pass: `prepare`, `run` unless the pass is replayed, `collect`. `close` frees the memory. */
export class HeadOutput {
  readonly #options: HeadOptions;
  /** Vocabulary rows of every rank. */
  readonly #rankVocabulary: readonly number[];
  /** This rank's ids below are usable, counted from its first; on the host, int64 [1]. */
  readonly #usableIds: number;
  readonly #usableEnd: RuntimeTensor;
  readonly #sampler: TokenSampler | undefined;
  /** The rows of the pass that get logits. */
  readonly #rows: Rows; // int32 [headRows]
  readonly #logits: Rows; // [headRows, this rank's vocabulary]
  readonly #best: Rows; // [headRows, 2]
  /** Rank 0 of several: every rank's part as it arrives, and all of them in one row each. */
  readonly #gathered: readonly Float32Array[];
  readonly #whole: Float32Array; // [headRows, V]
  #asked: readonly HeadRequest[] = [];

  constructor(options: HeadOptions) {
    const { runtime, manifest, collective, maxHeadRows, usableVocab } = options;
    const { config, tensorParallel, profile, vocabStart, vocabRows } = manifest;
    this.#options = options;
    this.#rankVocabulary = planShards(config, tensorParallel, profile.weights).map(
      ({ vocabulary }) => vocabulary.end - vocabulary.start,
    );
    this.#usableIds = Math.min(vocabRows, Math.max(0, usableVocab - vocabStart));
    this.#usableEnd = runtime.tensor(BigInt64Array.of(BigInt(this.#usableIds)), [1]);
    this.#sampler =
      this.#usableIds > 0
        ? runtime.createSampler?.({
            rowLength: vocabRows,
            firstId: vocabStart,
            usable: this.#usableIds,
            maxRows: maxHeadRows,
          })
        : undefined;
    const floats = (width: number): Rows =>
      new Rows(runtime.allocate('float', maxHeadRows * width, 'exchanged'), width);
    this.#rows = new Rows(runtime.allocate('int32', maxHeadRows, 'exchanged'), 0);
    this.#logits = floats(vocabRows);
    this.#best = floats(2);
    const gathers = collective.rank === 0 && collective.worldSize > 1;
    this.#gathered = gathers
      ? this.#rankVocabulary.map((count) => new Float32Array(maxHeadRows * count))
      : [];
    this.#whole = new Float32Array(gathers ? maxHeadRows * config.vocabSize : 0);
  }

  /** Sets the rows and their requests. Returns a key: passes of equal keys run the same kernels. */
  prepare(plan: PassPlan): string {
    this.#asked = plan.heads;
    this.#rows.write(rowsWithHead(plan));
    if (this.#samples) {
      // Over several ranks the device chooses best tokens alone: a draw needs the whole row.
      const draws = this.#options.collective.worldSize === 1;
      this.#sampler!.ask(
        plan.heads.map((head) => (head.kind === 'sampled' && draws ? head.draw : undefined)),
      );
    }
    return [plan.heads.length, this.#samples, this.#asksBest].join();
  }

  /** `normed` holds the pass's rows, [rows, H]. */
  run(normed: RuntimeTensor): void {
    const { runtime, head, best } = this.#options;
    const rows = this.#asked.length;
    if (rows === 0) {
      return;
    }
    const logits = this.#logits.first(rows);
    runtime.run(head, [normed, this.#rows.first(rows)], [logits]);
    if (this.#samples) {
      this.#sampler!.run(this.#logits.memory);
    } else if (this.#asksBest && best !== undefined && this.#usableIds > 0) {
      runtime.run(best, [logits, this.#usableEnd], [this.#best.first(rows)]);
    }
  }

  /** Rank 0: the answers; other ranks take part and return nothing. */
  collect(): readonly HeadRow[] {
    const { rank, worldSize } = this.#options.collective;
    const asked = this.#asked;
    if (asked.length === 0) {
      return [];
    }
    const chosen = this.#samples ? this.#sampler!.answers() : undefined;
    const isWhole = ({ kind }: HeadRequest): boolean =>
      kind === 'logits' || (kind === 'sampled' && (chosen === undefined || worldSize > 1));
    const best = this.#asksBest ? this.#gatherBest(chosen) : [];
    const logits = runsOf(asked, isWhole).flatMap((run) => this.#gatherLogits(run));
    if (rank !== 0) {
      return [];
    }
    let whole = 0;
    return asked.map((head, row) => {
      if (!isWhole(head)) {
        return head.kind === 'best' ? best[row]! : chosen![row]!;
      }
      const all = logits[whole++]!;
      return head.kind === 'sampled'
        ? chooseToken(all.subarray(0, this.#options.usableVocab), head.draw)
        : all;
    });
  }

  close(): void {
    this.#sampler?.release();
    this.#usableEnd.release();
    [this.#rows, this.#logits, this.#best].forEach((rows) => rows.close());
  }

  get #asksBest(): boolean {
    return this.#asked.some(({ kind }) => kind === 'best');
  }

  /** Does the device's sampler choose in this pass? */
  get #samples(): boolean {
    const draws = this.#options.collective.worldSize === 1;
    return (
      this.#sampler !== undefined &&
      this.#asked.some(({ kind }) => kind === 'best' || (draws && kind === 'sampled'))
    );
  }

  /** The best token over all ranks of each row that requests it; valid on rank 0 only. */
  #gatherBest(chosen: readonly ChosenToken[] | undefined): readonly ChosenToken[] {
    const { collective, best } = this.#options;
    const rows = this.#asked.length;
    if (chosen !== undefined && collective.worldSize === 1) {
      return chosen;
    }
    const local =
      chosen !== undefined
        ? Float32Array.from(chosen.flatMap(({ tokenId, logit }) => [tokenId, logit]))
        : best !== undefined && this.#usableIds > 0
          ? this.#best.read(rows)
          : this.#findBest();
    let parts: readonly Float32Array[] = [local];
    if (collective.worldSize > 1) {
      parts = this.#gathered.map((part) => part.subarray(0, 2 * rows));
      collective.gather(
        local,
        this.#rankVocabulary.map(() => 2 * rows),
        parts,
      );
    }
    return Array.from({ length: parts.length === 0 ? 0 : rows }, (_, row) => {
      // The first at ties: ranks hold ascending ids. A NaN is not overlooked.
      const at = 2 * row + 1;
      const winner = parts.reduce((most, part) =>
        part[at]! > most[at]! || Number.isNaN(part[at]) ? part : most,
      );
      return { tokenId: winner[2 * row]!, logit: winner[2 * row + 1]! };
    });
  }

  /** This rank's best tokens, found on the host, [headRows, 2]; without a usable token, id 0 with minus infinity. */
  #findBest(): Float32Array {
    const { vocabStart, vocabRows } = this.#options.manifest;
    const logits = this.#logits.read(this.#asked.length);
    const best = new Float32Array(2 * this.#asked.length);
    for (const [row, { kind }] of this.#asked.entries()) {
      if (kind === 'best') {
        const usable = logits.subarray(row * vocabRows, row * vocabRows + this.#usableIds);
        const { tokenId, logit } = bestToken(usable);
        best.set([vocabStart + tokenId, logit], 2 * row);
      }
    }
    return best;
  }

  /** Rank 0: all logits of the run's head rows, [V] each; other ranks: nothing. */
  #gatherLogits({ start, rows }: RowRun): readonly Float32Array[] {
    const { collective, manifest } = this.#options;
    const { vocabSize } = manifest.config;
    const local = this.#logits.read(rows, start);
    let whole = local;
    if (collective.worldSize > 1) {
      whole = this.#whole.subarray(start * vocabSize, (start + rows) * vocabSize);
      const lengths = this.#rankVocabulary.map((count) => rows * count);
      const parts = this.#gathered.map((part, r) => part.subarray(0, lengths[r]));
      collective.gather(local, lengths, parts);
      let column = 0;
      for (const [r, part] of parts.entries()) {
        const width = this.#rankVocabulary[r]!;
        for (let row = 0; row < rows; row++) {
          whole.set(part.subarray(row * width, (row + 1) * width), row * vocabSize + column);
        }
        column += width;
      }
    }
    return collective.rank === 0
      ? Array.from({ length: rows }, (_, row) => whole.subarray(row * vocabSize, (row + 1) * vocabSize))
      : [];
  }
}

/** Consecutive head rows. */
interface RowRun {
  readonly start: number;
  readonly rows: number;
}

/** The head rows with requested logits, as runs: each run is copied and gathered in one piece. */
function runsOf(heads: readonly HeadRequest[], isWhole: (head: HeadRequest) => boolean): readonly RowRun[] {
  const runs: { start: number; rows: number }[] = [];
  for (const [row, head] of heads.entries()) {
    const last = runs.at(-1);
    if (!isWhole(head)) {
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
