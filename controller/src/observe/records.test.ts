import { describe, expect, it } from 'vitest';

import { labels, prepareLabels } from '../decide/labels.ts';
import type { KubeObject } from '../kube/resource.ts';
import { podAt, readPod } from './records.ts';

const sinceMs = Date.parse('2026-01-01T00:00:10Z');
/** The kubelet's clock is far behind. */
const kubeletTime = '2025-12-31T23:50:00Z';

/** A pod that lies on a machine and has not been given its volumes. */
function placed(podLabels: Readonly<Record<string, string>>, started: 'True' | 'False'): KubeObject {
  return {
    apiVersion: 'v1',
    kind: 'Pod',
    metadata: {
      name: 'chat-pod',
      namespace: 'n',
      uid: 'u',
      resourceVersion: '1',
      creationTimestamp: '2026-01-01T00:00:00Z',
      generation: 1,
      labels: podLabels,
    },
    status: {
      phase: 'Pending',
      conditions: [
        { type: 'PodScheduled', status: 'True', lastTransitionTime: kubeletTime },
        {
          type: 'PodReadyToStartContainers',
          status: started,
          lastTransitionTime: kubeletTime,
        },
      ],
    },
  };
}

const rankLabels = {
  [labels.service]: 'chat',
  [labels.group]: 'chat-0a1b2c3d-2',
  [labels.revision]: '0a1b2c3d',
  [labels.index]: '2',
  [labels.rank]: '0',
  [labels.groupPods]: '1',
};

describe('a pod waiting for its volumes', () => {
  it('counts as blocked after a minute, with a hint where to look', () => {
    const first = readPod(placed(rankLabels, 'False'), undefined, sinceMs);
    const record = readPod(placed(rankLabels, 'False'), first, sinceMs + 30_000);
    expect(podAt(record, sinceMs + 59_000).rank?.blocker).toBe(undefined);
    expect(podAt(record, sinceMs + 60_000).rank?.blocker).toBe(
      'pod chat-pod has waited for its volumes or its network since 2026-01-01T00:00:10.000Z: ' +
        'kubectl describe pod chat-pod shows the cause',
    );
  });

  it('counts as blocked while it prepares a model, too', () => {
    const record = readPod(
      placed({ [prepareLabels.service]: 'chat', [prepareLabels.hash]: 'cafe' }, 'False'),
      undefined,
      sinceMs,
    );
    expect(podAt(record, sinceMs + 60_000)).toMatchObject({
      rank: undefined,
      prepare: { blocker: expect.stringMatching(/^pod chat-pod has waited/) as string },
    });
  });

  it('no longer counts as blocked once they are mounted', () => {
    const first = readPod(placed(rankLabels, 'False'), undefined, sinceMs);
    const record = readPod(placed(rankLabels, 'True'), first, sinceMs + 30_000);
    expect(podAt(record, sinceMs + 600_000).rank?.blocker).toBe(undefined);
  });
});
