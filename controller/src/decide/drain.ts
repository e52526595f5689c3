// Which group goes first, and when a draining group may be deleted. Pure.

import type { ReplicaGroup } from './groups.ts';

/**
 * The `count` groups that are the cheapest to take away: those that serve nobody yet, youngest first; then those with the
 * fewest tokens in flight. Unknown load counts as most. Ties go to the higher index, so that the answer is always the same.
 */
export function chooseVictims(groups: readonly ReplicaGroup[], count: number): readonly ReplicaGroup[] {
  return groups
    .toSorted(
      (a, b) =>
        Number(a.ready) - Number(b.ready) ||
        (a.ready ? tokensOf(a) - tokensOf(b) : b.createdMs - a.createdMs) ||
        b.index - a.index,
    )
    .slice(0, Math.max(0, count));
}

function tokensOf(group: ReplicaGroup): number {
  return group.load?.inFlightTokens ?? Number.MAX_SAFE_INTEGER;
}

/**
 * Why a draining group can be deleted at this moment: it holds nothing, its time is up (the rest moves to other groups), or
 * it is not ready and so serves nobody. Undefined: it drains on.
 */
export function drainEnd(group: ReplicaGroup, drainMs: number, nowMs: number): string | undefined {
  if (group.drainingSinceMs === undefined) {
    return undefined;
  }
  if (!group.ready) {
    return 'drained: it does not serve';
  }
  if (group.load?.inFlightRequests === 0) {
    return 'drained: it holds no requests';
  }
  if (nowMs - group.drainingSinceMs >= drainMs) {
    return `drained: ${drainMs / 1000} s are over, what it holds moves to other groups`;
  }
  return undefined;
}
