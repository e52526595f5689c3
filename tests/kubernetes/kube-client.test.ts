// The client's verbs and errors against a real API server, and against one behind a broken network.

import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

import { KubeConfig } from '@kubernetes/client-node';
import { hasReason, httpStatusOf } from '@mimo/controller/kube/api-status';
import { KubeClient, loadKubeConfig, type WatchEvent } from '@mimo/controller/kube/client';
import { EventRecorder } from '@mimo/controller/kube/events';
import { resourceTypes, type KubeObject, type ResourceType } from '@mimo/controller/kube/resource';
import { ClusterError } from '@mimo/core/process/errors';
import { createLog } from '@mimo/core/process/log';
import { afterAll, afterEach, beforeAll, describe, expect, it, onTestFinished, vi } from 'vitest';

import { readApiserverMetric } from '../harness/kubernetes/apiserver-metrics.ts';
import {
  configMap,
  configMaps,
  createNamespace,
  kubeConfigVia,
  type ConfigMap,
} from '../harness/kubernetes/config-maps.ts';
import { startControlPlane, type ControlPlane } from '../harness/kubernetes/control-plane.ts';
import { startFaultProxy, type FaultProxy } from '../harness/kubernetes/fault-proxy.ts';
import { findTools } from '../harness/kubernetes/tools.ts';
import { waitFor } from '../harness/wait-for.ts';

const log = createLog({ process: 'test', level: 'silent' });
const soon = (): AbortSignal => AbortSignal.timeout(30_000);
/** The API server is told to forget old versions after this and up to twice as long. */
const compactionSeconds = 2;

/** ConfigMaps that are there from the beginning. */
const pages = Array.from({ length: 25 }, (_, index) => `page-${String(index).padStart(2, '0')}`);

const reviews: ResourceType = {
  apiVersion: 'authentication.k8s.io/v1',
  kind: 'SelfSubjectReview',
  plural: 'selfsubjectreviews',
  scope: 'cluster',
};

let plane: ControlPlane;
let client: KubeClient;

beforeAll(async () => {
  plane = await startControlPlane({
    tools: await findTools(),
    apiserverFlags: [`--etcd-compaction-interval=${compactionSeconds}s`],
  });
  client = await createNamespace(plane.kubeconfig, 'verbs', { pageSize: 10 });
  await Promise.all(
    pages.map((name, index) =>
      client.create(
        configMaps,
        configMap(name, {}, { labels: { pages: index % 2 === 0 ? 'even' : 'odd' } }),
        soon(),
      ),
    ),
  );
});
afterAll(async () => {
  client.close();
  await plane.close();
});

/** What a promise rejects with; fails if it resolves. */
async function failureOf(promise: Promise<unknown>): Promise<ClusterError> {
  const error: unknown = await promise.then(
    () => new Error('resolved'),
    (caught: unknown) => caught,
  );
  expect(error).toBeInstanceOf(ClusterError);
  return error as ClusterError;
}

async function throughProxy(timeoutMs: number): Promise<{ proxy: FaultProxy; proxied: KubeClient }> {
  const proxy = await startFaultProxy(plane.url);
  const proxied = new KubeClient(kubeConfigVia(plane.kubeconfig, proxy.url), {
    namespace: 'verbs',
    timeoutMs,
  });
  onTestFinished(async () => {
    proxied.close();
    await proxy.close();
  });
  return { proxy, proxied };
}

