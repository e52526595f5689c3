import { describe, expect, it } from 'vitest';

import type { GroupState, ReplicaGroup } from './groups.ts';
import { noStartUp, observeStartUps, readyInMs } from './start-up.ts';

function groupOf(uid: string, state: GroupState, fields: Partial<ReplicaGroup> = {}): ReplicaGroup {
  const pods = [{ uid } as ReplicaGroup['pods'][number]];
  return {
    name: uid,
    revision: '',
    index: 0,
    state,
    ready: state === 'ready',
    pods,
    createdMs: 0,
    drainingSinceMs: undefined,
    blocker: undefined,
    failure: undefined,
    load: undefined,
    ...fields,
  };
}

describe('observeStartUps', () => {
  it('measures from creation to ready, weighting the latest most', () => {
    let memory = observeStartUps(noStartUp, [groupOf('a', 'starting')], 1_000);
    memory = observeStartUps(memory, [groupOf('a', 'ready')], 40_000);
    expect(memory.startUpMs).toBe(40_000);
    memory = observeStartUps(memory, [groupOf('b', 'starting', { createdMs: 50_000 })], 50_000);
    memory = observeStartUps(memory, [groupOf('b', 'ready', { createdMs: 50_000 })], 70_000);
    expect(memory.startUpMs).toBe(30_000);
  });

  it('skips groups whose start it has not seen, and those that could not be placed', () => {
    expect(observeStartUps(noStartUp, [groupOf('a', 'ready')], 9_000).startUpMs).toBeUndefined();
    let memory = observeStartUps(noStartUp, [groupOf('a', 'starting', { blocker: 'no room' })], 1_000);
    memory = observeStartUps(memory, [groupOf('a', 'ready')], 3_600_000);
    expect(memory.startUpMs).toBeUndefined();
  });
});

describe('readyInMs', () => {
  it('expects each starting group after its remaining time, and overdue ones at once', () => {
    const groups = [
      groupOf('a', 'starting', { createdMs: 0 }),
      groupOf('b', 'starting', { createdMs: 50_000 }),
      groupOf('c', 'ready'),
    ];
    expect(readyInMs(groups, 30_000, 60_000)).toEqual([0, 20_000]);
  });

  it('does not wait for a group that the dispatcher already reaches', () => {
    const load = { routable: true, draining: false, inFlightRequests: 3, inFlightTokens: 300 };
    expect(readyInMs([groupOf('a', 'starting', { load })], 30_000, 10_000)).toEqual([]);
  });
});
