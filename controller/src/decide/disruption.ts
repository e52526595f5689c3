// The disruption budget of a service, counted in groups although Kubernetes counts pods. Pure.
//
// `maxUnavailable` does not work: the disruption controller would take the expected count from the scale subresource,
// which is the minimum in groups, so at `min: 0` it would allow every eviction. `minAvailable` is compared with the
// Ready pods:
//
//   minAvailable = pods of the protected groups - 1 + Ready pods of draining groups
//
// With all protected groups Ready, one eviction is allowed. It makes its group unready, because the readiness gate
// covers the whole group; the group's other ranks may then be evicted freely, those of other groups may not. A group
// stays protected while it is rebuilt, but for at most ten minutes: a group that cannot be placed again must not
// block the draining of other machines. Draining groups are Ready for a while and must not count as spare ones.

import type { ReplicaGroup } from './groups.ts';

/** What was protected, and since when fewer pods have been Ready. */
export interface DisruptionMemory {
  readonly protectedPods: number;
  readonly belowSinceMs: number | undefined;
}

export const noDisruption: DisruptionMemory = { protectedPods: 0, belowSinceMs: undefined };

const rebuildLimitMs = 600_000;

export interface DisruptionPlan {
  readonly minAvailable: number;
  readonly memory: DisruptionMemory;
}

/**
 * Plans the budget. `wantedPods` is the number of pods of all wanted groups; protection above it is dropped at once.
 */
export function planDisruption(
  groups: readonly ReplicaGroup[],
  wantedPods: number,
  { memory, nowMs }: { readonly memory: DisruptionMemory; readonly nowMs: number },
): DisruptionPlan {
  const podsOf = (state: ReplicaGroup['state']): number =>
    groups.reduce((sum, group) => sum + (group.state === state && group.ready ? group.pods.length : 0), 0);
  const readyPods = podsOf('ready');
  const heldPods = Math.min(memory.protectedPods, wantedPods);
  const below = readyPods < heldPods;
  const belowSinceMs = below ? (memory.belowSinceMs ?? nowMs) : undefined;
  const expired = belowSinceMs !== undefined && nowMs - belowSinceMs >= rebuildLimitMs;
  const protectedPods = expired ? readyPods : Math.max(readyPods, heldPods);
  return {
    minAvailable: Math.max(0, protectedPods - 1) + podsOf('draining'),
    memory: { protectedPods, belowSinceMs: expired ? undefined : belowSinceMs },
  };
}
