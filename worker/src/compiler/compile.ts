// From a checkpoint directory to one shard directory per rank. Owns the key and the order of work: plan, graphs and
// layout (segments.ts), then one pass over the checkpoint that fills all ranks' files at once (transfer.ts), then the
// move into place (partial-shards.ts).

import { createHash } from 'node:crypto';
import { mkdir } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { ClusterError } from '@mimo/core/process/errors';
import { withFileLock } from '@mimo/core/process/file-lock';
import { backboneTensors, type Checkpoint, hashCheckpoint, openCheckpoint } from './checkpoint.ts';
import { elementBytes, type TensorLocation } from './safetensors.ts';
import { openPartial, type RankOutput, rankDirectory } from './partial-shards.ts';
import { buildSegments } from './segments.ts';
import { readShardManifest, shardFormatVersion, type ShardManifest } from '../shards/shard.ts';
import { profileOf, type Precision, type TargetProfile } from '../shards/target-profile.ts';
import { planShards, rangeLength, type RankPlan } from '../shards/shard-plan.ts';
import type { TransferJob } from './transfer.ts';
import { runTransfers } from './transfer-pool.ts';
import { isSharedCopy, type Transfer } from './weight-layout.ts';

/** What to compile, and how; everything except the directories, threads and listener is part of the key. */
export interface CompileOptions {
  /** Folder with config.json and safetensors. */
  readonly modelDirectory: string;
  /** Directory for `rank-0`, `rank-1`, ...; created if missing. */
  readonly outDirectory: string;
  readonly tensorParallel: number;
  readonly precision: Precision;
  /**
   * Default 4: int8 arithmetic inside int8 and int4 products; 0: fp32 arithmetic, slow, for comparison with an
   * oracle.
   */
  readonly accuracyLevel?: 0 | 4;
  /** Default `pre-norm`: Xiaomi's own code and weights. */
  readonly mtpHidden?: ShardManifest['mtpHidden'];
  /** Default: the config's value; fewer make the RoPE tables smaller. */
  readonly maxPositions?: number;
  /** Default: one for each core, at most 8. */
  readonly threads?: number;
  readonly onProgress?: (progress: CompileProgress) => void;
}

/** The processed bytes of the checkpoint, and the last tensor. */
export interface CompileProgress {
  readonly tensor: string;
  readonly doneBytes: number;
  readonly totalBytes: number;
}

/** The result of a compile on disk. */
export interface CompileResult {
  readonly key: string;
  /** One a rank, in rank order. */
  readonly rankDirectories: readonly string[];
  /** Bytes of one rank's weight files, the shared embedding included. */
  readonly rankBytes: readonly number[];
  /** Complete shards of the same key existed already. */
  readonly upToDate: boolean;
}

/** Source bytes of one job: the grain of progress and of sharing work among threads. */
const jobBytes = 32 * 2 ** 20;
/** Source bytes between two flushes, which make finished jobs durable and record them. */
const recordEveryBytes = 2 ** 30;
const maxThreads = 8;

/**
 * Compiles a checkpoint. Streams: memory is a few bands of rows for each thread, whatever the tensors' size. After an
 * abort or a crash, the next call with equal options continues from the finished jobs; with complete shards it does
 * nothing. One compile at a time works in `outDirectory`, the others wait. Throws the errors of openCheckpoint and
 * planShards, `invalid_argument` for options out of range, `data_loss` for NaN or infinite weights and
 * `resource_exhausted` if the disk is too small. The signal cancels.
 */
export async function compile(options: CompileOptions, signal: AbortSignal): Promise<CompileResult> {
  const checkpoint = await openCheckpoint(options.modelDirectory);
  const settings = completeSettings(options, checkpoint);
  const plans = planShards(checkpoint.config, settings.tensorParallel, settings.profile.weights);
  const key = createHash('sha256')
    .update(JSON.stringify([shardFormatVersion, settings, await hashCheckpoint(checkpoint, signal)]))
    .digest('hex');
  const { outDirectory } = options;
  const findDone = async (): Promise<CompileResult | undefined> => findComplete(outDirectory, key, plans);
  const compileUnlessDone = async (): Promise<CompileResult> => {
    const done = await findDone();
    if (done !== undefined) {
      return done;
    }
    const ranks = plans.map((plan) => buildRank({ checkpoint, plan, settings, key }));
    await fillRanks({ options, checkpoint, ranks, key }, signal);
    const made = await findDone();
    if (made === undefined) {
      throw new ClusterError('internal', `${outDirectory}: shards are incomplete after compiling`);
    }
    return { ...made, upToDate: false };
  };
  // A first check without the lock allows shards on a read-only volume.
  const done = await findDone();
  if (done !== undefined) {
    return done;
  }
  await mkdir(outDirectory, { recursive: true });
  return withFileLock(join(outDirectory, 'compile.lock'), compileUnlessDone, signal);
}

interface Settings {
  readonly tensorParallel: number;
  readonly profile: TargetProfile;
  readonly accuracyLevel: 0 | 4;
  readonly mtpHidden: ShardManifest['mtpHidden'];
  readonly maxPositions: number;
}

