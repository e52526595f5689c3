// The permissions in the chart: the controller's Role as written, and the flows that its NetworkPolicies allow, under
// all kinds of values. chart.test.ts checks the Role on a real API server; the end-to-end scenario `policies` enforces
// the default values on a real network.

import { beforeAll, describe, expect, it } from 'vitest';

import { objectOf, renderChart, type KubernetesObject } from '../harness/kubernetes/helm.ts';
import { isAllowed, type Endpoint, type Flow } from '../harness/kubernetes/network-policies.ts';
import { findTools } from '../harness/kubernetes/tools.ts';

let helm: string;

beforeAll(async () => {
  ({ helm } = await findTools());
});

interface Rule {
  readonly apiGroups: readonly string[];
  readonly resources: readonly string[];
  readonly resourceNames?: readonly string[];
  readonly verbs: readonly string[];
}

describe('the Role', () => {
  it('has no wildcard, no pods/exec, no cluster-wide right, and cannot create or list Secrets', async () => {
    const objects = await renderChart(helm);
    expect(objects.filter(({ kind }) => kind.startsWith('ClusterRole'))).toEqual([]);
    const rules = objectOf(objects, 'Role', 'mimo-mimo-cluster-controller')['rules'] as readonly Rule[];
    for (const { apiGroups, resources, verbs } of rules) {
      expect([...apiGroups, ...resources, ...verbs].filter((word) => word.includes('*'))).toEqual([]);
      expect(
        resources.filter((resource) => /exec|attach|portforward|ephemeral|token/.test(resource)),
      ).toEqual([]);
    }
    const ofAnySecret = rules.filter(
      ({ resources, resourceNames }) => resources.includes('secrets') && resourceNames === undefined,
    );
    expect(ofAnySecret.flatMap(({ verbs }) => verbs)).toEqual(['get']);
  });
});

/** A pod of the release. */
function ours(name: string): Endpoint {
  return {
    namespace: 'serving',
    labels: { 'app.kubernetes.io/name': `mimo-${name}`, 'app.kubernetes.io/instance': 'mimo' },
  };
}

/** A pod that the controller makes. */
function made(component: string): Endpoint {
  return {
    namespace: 'serving',
    labels: {
      'app.kubernetes.io/name': 'mimo-worker',
      'app.kubernetes.io/component': component,
      'app.kubernetes.io/managed-by': 'mimo-controller',
      'app.kubernetes.io/instance': 'my-model',
    },
  };
}

