import { describe, expect, it } from 'vitest';

import { parseModelService, type ModelService } from '../resources/resources.ts';
import type { WorkerSettings } from './containers.ts';
import { disruptionBudget, groupPods, preparePod, rankService } from './manifests.ts';

interface Container {
  readonly name: string;
  readonly image: string;
  readonly imagePullPolicy: string;
  readonly args: readonly string[];
  readonly env: readonly { readonly name: string; readonly value: string; readonly valueFrom?: unknown }[];
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
    readonly initContainers: readonly Container[];
    readonly volumes: readonly { readonly name: string }[];
    readonly securityContext: unknown;
    readonly readinessGates: unknown;
    readonly affinity?: unknown;
    readonly topologySpreadConstraints: readonly { readonly topologyKey: string }[];
  };
}

const settings: WorkerSettings = {
  image: 'registry.example/worker:1',
  cudaImage: 'registry.example/worker:1-cuda',
  imagePullPolicy: 'IfNotPresent',
  natsUrl: 'nats://queue:4222',
  cache: { kind: 'pod' },
};

function serviceWith(spec: object): ModelService {
  return parseModelService({
    metadata: { name: 'chat', namespace: 'models', uid: 'u' },
    spec: { model: { name: 'mimo', source: { hostPath: '/models/mimo' } }, ...spec },
  });
}

function podsOf(spec: object): readonly Pod[] {
  const identity = {
    group: 'chat-0a1b2c3d-4',
    revision: '0a1b2c3d',
    index: 4,
    groupToken: 'token',
    life: 'life',
  };
  return groupPods(serviceWith(spec), identity, settings) as unknown as readonly Pod[];
}

function variablesOf(container: Container | undefined): Readonly<Record<string, string>> {
  return Object.fromEntries((container?.env ?? []).map(({ name, value }) => [name, value]));
}

function topologyKeysOf(pod: Pod | undefined): readonly string[] | undefined {
  return pod?.spec.topologySpreadConstraints.map(({ topologyKey }) => topologyKey);
}

function cacheVolumeOf(cache: WorkerSettings['cache'], template: object): unknown {
  const pod = preparePod(serviceWith({ template }), 'cafe0123', { ...settings, cache }) as unknown as Pod;
  return pod.spec.volumes.find(({ name }) => name === 'cache');
}

