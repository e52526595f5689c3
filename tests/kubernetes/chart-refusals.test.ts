// Values and clusters that the chart rejects, and the field that the real helm's error names. No cluster.

import { beforeAll, describe, expect, it } from 'vitest';

import { renderChart, type Values } from '../harness/kubernetes/helm.ts';
import { findTools } from '../harness/kubernetes/tools.ts';

const sha256 = 'a'.repeat(64);
let helm: string;

beforeAll(async () => {
  ({ helm } = await findTools());
});

describe('the chart refuses', () => {
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
