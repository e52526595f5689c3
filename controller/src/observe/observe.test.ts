import type { QueueState } from '@mimo/core/bus/signals';
import { describe, expect, it } from 'vitest';

import { labels, prepareLabels } from '../decide/labels.ts';
import { observeFailure, observePod, observePreparePod, type ApiPod, type Failure } from './observe.ts';
import { observeLoads } from './queue-loads.ts';

type Status = NonNullable<ApiPod['status']>;
type Container = NonNullable<Status['containerStatuses']>[number];

function rankPod(status: Status, metadata: Partial<ApiPod['metadata']> = {}): ApiPod {
  return {
    metadata: {
      name: 'chat-0a1b2c3d-2-1',
      uid: 'u',
      creationTimestamp: '2026-01-01T00:00:00Z',
      labels: {
        [labels.service]: 'chat',
        [labels.group]: 'chat-0a1b2c3d-2',
        [labels.revision]: '0a1b2c3d',
        [labels.index]: '2',
        [labels.rank]: '1',
        [labels.groupPods]: '2',
      },
      ...metadata,
    },
    status,
  };
}

function ended(name: string, exitCode: number, second: number, more: object = {}): Container {
  const finishedAt = `2026-01-01T00:01:${String(second).padStart(2, '0')}Z`;
  return { name, state: { terminated: { exitCode, finishedAt, ...more } } };
}

const running: Container = { name: 'rank-0', state: {} };

/** A pod as it is read, now or when it was known to have failed. */
function read(pod: ApiPod, before?: Failure): ReturnType<typeof observePod> {
  return observePod(pod, observeFailure(pod, before, 7));
}

describe('observePod', () => {
  it('reads the labels and the readiness gate', () => {
    const pod = rankPod({
      phase: 'Running',
      conditions: [
        { type: 'Ready', status: 'False' },
        { type: 'mimo-cluster.dev/routable', status: 'True' },
      ],
      containerStatuses: [running],
    });
    expect(read(pod)).toEqual({
      name: 'chat-0a1b2c3d-2-1',
      uid: 'u',
      group: 'chat-0a1b2c3d-2',
      revision: '0a1b2c3d',
      index: 2,
      rank: 1,
      groupPods: 2,
      phase: 'Running',
      ready: false,
      deleting: false,
      createdMs: Date.parse('2026-01-01T00:00:00Z'),
      drainingSinceMs: undefined,
      blocker: undefined,
      failure: undefined,
      failedMs: undefined,
      routable: true,
    });
  });

  it('ignores a pod without the labels of a group', () => {
    expect(read(rankPod({}, { labels: {} }))).toBeUndefined();
    expect(read(rankPod({}, { labels: { ...rankPod({}).metadata.labels, [labels.rank]: 'x' } }))).toBe(
      undefined,
    );
  });

  it('counts a pod as ended when one of its ranks has ended, whatever the others do', () => {
    const crashed = rankPod({ phase: 'Running', containerStatuses: [running, ended('rank-1', 137, 1)] });
    expect(read(crashed)?.phase).toBe('Failed');
    const left = rankPod({ phase: 'Running', containerStatuses: [running, ended('rank-1', 0, 1)] });
    expect(read(left)?.phase).toBe('Succeeded');
  });

  const words: readonly (readonly [string, Status, string])[] = [
    [
      'the rank that failed first, not the one that lost it',
      {
        phase: 'Failed',
        containerStatuses: [
          ended('rank-0', 1, 9, { reason: 'Error', message: 'rank 1 is lost' }),
          ended('rank-1', 137, 5, { reason: 'OOMKilled' }),
        ],
      },
      'rank-1: OOMKilled, exit code 137',
    ],
    [
      'the last line of the log',
      { phase: 'Failed', containerStatuses: [ended('rank-0', 1, 1, { message: 'one\n{"a":1}\nboom\n' })] },
      'rank-0: exit code 1: boom',
    ],
    [
      'the container that prepares',
      { phase: 'Pending', initContainerStatuses: [ended('prepare', 3, 1, { message: 'no such model' })] },
      'prepare: exit code 3: no such model',
    ],
    [
      'the kubelet that evicted it',
      { phase: 'Failed', reason: 'Evicted', message: 'The node was low on resource: memory.' },
      'Evicted: The node was low on resource: memory.',
    ],
  ];
  it.each(words)('reports the failure of %s', (_what, status, failure) => {
    expect(read(rankPod(status))).toMatchObject({ phase: 'Failed', failure });
  });

  it('does not count an exit caused by the deletion of the pod as a failure, even if clocks differ', () => {
    const deletion = { deletionTimestamp: '2026-01-01T00:01:30Z' };
    const killed = rankPod({ phase: 'Failed', containerStatuses: [ended('rank-0', 137, 20)] }, deletion);
    expect(read(killed)).toMatchObject({ phase: 'Succeeded', failure: undefined, deleting: true });
    // It was seen to have crashed before, which is why it is deleted.
    const crash = { words: 'rank-0: exit code 137', exitCode: 137, seenMs: 3 };
    expect(read(killed, crash)).toMatchObject({ phase: 'Failed', failure: crash.words, failedMs: 3 });
  });

  it('remembers when it first saw a failure', () => {
    const crashed = rankPod({ phase: 'Running', containerStatuses: [running, ended('rank-1', 137, 1)] });
    const first = observeFailure(crashed, undefined, 7);
    expect(observeFailure(crashed, first, 9)).toMatchObject({ seenMs: 7 });
  });

  const blockers: readonly (readonly [string, Status, string | undefined])[] = [
    [
      'the scheduler',
      {
        phase: 'Pending',
        conditions: [
          {
            type: 'PodScheduled',
            status: 'False',
            reason: 'Unschedulable',
            message: '0/2 nodes are available: 2 Insufficient nvidia.com/gpu.',
          },
        ],
      },
      '0/2 nodes are available: 2 Insufficient nvidia.com/gpu.',
    ],
    [
      'the kubelet about an image',
      {
        phase: 'Pending',
        containerStatuses: [
          { name: 'rank-0', state: { waiting: { reason: 'ImagePullBackOff', message: 'Back-off pulling' } } },
        ],
      },
      'rank-0: ImagePullBackOff: Back-off pulling',
    ],
    [
      'nobody while containers are created',
      {
        phase: 'Pending',
        containerStatuses: [{ name: 'rank-0', state: { waiting: { reason: 'PodInitializing' } } }],
      },
      undefined,
    ],
  ];
  it.each(blockers)('reads from %s why a pod does not start', (_what, status, blocker) => {
    expect(read(rankPod(status))?.blocker).toBe(blocker);
  });
});

