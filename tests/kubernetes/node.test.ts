// The cluster that the other tests of this layer use: a real kubelet, containerd, kube-proxy and DNS in a box, and a
// check that it leaves nothing behind.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync, existsSync, globSync } from 'node:fs';
import { basename, dirname } from 'node:path';

import { isUnmounted, type ApiPod } from '@mimo/controller/observe/observe';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { startRealCluster, type RealCluster } from '../harness/kubernetes/cluster.ts';
import { cut, delay, heal, roundTripMs } from '../harness/kubernetes/network-faults.ts';
import { createRunDirectory } from '../harness/kubernetes/run-directory.ts';
import { findTools, type KubernetesTools } from '../harness/kubernetes/tools.ts';
import { waitFor } from '../harness/wait-for.ts';

/** The traces of one run, found by the name of its directory; other runs may be active. */
const leftovers = (path: string): readonly string[] => [
  ...globSync(path),
  ...globSync(`/sys/fs/cgroup/*/${basename(path)}*`),
];
const overcommit = (): string => readFileSync('/proc/sys/vm/overcommit_memory', 'utf8');

describe('a real cluster of two nodes', () => {
  const before = overcommit();
  let tools: KubernetesTools;
  let cluster: RealCluster;
  beforeAll(async () => {
    tools = await findTools();
    cluster = await startRealCluster({
      tools,
      nodes: 2,
      gpusPerNode: 4,
      onProgress: (line) => console.error(line),
    });
  });
  afterAll(async () => {
    await cluster.close();
  });

  const shell = (pod: string, script: string): Promise<string> =>
    cluster.kubectl('exec', pod, '--', 'busybox', 'sh', '-c', script);
  /** What web-0 hears from the Service of web-1 within two seconds. */
  const askWeb = async (): Promise<string | undefined> =>
    shell('web-0', 'busybox timeout 2 busybox wget -qO- http://web.default.svc.cluster.local/name').catch(
      () => undefined,
    );

  it("runs pods with GPUs that resolve each other's names across nodes", async () => {
    for (const [index, { name }] of cluster.nodes.entries()) {
      await cluster.apply(webPod(`web-${index}`, name));
    }
    await cluster.apply({
      apiVersion: 'v1',
      kind: 'Service',
      metadata: { name: 'web', namespace: 'default' },
      spec: { selector: { app: 'web-1' }, ports: [{ port: 80, targetPort: 8080 }] },
    });
    await cluster.kubectl('wait', '--for=condition=Ready', 'pod/web-0', 'pod/web-1', '--timeout=60s');

    await waitFor('the Service to answer in a pod of the other node', async () => {
      const answer = await shell('web-0', 'busybox wget -qO- http://web.default.svc.cluster.local/name');
      return answer.trim() === 'web-1';
    });
    const address = await cluster.kubectl('get', 'service', 'web', '-o', 'jsonpath={.spec.clusterIP}');
    const { port } = await cluster.forward({ host: address, port: 80 });
    expect(await (await fetch(`http://127.0.0.1:${port}/name`)).text()).toBe('web-1\n');
    expect((await shell('web-0', 'echo $NVIDIA_VISIBLE_DEVICES')).split(',')).toHaveLength(3);
    expect(cluster.gpus[0]?.allocations).toHaveLength(1);
  });

  it("reports a pod's missing volumes before any container is created", async () => {
    await cluster.apply({
      apiVersion: 'v1',
      kind: 'Pod',
      metadata: { name: 'lost', namespace: 'default' },
      spec: {
        containers: [
          {
            name: 'lost',
            image: 'registry.k8s.io/pause:mimo-tests',
            imagePullPolicy: 'Never',
            // The kubelet waits only for volumes that a container mounts.
            volumeMounts: [{ name: 'checkpoint', mountPath: '/models' }],
          },
        ],
        volumes: [{ name: 'checkpoint', hostPath: { path: '/no/such/model', type: 'Directory' } }],
      },
    });
    const waits = async (pod: string): Promise<boolean> =>
      isUnmounted(JSON.parse(await cluster.kubectl('get', 'pod', pod, '-o', 'json')) as ApiPod);
    await waitFor('the pod to be waiting', () => waits('lost'));
    expect(await waits('web-0')).toBe(false);
    await cluster.kubectl('delete', 'pod', 'lost', '--grace-period=0', '--force');
  });

  it('offers one GPU fewer while one is unhealthy', async () => {
    const offered = (): Promise<string> =>
      cluster.kubectl(
        'get',
        'node',
        'node-1',
        '-o',
        String.raw`jsonpath={.status.allocatable.nvidia\.com/gpu}`,
      );
    expect(await offered()).toBe('4');
    cluster.gpus[0]?.setHealthy(3, false);
    await waitFor('three GPUs', async () => (await offered()) === '3');
    cluster.gpus[0]?.setHealthy(3, true);
    await waitFor('four GPUs', async () => (await offered()) === '4');
  });

  it('keeps its pods while the kubelet, containerd and etcd are killed and restarted', async () => {
    const [node] = cluster.nodes;
    const registrations = cluster.gpus[0]?.registrations ?? 0;
    const restarts = '-o=jsonpath={.items[*].status.containerStatuses[*].restartCount}';
    await node?.kubelet.kill();
    await node?.containerd.kill();
    await cluster.controlPlane.etcd.kill();
    await cluster.controlPlane.restartEtcd();
    await node?.restartContainerd();
    await node?.restartKubelet();
    await cluster.controlPlane.ready();
    await waitFor('the pods to answer', async () => (await shell('web-0', 'echo here')) === 'here\n', 60_000);
    expect(await cluster.kubectl('get', 'pods', restarts)).toBe('0 0');
    await waitFor(
      'the GPUs to be offered again',
      async () =>
        (cluster.gpus[0]?.registrations ?? 0) > registrations &&
        (await cluster.kubectl(
          'get',
          'node',
          'node-1',
          '-o',
          String.raw`jsonpath={.status.allocatable.nvidia\.com/gpu}`,
        )) === '4',
      60_000,
    );
  });

  it('enforces network policies, which block no probe', async () => {
    const policy = {
      apiVersion: 'networking.k8s.io/v1',
      kind: 'NetworkPolicy',
      metadata: { name: 'web', namespace: 'default' },
    };
    const spec = { podSelector: { matchLabels: { app: 'web-1' } }, policyTypes: ['Ingress'] };
    await waitFor('the Service to answer', async () => (await askWeb()) === 'web-1\n');
    await cluster.apply({ ...policy, spec });
    await waitFor('all connections to be rejected', async () => (await askWeb()) === undefined);
    for (const app of ['web-1', 'another']) {
      await cluster.apply({ ...policy, spec: { ...spec, ingress: [holeFor(app)] } });
      expect(await askWeb()).toBe(undefined);
    }
    // By this time probes that do not get through would have failed three times.
    const path = 'jsonpath={.status.conditions[?(@.type=="Ready")].status}';
    await waitFor(
      'the pod to be ready still',
      async () => (await cluster.kubectl('get', 'pod', 'web-1', '-o', path)) === 'True',
    );
    await cluster.apply({ ...policy, spec: { ...spec, ingress: [holeFor('web-0')] } });
    await waitFor('the other pod to be allowed', async () => (await askWeb()) === 'web-1\n');
    await cluster.kubectl('delete', 'networkpolicy', 'web');
  });

  it('marks a node that is cut off as lost, and accepts it again', async () => {
    const [, node] = cluster.nodes;
    if (node === undefined) {
      throw new Error('there is no second node');
    }
    const path = 'jsonpath={.status.conditions[?(@.type=="Ready")].status}';
    const ready = (): Promise<string> => cluster.kubectl('get', 'node', node.name, '-o', path);
    await cut(node.box, cluster.controlPlaneBox);
    await waitFor('the node to count as lost', async () => (await ready()) === 'Unknown', 60_000);
    await heal(node.box, cluster.controlPlaneBox);
    await waitFor('the node to be back', async () => (await ready()) === 'True', 60_000);
    expect(await ready()).toBe('True');
  });

  it('delays the network of a node for as long as a test needs it', async () => {
    const [near, far] = cluster.nodes;
    if (near === undefined || far === undefined) {
      throw new Error('there are no two nodes');
    }
    const shortMs = await roundTripMs(near.box, far.box);
    const line = await delay(far.box, { program: tools.delay, delayMs: 100, jitterMs: 20 });
    const longMs = await roundTripMs(near.box, far.box);
    expect(longMs).toBeGreaterThan(2 * (100 - 20));
    // Its endpoint may be away for some seconds still after the partition before.
    await waitFor('the Service to answer over the long line', async () => (await askWeb()) === 'web-1\n');
    await line.end();
    expect(await roundTripMs(near.box, far.box)).toBeLessThan(longMs / 2);
    expect(shortMs).toBeLessThan(longMs / 2);
  });

  it('leaves nothing behind', async () => {
    const path = dirname(cluster.sharedDirectory);
    expect(leftovers(path)).not.toEqual([]);
    await cluster.close();
    expect(leftovers(path)).toEqual([]);
    expect(overcommit()).toBe(before);
  });
});