function completeSettings(options: CompileOptions, { config }: Checkpoint): Settings {
  const maxPositions = options.maxPositions ?? config.maxPositions;
  if (!Number.isInteger(maxPositions) || maxPositions < 1 || maxPositions > config.maxPositions) {
    throw new ClusterError(
      'invalid_argument',
      `maxPositions: must be an integer from 1 to max_position_embeddings ${config.maxPositions}, is ${maxPositions}`,
    );
  }
  return {
    tensorParallel: options.tensorParallel,
    profile: profileOf(options.precision),
    accuracyLevel: options.accuracyLevel ?? 4,
    mtpHidden: options.mtpHidden ?? 'pre-norm',
    maxPositions,
  };
}

function buildRank(from: {
  readonly checkpoint: Checkpoint;
  readonly plan: RankPlan;
  readonly settings: Settings;
  readonly key: string;
}): RankOutput {
  const { checkpoint, plan, settings, key } = from;
  const { config } = checkpoint;
  const embeddingDtype = tensorOf(checkpoint, backboneTensors.embedding).dtype;
  const built = buildSegments({ config, plan, embeddingDtype, ...settings });
  return {
    ...built,
    manifest: {
      formatVersion: shardFormatVersion,
      key,
      profile: settings.profile,
      tensorParallel: settings.tensorParallel,
      rank: plan.rank,
      config,
      vocabStart: plan.vocabulary.start,
      vocabRows: rangeLength(plan.vocabulary),
      maxPositions: settings.maxPositions,
      mtpHidden: settings.mtpHidden,
      segments: built.segments.map(({ entry }) => entry),
      files: Object.fromEntries(built.layout.fileBytes),
    },
  };
}

async function fillRanks(
  work: {
    readonly options: CompileOptions;
    readonly checkpoint: Checkpoint;
    readonly ranks: readonly RankOutput[];
    readonly key: string;
  },
  signal: AbortSignal,
): Promise<void> {
  const { options, checkpoint, ranks, key } = work;
  const partial = await openPartial({ outDirectory: options.outDirectory, ranks, key });
  const jobs = planJobs({ checkpoint, ranks, directory: partial.directory });
  const totalBytes = jobs.reduce((sum, job) => sum + job.bytes, 0);
  const left = jobs.filter((job) => !partial.done.has(job.id));
  let doneBytes = totalBytes - left.reduce((sum, job) => sum + job.bytes, 0);
  let unrecordedBytes = 0;

  const onDone = async (job: TransferJob): Promise<void> => {
    partial.done.add(job.id);
    doneBytes += job.bytes;
    unrecordedBytes += job.bytes;
    options.onProgress?.({ tensor: job.tensor.name, doneBytes, totalBytes });
    if (unrecordedBytes >= recordEveryBytes) {
      unrecordedBytes = 0;
      await partial.record();
    }
  };
  const mostThreads = options.threads ?? Math.min(availableParallelism(), maxThreads);
  // Starting a thread takes longer than one job.
  const threads = Math.min(mostThreads, Math.ceil(totalBytes / jobBytes));
  try {
    await runTransfers({ jobs: left, threads, onDone }, signal);
  } finally {
    await partial.record();
  }
  await partial.finish();
}

/**
 * Every tensor cut into runs of rows, each with its targets on all ranks; the same input always gives the same list.
 */
function planJobs(from: {
  readonly checkpoint: Checkpoint;
  readonly ranks: readonly RankOutput[];
  readonly directory: string;
}): TransferJob[] {
  const targets = new Map<string, Transfer[]>();
  for (const { manifest, layout } of from.ranks) {
    for (const transfer of layout.transfers) {
      if (!isSharedCopy(transfer.file, manifest.rank)) {
        const file = join(rankDirectory(from.directory, manifest.rank), transfer.file);
        targets.set(transfer.source, [...(targets.get(transfer.source) ?? []), { ...transfer, file }]);
      }
    }
  }
  const jobs: TransferJob[] = [];
  for (const [source, transfers] of targets) {
    const tensor = tensorOf(from.checkpoint, source);
    const [rows = 0, columns = 1] = tensor.shape;
    const rowBytes = columns * elementBytes[tensor.dtype];
    const jobRows = Math.max(1, Math.floor(jobBytes / rowBytes));
    for (let start = 0; start < rows; start += jobRows) {
      const end = Math.min(start + jobRows, rows);
      jobs.push({
        id: jobs.length,
        bytes: (end - start) * rowBytes,
        tensor,
        rows: { start, end },
        columns,
        targets: transfers,
      });
    }
  }
  return jobs;
}

function tensorOf(checkpoint: Checkpoint, name: string): TensorLocation {
  const tensor = checkpoint.tensors.get(name);
  if (tensor === undefined) {
    throw new ClusterError('internal', `segments refer to ${name}, which the checkpoint does not have`);
  }
  return tensor;
}

/** The ranks' shards, if all of them are complete and of this key. */
async function findComplete(
  outDirectory: string,
  key: string,
  plans: readonly RankPlan[],
): Promise<CompileResult | undefined> {
  const rankDirectories = plans.map(({ rank }) => rankDirectory(outDirectory, rank));
  const rankBytes: number[] = [];
  for (const directory of rankDirectories) {
    const manifest = await readShardManifest(directory).catch(() => undefined);
    if (manifest?.key !== key) {
      return undefined;
    }
    rankBytes.push(Object.values(manifest.files).reduce((sum, bytes) => sum + bytes, 0));
  }
  return { key, rankDirectories, rankBytes, upToDate: true };
}
