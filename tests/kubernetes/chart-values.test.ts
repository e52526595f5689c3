// The objects that each value of the chart reaches, as the real helm renders them, and a real NATS server's check of
// its configuration. No cluster.

import { workerSettingsOf } from '@mimo/controller/config';
import { parseGatewayConfig } from '@mimo/gateway/config';
import { beforeAll, describe, expect, it } from 'vitest';

import {
  chartDirectory,
  environmentOf,
  objectOf,
  podsOf,
  renderChart,
  runHelm,
  type Values,
} from '../harness/kubernetes/helm.ts';
import { findTools } from '../harness/kubernetes/tools.ts';
import { checkNatsConfig } from '../harness/nats.ts';
import { choices, controllerConfig, sha256 } from './chart-choices.ts';

let helm: string;

beforeAll(async () => {
  ({ helm } = await findTools());
});

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
    expect(await controllerConfig(helm, { images: { registry: 'r.example.com' } })).toMatchObject({
      workerImage: 'r.example.com/mimo-cluster/worker:0.1.0',
      workerCudaImage: 'r.example.com/mimo-cluster/worker-cuda:0.1.0',
    });
    expect(await controllerConfig(helm, { images: { workerCuda: { repository: '' } } })).toMatchObject({
      workerCudaImage: '',
    });
  });

  it('worker pods: account, registries, cache, accelerators', async () => {
    const settings = workerSettingsOf(
      await controllerConfig(helm, {
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
    const host = await controllerConfig(helm, {
      modelCache: { type: 'hostPath', hostPath: { path: '/models' } },
    });
    expect(workerSettingsOf(host).cache).toEqual({ kind: 'hostPath', path: '/models' });
  });

  it('the queue: streams have up to three replicas, whichever process creates them', async () => {
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
      expect((await controllerConfig(helm, values)).natsReplicas).toBe(ofStreams);
    }
  });

  it('the queue: requests may use 40 % of the volume, and the default size on external servers', async () => {
    expect(await maxBytesOf({})).toBe(3_276 * 2 ** 20);
    expect(await maxBytesOf({ nats: { storage: { size: '500Mi' } } })).toBe(200 * 2 ** 20);
    expect(await maxBytesOf({ nats: { storage: { size: '2Ti' } } })).toBe(838_860 * 2 ** 20);
    expect(await maxBytesOf(choices['external NATS'])).toBe(2 ** 30);
  });

  it('the queue: its disk is encrypted with a generated key, with a key from your Secret, or not at all', async () => {
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

  it('tenants: hashes go to one Secret each, and the shared one stays empty', async () => {
    const objects = await renderChart(helm, choices.tenants);
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

  it('names that YAML would read as another type', async () => {
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
    expect(workerSettingsOf(await controllerConfig(helm, values))).toMatchObject({
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

  it('alerts: disabled ones are left out, the others are those of the file', async () => {
    const all = await countAlerts([]);
    expect(all).toBeGreaterThan(5);
    expect(await countAlerts(['MimoQueueDeep', 'MimoErrorRatio'])).toBe(all - 2);
  });

  it('the test expects a model list with a key, a refusal without one, and a list when authentication is off', async () => {
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
