// Which groups to remove first, when a draining group may be deleted, and which drain marks the dispatcher shall see.
// Pure.

import type { MarkedGroups } from '@mimo/core/bus/drain-marks';

import { isServing, type ReplicaGroup } from './groups.ts';

/**
 * The `count` groups that are cheapest to remove: first those that serve nobody yet, youngest first; then those
 * becoming ready, then ready ones, each with the fewest tokens in flight first. Unknown load counts as the highest.
 * Ties go to the higher index, so that the result is deterministic.
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
 * Why a draining group can be deleted now: it has no requests and gets no new ones, no gateway reaches it, or its
 * time is up (the rest moves to other groups). Undefined: it keeps draining, also if nothing is known about it.
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
    return `drained: ${drainMs / 1000} s are over, its requests move to other groups`;
  }
  if (loadsComplete && load?.routable !== true && (load?.inFlightRequests ?? 0) === 0) {
    return 'drained: it is not reachable';
  }
  return undefined;
}

export interface MarkPlan {
  readonly mark: readonly { readonly group: string; readonly sinceUnixMs: number }[];
  readonly clear: readonly string[];
}

/**
 * The changes that make the marks match the draining groups. A mark stays until the last pod is gone, so that an
 * ending group gets no requests, and is removed before another group can take the name.
 */
export function planMarks(groups: readonly ReplicaGroup[], marks: MarkedGroups | 'unknown'): MarkPlan {
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
