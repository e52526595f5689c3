import { existsSync, readFileSync } from 'node:fs';

import { CoreV1Api, KubeConfig } from '@kubernetes/client-node';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { startControlPlane, type ControlPlane } from '../harness/kubernetes/control-plane.ts';
import { findTools } from '../harness/kubernetes/tools.ts';
import { isAlive, waitFor } from '../harness/wait-for.ts';

/** A role that may read ConfigMaps of one namespace, and a ServiceAccount that has it. */
const reader = `
apiVersion: v1
kind: Namespace
metadata: {name: readers}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: reader, namespace: readers}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: reader, namespace: readers}
rules: [{apiGroups: [""], resources: [configmaps], verbs: [get, list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: reader, namespace: readers}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}
subjects: [{kind: ServiceAccount, name: reader, namespace: readers}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: book, namespace: readers}
data: {title: clusters}
`;

const pod = `
apiVersion: v1
kind: Pod
metadata: {name: homeless}
spec: {containers: [{name: main, image: none}]}
`;

function coreClient(kubeconfig: string): CoreV1Api {
  const config = new KubeConfig();
  config.loadFromFile(kubeconfig);
  return config.makeApiClient(CoreV1Api);
}

describe('a control plane on loopback', () => {
  let plane: ControlPlane;
  beforeAll(async () => {
    plane = await startControlPlane({ tools: await findTools() });
    console.log(`control plane ready in ${(plane.startMs / 1000).toFixed(1)} s`);
  });
  afterAll(async () => plane.close());

  it('is the version of tools/kubernetes/go.mod', async () => {
    const module = readFileSync(
      `${import.meta.dirname}/../harness/kubernetes/tools/kubernetes/go.mod`,
      'utf8',
    );
    const [, version] = /k8s\.io\/kubernetes (v\S+)/.exec(module) ?? [];
    expect(await plane.kubectl(['version'])).toContain(`Server Version: ${version}`);
  });

  it('grants a ServiceAccount its own rights and no others', async () => {
    await plane.kubectl(['apply', '--filename=-'], reader);
    const client = coreClient(await plane.kubeconfigForServiceAccount('readers', 'reader'));
    const book = await client.readNamespacedConfigMap({ namespace: 'readers', name: 'book' });
    expect(book.data).toEqual({ title: 'clusters' });
    await expect(
      client.deleteNamespacedConfigMap({ namespace: 'readers', name: 'book' }),
    ).rejects.toMatchObject({ code: 403 });
    await expect(
      client.readNamespacedConfigMap({
        namespace: 'kube-system',
        name: 'extension-apiserver-authentication',
      }),
    ).rejects.toMatchObject({ code: 403 });
  });

  it('has a scheduler that says why a pod has no node', async () => {
    await plane.kubectl(['apply', '--filename=-'], pod);
    const describePod = async (): Promise<string> => plane.kubectl(['describe', 'pod', 'homeless']);
    await waitFor('the scheduler', async () => (await describePod()).includes('FailedScheduling'));
    expect(await describePod()).toContain('no nodes available to schedule pods');
  });

  it('has a controller-manager that empties a namespace', async () => {
    await plane.kubectl(['create', 'namespace', 'short-lived']);
    await plane.kubectl(['create', 'configmap', 'note', '--namespace=short-lived']);
    await plane.kubectl(['delete', 'namespace', 'short-lived']);
    await expect(plane.kubectl(['get', 'namespace', 'short-lived'])).rejects.toThrow('not found');
  });

  it.each(['SIGTERM', 'SIGKILL'] as const)(
    'keeps its objects when the API server ends by %s',
    async (signal) => {
      const client = coreClient(plane.kubeconfig);
      await client.listNamespace();
      await plane.stopApiserver(signal);
      await expect(client.listNamespace()).rejects.toMatchObject({ cause: { code: 'ECONNREFUSED' } });
      await plane.startApiserver();
      const { items } = await client.listNamespace();
      expect(items.map((item) => item.metadata?.name)).toContain('default');
    },
  );
});

describe('closing a control plane', () => {
  it('leaves no process and no file', async () => {
    const plane = await startControlPlane({ tools: await findTools() });
    const pids = plane.pids();
    expect(pids.filter(isAlive)).toHaveLength(4);
    await plane.close();
    expect(pids.filter(isAlive)).toEqual([]);
    expect(existsSync(plane.directory)).toBe(false);
  });

  it('happens by itself when a component does not start, and reports its output', async () => {
    const tools = await findTools();
    await expect(startControlPlane({ tools, schedulerFlags: ['--no-such-flag'] })).rejects.toMatchObject({
      code: 'unavailable',
      message: expect.stringContaining('--no-such-flag'),
    });
  });
});