describe('observePreparePod', () => {
  it('reads the outcome of the pod', () => {
    const pod: ApiPod = {
      metadata: { name: 'chat-cafe0123-prepare', uid: 'u', labels: { [prepareLabels.hash]: 'cafe0123' } },
      status: {
        phase: 'Failed',
        containerStatuses: [ended('prepare', 3, 7, { reason: 'Error', message: 'prepare: no such model' })],
      },
    };
    expect(observePreparePod(pod, observeFailure(pod, undefined, 7))).toMatchObject({
      modelHash: 'cafe0123',
      phase: 'Failed',
      exitCode: 3,
      failedMs: 7,
      failure: 'prepare: exit code 3: prepare: no such model',
    });
    expect(observePreparePod(rankPod({}), undefined)).toBeUndefined();
  });
});

describe('observeLoads', () => {
  const group = {
    incarnation: '1',
    revision: '',
    identity: 'i',
    draining: false,
    slots: 1,
    inFlightRequests: 1,
    inFlightTokens: 9,
  };
  const state: QueueState = {
    model: 'm',
    dispatcherEpoch: 1,
    waitingFor: [],
    waitingRequests: 0,
    runningRequests: 0,
    parkedRequests: 0,
    waitingTokens: 0,
    inFlightTokens: 0,
    oldestWaitingMs: 0,
    readyGroups: 1,
    slots: 1,
    arrivedTokens: 0,
    endedTokens: 0,
    groups: [
      { group: 'reached', routable: true, ...group },
      { group: 'lost', routable: false, ...group },
    ],
  };

  it('trusts a new dispatcher on reachable groups at once, and on unreachable ones only later', () => {
    const sight = { state, receivedMs: 20_000, dispatcherSinceMs: 18_000 };
    const early = observeLoads(sight, 20_000);
    expect([[...early.loads.keys()], early.loadsComplete]).toEqual([['reached'], false]);
    const late = observeLoads({ ...sight, dispatcherSinceMs: 0 }, 20_000);
    expect([[...late.loads.keys()], late.loadsComplete]).toEqual([['reached', 'lost'], true]);
  });

  it('marks the groups that requests wait for: only if all groups of that identity are full', () => {
    const waitedFor = (more: Partial<QueueState>): (boolean | undefined)[] => {
      const sight = { state: { ...state, ...more }, receivedMs: 0, dispatcherSinceMs: -10_000 };
      return [...observeLoads(sight, 0).loads.values()].map((load) => load.waitedFor);
    };
    const waitingFor = [{ identity: 'i', requests: 1, tokens: 9 }];
    const other = { ...group, group: 'other', identity: 'j', routable: true };
    const groups = [...state.groups, other];
    expect(waitedFor({ waitingFor: [], groups })).toEqual([false, false, false]);
    expect(waitedFor({ waitingFor, groups })).toEqual([true, true, false]);
    const free = { ...group, group: 'free', routable: true, inFlightRequests: 0 };
    expect(waitedFor({ waitingFor, groups: [...groups, free] })).toEqual([false, false, false, false]);
    expect(waitedFor({ waitingFor, groups: [{ ...free, draining: true }] })).toEqual([true]);
    const silent = { ...free, identity: '' };
    expect(waitedFor({ waitingFor: [{ ...waitingFor[0]!, identity: '' }], groups: [silent] })).toEqual([
      false,
    ]);
  });

  it('treats an old state as unknown, not as one without routable groups', () => {
    const old = observeLoads({ state, receivedMs: 0, dispatcherSinceMs: 0 }, 5_001);
    expect([old.loads.size, old.loadsComplete]).toEqual([0, false]);
  });
});