describe('verbs', () => {
  it('create, read, apply, patch in both forms, delete', async () => {
    const created = await client.create<ConfigMap>(configMaps, configMap('all', { a: '1' }), soon());
    expect(created.metadata).toMatchObject({ name: 'all', namespace: 'verbs' });

    await client.apply(configMaps, configMap('all', { b: '2' }), {}, soon());
    expect((await client.get<ConfigMap>(configMaps, 'all', soon())).data).toEqual({ a: '1', b: '2' });
    // A field that was applied and is not any more goes; what others set stays.
    await client.apply(configMaps, configMap('all', { c: '3' }), {}, soon());
    expect((await client.get<ConfigMap>(configMaps, 'all', soon())).data).toEqual({ a: '1', c: '3' });

    const merged = await client.patch<ConfigMap>(
      configMaps,
      'all',
      { data: { a: null, d: '4' } },
      {},
      soon(),
    );
    expect(merged.data).toEqual({ c: '3', d: '4' });
    const patched = await client.patch<ConfigMap>(
      configMaps,
      'all',
      [
        { op: 'test', path: '/data/c', value: '3' },
        { op: 'remove', path: '/data/d' },
      ],
      {},
      soon(),
    );
    expect(patched.data).toEqual({ c: '3' });

    await client.delete(configMaps, 'all', { uid: created.metadata.uid }, soon());
    const gone = await failureOf(client.get(configMaps, 'all', soon()));
    expect(gone.code).toBe('not_found');
    expect(hasReason(gone, 'NotFound')).toBe(true);
  });

  it('write the status of a pod through its subresource', async () => {
    const pod = {
      apiVersion: 'v1',
      kind: 'Pod',
      metadata: { name: 'gated' },
      spec: {
        containers: [{ name: 'main', image: 'none' }],
        readinessGates: [{ conditionType: 'mimo-cluster.dev/routable' }],
      },
    };
    await waitFor('the default service account', async () =>
      plane.kubectl(['get', 'serviceaccount', 'default', '--namespace=verbs']).then(() => true),
    );
    await client.apply(resourceTypes.pods, pod, {}, soon());
    const conditions = [{ type: 'mimo-cluster.dev/routable', status: 'True' }];
    const status = { apiVersion: 'v1', kind: 'Pod', metadata: { name: 'gated' }, status: { conditions } };
    await client.apply(resourceTypes.pods, status, { subresource: 'status' }, soon());
    const read = await client.get<KubeObject & { status: { conditions: unknown[] } }>(
      resourceTypes.pods,
      'gated',
      soon(),
    );
    expect(read.status.conditions).toContainEqual(expect.objectContaining(conditions[0]));
    await client.delete(resourceTypes.pods, 'gated', { gracePeriodSeconds: 0 }, soon());
  });

  it('list page by page at one resource version, with selectors', async () => {
    const all = await client.list(configMaps, { labelSelector: 'pages' }, soon());
    expect(all.items.map(({ metadata }) => metadata.name)).toEqual(pages);
    expect(all.items[0]).toMatchObject({ apiVersion: 'v1', kind: 'ConfigMap' });
    const even = await client.list(configMaps, { labelSelector: 'pages=even' }, soon());
    expect(even.items).toHaveLength(13);
    const one = await client.list(configMaps, { fieldSelector: 'metadata.name=page-03' }, soon());
    expect(one.items).toHaveLength(1);
  });

  it('watch from a version on, until the server ends it', async () => {
    const { resourceVersion } = await client.list(configMaps, {}, soon());
    await client.create(configMaps, configMap('seen'), soon());
    await client.patch(configMaps, 'seen', { data: { a: '1' } }, {}, soon());
    await client.delete(configMaps, 'seen', {}, soon());
    const lastOfWatch = async (elsewhere: string): Promise<WatchEvent<KubeObject> | undefined> => {
      const events: WatchEvent<KubeObject>[] = [];
      for await (const event of client.watch(configMaps, { resourceVersion, timeoutSeconds: 8 }, soon())) {
        events.push(event);
        if (event.type === 'DELETED') {
          await plane.kubectl(['create', 'configmap', elsewhere, '--namespace=default']);
        }
      }
      const seen = events.filter(
        (event) => event.type !== 'BOOKMARK' && event.object.metadata.name === 'seen',
      );
      expect(seen.map(({ type }) => type)).toEqual(['ADDED', 'MODIFIED', 'DELETED']);
      return events.at(-1);
    };
    // Nothing of ours changes any more, and yet the version does not grow old. The server says so in the last two
    // seconds of a watch and at no other time: one that stood still for those says nothing.
    const last = await lastOfWatch('elsewhere');
    expect(last?.type === 'BOOKMARK' ? last : await lastOfWatch('elsewhere-again')).toMatchObject({
      type: 'BOOKMARK',
    });
  });
});

