// Every choice of a platform team, from nothing to everything, as the real helm renders it: whole, consistent and
// readable by our own processes. No cluster.

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
import { choices, controllerConfig } from './chart-choices.ts';

let helm: string;

beforeAll(async () => {
  ({ helm } = await findTools());
});

describe('helm lint --strict', () => {
  it.each(Object.entries<Values>(choices))('passes with %s', async (_name, values) => {
    expect(await runHelm(helm, ['lint', '--strict', chartDirectory], { values })).toContain(
      '0 chart(s) failed',
    );
  });
});

describe.each(Object.entries<Values>(choices))('rendered with %s', (_name, values) => {
  let objects: readonly KubernetesObject[];
  let pods: readonly PodTemplate[];

  beforeAll(async () => {
    objects = await renderChart(helm, values);
    pods = podsOf(objects);
  });

  it("every object is in the release's namespace, once, and has the release's labels", () => {
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

  it('Services, budgets, spreads and monitors select existing pods', () => {
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

  it('only the controller and the uninstall hook have a token', () => {
    const withToken = pods.filter(({ spec }) => spec['automountServiceAccountToken'] !== false);
    expect(withToken.map(({ owner }) => owner)).toEqual([
      'Deployment/mimo-mimo-cluster-controller',
      'Job/mimo-mimo-cluster-uninstall',
    ]);
  });

  it('the controller reads its environment', async () => {
    expect(await controllerConfig(helm, values)).toMatchObject({
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
