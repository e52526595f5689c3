// The chart on a real API server with its controllers, in namespaces that enforce Pod Security "restricted": its
// objects are admitted and create their pods, the controller's rights are exactly those of the table, an upgrade keeps
// the controller's writes, and nothing is left behind. There are no machines: the node layer tests running pods.

import { execFile } from 'node:child_process';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { startControlPlane, type ControlPlane } from '../harness/kubernetes/control-plane.ts';
import {
  chartDirectory,
  renderChart,
  runHelm,
  type KubernetesObject,
  type Values,
} from '../harness/kubernetes/helm.ts';
import { findTools } from '../harness/kubernetes/tools.ts';
import { checkNatsConfig } from '../harness/nats.ts';
import { waitFor } from '../harness/wait-for.ts';

const sha256 = 'a'.repeat(64);
const controllerAccount = 'mimo-mimo-cluster-controller';
const tenantSecret = 'mimo-mimo-cluster-tenant-keys';
let helm: string;
let cluster: ControlPlane;

beforeAll(async () => {
  const tools = await findTools();
  ({ helm } = tools);
  cluster = await startControlPlane({ tools });
  // As before an upgrade: they are newer than, or the same as, those that helm installs where there are none.
  await cluster.kubectl(['apply', '--server-side', '--force-conflicts', `--filename=${chartDirectory}/crds`]);
});

afterAll(async () => {
  await cluster?.close();
});

async function createNamespace(name: string): Promise<void> {
  await cluster.kubectl(['create', 'namespace', name]);
  await cluster.kubectl([
    'label',
    'namespace',
    name,
    'pod-security.kubernetes.io/enforce=restricted',
    'pod-security.kubernetes.io/enforce-version=latest',
  ]);
}

async function helmIn(namespace: string, args: readonly string[], values?: Values): Promise<string> {
  return runHelm(helm, [...args, '--namespace', namespace, '--kubeconfig', cluster.kubeconfig], { values });
}

async function install(namespace: string, values: Values): Promise<string> {
  await createNamespace(namespace);
  return helmIn(namespace, ['install', 'mimo', chartDirectory], values);
}

async function list(namespace: string, kinds: string): Promise<readonly KubernetesObject[]> {
  const text = await cluster.kubectl(['get', kinds, '--namespace', namespace, '--output', 'json']);
  return (JSON.parse(text) as { items: KubernetesObject[] }).items;
}

const everyKind =
  'deployments,statefulsets,replicasets,pods,services,configmaps,secrets,serviceaccounts,roles,rolebindings,leases,' +
  'persistentvolumeclaims,poddisruptionbudgets,networkpolicies,horizontalpodautoscalers,jobs,endpointslices,' +
  'modelservices.mimo-cluster.dev,tenants.mimo-cluster.dev';

const modelService = {
  name: 'demo',
  spec: {
    model: { name: 'demo', precision: 'bf16', source: { hub: { repository: 'a/b' } } },
    resources: { accelerators: 1 },
    scaling: { min: 0, max: 2 },
  },
};

const choices: readonly (readonly [name: string, values: Values, pods: number])[] = [
  ['defaults', {}, 7],
  [
    'external-nats',
    { nats: { enabled: false, externalUrls: ['nats://queue.infra.svc:4222'], credentialsSecret: 'queue' } },
    4,
  ],
  ['1e3', { nats: { replicas: 1 }, gateway: { replicas: 1 }, controller: { replicas: 1 } }, 3],
  [
    'full',
    {
      images: { pullSecrets: ['pull'] },
      gateway: {
        spread: 'required',
        replicas: 3,
        models: [{ name: 'org/local', claimName: 'tokenizer', path: 'mimo' }],
        service: { type: 'LoadBalancer', loadBalancerSourceRanges: ['10.0.0.0/8'] },
        affinity: { nodeAffinity: {} },
      },
      nats: { replicas: 5, spread: 'required' },
      modelCache: { type: 'pvc', pvc: { keepOnUninstall: false } },
      accelerators: { resourceName: 'example.com/gpu', runtimeClassName: 'nvidia' },
      networkPolicy: { apiServerCidrs: ['10.0.0.1/32'], hub: { cidrs: ['0.0.0.0/0'] } },
      dashboards: { enabled: true },
      tenants: [
        { name: 'alpha', apiKeySha256: [sha256], limits: { tokensPerMinute: 1000 }, allowedModels: ['demo'] },
        { name: 'beta', existingSecrets: [{ name: 'their-key' }], priorityClass: 'batch' },
      ],
      modelServices: [modelService],
    },
    10,
  ],
  [
    'off',
    {
      gateway: { authentication: 'none', service: { headless: false }, autoscaling: { enabled: true } },
      nats: { podDisruptionBudget: { enabled: false }, networkPolicy: { enabled: false } },
      podDisruptionBudget: { enabled: false },
      networkPolicy: { enabled: false },
    },
    6,
  ],
];