describe('refusals', () => {
  it('are permission_denied without a role, naming the request', async () => {
    await plane.kubectl(['create', 'serviceaccount', 'stranger', '--namespace=verbs']);
    const stranger = new KubeClient(
      loadKubeConfig(await plane.kubeconfigForServiceAccount('verbs', 'stranger')),
      {
        namespace: 'verbs',
      },
    );
    const denied = await failureOf(stranger.list(configMaps, {}, soon()));
    expect(denied.code).toBe('permission_denied');
    expect(denied.message).toContain('configmaps is forbidden');
    stranger.close();

    const config = loadKubeConfig(plane.kubeconfig);
    config.users = [{ name: 'test', token: 'nobody-issued-this' }];
    const nobody = new KubeClient(config);
    const unknown = await failureOf(nobody.list(configMaps, {}, soon()));
    expect(unknown.code).toBe('permission_denied');
    expect(httpStatusOf(unknown)).toBe(401);
    nobody.close();
  });

  it('distinguish a taken name from a conflicting change, both aborted', async () => {
    const first = await client.create(configMaps, configMap('both'), soon());
    const taken = await failureOf(client.create(configMaps, configMap('both'), soon()));
    expect(taken.code).toBe('aborted');
    expect(hasReason(taken, 'AlreadyExists')).toBe(true);
    expect(hasReason(taken, 'Conflict')).toBe(false);

    await client.patch(configMaps, 'both', { data: { a: '1' } }, {}, soon());
    const { resourceVersion } = first.metadata;
    const late = { metadata: { resourceVersion }, data: { a: '2' } };
    const changed = await failureOf(client.patch(configMaps, 'both', late, {}, soon()));
    expect(changed.code).toBe('aborted');
    expect(hasReason(changed, 'Conflict')).toBe(true);
    expect(hasReason(changed, 'AlreadyExists')).toBe(false);

    const other = await failureOf(client.delete(configMaps, 'both', { uid: 'another' }, soon()));
    expect(hasReason(other, 'Conflict')).toBe(true);
    const stale = await failureOf(client.delete(configMaps, 'both', { resourceVersion }, soon()));
    expect(hasReason(stale, 'Conflict')).toBe(true);
  });

  it('name the fields of an invalid object', async () => {
    const refused = await failureOf(client.create(configMaps, configMap('Not_A_Name'), soon()));
    expect(refused.code).toBe('invalid_argument');
    expect(refused.detail.fieldViolations?.[0]).toMatchObject({ field: 'metadata.name' });
  });

  it('of an expired page restart the list', async () => {
    // Asked for before each request: the place to stop between two pages.
    class GatedConfig extends KubeConfig {
      requests = 0;
      readonly second = Promise.withResolvers<void>();
      override async applyToHTTPSOptions(
        ...args: Parameters<KubeConfig['applyToHTTPSOptions']>
      ): Promise<void> {
        this.requests += 1;
        if (this.requests === 2) {
          await this.second.promise;
        }
        return super.applyToHTTPSOptions(...args);
      }
    }
    const config = new GatedConfig();
    config.loadFromFile(plane.kubeconfig);
    const paging = new KubeClient(config, { namespace: 'verbs', pageSize: 10 });
    onTestFinished(() => paging.close());
    const listing = paging.list(configMaps, { labelSelector: 'pages' }, soon());
    await waitFor('the end of the first page', () => config.requests === 2);
    // Another's page token, younger than the list's: where it has expired, so has the list's.
    const collection = '/api/v1/namespaces/verbs/configmaps?limit=1';
    const page = JSON.parse(await plane.kubectl(['get', '--raw', collection])) as {
      metadata: { continue: string };
    };
    await client.create(configMaps, configMap('page-99', {}, { labels: { pages: 'late' } }), soon());
    let writes = 0;
    await waitFor('the token to expire', async () => {
      writes += 1;
      await client.patch(configMaps, 'page-99', { data: { writes: String(writes) } }, {}, soon());
      const next = `${collection}&continue=${encodeURIComponent(page.metadata.continue)}`;
      const answer = await plane.kubectl(['get', '--raw', next]).catch((error: unknown) => String(error));
      return /expired|too old/i.test(answer);
    });
    config.second.resolve();
    expect((await listing).items.map(({ metadata }) => metadata.name)).toContain('page-99');
    // The first page, the page that had expired, and everything in one.
    expect(config.requests).toBe(3);
  });
});

