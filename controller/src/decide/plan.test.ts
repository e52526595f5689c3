import { describe, expect, it } from 'vitest';

import { parseModelService, type ModelService } from '../resources/resources.ts';
import type { ModelServiceStatus, ScaleDecision } from '../resources/status.ts';
import { chooseVictims } from './drain.ts';
import { noFailures, type FailureMemory } from './failures.ts';
import { groupsFromPods, type GroupLoad, type ObservedPod } from './groups.ts';
import { groupName, podName } from './labels.ts';
import { planService, type Action, type PlanInput } from './plan.ts';
import { noPreparation, planPrepare, type Preparation } from './prepare.ts';

const service = parseModelService({
  metadata: { name: 'chat', namespace: 'models', uid: 'u', finalizers: ['mimo-cluster.dev/drain'] },
  spec: {
    model: { name: 'mimo', source: { hostPath: '/models' } },
    tensorParallel: 2,
    placement: 'spread',
    scaling: { max: 9 },
    drainSeconds: 60,
  },
});

interface GroupOptions {
  readonly revision?: string;
  readonly state?: 'starting' | 'ready' | 'draining';
  readonly pods?: Partial<ObservedPod>;
}

/** Both pods of a group. */
function groupOf(
  index: number,
  { revision = 'new', state = 'ready', pods = {} }: GroupOptions = {},
): ObservedPod[] {
  const group = groupName('chat', revision, index);
  return [0, 1].map((rank) => ({
    name: podName(group, rank),
    uid: `${group}-${rank}-uid`,
    group,
    revision,
    index,
    rank,
    groupPods: 2,
    phase: 'Running',
    ready: state !== 'starting',
    routable: state !== 'starting',
    deleting: false,
    createdMs: index,
    drainingSinceMs: state === 'draining' ? 0 : undefined,
    blocker: undefined,
    failure: undefined,
    failedMs: undefined,
    ...pods,
  }));
}

/** Loads that agree with the pods' gates and drains, so that no gate has to be set. */
function loadsOf(
  pods: readonly ObservedPod[],
  tokens: Readonly<Record<string, number>> = {},
): Map<string, GroupLoad> {
  return new Map(
    pods.map(({ group, routable, drainingSinceMs }) => {
      const inFlightTokens = tokens[group] ?? 100;
      const inFlightRequests = Math.sign(inFlightTokens);
      return [group, { routable, draining: drainingSinceMs !== undefined, inFlightRequests, inFlightTokens }];
    }),
  );
}

/** Loads of groups for which requests wait that nothing else may run. */
function waitedFor(pods: readonly ObservedPod[]): Map<string, GroupLoad> {
  return new Map([...loadsOf(pods)].map(([name, load]) => [name, { ...load, waitedFor: true }]));
}

/** Marks that agree with the pods' drains. */
function marksOf(pods: readonly ObservedPod[]): Map<string, { sinceUnixMs: number }> {
  return new Map(
    pods.flatMap(({ group, drainingSinceMs }) =>
      drainingSinceMs === undefined ? [] : [[group, { sinceUnixMs: drainingSinceMs }]],
    ),
  );
}

const prepared: Preparation = planPrepare({
  service: 'chat',
  generation: 1,
  deleting: false,
  modelHash: 'hash',
  pods: [],
  preparedModel: 'hash',
  published: true,
  nameTakenBy: undefined,
  memory: noPreparation,
  nowMs: 0,
});

function decisionOf(wanted: number, blocker?: string): ScaleDecision {
  return {
    wanted,
    before: wanted,
    reason: 'RecentLoad',
    message: '',
    formula: 'f',
    clamps: [],
    ...(blocker === undefined ? {} : { blocker }),
    inputs: { readyGroups: 0, startingGroups: 0, groupTokensPerSecond: 1, startUpSeconds: 1 },
  };
}

function inputWith(
  fields: Partial<PlanInput> & { readonly wanted?: number; readonly pods?: ObservedPod[] },
): PlanInput {
  const { wanted = 1, pods = [] } = fields;
  return {
    service,
    revision: 'new',
    pods,
    loads: loadsOf(pods),
    loadsComplete: true,
    marks: marksOf(pods),
    preparation: prepared,
    ownsCatalogueEntry: true,
    settled: true,
    decision: decisionOf(wanted),
    queue: 'unknown',
    previous: {},
    failures: noFailures,
    nowMs: 1000,
    ...fields,
  };
}