// Names that YAML takes for something else are names too.
describe.each(choices)('installed as %s', (namespace, values, podCount) => {
  it('is admitted, creates its pods under Pod Security "restricted", and is gone after helm uninstall', async () => {
    expect(await install(namespace, values)).toContain('STATUS: deployed');

    // Pods are made by the API server's controllers: one that is not admitted does not appear.
    await waitFor('the pods', async () => (await list(namespace, 'pods')).length >= podCount, 60_000);
    const failures = (await list(namespace, 'events')).filter(({ reason }) => reason === 'FailedCreate');
    expect(failures.map(({ message }) => message)).toEqual([]);

    // The hook is a Job, which needs a machine.
    await helmIn(namespace, ['uninstall', 'mimo', '--wait', '--no-hooks']);
    const own = new Set(['kube-root-ca.crt', 'default']);
    await waitFor(
      'nothing to be left',
      async () => (await list(namespace, everyKind)).every(({ metadata }) => own.has(metadata.name)),
      60_000,
    );
  });

  it('renders only fields that the API server knows, in the hooks too', async () => {
    const dry = `${namespace}-dry`;
    await createNamespace(dry);
    const objects = await renderChart(helm, values);
    const said = await cluster.kubectl(
      ['apply', '--server-side', '--dry-run=server', '--validate=strict', '--filename', '-'],
      JSON.stringify({
        apiVersion: 'v1',
        kind: 'List',
        items: objects.map((object) => inNamespace(object, dry)),
      }),
    );
    expect(said.trim().split('\n')).toHaveLength(objects.length);
  });
});

function inNamespace(object: KubernetesObject, namespace: string): KubernetesObject {
  return { ...object, metadata: { ...object.metadata, namespace } };
}

describe('what the API server refuses', () => {
  it('a ModelService by its field, and nothing stays installed', async () => {
    const broken = { ...modelService, spec: { ...modelService.spec, tensorParallel: 3 } };
    await expect(install('refused', { modelServices: [broken] })).rejects.toThrow(/spec\.tensorParallel/);
    await helmIn('refused', ['uninstall', 'mimo', '--wait', '--no-hooks']);
    expect(await list('refused', 'deployments,statefulsets')).toEqual([]);
  });

  it('a worker pod on a machine\'s directory, where "restricted" is enforced', async () => {
    await createNamespace('host-path');
    const pod = {
      apiVersion: 'v1',
      kind: 'Pod',
      metadata: { name: 'w', namespace: 'host-path' },
      spec: { containers: [{ name: 'c', image: 'i' }], volumes: [{ name: 'v', hostPath: { path: '/x' } }] },
    };
    await expect(
      cluster.kubectl(['create', '--dry-run=server', '--filename', '-'], JSON.stringify(pod)),
    ).rejects.toThrow(/violates PodSecurity/);
  });
});

interface Right {
  readonly verb: string;
  readonly group?: string;
  readonly resource: string;
  readonly subresource?: string;
  readonly name?: string;
  readonly namespace?: string;
}

/** `verbs` of a `group/resource/subresource` (the core group is empty), of one name or of any. */
function rights(verbs: string, what: string, where: Partial<Right> = {}): readonly Right[] {
  const [group = '', resource = '', subresource] = what.split('/');
  return verbs.split(' ').map((verb) => ({
    verb,
    group,
    resource,
    ...(subresource === undefined ? {} : { subresource }),
    ...where,
  }));
}

