// The disruption budget of a service, counted in groups although Kubernetes counts pods. Pure.
//
// `maxUnavailable` would not do: the disruption controller then takes the expected count from the scale subresource, which
// is the floor in groups, so at `min: 0` it would allow everything. `minAvailable` is compared with the pods that are Ready:
//
//   minAvailable = pods of the protected groups - 1 + Ready pods of draining groups
//
// With all protected groups Ready one eviction is allowed. It makes its group unready, because the readiness gate is that of
// the whole group; its other ranks are then unhealthy and may be evicted freely, and no other group's may. A group stays
// protected while it is rebuilt, but for ten minutes at most: a group that cannot be placed again must not keep the other
// machines from being emptied. Groups that drain are Ready for a while and are not to be taken for spare ones.

import type { ReplicaGroup } from './groups.ts';

/** What was protected, and since when less than that has been Ready. */
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

/** Plans the budget. `wantedPods` is what the wanted groups have together: what was protected above it is forgotten at once. */
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
