// The plan for one ModelService: observation -> ordered actions. Pure; act.ts carries them out, and a failed action
// is planned again from the next observation. Owns the order and the life of groups; rollout.ts counts them, drain.ts
// chooses among them, conditions.ts writes the status.
//
// In this order:
//   finalizer   before anything is created; removed when the service is being deleted and nothing is left
//   prepare     the pod that finds the model: prepare.ts
//   gate        the readiness gate of each pod follows the dispatcher's report on its group
//   mark        the dispatcher's drain marks follow the groups that drain
//   delete      broken groups, whole; drained groups; unneeded groups that serve nobody
//   drain       the mark on serving groups that have to go: they get no new requests
//   resume      removes the mark
//   create      whole groups, at the lowest free indexes, once the model is found; an ending group keeps its name
//   status      last, from the observation
//
// Only the status is planned until own writes appear in the observation (`settled`): a second plan from old pods
// would create or delete twice. Deletions name the uid, so an old observation cannot delete a newer pod.
// INVARIANT: if the observation matches the target, the plan is empty.

import type { MarkedGroups } from '@mimo/core/bus/drain-marks';

import type { ModelService } from '../resources/resources.ts';
import type { ModelServiceStatus } from '../resources/status.ts';
import { planStatus, type StatusInput } from './conditions.ts';
import { drainEnd, planMarks } from './drain.ts';
import { countFailures, retryAtMs, type FailureMemory } from './failures.ts';
import {
  groupsFromPods,
  type GroupLoad,
  type ObservedPod,
  type PodRef,
  type ReplicaGroup,
} from './groups.ts';
import { drainFinalizer, groupName } from './labels.ts';
import type { Preparation, PrepareAction } from './prepare.ts';
import { planRollout } from './rollout.ts';

export type Action =
  | { readonly kind: 'addFinalizer' }
  /** Removes the model from the catalogue. */
  | { readonly kind: 'removeModel' }
  | { readonly kind: 'removeFinalizer' }
  | PrepareAction
  | { readonly kind: 'markDraining'; readonly group: string; readonly sinceUnixMs: number }
  | { readonly kind: 'clearDraining'; readonly group: string }
  | { readonly kind: 'setRoutable'; readonly pod: PodRef; readonly routable: boolean }
  | {
      readonly kind: 'deleteGroup';
      readonly group: string;
      readonly pods: readonly PodRef[];
      readonly reason: string;
      /** True: it broke. False: it is no longer needed. */
      readonly failed: boolean;
    }
  | {
      readonly kind: 'drainGroup';
      readonly group: string;
      readonly pods: readonly PodRef[];
      readonly reason: string;
    }
  | { readonly kind: 'resumeGroup'; readonly group: string; readonly pods: readonly PodRef[] }
  | {
      readonly kind: 'createGroup';
      readonly group: string;
      readonly revision: string;
      readonly index: number;
    }
  | { readonly kind: 'patchStatus'; readonly status: ModelServiceStatus };

export interface PlanInput extends Pick<StatusInput, 'decision' | 'queue' | 'previous'> {
  readonly service: ModelService;
  readonly revision: string;
  readonly pods: readonly ObservedPod[];
  readonly loads: ReadonlyMap<string, GroupLoad>;
  /** False: nothing is known about groups without a load, and their gates stay as they are. */
  readonly loadsComplete: boolean;
  /** The drain marks as the dispatcher sees them. */
  readonly marks: MarkedGroups | 'unknown';
  readonly preparation: Preparation;
  /**
   * No other service serves the model: its catalogue entry is removed with this service. Undefined: the catalogue did
   * not answer.
   */
  readonly ownsCatalogueEntry: boolean | 'unknown';
  /** False until own writes have been observed. */
  readonly settled: boolean;
  readonly failures: FailureMemory;
  readonly nowMs: number;
}

export interface Plan {
  readonly actions: readonly Action[];
  readonly failures: FailureMemory;
}

