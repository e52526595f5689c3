// Fits the KV cache into the memory that the ranks have left after loading their weights. Owns the reserve, the errors
// that name need and limit, and the exchange of free memory with rank 0; queries no device itself.

import { ClusterError } from '@mimo/core/process/errors';
import type { Collective } from '../../collective/collective.ts';
import type { MemoryInfo } from '../../runtime/memory.ts';

/** The share of memory reserved for activations, arenas, recorded passes and the buffers of collectives. */
export const reservedShare = 0.1;

/** The whole cache if no limit is known. */
const unlimitedBytes = 2 ** 30;

/** The cache that one rank needs; all ranks are alike. */
export interface KvNeed {
  /** `auto`: as many blocks as fit. Else all of `blocks`, or an error. */
  readonly kind: 'auto' | 'given';
  /** The most blocks that can ever be used, or the requested number. */
  readonly blocks: number;
  readonly blockBytes: number;
  /** Beyond the blocks: pages that every slot may leave almost empty. */
  readonly slackBytes: number;
}

/**
 * The blocks that all ranks can hold; `memories` by rank, undefined if no limit is known. Throws `resource_exhausted`
 * naming the rank with too little memory, its need and its limit.
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

/** Throws `resource_exhausted` if a rank's weights are larger than the memory free before loading. */
export function assertWeightsFit(weightBytes: number, memory: MemoryInfo | undefined): void {
  if (memory !== undefined && weightBytes > memory.freeBytes) {
    throw new ClusterError(
      'resource_exhausted',
      `weights: take ${formatBytes(weightBytes)}; ${formatBytes(memory.freeBytes)} of ${formatBytes(memory.totalBytes)} are free`,
    );
  }
}

/** On rank 0, the free memory of every rank; empty on the others. All ranks call it. */
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