describe('groupPods', () => {
  it('puts all ranks into one pod for placement pod, each with its own ports', () => {
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
    expect(variables['MIMO_WORKER_ADVERTISE']).toBe('$(POD_IP):50052');
    expect(pods[3]?.spec.containers[0]?.env[0]?.name).toBe('POD_IP');
  });

  it('prefers one zone for the ranks of a spread group, and different machines for its groups', () => {
    const [leader, follower] = podsOf({ tensorParallel: 2, placement: 'spread' });
    expect(leader?.spec.affinity).toMatchObject({
      podAffinity: {
        preferredDuringSchedulingIgnoredDuringExecution: [
          {
            podAffinityTerm: {
              topologyKey: 'topology.kubernetes.io/zone',
              labelSelector: { matchLabels: { 'mimo-cluster.dev/group': 'chat-0a1b2c3d-4' } },
            },
          },
        ],
      },
    });
    expect(topologyKeysOf(leader)).toEqual(['kubernetes.io/hostname', 'topology.kubernetes.io/zone']);
    expect(topologyKeysOf(follower)).toEqual(['kubernetes.io/hostname']);
    expect(podsOf({ tensorParallel: 2 })[0]?.spec.affinity).toBeUndefined();
  });

  it('serves metrics on the leader alone', () => {
    const [pod] = podsOf({ tensorParallel: 2 });
    const listening = pod?.spec.containers.map((rank) => variablesOf(rank)['MIMO_WORKER_METRICS_LISTEN']);
    expect(listening).toEqual(['0.0.0.0:9464', undefined]);
    expect(pod?.spec.containers[0]?.ports.map(({ containerPort }) => containerPort)).toContain(9464);
  });

  it('derives threads, KV memory and the device from the resources', () => {
    const rankOf = (spec: object): Readonly<Record<string, string>> =>
      variablesOf(podsOf(spec)[0]?.spec.containers[0]);
    expect(rankOf({ resources: { cpu: '500m' } })).toMatchObject({
      MIMO_WORKER_THREADS: '1',
      MIMO_WORKER_EXECUTION_PROVIDER: 'cpu',
    });
    expect(rankOf({ resources: { cpu: '6.5', kvCache: '2Gi' } })).toMatchObject({
      MIMO_WORKER_THREADS: '6',
      MIMO_WORKER_KV_BYTES: '2147483648',
    });
    const model = { name: 'mimo', source: { hostPath: '/models/mimo' }, precision: 'bf16' };
    const cuda = podsOf({ model, resources: { accelerators: 1 } })[0]?.spec.containers[0];
    expect(variablesOf(cuda)['MIMO_WORKER_EXECUTION_PROVIDER']).toBe('cuda');
    expect(cuda?.image).toBe('registry.example/worker:1-cuda');
    expect(rankOf({})).not.toHaveProperty('MIMO_WORKER_KV_BYTES');
  });

  it('passes on the speculation settings', () => {
    const variables = variablesOf(
      podsOf({ speculation: { draftTokens: 0, adaptive: false } })[0]?.spec.containers[0],
    );
    expect(variables).toMatchObject({
      MIMO_WORKER_DRAFT_TOKENS: '0',
      MIMO_WORKER_ADAPTIVE_SPECULATION: 'false',
    });
  });

  it('requests the accelerator by its resource name, and none by default', () => {
    const model = { name: 'mimo', source: { hostPath: '/models/mimo' }, precision: 'fp16' };
    const amd = podsOf({ model, resources: { accelerators: 2, acceleratorResource: 'amd.com/gpu' } });
    expect(amd[0]?.spec.containers[0]?.resources.limits).toMatchObject({ 'amd.com/gpu': '2', cpu: '4' });
    const cpu = podsOf({});
    expect(Object.keys(cpu[0]?.spec.containers[0]?.resources.limits ?? {})).toEqual(['cpu', 'memory']);
  });

  it('meets the restricted pod security standard, and is never restarted by the kubelet', () => {
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

  it('prepares the shards in the cache before the ranks start', () => {
    const hub = { repository: 'XiaomiMiMo/MiMo-7B-RL', revision: 'abc', tokenSecret: { name: 'hub' } };
    const [pod] = podsOf({
      model: { name: 'mimo', source: { hub } },
      template: { cacheVolumeClaim: 'shards' },
    });
    const [prepare] = pod?.spec.initContainers ?? [];
    expect(prepare?.args).toEqual(['prepare', '--compile']);
    expect(variablesOf(prepare)).toMatchObject({
      MIMO_WORKER_HUB_REPOSITORY: 'XiaomiMiMo/MiMo-7B-RL',
      MIMO_WORKER_HUB_REVISION: 'abc',
    });
    expect(prepare?.env).toContainEqual({
      name: 'HF_TOKEN',
      valueFrom: { secretKeyRef: { name: 'hub', key: 'token' } },
    });
    const directory = '/cache/checkpoints/XiaomiMiMo/MiMo-7B-RL/abc';
    expect(variablesOf(pod?.spec.containers[0])['MIMO_WORKER_CHECKPOINT_DIRECTORY']).toBe(directory);
    expect(pod?.spec.volumes).toContainEqual({
      name: 'cache',
      persistentVolumeClaim: { claimName: 'shards' },
    });
  });

  it("prefers the service's cache claim to the controller's setting, and that to the pod's own volume", () => {
    const hostPath = { kind: 'hostPath', path: '/var/cache/mimo' } as const;
    expect(cacheVolumeOf(hostPath, { cacheVolumeClaim: 'mine' })).toMatchObject({
      persistentVolumeClaim: { claimName: 'mine' },
    });
    expect(cacheVolumeOf(hostPath, {})).toMatchObject({ hostPath: { path: '/var/cache/mimo' } });
    expect(cacheVolumeOf({ kind: 'pod' }, {})).toMatchObject({ emptyDir: {} });
  });

  it('prefers the template to the defaults', () => {
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

  it('keeps its own labels even if the template sets them', () => {
    const [pod] = podsOf({ template: { labels: { 'mimo-cluster.dev/rank': '9' } } });
    expect(pod?.metadata.labels['mimo-cluster.dev/rank']).toBe('0');
  });
});

describe('the objects beside the pods', () => {
  it('resolve ranks that are not ready yet', () => {
    expect(rankService(serviceWith({}))).toMatchObject({
      metadata: { name: 'chat-ranks' },
      spec: { clusterIP: 'None', publishNotReadyAddresses: true },
    });
  });

  it('prepare and publish the model, without counting as a rank', () => {
    const pod = preparePod(serviceWith({ tensorParallel: 2 }), 'cafe0123', {
      ...settings,
      cache: { kind: 'claim', claimName: 'shards' },
    }) as unknown as Pod;
    expect(pod.metadata.name).toBe('chat-cafe0123-prepare');
    expect(pod.metadata.labels).not.toHaveProperty('mimo-cluster.dev/service');
    expect(pod.spec.containers[0]?.args).toEqual(['prepare', '--publish', '--compile']);
    const alone = preparePod(serviceWith({}), 'cafe0123', settings) as unknown as Pod;
    expect(alone.spec.containers[0]?.args).toEqual(['prepare', '--publish']);
  });

  it('protect as many pods from eviction as given', () => {
    expect(disruptionBudget(serviceWith({}), 3)).toMatchObject({
      spec: { minAvailable: 3, selector: { matchLabels: { 'mimo-cluster.dev/service': 'chat' } } },
    });
  });
});

describe('pod settings of the configuration', () => {
  const configured: WorkerSettings = {
    ...settings,
    podDefaults: {
      serviceAccountName: 'worker',
      imagePullSecrets: ['pull', 'own'],
      accelerated: {
        runtimeClassName: 'nvidia',
        nodeSelector: { pool: 'gpu', zone: 'a' },
        tolerations: [{ key: 'nvidia.com/gpu', operator: 'Exists', effect: 'NoSchedule' }],
      },
    },
  };
  const gpu = { model: { name: 'm', precision: 'bf16', source: { hostPath: '/m' } } };
  const specOf = (spec: object): Readonly<Record<string, unknown>> => {
    const { spec: pod } = preparePod(serviceWith(spec), 'hash', configured);
    return pod as Readonly<Record<string, unknown>>;
  };

  it('set account and registries for all pods, and placement for those with accelerators', () => {
    const accelerated = specOf({ ...gpu, resources: { accelerators: 1 } });
    expect(accelerated).toMatchObject({
      serviceAccountName: 'worker',
      imagePullSecrets: [{ name: 'pull' }, { name: 'own' }],
      runtimeClassName: 'nvidia',
      nodeSelector: { pool: 'gpu', zone: 'a' },
    });
    expect(accelerated['tolerations']).toContainEqual(configured.podDefaults?.accelerated.tolerations[0]);
    const plain = specOf({});
    expect(plain).toMatchObject({ serviceAccountName: 'worker', nodeSelector: {} });
    expect(plain).not.toHaveProperty('runtimeClassName');
    expect(JSON.stringify(plain['tolerations'])).not.toContain('nvidia');
  });

  it('tolerate a lost machine for as long as the template sets, else half a minute', () => {
    const unreachable = { key: 'node.kubernetes.io/unreachable', operator: 'Exists', effect: 'NoExecute' };
    const own = { ...unreachable, tolerationSeconds: 300 };
    const notReady = { ...unreachable, key: 'node.kubernetes.io/not-ready', tolerationSeconds: 30 };
    expect(specOf({})['tolerations']).toEqual([notReady, { ...unreachable, tolerationSeconds: 30 }]);
    expect(specOf({ template: { tolerations: [own] } })['tolerations']).toEqual([own, notReady]);
    const everything = { operator: 'Exists' };
    expect(specOf({ template: { tolerations: [everything] } })['tolerations']).toEqual([everything]);
    const scheduled = { ...unreachable, effect: 'NoSchedule' };
    expect(specOf({ template: { tolerations: [scheduled] } })['tolerations']).toHaveLength(3);
  });

  it("mount the queue's credentials into every container", () => {
    const pod = preparePod(serviceWith({}), 'hash', { ...configured, natsCredentialsSecret: 'queue' });
    const { volumes, containers } = pod['spec'] as {
      readonly volumes: readonly object[];
      readonly containers: readonly {
        readonly env: readonly object[];
        readonly volumeMounts: readonly object[];
      }[];
    };
    expect(volumes).toContainEqual({
      name: 'nats-credentials',
      secret: { secretName: 'queue', defaultMode: 0o440 },
    });
    for (const { env, volumeMounts } of containers) {
      expect(env).toContainEqual({
        name: 'MIMO_WORKER_NATS_CREDENTIALS_FILE',
        value: '/etc/mimo/nats/credentials',
      });
      expect(volumeMounts).toContainEqual({
        name: 'nats-credentials',
        mountPath: '/etc/mimo/nats',
        readOnly: true,
      });
    }
    expect(JSON.stringify(specOf({}))).not.toContain('nats-credentials');
  });

  it('yield to the settings of the service', () => {
    const template = {
      serviceAccountName: 'mine',
      runtimeClassName: 'kata',
      nodeSelector: { zone: 'b' },
      imagePullSecrets: [{ name: 'own' }],
    };
    expect(specOf({ ...gpu, resources: { accelerators: 1 }, template })).toMatchObject({
      serviceAccountName: 'mine',
      runtimeClassName: 'kata',
      nodeSelector: { pool: 'gpu', zone: 'b' },
      imagePullSecrets: [{ name: 'own' }, { name: 'pull' }],
    });
  });
});
