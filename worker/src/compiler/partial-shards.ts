// The files of an unfinished compile. Owns `<out>/partial-<key>/`: the ranks' files at their final size, and
// progress.json with the durably finished jobs, so that an interrupted compile continues where it stopped.
// INVARIANT: `<out>/rank-N` is always a complete directory, manifest included, moved there in one piece.

import {
  copyFile,
  link,
  mkdir,
  open,
  readdir,
  readFile,
  rename,
  rm,
  statfs,
  writeFile,
} from 'node:fs/promises';
import { join } from 'node:path';
import { ClusterError } from '@mimo/core/process/errors';
import type { RankSegments } from './segments.ts';
import { manifestFile, type ShardManifest } from '../shards/shard.ts';
import { isSharedCopy } from './weight-layout.ts';

/** The contents of one rank's directory, except the weights from the checkpoint. */
export interface RankOutput extends RankSegments {
  readonly manifest: ShardManifest;
}

/** The work on disk. Needs no close: each operation opens its files. */
export interface PartialShards {
  readonly directory: string;
  /** Ids of the finished jobs; the caller adds to it. */
  readonly done: Set<number>;
  /** Makes the files durable, then records the finished jobs. */
  record(): Promise<void>;
  /** Adds graphs and manifests and moves every rank into place, replacing earlier shards. */
  finish(): Promise<void>;
}

const progressFile = 'progress.json';
const partialName = /^partial-[0-9a-f]{16}$/;
const rankName = /^rank-\d+$/;
/** The unit of stat's `blocks`. */
const statBlockBytes = 512;

/** A rank's directory below `parent`. */
export function rankDirectory(parent: string, rank: number): string {
  return join(parent, `rank-${rank}`);
}

/**
 * Continues the partial shards of this key, or creates them; removes those of other keys. Throws
 * `resource_exhausted` if the disk cannot hold them.
 */
export async function openPartial(of: {
  readonly outDirectory: string;
  readonly ranks: readonly RankOutput[];
  readonly key: string;
}): Promise<PartialShards> {
  const { outDirectory, ranks, key } = of;
  const name = `partial-${key.slice(0, 16)}`;
  const directory = join(outDirectory, name);
  const progress = join(directory, progressFile);
  await removeChildren(outDirectory, (child) => partialName.test(child) && child !== name);

  const files = ranks.flatMap(({ manifest }) =>
    Object.entries(manifest.files)
      .filter(([file]) => !isSharedCopy(file, manifest.rank))
      .map(([file, bytes]) => ({ path: join(rankDirectory(directory, manifest.rank), file), bytes })),
  );
  for (const { manifest } of ranks) {
    await mkdir(rankDirectory(directory, manifest.rank), { recursive: true });
  }
  const kept = await reserveFiles(directory, files);
  const done = kept ? await readProgress(progress) : new Set<number>();

  let recording = Promise.resolve();
  const record = async (): Promise<void> => {
    const text = JSON.stringify({ done: [...done] });
    await Promise.all(files.map(({ path }) => syncFile(path)));
    await replaceFile(progress, text);
  };
  return {
    directory,
    done,
    record() {
      // Two threads may record at once; the later record includes the earlier one.
      recording = recording.then(record);
      return recording;
    },
    async finish() {
      for (const rank of ranks) {
        await writeRank(directory, rank);
      }
      await removeChildren(outDirectory, (child) => rankName.test(child));
      for (const { manifest } of ranks) {
        await rename(rankDirectory(directory, manifest.rank), rankDirectory(outDirectory, manifest.rank));
      }
      await rm(directory, { recursive: true });
    },
  };
}

async function readProgress(path: string): Promise<Set<number>> {
  const text = await readFile(path, 'utf8').catch(() => '{"done":[]}');
  const progress: { readonly done: readonly number[] } = JSON.parse(text);
  return new Set(progress.done);
}

/** Sets each file's size; false if a file was missing or short, which discards all progress. */
async function reserveFiles(
  directory: string,
  files: readonly { readonly path: string; readonly bytes: number }[],
): Promise<boolean> {
  let kept = true;
  let neededBytes = 0;
  for (const { path, bytes } of files) {
    const file = await open(path, 'a');
    try {
      const { size, blocks } = await file.stat();
      kept &&= size === bytes;
      neededBytes += Math.max(0, bytes - blocks * statBlockBytes);
      await file.truncate(bytes);
    } finally {
      await file.close();
    }
  }
  const { bavail, bsize } = await statfs(directory);
  if (neededBytes > bavail * bsize) {
    throw new ClusterError(
      'resource_exhausted',
      `${directory}: needs ${neededBytes} more bytes of disk, ${bavail * bsize} are free`,
    );
  }
  return kept;
}

async function writeRank(directory: string, { manifest, segments, layout }: RankOutput): Promise<void> {
  const own = rankDirectory(directory, manifest.rank);
  for (const { file, offset, bytes } of layout.constants) {
    const weights = await open(join(own, file), 'r+');
    try {
      await weights.write(bytes, 0, bytes.length, offset);
    } finally {
      await weights.close();
    }
  }
  for (const { entry, model } of segments) {
    await writeFile(join(own, entry.file), model);
  }
  for (const file of Object.keys(manifest.files)) {
    if (isSharedCopy(file, manifest.rank)) {
      await rm(join(own, file), { force: true });
      await linkOrCopy(join(rankDirectory(directory, 0), file), join(own, file));
    } else {
      await syncFile(join(own, file));
    }
  }
  await replaceFile(join(own, manifestFile), JSON.stringify(manifest, undefined, 1));
}

/** Not every volume supports hard links. */
async function linkOrCopy(from: string, to: string): Promise<void> {
  await link(from, to).catch(async () => copyFile(from, to));
}

async function removeChildren(directory: string, isRemoved: (name: string) => boolean): Promise<void> {
  for (const child of (await readdir(directory)).filter(isRemoved)) {
    await rm(join(directory, child), { recursive: true });
  }
}

async function replaceFile(path: string, text: string): Promise<void> {
  await writeFile(`${path}.new`, text, { flush: true });
  await rename(`${path}.new`, path);
}

async function syncFile(path: string): Promise<void> {
  const file = await open(path, 'r+');
  try {
    await file.datasync();
  } finally {
    await file.close();
  }
}
