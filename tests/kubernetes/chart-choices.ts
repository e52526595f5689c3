// The choices of a platform team in the chart, for several tests, and the settings that the controller then reads.

import { parseControllerConfig } from '@mimo/controller/config';

import { environmentOf, objectOf, podsOf, renderChart, type Values } from '../harness/kubernetes/helm.ts';

export const sha256 = 'a'.repeat(64);

/** What a platform team may choose, from nothing to everything. */
export const choices = {
  'the defaults': {},
  'one machine': { nats: { replicas: 1 }, gateway: { replicas: 1 }, controller: { replicas: 1 } },
  'external NATS': {
    nats: { enabled: false, externalUrls: ['nats://queue.infra.svc', 'tls://b.example.com:4223'] },
  },
  GPUs: {
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
  'a shared cache': { modelCache: { type: 'pvc', pvc: { storageClassName: 'shared', size: '1Ti' } } },
  'a cache that is there': { modelCache: { type: 'pvc', pvc: { existingClaim: 'models' } } },
  'a cache on each machine': { modelCache: { type: 'hostPath' } },
  tenants: {
    tenants: [
      { name: 'alpha', apiKeySha256: [sha256, 'b'.repeat(64)], weight: 10, limits: { maxInFlight: 3 } },
      { name: 'beta', existingSecrets: [{ name: 'their-key', key: 'hash' }, { name: 'other' }] },
    ],
  },
  'an open door': { gateway: { authentication: 'none', service: { type: 'LoadBalancer' } } },
  'everything on': {
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
  'everything off': {
    gateway: { service: { headless: false } },
    nats: { podDisruptionBudget: { enabled: false }, networkPolicy: { enabled: false } },
    podDisruptionBudget: { enabled: false },
    networkPolicy: { enabled: false },
  },
} satisfies Readonly<Record<string, Values>>;

/** The controller's settings, from the environment that the chart gives it. */
export async function controllerConfig(
  helm: string,
  values: Values,
): Promise<ReturnType<typeof parseControllerConfig>> {
  const objects = await renderChart(helm, values);
  const [pod] = podsOf([objectOf(objects, 'Deployment', 'mimo-mimo-cluster-controller')]);
  return parseControllerConfig(environmentOf(pod?.spec.containers[0] ?? { name: '', image: '' }));
}
