// The chart as the real helm renders it: what is refused and by which field, what our processes make of the environment
// they get, what the NATS server makes of its configuration. No cluster.

import { parseControllerConfig, workerSettingsOf } from '@mimo/controller/config';
import { parseGatewayConfig } from '@mimo/gateway/config';
import { beforeAll, describe, expect, it } from 'vitest';

import {
  chartDirectory,
  environmentOf,
  objectOf,
  podsOf,
  renderChart,
  runHelm,
  type KubernetesObject,
  type PodTemplate,
  type Values,
} from '../harness/kubernetes/helm.ts';
import { findTools } from '../harness/kubernetes/tools.ts';
import { checkNatsConfig } from '../harness/nats.ts';

const sha256 = 'a'.repeat(64);
let helm: string;

beforeAll(async () => {
  ({ helm } = await findTools());
});

/** What a platform team may choose, from nothing to everything. */
const choices: readonly (readonly [name: string, values: Values])[] = [
  ['the defaults', {}],
  ['one machine', { nats: { replicas: 1 }, gateway: { replicas: 1 }, controller: { replicas: 1 } }],
  [
    'external NATS',
    { nats: { enabled: false, externalUrls: ['nats://queue.infra.svc', 'tls://b.example.com:4223'] } },
  ],
  [
    'GPUs',
    {
      accelerators: { runtimeClassName: 'nvidia', nodeSelector: { pool: 'gpu' } },
      modelServices: [
        {
          name: 'big',
          spec: {
            model: { name: 'big', source: { hub: { repository: 'a/b' } } },
            resources: { accelerators: 1 },
          },
        },
      ],
    },
  ],
  ['a shared cache', { modelCache: { type: 'pvc', pvc: { storageClassName: 'shared', size: '1Ti' } } }],
  ['a cache that is there', { modelCache: { type: 'pvc', pvc: { existingClaim: 'models' } } }],
  ['a cache on each machine', { modelCache: { type: 'hostPath' } }],
  [
    'tenants',
    {
      tenants: [
        { name: 'alpha', apiKeySha256: [sha256, 'b'.repeat(64)], weight: 10, limits: { maxInFlight: 3 } },
        { name: 'beta', existingSecrets: [{ name: 'their-key', key: 'hash' }, { name: 'other' }] },
      ],
    },
  ],
  ['an open door', { gateway: { authentication: 'none', service: { type: 'LoadBalancer' } } }],
  [
    'everything on',
    {
      images: {
        registry: 'registry.example.com/mimo',
        pullSecrets: ['pull'],
        gateway: { digest: `sha256:${sha256}` },
      },
      gateway: {
        autoscaling: { enabled: true },
        spread: 'required',
        models: [{ name: 'org/local', claimName: 'tokenizer', path: 'mimo/7b' }],
        env: { MIMO_GATEWAY_MAX_REQUESTS: 5000, NODE_OPTIONS: '--max-old-space-size=1500' },
        affinity: { nodeAffinity: {} },
        priorityClassName: 'high',
        podLabels: { team: 'serving' },
        podAnnotations: { note: 'x' },
      },
      nats: { replicas: 5, spread: 'required', storage: { keepOnUninstall: true } },
      networkPolicy: { apiServerCidrs: ['10.0.0.1/32'], hub: { cidrs: ['10.0.0.2/32'] } },
      serviceMonitor: { enabled: true, labels: { release: 'prometheus' } },
      prometheusRule: { enabled: true, disabledAlerts: ['MimoQueueDeep'] },
      dashboards: { enabled: true },
      tests: { apiKeySecret: { name: 'key-of-test' } },
    },
  ],
  [
    'everything off',
    {
      gateway: { service: { headless: false } },
      nats: { podDisruptionBudget: { enabled: false }, networkPolicy: { enabled: false } },
      podDisruptionBudget: { enabled: false },
      networkPolicy: { enabled: false },
    },
  ],
];

/** What the stream of requests may hold, by the gateway. */
async function maxBytesOf(values: Values): Promise<number> {
  const objects = await renderChart(helm, values);
  const [gateway] = podsOf([objectOf(objects, 'Deployment', 'mimo-mimo-cluster-gateway')]);
  return parseGatewayConfig(environmentOf(gateway?.spec.containers[0] ?? { name: '', image: '' }))
    .queueMaxBytes;
}

