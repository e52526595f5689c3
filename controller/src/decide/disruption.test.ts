import { describe, expect, it } from 'vitest';

import { noDisruption, planDisruption, type DisruptionMemory } from './disruption.ts';
import type { GroupState, ReplicaGroup } from './groups.ts';

const podsOfGroup = 4;

function groupsOf(...states: readonly (GroupState | 'draining but unready')[]): readonly ReplicaGroup[] {
  return states.map((state, index) => ({
    name: `chat-new-${index}`,
    revision: 'new',
    index,
    state: state === 'draining but unready' ? 'draining' : state,
    ready: state === 'ready' || state === 'draining',
    pods: Array.from({ length: podsOfGroup }, () => ({}) as ReplicaGroup['pods'][number]),
    createdMs: 0,
    drainingSinceMs: undefined,
    blocker: undefined,
    failure: undefined,
    load: undefined,
  }));
}

interface Step {
  readonly groups: readonly ReplicaGroup[];
  readonly wanted: number;
  readonly atMs?: number;
}

/** `minAvailable` after each step. */
function planAll(...steps: readonly Step[]): number[] {
  let memory: DisruptionMemory = noDisruption;
  return steps.map(({ groups, wanted, atMs = 0 }) => {
    const plan = planDisruption(groups, wanted * podsOfGroup, { memory, nowMs: atMs });
    memory = plan.memory;
    return plan.minAvailable;
  });
}

/** What the disruption controller would allow: Ready pods above minAvailable. */
function allowed(groups: readonly ReplicaGroup[], minAvailable: number): number {
  return Math.max(0, groups.filter(({ ready }) => ready).length * podsOfGroup - minAvailable);
}

describe('planDisruption', () => {
  it('allows one eviction while all groups serve, and none while one of them is rebuilt', () => {
    const whole = groupsOf('ready', 'ready');
    const broken = groupsOf('broken', 'ready');
    const rebuilding = groupsOf('ending', 'ready', 'starting');
    const [first, second, third, fourth] = planAll(
      { groups: whole, wanted: 2 },
      { groups: broken, wanted: 2 },
      { groups: rebuilding, wanted: 2 },
      { groups: whole, wanted: 2 },
    );
    expect([
      allowed(whole, first ?? 0),
      allowed(broken, second ?? 0),
      allowed(rebuilding, third ?? 0),
      allowed(whole, fourth ?? 0),
    ]).toEqual([1, 0, 0, 1]);
  });

  it('allows eviction of the only group when its machine is drained', () => {
    const groups = groupsOf('ready');
    expect(planAll({ groups, wanted: 1 }).map((min) => allowed(groups, min))).toEqual([1]);
  });

  it('does not block node drains forever: gives up on a group that cannot come back', () => {
    const whole = groupsOf('ready', 'ready', 'ready');
    const two = groupsOf('ready', 'ready', 'starting');
    const limits = planAll(
      { groups: whole, wanted: 3 },
      { groups: two, wanted: 3, atMs: 1_000 },
      { groups: two, wanted: 3, atMs: 600_999 },
      { groups: two, wanted: 3, atMs: 601_000 },
      { groups: two, wanted: 3, atMs: 602_000 },
    );
    expect(limits.slice(1).map((min) => allowed(two, min))).toEqual([0, 0, 1, 1]);
  });

  it('does not protect starting groups: an unreachable count blocks no eviction', () => {
    const groups = groupsOf('ready', 'ready', 'starting', 'starting', 'starting');
    expect(planAll({ groups, wanted: 5 }).map((min) => allowed(groups, min))).toEqual([1]);
  });

  it('does not count draining or surge groups as spare', () => {
    const draining = groupsOf('ready', 'ready', 'draining');
    expect(planAll({ groups: draining, wanted: 2 }).map((min) => allowed(draining, min))).toEqual([1]);
    const surge = groupsOf('ready', 'ready', 'ready');
    expect(planAll({ groups: surge, wanted: 2 }).map((min) => allowed(surge, min))).toEqual([1]);
    const unready = groupsOf('ready', 'draining but unready');
    expect(planAll({ groups: unready, wanted: 1 }).map((min) => allowed(unready, min))).toEqual([1]);
  });

  it('lowers the protection as soon as fewer groups are wanted, to none at zero', () => {
    expect(
      planAll(
        { groups: groupsOf('ready', 'ready', 'ready'), wanted: 3 },
        { groups: groupsOf('ready'), wanted: 1 },
        { groups: [], wanted: 0 },
      ),
    ).toEqual([11, 3, 0]);
  });
});
