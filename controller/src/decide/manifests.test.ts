import { describe, expect, it } from 'vitest';

import { parseModelService, type ModelService } from '../resources.ts';
import { disruptionBudget, groupPods, rankService } from './manifests.ts';

interface Container {
  readonly name: string;
  readonly image: string;
  readonly env: readonly { readonly name: string; readonly value: string }[];
  readonly ports: readonly { readonly containerPort: number }[];
  readonly resources: { readonly limits: Readonly<Record<string, string>>; readonly requests: unknown };
  readonly securityContext: unknown;
  readonly startupProbe: unknown;
}

interface Pod {
  readonly metadata: { readonly name: string; readonly labels: Readonly<Record<string, string>> };
  readonly spec: {
    readonly hostname: string;
    readonly subdomain: string;
    readonly restartPolicy: string;
    readonly containers: readonly Container[];
    readonly initContainers: readonly { readonly args: readonly string[] }[];
    readonly volumes: readonly { readonly name: string }[];
    readonly securityContext: unknown;
    readonly readinessGates: unknown;
  };
}

function serviceWith(spec: object): ModelService {
  return parseModelService({
    metadata: { name: 'chat', namespace: 'models', uid: 'u' },
    spec: { model: { name: 'mimo', source: { hostPath: '/models/mimo' } }, ...spec },
  });
}

function podsOf(spec: object): readonly Pod[] {
  const identity = { group: 'chat-0a1b2c3d-4', revision: '0a1b2c3d', index: 4, groupToken: 'token' };
  const settings = { image: 'registry.example/worker:1', natsUrl: 'nats://queue:4222' };
  return groupPods(serviceWith(spec), identity, settings) as unknown as readonly Pod[];
}

function variablesOf(container: Container | undefined): Readonly<Record<string, string>> {
  return Object.fromEntries((container?.env ?? []).map(({ name, value }) => [name, value]));
}

describe('groupPods', () => {
  it('puts all ranks into one pod for placement pod, each with ports of its own', () => {
    const pods = podsOf({ tensorParallel: 2 });
    expect(pods.map(({ metadata }) => metadata.name)).toEqual(['chat-0a1b2c3d-4-0']);
    const containers = pods[0]?.spec.containers ?? [];
    expect(containers.map(({ name }) => name)).toEqual(['rank-0', 'rank-1']);
    expect(containers.map(({ ports }) => ports[0]?.containerPort)).toEqual([50_052, 50_053]);
    const peers = '127.0.0.1:50152,127.0.0.1:50153';
    expect(variablesOf(containers[0])).toMatchObject({ MIMO_WORKER_RANK: '0', MIMO_WORKER_PEERS: peers });
    expect(variablesOf(containers[1])).toMatchObject({
      MIMO_WORKER_RANK: '1',
      MIMO_WORKER_PEERS: peers,
      MIMO_WORKER_PEER_LISTEN: '127.0.0.1:50153',
      MIMO_WORKER_LISTEN: '0.0.0.0:50053',
    });
  });

  it('gives each rank a pod and a stable name for placement spread', () => {
    const pods = podsOf({ tensorParallel: 4, placement: 'spread' });
    expect(pods.map(({ metadata }) => metadata.name)).toEqual(
      [0, 1, 2, 3].map((rank) => `chat-0a1b2c3d-4-${rank}`),
    );
    expect(pods.map(({ spec }) => [spec.hostname, spec.subdomain])[2]).toEqual([
      'chat-0a1b2c3d-4-2',
      'chat-ranks',
    ]);
    expect(pods.every(({ metadata }) => metadata.labels['mimo-cluster.dev/group-pods'] === '4')).toBe(true);
    const variables = variablesOf(pods[3]?.spec.containers[0]);
    expect(variables['MIMO_WORKER_RANK']).toBe('3');
    expect(variables['MIMO_WORKER_PEERS']?.split(',')[1]).toBe(
      'chat-0a1b2c3d-4-1.chat-ranks.models.svc:50152',
    );
    expect(variables['MIMO_WORKER_ADVERTISE']).toBe('chat-0a1b2c3d-4-0.chat-ranks.models.svc:50052');
  });

  it('asks for the accelerator by the name of its resource, and for none by default', () => {
    const amd = podsOf({ resources: { accelerators: 2, acceleratorResource: 'amd.com/gpu' } });
    expect(amd[0]?.spec.containers[0]?.resources.limits).toMatchObject({ 'amd.com/gpu': '2', cpu: '4' });
    const cpu = podsOf({});
    expect(Object.keys(cpu[0]?.spec.containers[0]?.resources.limits ?? {})).toEqual(['cpu', 'memory']);
  });

  it('is restricted, and is never started again by the kubelet', () => {
    const [pod] = podsOf({});
    expect(pod?.spec.restartPolicy).toBe('Never');
    expect(pod?.spec.readinessGates).toEqual([{ conditionType: 'mimo-cluster.dev/routable' }]);
    expect(pod?.spec.securityContext).toMatchObject({
      runAsNonRoot: true,
      seccompProfile: { type: 'RuntimeDefault' },
    });
    expect(pod?.spec.containers[0]?.securityContext).toEqual({
      allowPrivilegeEscalation: false,
      readOnlyRootFilesystem: true,
      capabilities: { drop: ['ALL'] },
    });
  });

  it('fetches a hub checkpoint into the cache before the ranks start', () => {
    const hub = { repository: 'XiaomiMiMo/MiMo-7B-RL', revision: 'abc' };
    const [pod] = podsOf({
      model: { name: 'mimo', source: { hub } },
      template: { cacheVolumeClaim: 'shards' },
    });
    const directory = '/cache/checkpoints/XiaomiMiMo/MiMo-7B-RL/abc';
    expect(pod?.spec.initContainers[0]?.args).toEqual([
      'fetch',
      'XiaomiMiMo/MiMo-7B-RL',
      '--revision',
      'abc',
      '--to',
      directory,
    ]);
    expect(variablesOf(pod?.spec.containers[0])['MIMO_WORKER_CHECKPOINT_DIRECTORY']).toBe(directory);
    expect(pod?.spec.volumes).toContainEqual({
      name: 'cache',
      persistentVolumeClaim: { claimName: 'shards' },
    });
  });

  it('lets the template win over the defaults', () => {
    const [pod] = podsOf({
      template: {
        image: 'mine:2',
        env: [{ name: 'MIMO_WORKER_THREADS', value: '8' }],
        labels: { team: 'a' },
      },
    });
    expect(pod?.spec.containers[0]?.image).toBe('mine:2');
    expect(variablesOf(pod?.spec.containers[0])['MIMO_WORKER_THREADS']).toBe('8');
    expect(pod?.metadata.labels['team']).toBe('a');
  });

  it('keeps its own labels whatever the template says', () => {
    const [pod] = podsOf({ template: { labels: { 'mimo-cluster.dev/rank': '9' } } });
    expect(pod?.metadata.labels['mimo-cluster.dev/rank']).toBe('0');
  });
});

describe('the objects beside the pods', () => {
  it('name ranks that are not ready yet', () => {
    expect(rankService(serviceWith({}))).toMatchObject({
      metadata: { name: 'chat-ranks' },
      spec: { clusterIP: 'None', publishNotReadyAddresses: true },
    });
  });

  it('allow one group at a time to be evicted', () => {
    expect(disruptionBudget(serviceWith({}))).toMatchObject({
      spec: { maxUnavailable: 1, selector: { matchLabels: { 'mimo-cluster.dev/service': 'chat' } } },
    });
  });
});
