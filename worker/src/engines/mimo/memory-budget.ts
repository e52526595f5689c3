// How much of the KV cache fits where the ranks compute, once their weights are loaded. Owns the reserve, the errors
// that name need and limit, and how rank 0 learns what the others have left; asks no device itself.

import { ClusterError } from '@mimo/core/process/errors';
import type { Collective } from '../../collective/collective.ts';
import type { MemoryInfo } from '../../runtime/memory.ts';

/** Left for activations, arenas, recorded passes and the buffers of collectives, as a share of all. */
export const reservedShare = 0.1;

/** The whole cache where no limit is known. */
const unlimitedBytes = 2 ** 30;

/** What is to be fitted, of one rank; all ranks are alike. */
export interface KvNeed {
  /** `auto`: as many blocks as fit. Else all of `blocks`, or an error. */
  readonly kind: 'auto' | 'given';
  /** Most blocks that can ever be used, or those that were asked for. */
  readonly blocks: number;
  readonly blockBytes: number;
  /** Beyond the blocks: pages that every slot may leave almost empty. */
  readonly slackBytes: number;
}

/**
 * The blocks that all ranks can hold; `memories` by rank, undefined if no limit is known. Throws `resource_exhausted`
 * with the rank that has too little, what it needs and what it has.
 */
export function fitKvBlocks(need: KvNeed, memories: readonly (MemoryInfo | undefined)[]): number {
  const { kind, blocks, blockBytes, slackBytes } = need;
  const wantedBlocks = kind === 'auto' ? 1 : blocks;
  const fits = memories.map((memory, rank) => {
    if (memory === undefined) {
      return kind === 'auto' ? Math.max(1, Math.floor(unlimitedBytes / blockBytes)) : blocks;
    }
    const usableBytes = Math.floor(memory.freeBytes - reservedShare * memory.totalBytes - slackBytes);
    const fitting = Math.floor(usableBytes / blockBytes);
    if (fitting < wantedBlocks) {
      throw new ClusterError(
        'resource_exhausted',
        `KV cache: rank ${rank} needs ${formatBytes(wantedBlocks * blockBytes + slackBytes)} for ${wantedBlocks} blocks; ` +
          `after the weights ${formatBytes(memory.freeBytes)} of ${formatBytes(memory.totalBytes)} are free, ` +
          `of which ${formatBytes(reservedShare * memory.totalBytes)} are kept for activations`,
      );
    }
    return fitting;
  });
  return Math.min(blocks, ...fits);
}

/** Throws `resource_exhausted` if a rank's weights are larger than what is free before they are loaded. */
export function assertWeightsFit(weightBytes: number, memory: MemoryInfo | undefined): void {
  if (memory !== undefined && weightBytes > memory.freeBytes) {
    throw new ClusterError(
      'resource_exhausted',
      `weights: take ${formatBytes(weightBytes)}; ${formatBytes(memory.freeBytes)} of ${formatBytes(memory.totalBytes)} are free`,
    );
  }
}

/** What every rank has left, by rank, for rank 0; nothing for the others. All ranks call it. */
export function gatherMemories(
  own: MemoryInfo | undefined,
  collective: Collective,
): readonly (MemoryInfo | undefined)[] {
  // In MiB, which a float holds for all memories of this century.
  const mebibyte = 2 ** 20;
  const values = Float32Array.of(
    Math.floor((own?.freeBytes ?? -mebibyte) / mebibyte),
    Math.floor((own?.totalBytes ?? 0) / mebibyte),
  );
  const parts = Array.from(
    { length: collective.rank === 0 ? collective.worldSize : 0 },
    () => new Float32Array(2),
  );
  collective.gather(
    values,
    Array.from({ length: collective.worldSize }, () => values.length),
    parts,
  );
  return parts.map(([free = -1, total = 0]) =>
    free < 0 ? undefined : { freeBytes: free * mebibyte, totalBytes: total * mebibyte },
  );
}

function formatBytes(bytes: number): string {
  return bytes < 2 ** 30 ? `${Math.ceil(bytes / 2 ** 20)} MiB` : `${(bytes / 2 ** 30).toFixed(2)} GiB`;
}