/** How the chart has NATS encrypt its disk. */
async function encryptionOf(
  values: Values,
): Promise<{ readonly key: string | undefined; readonly secret: unknown; readonly conf: boolean }> {
  const objects = await renderChart(helm, { nats: { encryption: values } });
  const secret = objects.find(
    ({ kind, metadata }) => kind === 'Secret' && metadata.name === 'mimo-nats-encryption',
  );
  const [pod] = podsOf([objectOf(objects, 'StatefulSet', 'mimo-nats')]);
  const { env } = (pod?.spec.containers[0] ?? {}) as {
    env?: { name: string; valueFrom?: { secretKeyRef?: unknown } }[];
  };
  const config = objectOf(objects, 'ConfigMap', 'mimo-nats')['data'] as Record<string, string>;
  return {
    key: (secret?.['data'] as Record<string, string> | undefined)?.['key'],
    secret: env?.find(({ name }) => name === 'JETSTREAM_KEY')?.valueFrom?.secretKeyRef,
    conf: config['nats.conf']?.includes('cipher: "chachapoly"') === true,
  };
}

describe('helm lint --strict', () => {
  it.each(choices)('is content with %s', async (_name, values) => {
    expect(await runHelm(helm, ['lint', '--strict', chartDirectory], { values })).toContain(
      '0 chart(s) failed',
    );
  });
});

describe.each(choices)('rendered with %s', (_name, values) => {
  let objects: readonly KubernetesObject[];
  let pods: readonly PodTemplate[];

  beforeAll(async () => {
    objects = await renderChart(helm, values);
    pods = podsOf(objects);
  });

  it('every object is in the namespace of the release, once, and says whose it is', () => {
    const names = objects.map(({ kind, metadata }) => `${kind}/${metadata.name}`);
    expect(names.filter((name, index) => names.indexOf(name) !== index)).toEqual([]);
    for (const { metadata } of objects) {
      expect(metadata.namespace).toBe('serving');
      expect(metadata.labels).toMatchObject({
        'app.kubernetes.io/part-of': 'mimo-cluster',
        'app.kubernetes.io/managed-by': 'Helm',
        'app.kubernetes.io/instance': 'mimo',
      });
    }
  });

  it('Services, budgets, spreads and monitors select pods that there are', () => {
    const selectors = objects.flatMap(({ kind, metadata, spec }) => {
      const { selector } = (spec ?? {}) as { selector?: { matchLabels?: object } };
      return selector === undefined
        ? []
        : [{ what: `${kind}/${metadata.name}`, labels: selector.matchLabels ?? selector }];
    });
    expect(selectors.length).toBeGreaterThan(3);
    for (const { what, labels } of selectors) {
      const isOfController = what.startsWith('PodMonitor/');
      const selected = (
        what.startsWith('ServiceMonitor/')
          ? objects.filter(({ kind }) => kind === 'Service').map(({ metadata }) => metadata.labels ?? {})
          : pods.map((pod) => pod.labels)
      ).filter((own) => Object.entries(labels).every(([key, value]) => own[key] === value));
      expect([what, isOfController || selected.length > 0]).toEqual([what, true]);
    }
  });

  it('every container is restricted, has requests and a memory limit, and a pinned image', () => {
    expect(pods.length).toBeGreaterThan(2);
    for (const { spec } of pods) {
      expect(spec).toMatchObject({
        enableServiceLinks: false,
        securityContext: { runAsNonRoot: true, seccompProfile: { type: 'RuntimeDefault' } },
      });
      for (const container of spec.containers) {
        expect(container).toMatchObject({
          terminationMessagePolicy: 'FallbackToLogsOnError',
          securityContext: {
            allowPrivilegeEscalation: false,
            readOnlyRootFilesystem: true,
            capabilities: { drop: ['ALL'] },
          },
          resources: {
            requests: { cpu: expect.anything(), memory: expect.anything() },
            limits: { memory: expect.anything() },
          },
        });
        expect(container.image).toMatch(/(:[\w.-]+|@sha256:[0-9a-f]{64})$/);
        expect(container.image).not.toContain(':latest');
      }
    }
  });

  it('only the controller and the uninstall have a token', () => {
    const withToken = pods.filter(({ spec }) => spec['automountServiceAccountToken'] !== false);
    expect(withToken.map(({ owner }) => owner)).toEqual([
      'Deployment/mimo-mimo-cluster-controller',
      'Job/mimo-mimo-cluster-uninstall',
    ]);
  });

  it('the controller reads its environment', async () => {
    expect(await controllerConfig(values)).toMatchObject({
      leaseName: 'mimo-controller',
      tenantSecret: 'mimo-mimo-cluster-tenant-keys',
      listen: '0.0.0.0:9465',
    });
  });

  it('the gateway reads its environment', () => {
    const [gateway] = podsOf([objectOf(objects, 'Deployment', 'mimo-mimo-cluster-gateway')]);
    const env = environmentOf(gateway?.spec.containers[0] ?? { name: '', image: '' });
    const config = parseGatewayConfig(env);
    expect(config.listenAddress).toBe('0.0.0.0:50051');
    expect(config.keysFile === '').toBe(!config.keysFileOptional);
    // The pod lives longer than the process needs to end its streams.
    const graceMs = Number(gateway?.spec['terminationGracePeriodSeconds']) * 1_000;
    expect(graceMs).toBeGreaterThan(config.graceMs + 10_000);
  });
});