describe('a run that is killed', () => {
  const script = `
    import { createRunDirectory } from './tests/harness/kubernetes/run-directory.ts';
    import { createBox } from './tests/harness/kubernetes/box.ts';
    const run = await createRunDirectory();
    await createBox({ run, name: 'box', address: '198.18.0.1' });
    console.log(run.path);
    setInterval(() => {}, 1000);
  `;
  const start = async () => {
    const child = spawn(process.execPath, ['--input-type=module-typescript', '-e', script], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    const [output] = (await once(child.stdout, 'data')) as [Buffer];
    return { child, path: output.toString().trim() };
  };

  it('is cleaned up at once', async () => {
    const { child, path } = await start();
    expect(existsSync(path)).toBe(true);
    child.kill('SIGKILL');
    await waitFor('everything to be removed', () => leftovers(path).length === 0);
  });

  it('is cleaned up by the next run if its cleaner was killed too', async () => {
    const { child, path } = await start();
    const cleaners = globSync('/proc/[0-9]*/cmdline').filter((file) => {
      const text = readFileOr(file);
      return text.startsWith('/bin/sh') && text.includes(path);
    });
    expect(cleaners).toHaveLength(1);
    process.kill(Number(cleaners[0]?.split('/')[2]), 'SIGKILL');
    child.kill('SIGKILL');
    await once(child, 'exit');
    expect(existsSync(path)).toBe(true);
    const next = await createRunDirectory();
    expect(existsSync(path)).toBe(false);
    await next.close();
    expect(leftovers(path)).toEqual([]);
  });
});

function readFileOr(file: string): string {
  try {
    return readFileSync(file, 'utf8');
  } catch {
    return '';
  }
}

/** A rule that lets the pods of an app in, by the pod's port. */
function holeFor(app: string): unknown {
  return { from: [{ podSelector: { matchLabels: { app } } }], ports: [{ port: 8080 }] };
}

function webPod(name: string, node: string): unknown {
  return {
    apiVersion: 'v1',
    kind: 'Pod',
    metadata: { name, namespace: 'default', labels: { app: name } },
    spec: {
      nodeSelector: { 'kubernetes.io/hostname': node },
      terminationGracePeriodSeconds: 1,
      containers: [
        {
          name: 'web',
          image: 'registry.k8s.io/pause:mimo-tests',
          imagePullPolicy: 'Never',
          command: ['busybox', 'sh', '-c', 'echo $HOSTNAME > /www/name; busybox httpd -f -p 8080 -h /www'],
          volumeMounts: [{ name: 'www', mountPath: '/www' }],
          resources: { limits: { 'nvidia.com/gpu': '3' } },
          readinessProbe: { httpGet: { port: 8080, path: '/name' }, periodSeconds: 1 },
          securityContext: {
            runAsNonRoot: true,
            readOnlyRootFilesystem: true,
            allowPrivilegeEscalation: false,
            capabilities: { drop: ['ALL'] },
            seccompProfile: { type: 'RuntimeDefault' },
          },
        },
      ],
      volumes: [{ name: 'www', emptyDir: {} }],
    },
  };
}
