import { describe, expect, it } from 'vitest';

import { planPodStatus, type PretendPod } from './pretend-nodes.ts';

const now = '2026-01-01T00:00:00Z';
const later = '2026-01-01T00:01:00Z';

function pod(status?: PretendPod['status']): PretendPod {
  return {
    apiVersion: 'v1',
    kind: 'Pod',
    metadata: { name: 'p', namespace: 'n', uid: 'u', resourceVersion: '1', creationTimestamp: now },
    spec: {
      nodeName: 'gpu-0000',
      containers: [{ name: 'main', image: 'i' }],
      readinessGates: [{ conditionType: 'gate' }],
    },
    ...(status === undefined ? {} : { status }),
  };
}

const plan = (given: PretendPod, ending?: { exitCode: number; reason: string }): PretendPod['status'] =>
  planPodStatus(given, { ending, podIP: '198.18.0.1', now: later });

const conditionOf = (status: PretendPod['status'], type: string): object | undefined =>
  status?.conditions?.find((condition) => condition.type === type);

describe('planPodStatus', () => {
  it('reports a pod as Running, and as Ready only when its readiness gates are true', () => {
    const started = plan(pod());
    expect(started).toMatchObject({
      phase: 'Running',
      podIP: '198.18.0.1',
      startTime: later,
      containerStatuses: [{ name: 'main', ready: true, state: { running: { startedAt: later } } }],
    });
    expect(conditionOf(started, 'Ready')).toMatchObject({ status: 'False' });
    const gate = { type: 'gate', status: 'True', lastTransitionTime: now };
    const opened = plan(pod({ ...started, conditions: [...(started?.conditions ?? []), gate] }));
    expect(conditionOf(opened, 'Ready')).toMatchObject({ status: 'True' });
    expect(conditionOf(opened, 'gate')).toEqual(gate);
    expect(plan(pod(opened))).toBeUndefined();
  });

  it('keeps the time of a condition that did not change', () => {
    const scheduled = { type: 'PodScheduled', status: 'True', lastTransitionTime: now };
    expect(conditionOf(plan(pod({ phase: 'Pending', conditions: [scheduled] })), 'PodScheduled')).toEqual(
      scheduled,
    );
  });

  it('ends a pod by its exit code, once', () => {
    const failed = plan(pod(plan(pod())), { exitCode: 137, reason: 'OOMKilled' });
    expect(failed).toMatchObject({
      phase: 'Failed',
      containerStatuses: [{ ready: false, state: { terminated: { exitCode: 137, reason: 'OOMKilled' } } }],
    });
    expect(plan(pod(failed), { exitCode: 137, reason: 'OOMKilled' })).toBeUndefined();
    expect(plan(pod(), { exitCode: 0, reason: 'Completed' })).toMatchObject({ phase: 'Succeeded' });
  });
});
