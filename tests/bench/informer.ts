// `npm run bench -- informer [--pods N]`: how long the controller's cache takes to fill from a real API server that
// holds N worker pods, how much memory it needs, and how soon it reports a change. Builds Kubernetes if the cache has
// none, starts a control plane, and creates the pods through its API.

import { parseArgs } from 'node:util';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';

import { KubeClient, loadKubeConfig } from '@mimo/controller/kube/client';
import { startInformer } from '@mimo/controller/kube/informer';
import { keyOf, resourceTypes, type KubeObject, type ObjectManifest } from '@mimo/controller/kube/resource';
import { createLog } from '@mimo/core/process/log';

import { createNamespace } from '../harness/kubernetes/config-maps.ts';
import { startControlPlane } from '../harness/kubernetes/control-plane.ts';
import { findTools } from '../harness/kubernetes/tools.ts';
import { waitFor } from '../harness/wait-for.ts';

const namespace = 'bench';
const creators = 32;
const changes = 200;

/** About as large as a worker's pod is; bound to no node, so that nobody else changes it. */
function pod(index: number): ObjectManifest {
  const service = `chat-${index % 100}`;
  return {
    apiVersion: 'v1',
    kind: 'Pod',
    metadata: {
      name: `${service}-${index}`,
      labels: {
        'mimo-cluster.dev/service': service,
        'mimo-cluster.dev/group': `${service}-${Math.floor(index / 2)}`,
      },
    },
    spec: {
      schedulerName: 'nobody',
      readinessGates: [{ conditionType: 'mimo-cluster.dev/routable' }],
      containers: [
        {
          name: 'rank-0',
          image: 'mimo-cluster/worker:bench',
          env: Array.from({ length: 20 }, (_, at) => ({
            name: `MIMO_WORKER_SETTING_${at}`,
            value: 'a value',
          })),
          resources: { limits: { cpu: '4', memory: '16Gi', 'nvidia.com/gpu': '1' } },
        },
      ],
    },
  };
}

async function createPods(client: KubeClient, count: number, signal: AbortSignal): Promise<void> {
  let next = 0;
  await Promise.all(
    Array.from({ length: creators }, async () => {
      while (next < count) {
        next += 1;
        await client.create(resourceTypes.pods, pod(next), signal);
      }
    }),
  );
}

/** What is reachable: garbage is collected first. */
function heapBytes(): number {
  setFlagsFromString('--expose-gc');
  (runInNewContext('gc') as () => void)();
  return process.memoryUsage().heapUsed;
}

/** Runs the benchmark. */
export async function run(args: readonly string[], signal: AbortSignal): Promise<void> {
  const { values } = parseArgs({ args: [...args], options: { pods: { type: 'string', default: '2000' } } });
  const count = Number(values.pods);
  const plane = await startControlPlane({ tools: await findTools({ signal }) });
  const writer = await createNamespace(plane.kubeconfig, namespace);
  const reader = new KubeClient(loadKubeConfig(plane.kubeconfig), { namespace });
  try {
    await waitFor('the default service account', async () =>
      plane.kubectl(['get', 'serviceaccount', 'default', `--namespace=${namespace}`]).then(() => true),
    );
    console.log(`creating ${count} pods`);
    await createPods(writer, count, signal);

    const heapBefore = heapBytes();
    const begin = performance.now();
    const informer = startInformer<KubeObject>({
      client: reader,
      type: resourceTypes.pods,
      parse: (object) => object,
      index: ({ metadata }) => metadata.labels?.['mimo-cluster.dev/service'],
      log: createLog({ process: 'bench', level: 'warn' }),
    });
    await informer.whenSynced(signal);
    const syncMs = performance.now() - begin;
    const heapMebibytes = (heapBytes() - heapBefore) / 2 ** 20;

    // From sending a change to hearing of it through the watch; the answer to the change comes at about the same time.
    const told = new Map<string, (atMs: number) => void>();
    informer.onChange((key) => told.get(key)?.(performance.now()));
    const lagMs: number[] = [];
    for (const object of [...informer.list()].slice(0, changes)) {
      const { promise, resolve } = Promise.withResolvers<number>();
      told.set(keyOf(object), resolve);
      const changed = { metadata: { annotations: { changed: 'yes' } } };
      const sentMs = performance.now();
      await writer.patch(resourceTypes.pods, object.metadata.name, changed, {}, signal);
      lagMs.push((await promise) - sentMs);
    }
    const sorted = lagMs.toSorted((a, b) => a - b);
    const report = {
      bench: 'informer',
      pods: [...informer.list()].length,
      syncMs: Math.round(syncMs),
      heapMebibytes: Math.round(heapMebibytes * 10) / 10,
      toldAfterSentP50Ms: Math.round((sorted[Math.floor(sorted.length / 2)] ?? 0) * 100) / 100,
      toldAfterSentWorstMs: Math.round((sorted.at(-1) ?? 0) * 100) / 100,
      node: process.version,
    };
    await informer.close();
    console.log(
      `${report.pods} pods: filled in ${report.syncMs} ms, ${report.heapMebibytes} MiB of heap; ` +
        `a change is told ${report.toldAfterSentP50Ms} ms after it was sent`,
    );
    console.log(JSON.stringify(report));
  } finally {
    reader.close();
    writer.close();
    await plane.close();
  }
}