// One request at a time for this user; what is more is answered with 429. A webhook that hangs keeps that one busy.
const throttling = (webhookUrl: string): string => `
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: throttled, namespace: verbs}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: edit}
subjects: [{kind: User, name: throttled, apiGroup: rbac.authorization.k8s.io}]
---
apiVersion: flowcontrol.apiserver.k8s.io/v1
kind: PriorityLevelConfiguration
metadata: {name: throttled}
spec:
  type: Limited
  limited: {nominalConcurrencyShares: 0, lendablePercent: 0, borrowingLimitPercent: 0, limitResponse: {type: Reject}}
---
apiVersion: flowcontrol.apiserver.k8s.io/v1
kind: FlowSchema
metadata: {name: throttled}
spec:
  priorityLevelConfiguration: {name: throttled}
  matchingPrecedence: 2
  rules:
    - subjects: [{kind: User, user: {name: throttled}}]
      resourceRules: [{verbs: ["*"], apiGroups: ["*"], resources: ["*"], namespaces: ["*"], clusterScope: true}]
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: slow}
webhooks:
  - name: slow.mimo-cluster.dev
    admissionReviewVersions: [v1]
    sideEffects: None
    failurePolicy: Ignore
    timeoutSeconds: 30
    clientConfig: {url: "${webhookUrl}"}
    objectSelector: {matchLabels: {slow: "true"}}
    rules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [configmaps]}]
`;

async function readRejections(): Promise<number> {
  const labels = { priority_level: 'throttled' };
  return readApiserverMetric(plane, 'apiserver_flowcontrol_rejected_requests_total', labels);
}

describe('a server that throttles (priority and fairness)', () => {
  let throttled: KubeClient;
  let webhook: FaultProxy;
  let creating: Promise<KubeObject>;

  beforeAll(async () => {
    webhook = await startFaultProxy(plane.url);
    webhook.mode = 'silent';
    await plane.kubectl(['apply', '--filename=-'], throttling(webhook.url));
    throttled = new KubeClient(loadKubeConfig(await plane.kubeconfigForUser('throttled')), {
      namespace: 'verbs',
    });
    await waitFor('the rules to hold', async () => {
      const schemas = await plane.kubectl([
        'get',
        '--raw',
        '/debug/api_priority_and_fairness/dump_priority_levels',
      ]);
      return schemas.includes('throttled');
    });
    await waitFor('the webhook to hang', async () => {
      const labels = { slow: 'true' };
      creating = throttled.create(configMaps, configMap(`slow-${Date.now()}`, {}, { labels }), soon());
      return Promise.race([
        creating.then(() => false),
        waitFor('the webhook to be asked', () => webhook.openConnections > 0, 20_000).then(() => true),
      ]);
    });
  });
  afterAll(async () => {
    throttled.close();
    await webhook.close();
  });

  it('is retried at the pace that it asks for, then the call fails as unavailable', async () => {
    const before = await readRejections();
    const beganMs = performance.now();
    const refused = await failureOf(throttled.get(configMaps, 'page-00', soon()));
    expect(refused).toMatchObject({ code: 'unavailable', detail: { retryAfterMs: 1000 } });
    expect(httpStatusOf(refused)).toBe(429);
    expect(performance.now() - beganMs).toBeGreaterThan(4 * 1000);
    expect(await readRejections()).toBe(before + 5);
  });

  it('answers within the same call once it has room again', async () => {
    const before = await readRejections();
    const reading = throttled.get(configMaps, 'page-00', soon());
    // After a rejection or two, and long before the fifth and last: there is a second between them. Nothing is asked
    // meanwhile, which on a busy machine could take longer than the call has.
    await sleep(1_500);
    webhook.mode = 'refuse';
    webhook.cut();
    expect((await reading).metadata.name).toBe('page-00');
    expect(await readRejections()).toBeGreaterThan(before);
    await creating;
  });
});