/** A right in words, for a failing table. */
function words({ verb, group = '', resource, subresource, name = '', namespace = '' }: Right): string {
  return [verb, [group, resource, subresource].filter(Boolean).join('/'), name, namespace].join(' ').trim();
}

describe("the key of NATS' disk", () => {
  it('is generated once: upgrades keep the Secret, and servers start with it', async () => {
    const namespace = 'key';
    const readKey = async (): Promise<unknown> => {
      const secrets = await list(namespace, 'secrets');
      const secret = secrets.find(({ metadata }) => metadata.name === 'mimo-nats-encryption');
      return secret?.['data'];
    };
    await install(namespace, {});
    const key = await readKey();
    expect(key).toEqual({ key: expect.stringMatching(/^\S{64}$/) as string });
    // A change of NATS itself, another one, and none.
    for (const values of [{ nats: { maxPayloadBytes: 2 ** 21 } }, { gateway: { replicas: 3 } }, {}]) {
      await helmIn(namespace, ['upgrade', 'mimo', chartDirectory], values);
      expect(await readKey()).toEqual(key);
      const config = (await list(namespace, 'configmaps')).find(
        ({ metadata }) => metadata.name === 'mimo-nats',
      );
      const { 'nats.conf': text = '' } = (config?.['data'] ?? {}) as Record<string, string>;
      expect(text).toContain('key: $JETSTREAM_KEY');
      const { key: encoded } = key as { readonly key: string };
      const env = { POD_NAME: 'mimo-nats-0', JETSTREAM_KEY: Buffer.from(encoded, 'base64').toString() };
      expect(await checkNatsConfig(text, env)).toContain('is valid');
    }
  });
});