/** What the controller makes of the environment that the chart gives it. */
async function controllerConfig(values: Values): Promise<ReturnType<typeof parseControllerConfig>> {
  const objects = await renderChart(helm, values);
  const [pod] = podsOf([objectOf(objects, 'Deployment', 'mimo-mimo-cluster-controller')]);
  return parseControllerConfig(environmentOf(pod?.spec.containers[0] ?? { name: '', image: '' }));
}

describe('what is refused', () => {
  const refusals: readonly (readonly [Values, RegExp])[] = [
    [{ gatway: {} }, /additional properties 'gatway' not allowed/],
    [{ gateway: { replica: 2 } }, /at '\/gateway': additional properties 'replica' not allowed/],
    [{ gateway: { replicas: 0 } }, /at '\/gateway\/replicas': minimum: got 0, want 1/],
    [{ gateway: { replicas: '2' } }, /at '\/gateway\/replicas': got string, want integer/],
    [{ gateway: { authentication: 'no' } }, /at '\/gateway\/authentication': value must be one of/],
    [{ gateway: { maxWait: '10 minutes' } }, /at '\/gateway\/maxWait': .*pattern/],
    [
      { gateway: { env: { MIMO_WORKER_RANK: '0' } } },
      /at '\/gateway\/env': additional properties 'MIMO_WORKER_RANK' not allowed/,
    ],
    [{ gateway: { models: [{ name: 'a' }] } }, /at '\/gateway\/models\/0': missing property 'claimName'/],
    [{ gateway: { models: [{ name: 'a', claimName: 'c', path: '/x' }] } }, /gateway\/models\/0\/path/],
    [{ gateway: { service: { loadBalancerSourceRanges: ['10.0.0.0/8'] } } }, /loadBalancerSourceRanges/],
    [
      { gateway: { podLabels: { 'app.kubernetes.io/name': 'x' } } },
      /at '\/gateway\/podLabels\/app\.kubernetes\.io~1name'/,
    ],
    [{ gateway: { resources: { limits: { memory: 'lots' } } } }, /\/gateway\/resources\/limits\/memory/],
    [{ gateway: { tolerations: [{ operator: 'Is' }] } }, /at '\/gateway\/tolerations\/0\/operator'/],
    [
      { gateway: { autoscaling: { enabled: true, minReplicas: 9 } } },
      /gateway\.autoscaling\.minReplicas \(9\) must not be more than maxReplicas \(6\)/,
    ],
    [
      { gateway: { authentication: 'none' }, tenants: [{ name: 'a', apiKeySha256: [sha256] }] },
      /'\/tenants'/,
    ],
    [{ controller: { replicas: 9 } }, /at '\/controller\/replicas': maximum/],
    [{ controller: { spread: 'hard' } }, /at '\/controller\/spread'/],
    [{ images: { gateway: { tag: 'a b' } } }, /at '\/images\/gateway\/tag'/],
    [{ images: { worker: { digest: 'sha256:12' } } }, /at '\/images\/worker\/digest'/],
    [{ images: { worker: { pullPolicy: 'Sometimes' } } }, /at '\/images\/worker\/pullPolicy'/],
    [{ images: { pullSecrets: [{ name: 'pull' }] } }, /at '\/images\/pullSecrets\/0': got object/],
    [{ accelerators: { resourceName: 'gpu' } }, /at '\/accelerators\/resourceName'/],
    [
      { accelerators: { tolerations: [{ operator: 'Exists' }] } },
      /at '\/accelerators\/tolerations\/0': missing property 'key'/,
    ],
    [{ modelCache: { type: 'nfs' } }, /at '\/modelCache\/type'/],
    [{ modelCache: { pvc: { size: 100 } } }, /at '\/modelCache\/pvc\/size': got number, want string/],
    [{ modelCache: { hostPath: { path: 'var' } } }, /at '\/modelCache\/hostPath\/path'/],
    [{ nats: { replicas: 2 } }, /at '\/nats\/replicas'/],
    [{ nats: { replica: 3 } }, /nats:\n- at '': additional properties 'replica' not allowed/],
    [{ nats: { storage: { size: '8GB' } } }, /nats:\n- at '\/storage\/size'/],
    [{ nats: { enabled: false } }, /at '\/nats\/externalUrls': minItems/],
    [{ nats: { externalUrls: ['nats://a:4222'] } }, /at '\/nats\/externalUrls': maxItems/],
    [{ nats: { enabled: false, externalUrls: ['http://a'] } }, /at '\/nats\/externalUrls\/0'/],
    [{ nats: { credentialsSecret: 'queue' } }, /at '\/nats\/credentialsSecret'/],
    // Values are no place for a password.
    [{ nats: { enabled: false, externalUrls: ['nats://u:p@a'] } }, /at '\/nats\/externalUrls\/0'/],
    [{ tenants: [{ name: 'a' }] }, /at '\/tenants\/0': missing property 'apiKeySha256'/],
    [{ tenants: [{ name: 'a', apiKey: 'secret' }] }, /additional properties 'apiKey' not allowed/],
    [{ tenants: [{ name: 'a', apiKeySha256: ['secret'] }] }, /at '\/tenants\/0\/apiKeySha256\/0'/],
    [{ tenants: [{ name: 'A', apiKeySha256: [sha256] }] }, /at '\/tenants\/0\/name'/],
    [
      { tenants: [1, 2].map(() => ({ name: 'a', apiKeySha256: [sha256] })) },
      /tenants: the name "a" is there twice/,
    ],
    [{ modelServices: [{ name: 'a', spec: {} }] }, /at '\/modelServices\/0\/spec': missing property 'model'/],
    [{ networkPolicy: { clientPeers: [{}] } }, /at '\/networkPolicy\/clientPeers\/0': minProperties/],
    [{ networkPolicy: { apiServerCidrs: ['10.0.0.1'] } }, /at '\/networkPolicy\/apiServerCidrs\/0'/],
    [{ networkPolicy: { apiServerPorts: [] } }, /at '\/networkPolicy\/apiServerPorts': minItems/],
    [{ prometheusRule: { disabledAlerts: ['mine'] } }, /at '\/prometheusRule\/disabledAlerts\/0'/],
    [{ serviceMonitor: { interval: '15' } }, /at '\/serviceMonitor\/interval'/],
  ];

  it.each(refusals)('%j', async (values, words) => {
    await expect(renderChart(helm, values)).rejects.toThrow(words);
  });

  it('a cluster that is too old', async () => {
    await expect(renderChart(helm, {}, ['--kube-version', '1.29.0'])).rejects.toThrow(
      /requires kubeVersion: >=1\.30/,
    );
  });
});