/** The plan in short: `create chat-new-0`, without the status. */
function shortPlan(input: PlanInput): string[] {
  return planService(input)
    .actions.filter(({ kind }) => kind !== 'patchStatus')
    .map((action) => ('group' in action ? `${action.kind} ${action.group}` : action.kind));
}

function statusOf(actions: readonly Action[]): ModelServiceStatus {
  const patch = actions.find((action) => action.kind === 'patchStatus');
  return patch?.kind === 'patchStatus' ? patch.status : {};
}

const old = (index: number): ObservedPod[] => groupOf(index, { revision: 'old' });

const withRollout = (maxSurge: number, maxUnavailable: number): ModelService => ({
  ...service,
  spec: { ...service.spec, rollout: { maxSurge, maxUnavailable } },
});

describe('planService', () => {
  it('creates all wanted groups at once', () => {
    expect(shortPlan(inputWith({ wanted: 3 }))).toEqual([
      'createGroup chat-new-0',
      'createGroup chat-new-1',
      'createGroup chat-new-2',
    ]);
  });

  it('adds the finalizer before it creates anything', () => {
    const free = { ...service, metadata: { ...service.metadata, finalizers: [] } };
    expect(shortPlan(inputWith({ service: free }))).toEqual(['addFinalizer', 'createGroup chat-new-0']);
  });

  it('plans nothing until it observes its own writes', () => {
    expect(shortPlan(inputWith({ wanted: 3, settled: false }))).toEqual([]);
  });

  it('plans nothing in the desired state, and writes an unchanged status once', () => {
    const input = inputWith({ wanted: 2, pods: [...groupOf(0), ...groupOf(1)] });
    const first = planService(input).actions;
    expect(first.map(({ kind }) => kind)).toEqual(['patchStatus']);
    expect(planService({ ...input, previous: statusOf(first), nowMs: 9_000_000 }).actions).toEqual([]);
  });

  it('sets the readiness gate from the state that the dispatcher reports', () => {
    const pods = groupOf(0, { state: 'starting' });
    const load = { routable: true, draining: false, inFlightRequests: 0, inFlightTokens: 0 };
    const loads = new Map([['chat-new-0', load]]);
    expect(shortPlan(inputWith({ pods, loads }))).toEqual(['setRoutable', 'setRoutable']);
    const serving = groupOf(0);
    expect(shortPlan(inputWith({ pods: serving, loads: new Map() }))).toEqual(['setRoutable', 'setRoutable']);
  });

  it('leaves gates and drains unchanged while the state of the groups is unknown', () => {
    const pods = [...groupOf(0), ...groupOf(1, { state: 'draining' })];
    const blind = { loads: new Map(), loadsComplete: false, marks: 'unknown' as const };
    expect(shortPlan(inputWith({ wanted: 1, pods, ...blind }))).toEqual([]);
    expect(shortPlan(inputWith({ wanted: 1, pods, ...blind, nowMs: 60_000 }))).toEqual([
      'deleteGroup chat-new-1',
    ]);
  });

  it('rebuilds a group that lost a rank: deletes the rest at once, creates another under a free name', () => {
    const [leader] = groupOf(0) as [ObservedPod, ObservedPod];
    const input = inputWith({ wanted: 1, pods: [leader] });
    expect(shortPlan(input)).toEqual(['deleteGroup chat-new-0', 'createGroup chat-new-1']);
    const deleted = planService(input).actions[0];
    expect(deleted).toMatchObject({ pods: [{ name: 'chat-new-0-0', uid: 'chat-new-0-0-uid' }] });

    // While the old one ends and the new one starts there is nothing to do: it is rebuilt once.
    const ending = [{ ...leader, deleting: true }, ...groupOf(1, { state: 'starting' })];
    expect(shortPlan(inputWith({ pods: ending }))).toEqual([]);
  });

  it('rebuilds a group whose rank failed, and reports the error of that rank', () => {
    const [leader, follower] = groupOf(0) as [ObservedPod, ObservedPod];
    const failed = { ...follower, phase: 'Failed' as const, ready: false, failure: 'out of memory' };
    const plan = planService(inputWith({ pods: [leader, failed] }));
    expect(plan.actions[0]).toMatchObject({ kind: 'deleteGroup', reason: 'broken: out of memory' });
    expect(plan.failures.count).toBe(1);
  });

  it('backs off between tries of a model that cannot start, and reports it as Degraded', () => {
    let failures: FailureMemory = noFailures;
    const waits: number[] = [];
    let nowMs = 0;
    for (let index = 0; index < 8; index++) {
      const words = {
        phase: 'Failed' as const,
        ready: false,
        routable: false,
        failure: 'no such checkpoint',
      };
      const pods = groupOf(index, { pods: words });
      const begin = nowMs;
      let creates = false;
      while (!creates) {
        const plan = planService(inputWith({ pods, failures, nowMs }));
        failures = plan.failures;
        creates = plan.actions.some(({ kind }) => kind === 'createGroup');
        const degraded = statusOf(plan.actions).conditions?.find(({ type }) => type === 'Degraded');
        expect(degraded?.status).toBe(failures.count >= 2 ? 'True' : 'False');
        expect(degraded?.message).toContain(failures.count >= 2 ? 'no such checkpoint' : 'no failures');
        nowMs += creates ? 0 : 1000;
      }
      waits.push((nowMs - begin) / 1000);
    }
    expect(waits).toEqual([0, 10, 20, 40, 80, 160, 300, 300]);
  });

  it('creates nothing until the model is found, and keeps serving groups when it can no longer be found', () => {
    const found = { ...prepared, found: false };
    expect(shortPlan(inputWith({ wanted: 2, preparation: found }))).toEqual([]);
    const starting = groupOf(0, { state: 'starting' });
    expect(shortPlan(inputWith({ wanted: 2, pods: starting, preparation: found }))).toEqual([]);
    const surging = withRollout(0, 1);
    const rollout = inputWith({ service: surging, wanted: 1, pods: old(0), preparation: found });
    expect(shortPlan(rollout)).toEqual([]);
    const tooMany = [...old(0), ...old(1)];
    expect(shortPlan(inputWith({ wanted: 1, pods: tooMany, preparation: found }))).toEqual([
      'drainGroup chat-old-1',
    ]);
  });

  it("keeps the dispatcher's drain marks equal to the draining groups", () => {
    const pods = [...groupOf(0), ...groupOf(1, { state: 'draining' })];
    const marks = new Map([['chat-new-0', { sinceUnixMs: 5 }]]);
    expect(shortPlan(inputWith({ pods, marks }))).toEqual([
      'clearDraining chat-new-0',
      'markDraining chat-new-1',
    ]);
    const ending = groupOf(1, { state: 'draining', pods: { deleting: true } });
    expect(shortPlan(inputWith({ wanted: 0, pods: ending }))).toEqual([]);
  });

  it('reports the error of the rank that failed first', () => {
    const [leader, follower] = groupOf(0, { pods: { phase: 'Failed', ready: false } }) as [
      ObservedPod,
      ObservedPod,
    ];
    const pods = [
      { ...leader, failure: 'rank 1 is lost', failedMs: 200 },
      { ...follower, failure: 'OOMKilled', failedMs: 100 },
    ];
    expect(planService(inputWith({ pods })).actions[0]).toMatchObject({ reason: 'broken: OOMKilled' });
  });

  it('starts a changed template at once although the last one failed', () => {
    const failures = { revision: 'old', count: 9, lastMs: 900, countedUids: [] };
    expect(shortPlan(inputWith({ failures }))).toEqual(['createGroup chat-new-0']);
  });

  it('keeps serving groups while another cannot be placed, and reports why', () => {
    const blocker = '0/3 nodes are available: 3 Insufficient nvidia.com/gpu';
    const pods = [...groupOf(0), ...groupOf(1, { state: 'starting', pods: { phase: 'Pending', blocker } })];
    const input = { ...inputWith({ pods }), decision: decisionOf(2, blocker) };
    const { actions } = planService(input);
    expect(actions.map(({ kind }) => kind)).toEqual(['patchStatus']);
    const conditions = statusOf(actions).conditions ?? [];
    expect(conditions.map(({ type, status, reason }) => `${type} ${status} ${reason}`)).toEqual([
      'ModelFound True Prepared',
      'Ready True GroupsReady',
      'Progressing True Scaling',
      'ScalingActive False QueueUnknown',
      'Degraded True Blocked',
    ]);
    expect(conditions.at(-1)?.message).toBe(blocker);
  });

  it('keeps the transition time of a condition whose status is unchanged, and sets the generation', () => {
    const first = statusOf(planService(inputWith({ pods: groupOf(0) })).actions);
    const edited = { ...service, metadata: { ...service.metadata, generation: 7 } };
    const later = planService(
      inputWith({ service: edited, pods: groupOf(0), previous: first, nowMs: 60_000 }),
    );
    const conditions = statusOf(later.actions).conditions ?? [];
    expect(new Set(conditions.map(({ lastTransitionTime }) => lastTransitionTime))).toEqual(
      new Set(['1970-01-01T00:00:01.000Z']),
    );
    expect(new Set(conditions.map(({ observedGeneration }) => observedGeneration))).toEqual(new Set([7]));
  });

  describe('scaling', () => {
    it('drains the group with the least work left, and deletes it when it is empty', () => {
      const pods = [...groupOf(0), ...groupOf(1), ...groupOf(2)];
      const loads = loadsOf(pods, { 'chat-new-0': 500, 'chat-new-1': 20, 'chat-new-2': 900 });
      expect(shortPlan(inputWith({ wanted: 2, pods, loads }))).toEqual(['drainGroup chat-new-1']);

      const draining = [...groupOf(0), ...groupOf(1, { state: 'draining' }), ...groupOf(2)];
      expect(shortPlan(inputWith({ wanted: 2, pods: draining }))).toEqual([]);
      const empty = loadsOf(draining, { 'chat-new-1': 0 });
      expect(shortPlan(inputWith({ wanted: 2, pods: draining, loads: empty }))).toEqual([
        'deleteGroup chat-new-1',
      ]);
      const unseen = new Map([...empty].map(([group, load]) => [group, { ...load, draining: false }]));
      expect(shortPlan(inputWith({ wanted: 2, pods: draining, loads: unseen }))).toEqual([]);
      const late = inputWith({ wanted: 2, pods: draining, nowMs: 60_000 });
      expect(shortPlan(late)).toEqual(['deleteGroup chat-new-1']);
    });

    it('deletes a starting group instead of draining a serving one', () => {
      const pods = [...groupOf(0), ...groupOf(1, { state: 'starting' })];
      expect(shortPlan(inputWith({ wanted: 1, pods }))).toEqual(['deleteGroup chat-new-1']);
    });

    it('resumes a draining group rather than starting another', () => {
      const pods = [...groupOf(0), ...groupOf(1, { state: 'draining' })];
      expect(shortPlan(inputWith({ wanted: 3, pods }))).toEqual([
        'resumeGroup chat-new-1',
        'createGroup chat-new-2',
      ]);
    });

    it('removes an idle group before one that serves requests though it is not ready', () => {
      const pods = [
        ...groupOf(0),
        ...groupOf(1, { state: 'starting' }),
        ...groupOf(2, { state: 'starting' }),
      ];
      const load = { routable: true, draining: false, inFlightRequests: 9, inFlightTokens: 900 };
      const groups = groupsFromPods(pods, new Map([['chat-new-2', load]]));
      expect(chooseVictims(groups, 3).map(({ name }) => name)).toEqual([
        'chat-new-1',
        'chat-new-2',
        'chat-new-0',
      ]);
    });

    it('chooses the same victim in any order of the groups', () => {
      const pods = [...groupOf(0), ...groupOf(1), ...groupOf(2)];
      const groups = groupsFromPods(pods, new Map());
      expect(chooseVictims(groups, 1)).toEqual(chooseVictims(groups.toReversed(), 1));
      expect(chooseVictims(groups, 1)[0]?.name).toBe('chat-new-2');
    });
  });

  describe('a rollout', () => {
    it('surges by one, and drains an old group only once a new one serves', () => {
      const before = [...old(0), ...old(1)];
      expect(shortPlan(inputWith({ wanted: 2, pods: before }))).toEqual(['createGroup chat-new-0']);
      const starting = [...before, ...groupOf(0, { state: 'starting' })];
      expect(shortPlan(inputWith({ wanted: 2, pods: starting }))).toEqual([]);
      const serving = [...before, ...groupOf(0)];
      expect(shortPlan(inputWith({ wanted: 2, pods: serving }))).toEqual(['drainGroup chat-old-1']);
      const oneDrains = [...old(0), ...groupOf(1, { revision: 'old', state: 'draining' }), ...groupOf(0)];
      expect(shortPlan(inputWith({ wanted: 2, pods: oneDrains }))).toEqual(['createGroup chat-new-1']);
    });

    it('removes an old group first when surge is not allowed', () => {
      const pods = [...old(0), ...old(1)];
      const input = inputWith({ service: withRollout(0, 1), wanted: 2, pods });
      expect(shortPlan(input)).toEqual(['drainGroup chat-old-1']);
    });

    it('keeps one old group while waiting requests need its identity', () => {
      const serving = [...old(0), ...groupOf(0)];
      const plan = (pods: ObservedPod[], more: Parameters<typeof inputWith>[0] = {}): string[] =>
        shortPlan(inputWith({ wanted: 1, pods, loads: waitedFor(pods), ...more }));
      expect(plan(serving)).toEqual([]);
      expect(shortPlan(inputWith({ wanted: 1, pods: serving }))).toEqual(['drainGroup chat-old-0']);
      expect(plan([...old(0), ...old(1)], { service: withRollout(0, 1), wanted: 2 })).toEqual([
        'drainGroup chat-old-1',
      ]);
      expect(plan(serving, { wanted: 0 })).toEqual(['drainGroup chat-old-0', 'drainGroup chat-new-0']);
    });

    it('keeps the serving groups and deletes the new ones when reverted', () => {
      const pods = [...old(0), ...old(1), ...groupOf(0, { state: 'starting' })];
      const reverted = inputWith({ revision: 'old', wanted: 2, pods });
      expect(shortPlan(reverted)).toEqual(['deleteGroup chat-new-0']);
    });

    it('resumes draining old groups first when reverted late', () => {
      const pods = [...old(0), ...groupOf(1, { revision: 'old', state: 'draining' }), ...groupOf(0)];
      const reverted = inputWith({ revision: 'old', wanted: 2, pods });
      expect(shortPlan(reverted)).toEqual(['resumeGroup chat-old-1']);
    });

    it('leaves the old groups serving when the new ones cannot start', () => {
      const pods = [...old(0), ...old(1), ...groupOf(0, { state: 'starting' })];
      for (let nowMs = 0; nowMs < 3_600_000; nowMs += 600_000) {
        expect(shortPlan(inputWith({ wanted: 2, pods, nowMs }))).toEqual([]);
      }
    });
  });

  describe('a deletion', () => {
    const deleted = {
      ...service,
      metadata: { ...service.metadata, deletionTimestamp: '2026-01-01T00:00:00Z' },
    };

    it('drains every group, and removes the finalizer last', () => {
      const pods = [...groupOf(0), ...groupOf(1, { state: 'starting' })];
      expect(shortPlan(inputWith({ service: deleted, wanted: 2, pods })).toSorted()).toEqual([
        'deleteGroup chat-new-1',
        'drainGroup chat-new-0',
      ]);
      expect(shortPlan(inputWith({ service: deleted, wanted: 2 }))).toEqual([
        'removeModel',
        'removeFinalizer',
      ]);
    });

    it('clears the marks of deleted groups, and waits a minute for a catalogue that does not answer', () => {
      const marks = new Map([['chat-new-7', { sinceUnixMs: 0 }]]);
      const sinceMs = Date.parse('2026-01-01T00:00:00Z');
      const input = inputWith({ service: deleted, marks, ownsCatalogueEntry: 'unknown', nowMs: sinceMs });
      expect(shortPlan(input)).toEqual(['clearDraining chat-new-7']);
      expect(shortPlan({ ...input, nowMs: sinceMs + 60_000 })).toEqual([
        'clearDraining chat-new-7',
        'removeFinalizer',
      ]);
    });

    it('leaves the catalogue unchanged if another service serves the model', () => {
      expect(shortPlan(inputWith({ service: deleted, ownsCatalogueEntry: false }))).toEqual([
        'removeFinalizer',
      ]);
    });

    it('plans nothing once it is complete', () => {
      const gone = { ...deleted, metadata: { ...deleted.metadata, finalizers: [] } };
      expect(planService(inputWith({ service: gone })).actions).toEqual([]);
    });
  });
});
