// How often groups of the current revision failed recently, and when the next may be created. Pure. A model that
// cannot start (no such checkpoint, no memory) is retried ever more slowly, while a group that dies once is rebuilt
// at once.

import type { ReplicaGroup } from './groups.ts';

/** Recent rebuilds, to slow down retries of a model that cannot start. */
export interface FailureMemory {
  readonly revision: string;
  readonly count: number;
  readonly lastMs: number;
  /** First pods of the broken groups that still exist and are already counted. */
  readonly countedUids: readonly string[];
}

export const noFailures: FailureMemory = { revision: '', count: 0, lastMs: 0, countedUids: [] };

/** The first rebuild comes at once, the following ones after 10 s, 20 s ... 5 min; ten quiet minutes forget them. */
const firstBackoffMs = 10_000;
const longestBackoffMs = 300_000;
const forgetFailuresMs = 600_000;

/** When the next group of a failing revision may be created. */
export function retryAtMs({ count, lastMs }: FailureMemory): number {
  if (count < 2) {
    return 0;
  }
  return lastMs + Math.min(longestBackoffMs, firstBackoffMs * 2 ** (count - 2));
}

/**
 * Counts the groups that failed since the last call; a changed template or ten minutes without failures reset the
 * count.
 */
export function countFailures(
  before: FailureMemory,
  groups: readonly ReplicaGroup[],
  revision: string,
  nowMs: number,
): FailureMemory {
  const known =
    before.revision === revision && nowMs - before.lastMs < forgetFailuresMs ? before : noFailures;
  const broken = groups
    .filter((group) => group.revision === revision && (group.state === 'broken' || group.state === 'ending'))
    .filter(({ pods }) => pods.some(({ phase }) => phase === 'Failed'))
    .flatMap(({ pods }) => pods.slice(0, 1).map(({ uid }) => uid));
  const added = broken.filter((uid) => !before.countedUids.includes(uid)).length;
  return {
    revision,
    count: known.count + added,
    lastMs: added > 0 ? nowMs : known.lastMs,
    countedUids: broken,
  };
}