describe("the controller's rights", () => {
  const namespace = 'rights';
  const own = 'mimo-cluster.dev';
  const allowed = [
    ...rights('get list watch patch', `${own}/modelservices`),
    ...rights('get list watch', `${own}/tenants`),
    ...rights('patch', `${own}/modelservices/status`),
    ...rights('patch', `${own}/tenants/status`),
    ...rights('update', `${own}/modelservices/finalizers`),
    ...rights('get list watch create patch delete', '/pods'),
    ...rights('patch', '/pods/status'),
    ...rights('get list watch create patch', '/services'),
    ...rights('get list watch create patch', 'policy/poddisruptionbudgets'),
    ...rights('create patch', '/events'),
    ...rights('get patch', 'coordination.k8s.io/leases', { name: 'mimo-controller' }),
    ...rights('get', '/secrets', { name: 'any-tenants-key' }),
    ...rights('patch', '/secrets', { name: tenantSecret }),
  ];
  const denied = [
    // Everything elsewhere, and what belongs to the cluster.
    ...rights('get list watch create patch delete', '/pods', { namespace: 'default' }),
    ...rights('get list', '/secrets', { namespace: 'kube-system' }),
    ...rights('get list watch', `${own}/modelservices`, { namespace: 'default' }),
    ...rights('get list watch patch', '/nodes'),
    ...rights('list', '/namespaces'),
    ...rights('get create patch', 'apiextensions.k8s.io/customresourcedefinitions'),
    // Into pods, and around their limits.
    ...rights('create get', '/pods/exec'),
    ...rights('create get', '/pods/attach'),
    ...rights('create get', '/pods/portforward'),
    ...rights('create get', '/pods/proxy'),
    ...rights('get', '/pods/log'),
    ...rights('patch update', '/pods/ephemeralcontainers'),
    ...rights('create', '/pods/eviction'),
    ...rights('create', '/pods/binding'),
    ...rights('update deletecollection', '/pods'),
    // Secrets.
    ...rights('list watch create delete deletecollection', '/secrets'),
    ...rights('patch update', '/secrets', { name: 'any-tenants-key' }),
    ...rights('update delete', '/secrets', { name: tenantSecret }),
    ...rights('create', '/serviceaccounts/token', { name: 'default' }),
    // More rights for itself.
    ...rights('create patch update bind escalate', 'rbac.authorization.k8s.io/roles'),
    ...rights('create patch update', 'rbac.authorization.k8s.io/rolebindings'),
    ...rights('impersonate', '/serviceaccounts'),
    ...rights('use', 'policy/podsecuritypolicies'),
    // Other things of the release.
    ...rights('create update delete deletecollection', `${own}/modelservices`),
    ...rights('create update patch delete', `${own}/tenants`),
    ...rights('update delete', '/services'),
    ...rights('update delete', 'policy/poddisruptionbudgets'),
    ...rights('get list delete', '/events'),
    ...rights('get list create patch delete', 'apps/deployments'),
    ...rights('get list create patch delete', 'apps/statefulsets'),
    ...rights('get list create patch delete', '/configmaps'),
    ...rights('create patch delete', '/persistentvolumeclaims'),
    ...rights('create patch delete', 'networking.k8s.io/networkpolicies'),
    ...rights('list watch create update delete', 'coordination.k8s.io/leases'),
    ...rights('get patch update', 'coordination.k8s.io/leases', { name: 'another' }),
  ];

  /** Asks the API server whether a ServiceAccount of the release may. */
  async function review(account: string, asked: readonly Right[]): Promise<readonly boolean[]> {
    const items = asked.map(({ verb, group = '', resource, subresource, name, namespace: where }) => ({
      apiVersion: 'authorization.k8s.io/v1',
      kind: 'SubjectAccessReview',
      spec: {
        user: `system:serviceaccount:${namespace}:${account}`,
        groups: ['system:serviceaccounts', `system:serviceaccounts:${namespace}`, 'system:authenticated'],
        resourceAttributes: { namespace: where ?? namespace, verb, group, resource, subresource, name },
      },
    }));
    const answer = await cluster.kubectl(
      ['create', '--output', 'json', '--filename', '-'],
      JSON.stringify({ apiVersion: 'v1', kind: 'List', items }),
    );
    const reviews = JSON.parse(`[${answer.replaceAll(/\}\s*\{/g, '},{')}]`) as {
      items?: { status: { allowed: boolean } }[];
      status: { allowed: boolean };
    }[];
    return reviews.flatMap((one) => one.items ?? [one]).map(({ status }) => status.allowed);
  }

  beforeAll(async () => {
    await install(namespace, {});
  });

  it('are these', async () => {
    const answers = await review(controllerAccount, allowed);
    expect(answers).toHaveLength(allowed.length);
    expect(allowed.filter((_right, index) => answers[index] !== true).map(words)).toEqual([]);
  });

  it('are not these', async () => {
    const answers = await review(controllerAccount, denied);
    expect(answers).toHaveLength(denied.length);
    expect(denied.filter((_right, index) => answers[index] !== false).map(words)).toEqual([]);
  });

  it("are nobody else's", async () => {
    for (const account of ['mimo-mimo-cluster-gateway', 'mimo-mimo-cluster-worker', 'default']) {
      expect((await review(account, allowed)).filter((isAllowed) => isAllowed)).toEqual([]);
    }
  });

  it("suffice for the tenants' keys, which an upgrade keeps", async () => {
    const kubeconfig = await cluster.kubeconfigForServiceAccount(namespace, controllerAccount);
    const keys = Buffer.from(JSON.stringify({ keys: [{ sha256, tenant: 'alpha' }] })).toString('base64');
    await cluster.kubectl(
      [
        `--kubeconfig=${kubeconfig}`,
        'apply',
        '--server-side',
        '--field-manager=mimo-controller',
        '--filename=-',
      ],
      JSON.stringify({
        apiVersion: 'v1',
        kind: 'Secret',
        metadata: { name: tenantSecret, namespace },
        data: { 'keys.json': keys },
      }),
    );
    await helmIn(namespace, ['upgrade', 'mimo', chartDirectory], { gateway: { replicas: 3 } });
    const secret = (await list(namespace, 'secrets')).find(({ metadata }) => metadata.name === tenantSecret);
    expect(secret?.['data']).toEqual({ 'keys.json': keys });
    const gateway = (await list(namespace, 'deployments')).find(({ metadata }) =>
      metadata.name.endsWith('-gateway'),
    );
    expect(gateway?.['spec']).toMatchObject({ replicas: 3 });
  });

  it('do not allow it to run a command in a pod', async () => {
    const kubeconfig = await cluster.kubeconfigForServiceAccount(namespace, controllerAccount);
    const [pod] = await list(namespace, 'pods');
    await expect(
      cluster.kubectl([
        `--kubeconfig=${kubeconfig}`,
        `--namespace=${namespace}`,
        'exec',
        pod?.metadata.name ?? '',
        '--',
        'true',
      ]),
    ).rejects.toThrow(/cannot (get|create) resource "pods\/exec"/);
  });
});

