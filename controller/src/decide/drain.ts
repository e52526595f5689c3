// Which group goes first, when a draining group may be deleted, and which drain marks the dispatcher is to see. Pure.

import type { DrainMarks } from '@mimo/core/bus/queue';

import { isServing, type ReplicaGroup } from './groups.ts';

/**
 * The `count` groups that are the cheapest to take away: those that serve nobody yet, youngest first; then those that are
 * becoming ready, then those that are, each with the fewest tokens in flight first. Unknown load counts as most. Ties go to
 * the higher index, so that the answer is always the same.
 */
export function chooseVictims(groups: readonly ReplicaGroup[], count: number): readonly ReplicaGroup[] {
  return groups
    .toSorted(
      (a, b) =>
        Number(a.ready) - Number(b.ready) ||
        Number(isServing(a)) - Number(isServing(b)) ||
        (isServing(a) ? tokensOf(a) - tokensOf(b) : b.createdMs - a.createdMs) ||
        b.index - a.index,
    )
    .slice(0, Math.max(0, count));
}

function tokensOf(group: ReplicaGroup): number {
  return group.load?.inFlightTokens ?? Number.MAX_SAFE_INTEGER;
}

/**
 * Why a draining group can be deleted at this moment: it holds nothing and gets nothing any more, nobody reaches it, or its
 * time is up (the rest moves to other groups). Undefined: it drains on, also where nothing is known of it.
 */
export function drainEnd(
  { drainingSinceMs, load }: ReplicaGroup,
  drainMs: number,
  { loadsComplete, nowMs }: { readonly loadsComplete: boolean; readonly nowMs: number },
): string | undefined {
  if (drainingSinceMs === undefined) {
    return undefined;
  }
  if (load?.draining === true && load.inFlightRequests === 0) {
    return 'drained: it holds no requests';
  }
  if (nowMs - drainingSinceMs >= drainMs) {
    return `drained: ${drainMs / 1000} s are over, what it holds moves to other groups`;
  }
  if (loadsComplete && load?.routable !== true && (load?.inFlightRequests ?? 0) === 0) {
    return 'drained: it does not serve';
  }
  return undefined;
}

export interface MarkPlan {
  readonly mark: readonly { readonly group: string; readonly sinceUnixMs: number }[];
  readonly clear: readonly string[];
}

/**
 * What has to change for the marks to be those of the groups that drain. A mark stays until the last pod is gone: nothing
 * is to be assigned to a group that ends; and it goes before another group can have the name.
 */
export function planMarks(groups: readonly ReplicaGroup[], marks: DrainMarks | 'unknown'): MarkPlan {
  if (marks === 'unknown') {
    return { mark: [], clear: [] };
  }
  const draining = new Map(groups.map(({ name, drainingSinceMs }) => [name, drainingSinceMs]));
  return {
    mark: groups.flatMap(({ name, drainingSinceMs }) =>
      drainingSinceMs === undefined || marks.has(name) ? [] : [{ group: name, sinceUnixMs: drainingSinceMs }],
    ),
    clear: [...marks.keys()].filter((group) => draining.get(group) === undefined),
  };
}