async function countAlerts(disabledAlerts: readonly string[]): Promise<number> {
  const objects = await renderChart(helm, { prometheusRule: { enabled: true, disabledAlerts } });
  const { spec } = objectOf(objects, 'PrometheusRule', 'mimo-mimo-cluster');
  const { groups } = spec as { groups: { rules: { alert: string }[] }[] };
  return groups.flatMap(({ rules }) => rules).length;
}

/** The arguments of the pod of `helm test`. */
async function testArgs(values: Values): Promise<unknown> {
  const [pod] = podsOf([objectOf(await renderChart(helm, values), 'Pod', 'mimo-mimo-cluster-test-gateway')]);
  return pod?.spec.containers[0]?.['args'];
}

describe('the values reach their objects', () => {
  it('images: registry, tag, digest, the CUDA image', async () => {
    const objects = await renderChart(helm, {
      images: {
        registry: 'r.example.com',
        gateway: { tag: 'v9' },
        controller: { digest: `sha256:${sha256}` },
      },
    });
    const images = podsOf(objects).flatMap(({ spec }) => spec.containers.map(({ image }) => image));
    expect(new Set(images)).toEqual(
      new Set([
        'r.example.com/mimo-cluster/gateway:v9',
        `r.example.com/mimo-cluster/controller@sha256:${sha256}`,
        expect.stringMatching(/^docker\.io\/library\/nats:/),
      ]),
    );
    expect(await controllerConfig({ images: { registry: 'r.example.com' } })).toMatchObject({
      workerImage: 'r.example.com/mimo-cluster/worker:0.1.0',
      workerCudaImage: 'r.example.com/mimo-cluster/worker-cuda:0.1.0',
    });
    expect(await controllerConfig({ images: { workerCuda: { repository: '' } } })).toMatchObject({
      workerCudaImage: '',
    });
  });

  it('worker pods: account, registries, cache, accelerators', async () => {
    const settings = workerSettingsOf(
      await controllerConfig({
        images: { pullSecrets: ['a', 'b'] },
        modelCache: { type: 'pvc' },
        accelerators: {
          runtimeClassName: 'nvidia',
          nodeSelector: { pool: 'gpu', 'example.com/class': 'h100' },
          tolerations: [
            { key: 'nvidia.com/gpu', operator: 'Exists', effect: 'NoSchedule' },
            { key: 'pool', operator: 'Equal', value: 'gpu' },
          ],
        },
      }),
    );
    expect(settings).toMatchObject({
      natsUrl: 'nats://mimo-nats.serving.svc:4222',
      cache: { kind: 'claim', claimName: 'mimo-mimo-cluster-model-cache' },
      podDefaults: {
        serviceAccountName: 'mimo-mimo-cluster-worker',
        imagePullSecrets: ['a', 'b'],
        accelerated: {
          runtimeClassName: 'nvidia',
          nodeSelector: { pool: 'gpu', 'example.com/class': 'h100' },
          tolerations: [
            { key: 'nvidia.com/gpu', operator: 'Exists', effect: 'NoSchedule' },
            { key: 'pool', operator: 'Equal', value: 'gpu' },
          ],
        },
      },
    });
    const host = await controllerConfig({ modelCache: { type: 'hostPath', hostPath: { path: '/models' } } });
    expect(workerSettingsOf(host).cache).toEqual({ kind: 'hostPath', path: '/models' });
  });

  it('the queue: streams have up to three replicas, whoever makes them first', async () => {
    for (const [replicas, ofStreams] of [
      [1, 1],
      [3, 3],
      [5, 3],
    ] as const) {
      const values = { nats: { replicas } };
      const [gateway] = podsOf([
        objectOf(await renderChart(helm, values), 'Deployment', 'mimo-mimo-cluster-gateway'),
      ]);
      const env = environmentOf(gateway?.spec.containers[0] ?? { name: '', image: '' });
      expect(parseGatewayConfig(env).natsReplicas).toBe(ofStreams);
      expect((await controllerConfig(values)).natsReplicas).toBe(ofStreams);
    }
  });

  it('the queue: requests may take 40 % of the volume, and of external servers what the default is', async () => {
    expect(await maxBytesOf({})).toBe(3_276 * 2 ** 20);
    expect(await maxBytesOf({ nats: { storage: { size: '500Mi' } } })).toBe(200 * 2 ** 20);
    expect(await maxBytesOf({ nats: { storage: { size: '2Ti' } } })).toBe(838_860 * 2 ** 20);
    expect(await maxBytesOf(Object.fromEntries(choices)['external NATS'] ?? {})).toBe(2 ** 30);
  });

  it('the queue: its disk is encrypted with a key of its own, of a Secret of yours, or not at all', async () => {
    const [one, other] = [await encryptionOf({}), await encryptionOf({})];
    expect(one).toMatchObject({ secret: { name: 'mimo-nats-encryption', key: 'key' }, conf: true });
    expect(Buffer.from(one.key ?? '', 'base64').toString()).toMatch(/^k[A-Za-z0-9]{47}$/);
    expect(one.key).not.toBe(other.key);
    expect(await encryptionOf({ existingSecret: 'mine' })).toEqual({
      key: undefined,
      secret: { name: 'mine', key: 'key' },
      conf: true,
    });
    expect(await encryptionOf({ enabled: false })).toEqual({
      key: undefined,
      secret: undefined,
      conf: false,
    });
  });

  it('tenants: hashes go to Secrets of their own, the shared one stays empty', async () => {
    const objects = await renderChart(helm, Object.fromEntries(choices)['tenants']);
    expect(objectOf(objects, 'Secret', 'mimo-mimo-cluster-tenant-keys')).not.toHaveProperty('data');
    expect(objectOf(objects, 'Secret', 'mimo-mimo-cluster-tenant-alpha')).toMatchObject({
      stringData: { 'key-0': sha256, 'key-1': 'b'.repeat(64) },
    });
    expect(objectOf(objects, 'Tenant', 'alpha')).toMatchObject({
      spec: {
        apiKeys: [0, 1].map((index) => ({
          secretName: 'mimo-mimo-cluster-tenant-alpha',
          key: `key-${index}`,
        })),
        weight: 10,
        limits: { maxInFlight: 3 },
      },
    });
    expect(objectOf(objects, 'Tenant', 'beta')).toMatchObject({
      spec: {
        apiKeys: [
          { secretName: 'their-key', key: 'hash' },
          { secretName: 'other', key: 'apiKey' },
        ],
      },
    });
  });

  it('names that YAML takes for something else', async () => {
    const output = await runHelm(helm, ['template', '1e3', chartDirectory, '--namespace', 'off'], {
      values: {
        fullnameOverride: 'yes',
        tenants: [{ name: '0', existingSecrets: [{ name: 'null', key: '1' }] }],
      },
    });
    expect(output).not.toMatch(/(name|namespace|instance|secretName|key): (yes|off|null|1e3|[01])$/im);
    expect(output).toMatch(/instance: "1e3"$/m);
  });

  it('credentials of external servers: a directory in gateways and controllers, a name for workers', async () => {
    const values = { nats: { enabled: false, externalUrls: ['tls://a'], credentialsSecret: 'queue' } };
    const objects = await renderChart(helm, values);
    for (const part of ['gateway', 'controller']) {
      const [pod] = podsOf([objectOf(objects, 'Deployment', `mimo-mimo-cluster-${part}`)]);
      expect(pod?.spec.volumes).toContainEqual({
        name: 'nats-credentials',
        secret: { secretName: 'queue', defaultMode: 0o440 },
      });
      expect(environmentOf(pod?.spec.containers[0] ?? { name: '', image: '' })).toMatchObject({
        [`MIMO_${part.toUpperCase()}_NATS_CREDENTIALS_FILE`]: '/etc/mimo/nats/credentials',
      });
    }
    expect(workerSettingsOf(await controllerConfig(values))).toMatchObject({
      natsUrl: 'tls://a',
      natsCredentialsSecret: 'queue',
    });
  });

  it('a load balancer opens the gRPC port and no other', async () => {
    const objects = await renderChart(helm, { gateway: { service: { type: 'LoadBalancer', port: 443 } } });
    expect(objectOf(objects, 'Service', 'mimo-mimo-cluster-gateway')['spec']).toMatchObject({
      type: 'LoadBalancer',
      ports: [{ name: 'grpc', port: 443, targetPort: 'grpc' }],
    });
    const open = objects.filter(
      ({ kind, spec }) => kind === 'Service' && (spec as { type: string }).type !== 'ClusterIP',
    );
    expect(open).toHaveLength(1);
  });

  it('alerts: those that are off are left out, the others are those of the file', async () => {
    const all = await countAlerts([]);
    expect(all).toBeGreaterThan(5);
    expect(await countAlerts(['MimoQueueDeep', 'MimoErrorRatio'])).toBe(all - 2);
  });

  it('the test asks for a list with a key, for a closed door without one, and for an open one where it is open', async () => {
    const address = '--address=mimo-mimo-cluster-gateway.serving.svc:50051';
    expect(await testArgs({})).toEqual([address, '--closed']);
    expect(await testArgs({ tests: { apiKeySecret: { name: 's' } } })).toEqual([address]);
    expect(await testArgs({ gateway: { authentication: 'none' } })).toEqual([address]);
  });
});

describe('the NATS server', () => {
  it.each([1, 3, 5])('accepts the configuration of %d replicas', async (replicas) => {
    const objects = await renderChart(helm, { nats: { replicas, storage: { size: '12Gi' } } });
    const data = objectOf(objects, 'ConfigMap', 'mimo-nats')['data'] as Record<string, string>;
    const said = await checkNatsConfig(data['nats.conf'] ?? '', {
      POD_NAME: 'mimo-nats-0',
      JETSTREAM_KEY: 'k'.repeat(48),
    });
    expect(said).toContain('is valid');
    // 80 % of the volume for the server; gateways bound their stream to 40 %.
    expect(data['nats.conf']).toContain('max_file_store: 9830MiB');
    expect(data['nats.conf']?.match(/nats:\/\/mimo-nats-\d/g) ?? []).toHaveLength(
      replicas === 1 ? 0 : replicas,
    );
  });
});