describe('a broken network', () => {
  afterEach(() => vi.useRealTimers());

  it('that refuses or cuts connections makes a call unavailable at once, and the next call works', async () => {
    const { proxy, proxied } = await throughProxy(30_000);
    proxy.mode = 'refuse';
    expect((await failureOf(proxied.get(configMaps, 'page-00', soon()))).code).toBe('unavailable');
    proxy.mode = 'pass';
    await proxied.get(configMaps, 'page-00', soon());
    proxy.cutAfterBytes(3000);
    const broken = await failureOf(proxied.list(configMaps, {}, soon()));
    expect(broken.code).toBe('unavailable');
    proxy.cutAfterBytes(undefined);
    await proxied.list(configMaps, {}, soon());
  });

  it('that drops a kept connection does not affect reads', async () => {
    const { proxy, proxied } = await throughProxy(30_000);
    for (let round = 0; round < 5; round += 1) {
      await proxied.get(configMaps, 'page-00', soon());
      proxy.cut();
    }
    expect((await proxied.get(configMaps, 'page-00', soon())).metadata.name).toBe('page-00');
  });

  it('that goes silent makes a call unavailable in time, and kept connections are not used again', async () => {
    const { proxy, proxied } = await throughProxy(5_000);
    await Promise.all(['00', '01', '02'].map((page) => proxied.get(configMaps, `page-${page}`, soon())));
    proxy.silence();
    const silent = await failureOf(proxied.get(configMaps, 'page-00', soon()));
    expect(silent.code).toBe('unavailable');
    expect(silent.message).toContain('5000 ms');
    // Three connections were kept and all of them are silent.
    await proxied.get(configMaps, 'page-00', soon());
    proxy.mode = 'silent';
    proxy.silence();
    const unanswered = await failureOf(proxied.create(configMaps, configMap('unanswered'), soon()));
    expect(unanswered.code).toBe('unavailable');
  });

  it('does not delay a canceled call or watch', async () => {
    const { proxy, proxied } = await throughProxy(30_000);
    proxy.mode = 'silent';
    const canceling = new AbortController();
    const reading = failureOf(proxied.get(configMaps, 'page-00', canceling.signal));
    await waitFor('the connection', () => proxy.openConnections > 0);
    canceling.abort(new ClusterError('canceled', 'enough'));
    expect(await reading).toMatchObject({ code: 'canceled', message: 'enough' });

    proxy.mode = 'pass';
    const leaving = new AbortController();
    const options = { resourceVersion: '', timeoutSeconds: 60 };
    for await (const _ of proxied.watch(configMaps, options, leaving.signal)) {
      // Left in mid-stream, as a reader may.
      break;
    }
    await waitFor('the end of the connections', () => proxy.openConnections === 0);
  });

  it('cuts a watch in the middle of a line: an error, never half an object', async () => {
    const { proxy, proxied } = await throughProxy(30_000);
    const { resourceVersion } = await client.list(configMaps, {}, soon());
    await client.create(configMaps, configMap('large', { text: 'x'.repeat(500_000) }), soon());
    const names: string[] = [];
    proxy.cutAfterBytes(200_000);
    const watching = (async () => {
      for await (const event of proxied.watch(configMaps, { resourceVersion, timeoutSeconds: 5 }, soon())) {
        names.push(event.type === 'BOOKMARK' ? '' : event.object.metadata.name);
      }
    })();
    expect((await failureOf(watching)).code).toBe('unavailable');
    expect(names).not.toContain('large');
    await client.delete(configMaps, 'large', {}, soon());
  });

  it('never carries a token that has been replaced in its file', async () => {
    const { hostname, port } = new URL(plane.url);
    vi.stubEnv('KUBERNETES_SERVICE_HOST', hostname);
    vi.stubEnv('KUBERNETES_SERVICE_PORT', port);
    const pod = join(plane.directory, 'pod');
    const mounted = join(pod, 'var/run/secrets/kubernetes.io/serviceaccount');
    await mkdir(mounted, { recursive: true });
    await writeFile(join(mounted, 'ca.crt'), plane.authorityCertificate);
    await writeFile(join(mounted, 'namespace'), 'verbs');
    const mount = async (account: string): Promise<void> => {
      await plane.kubectl(['create', 'serviceaccount', account, '--namespace=verbs']);
      const token = await plane.kubectl(['create', 'token', account, '--namespace=verbs']);
      await writeFile(join(mounted, 'token'), token.trim());
    };
    await mount('before');
    const config = new KubeConfig();
    config.loadFromCluster(pod);
    const inCluster = new KubeClient(config);
    expect(inCluster.namespace).toBe('verbs');
    const whoAmI = async (): Promise<string> => {
      const review = { apiVersion: reviews.apiVersion, kind: reviews.kind, metadata: { name: 'who' } };
      const answer = await inCluster.create<KubeObject & { status: { userInfo: { username: string } } }>(
        reviews,
        review,
        soon(),
      );
      return answer.status.userInfo.username;
    };
    expect(await whoAmI()).toBe('system:serviceaccount:verbs:before');
    await mount('after');
    vi.useFakeTimers({ toFake: ['Date'], now: Date.now() + 61_000 });
    expect(await whoAmI()).toBe('system:serviceaccount:verbs:after');
    inCluster.close();
    vi.unstubAllEnvs();
  });
});