describe('network policies', () => {
  const gateway = ours('gateway');
  const controller = ours('controller');
  const nats = ours('nats');
  const test = ours('test');
  const uninstall = ours('uninstall');
  const group = made('group');
  const prepare = made('prepare');
  const client: Endpoint = { namespace: 'apps', labels: { app: 'bot' } };
  const neighbour: Endpoint = { namespace: 'serving', labels: { app: 'other' } };
  const prometheus: Endpoint = { namespace: 'monitoring', labels: { app: 'prometheus' } };
  const dns: Endpoint = { namespace: 'kube-system', labels: { 'k8s-app': 'kube-dns' } };
  const outside: Endpoint = { address: '203.0.113.7' };
  const ends = {
    gateway,
    controller,
    nats,
    test,
    uninstall,
    group,
    prepare,
    client,
    neighbour,
    prometheus,
    dns,
    outside,
  };
  const names = new Map<Endpoint, string>(Object.entries(ends).map(([name, end]) => [end, name]));

  const allowed: readonly (readonly [Endpoint, Endpoint, ...number[]])[] = [
    [client, gateway, 50_051],
    [neighbour, gateway, 50_051],
    [test, gateway, 50_051],
    [gateway, group, 50_052, 50_059],
    [group, group, 50_152, 50_159],
    [gateway, nats, 4222],
    [controller, nats, 4222],
    [group, nats, 4222],
    [prepare, nats, 4222],
    [nats, nats, 6222],
    [controller, outside, 443, 6443],
    [uninstall, outside, 443, 6443],
    [group, outside, 443],
    [prepare, outside, 443],
    [prometheus, gateway, 9464],
    [prometheus, group, 9464],
    [prometheus, controller, 9465],
    ...[gateway, controller, group, prepare, nats, test, uninstall].map((from) => [from, dns, 53] as const),
  ];
  const denied: readonly (readonly [Endpoint, Endpoint, ...number[]])[] = [
    [outside, gateway, 50_051],
    [client, gateway, 9464, 50_052],
    [client, group, 50_052, 50_152, 9464],
    [client, controller, 9465],
    [client, nats, 4222, 6222, 8222],
    [neighbour, nats, 4222],
    [neighbour, group, 50_052],
    [gateway, group, 50_051, 50_060, 50_152, 9464],
    [gateway, prepare, 50_052],
    [gateway, outside, 443],
    [gateway, gateway, 50_052],
    [gateway, controller, 9465],
    [gateway, nats, 6222, 8222],
    [group, group, 50_052, 50_160],
    [group, gateway, 50_051],
    [group, controller, 9465],
    [group, outside, 80, 6443],
    [controller, group, 50_052, 50_152],
    [controller, gateway, 50_051],
    [controller, outside, 80, 22],
    [test, nats, 4222],
    [test, group, 50_052],
    [test, outside, 443],
    [nats, outside, 443],
    [uninstall, nats, 4222],
    [client, uninstall, 443],
    [nats, gateway, 50_051],
    [prometheus, nats, 8222],
    [prometheus, gateway, 50_052],
  ];

  let objects: readonly KubernetesObject[];
  beforeAll(async () => {
    objects = await renderChart(helm);
  });

  const cases = (table: typeof allowed): readonly (readonly [string, Flow])[] =>
    table.flatMap(([from, to, ...ports]) =>
      ports.map((port) => [`${names.get(from)} -> ${names.get(to)}:${port}`, { from, to, port }] as const),
    );

  it.each(cases(allowed))('allow %s', (_name, flow) => {
    // A gateway is open to the cluster by default, and to nobody outside it.
    expect(isAllowed(objects, flow)).toBe(true);
  });

  it.each(cases(denied))('deny %s', (_name, flow) => {
    expect(isAllowed(objects, flow)).toBe(false);
  });

  it('allow DNS over UDP, and nothing else', () => {
    expect(isAllowed(objects, { from: gateway, to: dns, port: 53, protocol: 'UDP' })).toBe(true);
    expect(isAllowed(objects, { from: client, to: gateway, port: 50_051, protocol: 'UDP' })).toBe(false);
  });

  it('follow the values: who may call, the API server, the hub, external servers', async () => {
    const narrow = await renderChart(helm, {
      networkPolicy: {
        clientPeers: [{ namespaceSelector: { matchLabels: { 'kubernetes.io/metadata.name': 'apps' } } }],
        metricsPeers: [],
        apiServerCidrs: ['203.0.113.7/32'],
        hub: { enabled: false },
      },
    });
    const ask = (from: Endpoint, to: Endpoint, port: number): boolean =>
      isAllowed(narrow, { from, to, port });
    expect(ask(client, gateway, 50_051)).toBe(true);
    expect(ask(test, gateway, 50_051)).toBe(true);
    expect(ask(neighbour, gateway, 50_051)).toBe(false);
    expect(ask(prometheus, gateway, 9464)).toBe(false);
    expect(ask(controller, outside, 6443)).toBe(true);
    expect(ask(controller, { address: '203.0.113.8' }, 6443)).toBe(false);
    expect(ask(prepare, outside, 443)).toBe(false);

    const open = await renderChart(helm, { gateway: { service: { type: 'LoadBalancer' } } });
    expect(isAllowed(open, { from: outside, to: gateway, port: 50_051 })).toBe(true);

    const external = await renderChart(helm, {
      nats: { enabled: false, externalUrls: ['nats://a', 'tls://b:4223'] },
    });
    for (const [port, isOpen] of [
      [4222, true],
      [4223, true],
      [4224, false],
    ] as const) {
      expect(isAllowed(external, { from: gateway, to: outside, port })).toBe(isOpen);
    }
  });
});