/** Plans one service. The same input always returns the same plan. */
export function planService(input: PlanInput): Plan {
  const { service, revision, pods, loads, preparation, settled, nowMs } = input;
  const groups = groupsFromPods(pods, loads);
  const failures = countFailures(input.failures, groups, revision, nowMs);
  const status = planStatus({ ...input, groups, failures });
  const patch: Action[] = status === undefined ? [] : [{ kind: 'patchStatus', status }];
  if (!settled) {
    return { actions: patch, failures };
  }

  const deleting = service.metadata.deletionTimestamp !== undefined;
  const held = service.metadata.finalizers.includes(drainFinalizer);
  const marks = planMarks(groups, input.marks);
  const markActions: Action[] = [
    ...marks.clear.map((group) => ({ kind: 'clearDraining' as const, group })),
    ...marks.mark.map((mark) => ({ kind: 'markDraining' as const, ...mark })),
  ];
  if (deleting && pods.length === 0 && preparation.podsLeft === 0) {
    return { actions: held ? [...markActions, ...planEnd(input)] : [], failures };
  }
  const rollout = planRollout(groups, {
    wanted: deleting ? 0 : input.decision.wanted,
    revision,
    maxSurge: service.spec.rollout.maxSurge,
    maxUnavailable: service.spec.rollout.maxUnavailable,
    mayBegin: deleting || preparation.found,
  });
  const mayCreate = !deleting && nowMs >= retryAtMs(failures);
  return {
    actions: [
      ...(deleting || held ? [] : [{ kind: 'addFinalizer' } as const]),
      ...preparation.actions,
      ...planGates(groups, input),
      ...markActions,
      ...planDeletions(groups, input),
      ...rollout.drain.map(({ group, reason }): Action => {
        const gone = { group: group.name, pods: refsOf(group), reason };
        return group.ready
          ? { kind: 'drainGroup', ...gone }
          : { kind: 'deleteGroup', ...gone, failed: false };
      }),
      ...rollout.resume.map((group) => ({
        kind: 'resumeGroup' as const,
        group: group.name,
        pods: refsOf(group),
      })),
      ...(mayCreate ? planCreations(service.metadata.name, groups, revision, rollout.create) : []),
      ...patch,
    ],
    failures,
  };
}

/** How long a deletion waits for an unreachable catalogue: a leftover entry would offer a model with zero groups. */
const catalogueLimitMs = 60_000;

/** The end of a service without pods. */
function planEnd({ service, ownsCatalogueEntry, nowMs }: PlanInput): Action[] {
  const sinceMs = Date.parse(service.metadata.deletionTimestamp ?? '');
  if (ownsCatalogueEntry === 'unknown' && nowMs - sinceMs < catalogueLimitMs) {
    return [];
  }
  return [
    ...(ownsCatalogueEntry === true ? [{ kind: 'removeModel' } as const] : []),
    { kind: 'removeFinalizer' },
  ];
}

function planGates(
  groups: readonly ReplicaGroup[],
  { loads, loadsComplete }: Pick<PlanInput, 'loads' | 'loadsComplete'>,
): Action[] {
  return groups.flatMap((group) => {
    const routable = loads.get(group.name)?.routable ?? (loadsComplete ? false : undefined);
    return group.pods
      .filter((pod) => !pod.deleting && routable !== undefined && pod.routable !== routable)
      .map(({ name, uid }) => ({
        kind: 'setRoutable' as const,
        pod: { name, uid },
        routable: routable === true,
      }));
  });
}

function planDeletions(groups: readonly ReplicaGroup[], input: PlanInput): Action[] {
  const drainMs = input.service.spec.drainSeconds * 1000;
  return groups.flatMap((group) => {
    const reason =
      group.state === 'broken'
        ? `broken: ${group.failure ?? 'a rank is missing or has ended'}`
        : group.state === 'draining'
          ? drainEnd(group, drainMs, input)
          : undefined;
    return reason === undefined
      ? []
      : [
          {
            kind: 'deleteGroup' as const,
            group: group.name,
            pods: refsOf(group),
            reason,
            failed: group.state === 'broken',
          },
        ];
  });
}

function planCreations(
  service: string,
  groups: readonly ReplicaGroup[],
  revision: string,
  count: number,
): Action[] {
  const taken = new Set(groups.filter((group) => group.revision === revision).map(({ index }) => index));
  const actions: Action[] = [];
  for (let index = 0; actions.length < count; index++) {
    if (!taken.has(index)) {
      actions.push({ kind: 'createGroup', group: groupName(service, revision, index), revision, index });
    }
  }
  return actions;
}

/** The pods of a group that are not being deleted already. */
function refsOf(group: ReplicaGroup): readonly PodRef[] {
  return group.pods.filter(({ deleting }) => !deleting).map(({ name, uid }) => ({ name, uid }));
}