describe('before an uninstall', () => {
  const namespace = 'leaving';
  const account = 'mimo-mimo-cluster-uninstall';
  let kubeconfig: string;

  beforeAll(async () => {
    await createNamespace(namespace);
    const objects = (await renderChart(helm, {}, ['--show-only', 'templates/uninstall.yaml'])).filter(
      ({ kind }) => kind !== 'Job',
    );
    const items = objects.map((object) => inNamespace(object, namespace));
    // The binding names the namespace once more.
    const text = JSON.stringify({ apiVersion: 'v1', kind: 'List', items }).replaceAll(
      '"serving"',
      `"${namespace}"`,
    );
    await cluster.kubectl(['apply', '--filename=-'], text);
    kubeconfig = await cluster.kubeconfigForServiceAccount(namespace, account);
  });

  async function createServices(...names: readonly string[]): Promise<void> {
    const items = names.map((name) => ({
      apiVersion: 'mimo-cluster.dev/v1alpha1',
      kind: 'ModelService',
      // As the controller keeps one while its groups drain.
      metadata: { name, namespace, finalizers: name === 'held' ? ['example.com/held'] : [] },
      spec: modelService.spec,
    }));
    await cluster.kubectl(
      ['create', '--filename=-'],
      JSON.stringify({ apiVersion: 'v1', kind: 'List', items }),
    );
  }

  async function removeServices(timeoutSeconds: number): Promise<{ code: number; said: string }> {
    const { promise, resolve } = Promise.withResolvers<{ code: number; said: string }>();
    const command = join(import.meta.dirname, '../../controller/src/act/remove-services.ts');
    const args = [`--kubeconfig=${kubeconfig}`, `--namespace=${namespace}`];
    execFile(
      process.execPath,
      [command, ...args, `--timeout-seconds=${timeoutSeconds}`],
      (error, stdout, stderr) =>
        resolve({ code: Number(error?.code ?? 0), said: `${stdout}${stderr}`.trim() }),
    );
    return promise;
  }

  it('nothing happens when no ModelService exists', async () => {
    expect(await removeServices(60)).toEqual({ code: 0, said: 'removed 0 ModelServices' });
  });

  it('ModelServices are deleted, and the hook waits for their finalizers', async () => {
    await createServices('free', 'held');
    const removed = removeServices(120);
    await waitFor(
      'one to be gone and one to be going',
      async () => {
        const [held, ...others] = await list(namespace, 'modelservices.mimo-cluster.dev');
        return others.length === 0 && 'deletionTimestamp' in (held?.metadata ?? {});
      },
      60_000,
    );
    const isDone = await Promise.race([removed.then(() => true), sleep(2_000, false)]);
    expect(isDone).toBe(false);
    await cluster.kubectl([
      'patch',
      'modelservice',
      'held',
      `--namespace=${namespace}`,
      '--type=merge',
      '--patch={"metadata":{"finalizers":null}}',
    ]);
    expect(await removed).toEqual({ code: 0, said: 'removed 2 ModelServices' });
  });

  it('a ModelService whose finalizer stays fails the hook, which names it', async () => {
    await createServices('held');
    const { code, said } = await removeServices(15);
    expect(code).toBe(1);
    expect(said).toMatch(/^remove-services: still there: held\. Is the controller running\?/);
  });
});