describe('events', () => {
  it('appear in kubectl describe, with repeats counted', async () => {
    const subject = await client.create(configMaps, configMap('talked-about'), soon());
    const recorder = new EventRecorder({ client, component: 'mimo-controller', instance: 'pod-a', log });
    for (let repeat = 0; repeat < 5; repeat += 1) {
      recorder.record(subject, { type: 'Normal', reason: 'Scaled', message: 'from 0 to 4 groups' });
    }
    recorder.record(subject, { type: 'Warning', reason: 'Blocked', message: 'x'.repeat(5000) });
    await recorder.close(soon());
    expect(recorder.dropped).toBe(0);
    const described = await plane.kubectl(['describe', 'configmap', 'talked-about', '--namespace=verbs']);
    expect(described).toMatch(/Normal\s+Scaled\s+\S+ \(x5 over \S+\)\s+mimo-controller\s+from 0 to 4 groups/);
    expect(described).toMatch(/Warning\s+Blocked .*x{1000}/);
  });

  it('are created again when the API server has deleted the first', async () => {
    const subject = await client.create(configMaps, configMap('forgotten'), soon());
    const recorder = new EventRecorder({ client, component: 'mimo-controller', instance: 'pod-a', log });
    const note = { type: 'Normal', reason: 'Scaled', message: 'up' } as const;
    const selection = { fieldSelector: 'involvedObject.name=forgotten' };
    const readNames = async (): Promise<string[]> =>
      (await client.list(resourceTypes.events, selection, soon())).items.map(({ metadata }) => metadata.name);
    recorder.record(subject, note);
    await waitFor('the event', async () => (await readNames()).length === 1);
    const before = await readNames();
    await plane.kubectl(['delete', 'events', '--namespace=verbs', '--all']);
    recorder.record(subject, note);
    await recorder.close(soon());
    const after = await readNames();
    expect(after).toHaveLength(1);
    expect(after).not.toEqual(before);
  });

  it('never block and never fail: events that cannot be written are dropped and counted', async () => {
    const { proxy, proxied } = await throughProxy(30_000);
    proxy.mode = 'silent';
    const subject = await client.create(configMaps, configMap('unheard'), soon());
    const recorder = new EventRecorder({ client: proxied, component: 'mimo-controller', instance: 'a', log });
    const beganMs = performance.now();
    for (let note = 0; note < 2_000; note += 1) {
      recorder.record(subject, { type: 'Normal', reason: 'Noise', message: `number ${note}` });
    }
    expect(performance.now() - beganMs).toBeLessThan(1_000);
    await recorder.close(AbortSignal.timeout(300));
    expect(recorder.dropped).toBe(2_000);
  });
});
