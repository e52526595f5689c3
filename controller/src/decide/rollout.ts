// How to get from the existing groups to `wanted` groups of the current revision. Pure; counts groups, not pods.
//
//   active     groups that neither drain nor end nor are broken;  old = active ones of other revisions
//   create     min(wanted - current, wanted + surge - active), where surge is maxSurge while there are old ones, else 0;
//              draining current groups that still serve are resumed first
//   drain      old groups that do not serve: all. Old groups that serve: as long as wanted - maxUnavailable serve without
//              them. But once a current group serves, they stay while requests wait that no other group may run: such a
//              backlog only shrinks. Current groups above wanted: the cheapest
//
// While the current revision's model is not found, nothing can replace the groups: only those above wanted are removed.
//
// A revert makes the serving groups current again: they are kept, and the groups of the abandoned revision are the
// old ones. INVARIANT: after the plan, active <= wanted + maxSurge, or nothing was created. INVARIANT: a rollout
// alone never takes the serving groups below min(serving, wanted - maxUnavailable).

import { chooseVictims } from './drain.ts';
import type { ReplicaGroup } from './groups.ts';

export interface RolloutRule {
  readonly wanted: number;
  readonly revision: string;
  readonly maxSurge: number;
  readonly maxUnavailable: number;
  /** False: no group of this revision may be created, because its model is not found. */
  readonly mayBegin: boolean;
}

export interface RolloutPlan {
  /** New groups of the current revision. */
  readonly create: number;
  /** Draining groups that resume instead. */
  readonly resume: readonly ReplicaGroup[];
  readonly drain: readonly { readonly group: ReplicaGroup; readonly reason: string }[];
}

export function planRollout(groups: readonly ReplicaGroup[], rule: RolloutRule): RolloutPlan {
  const { wanted, revision, maxSurge, maxUnavailable } = rule;
  const active = groups.filter(({ state }) => state === 'starting' || state === 'ready');
  const current = active.filter((group) => group.revision === revision);
  const old = active.filter((group) => group.revision !== revision);

  const surplusReason = `${wanted} groups are wanted`;
  if (!rule.mayBegin) {
    const surplus = [
      active.filter(({ ready }) => !ready),
      old.filter(({ ready }) => ready),
      current.filter(({ ready }) => ready),
    ]
      .flatMap((part) => chooseVictims(part, part.length))
      .slice(0, Math.max(0, active.length - wanted));
    return { create: 0, resume: [], drain: surplus.map((group) => ({ group, reason: surplusReason })) };
  }

  const surge = old.length > 0 ? maxSurge : 0;
  const missing = Math.max(0, Math.min(wanted - current.length, wanted + surge - active.length));
  const resumable = groups.filter(
    (group) => group.state === 'draining' && group.ready && group.revision === revision,
  );
  const resume = resumable.toSorted((a, b) => a.index - b.index).slice(0, missing);

  const serving = active.filter(({ ready }) => ready).length;
  const spare = Math.max(0, serving - Math.max(0, wanted - maxUnavailable));
  // Once a current group serves, new requests go there if the old groups are full.
  const mayWait = wanted > 0 && current.some(({ ready }) => ready);
  const oldServing = old.filter(({ ready, load }) => ready && !(mayWait && load?.waitedFor === true));
  const replaced = [...old.filter(({ ready }) => !ready), ...chooseVictims(oldServing, spare)];
  const surplus = chooseVictims(current, current.length - wanted);
  return {
    create: missing - resume.length,
    resume,
    drain: [
      ...replaced.map((group) => ({
        group,
        reason: `revision ${group.revision} is replaced by ${revision}`,
      })),
      ...surplus.map((group) => ({ group, reason: surplusReason })),
    ],
  };
}
