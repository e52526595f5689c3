// Three hundred machines with eight pretend GPUs each under the real scheduler and controllers: the placement of
// groups, the status of a group that does not fit, the loss of a machine, and the controller's own process over many
// services at once, with its invariants counted at every change of a pod.

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { crdDirectory } from '@mimo/controller/resources/crd-generate';
import { labels, prepareLabels } from '@mimo/controller/decide/labels';
import { groupPods } from '@mimo/controller/decide/manifests';
import { KubeClient, loadKubeConfig } from '@mimo/controller/kube/client';
import { resourceTypes, type KubeObject, type ObjectManifest } from '@mimo/controller/kube/resource';
import { modelServiceSpec, type ModelService } from '@mimo/controller/resources/resources';
import { pause } from '@mimo/core/process/abort';
import { createLog } from '@mimo/core/process/log';
import type { Bus } from '@mimo/core/bus/bus';
import { createNatsBus } from '@mimo/core/bus/nats/bus';
import { createModelCatalog } from '@mimo/core/bus/nats/model-catalog';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';

import { startChild, type Child } from '../../cli/src/local/child-process.ts';
import { freePorts } from '../../cli/src/local/free-ports.ts';
import { startControlPlane, type ControlPlane } from '../harness/kubernetes/control-plane.ts';
import {
  startPretendNodes,
  type PretendNodes,
  type PretendNodesOptions,
  type PretendPod,
} from '../harness/kubernetes/pretend-nodes.ts';
import { findTools } from '../harness/kubernetes/tools.ts';
import { startTestNats } from '../harness/nats.ts';
import { waitFor } from '../harness/wait-for.ts';
import { chartRights, namespace, serviceAccount } from './controller-stage.ts';

const controllerProgram = join(import.meta.dirname, '../../controller/src/main.ts');
const nodeCount = 300;
const gpusPerNode = 8;
const placingTimeoutMs = 180_000;
/** Beyond all time-outs within a test together: they say what went wrong. */
const longTestMs = 20 * 60_000;
const never = new AbortController().signal;

let plane: ControlPlane;
let client: KubeClient;
let nodes: PretendNodes;

/** Starts a control plane and its machines, for the tests of one `describe`. */
async function startFleet(
  managerFlags: readonly string[],
  options: Pick<PretendNodesOptions, 'count' | 'leaseRenewMs'>,
): Promise<void> {
  plane = await startControlPlane({ tools: await findTools(), controllerManagerFlags: managerFlags });
  await plane.kubectl(['create', 'namespace', namespace]);
  await plane.kubectl(['create', 'serviceaccount', serviceAccount, `--namespace=${namespace}`]);
  await waitFor('the default ServiceAccount', async () =>
    plane.kubectl(['get', 'serviceaccount', 'default', `--namespace=${namespace}`]).then(() => true),
  );
  client = new KubeClient(loadKubeConfig(plane.kubeconfig), { namespace });
  const beginMs = performance.now();
  nodes = await startPretendNodes({
    kubeconfig: plane.kubeconfig,
    namespace,
    gpusPerNode,
    startDelayMs: () => 200,
    endingOf: (pod) =>
      pod.metadata.labels?.[prepareLabels.hash] === undefined
        ? undefined
        : { exitCode: 0, reason: 'Completed' },
    ...options,
  });
  console.log(`${options.count} nodes in ${seconds(beginMs)} s`);
}

async function closeFleet(): Promise<void> {
  await nodes.close();
  client.close();
  await plane.close();
}

function seconds(beginMs: number): string {
  return ((performance.now() - beginMs) / 1000).toFixed(1);
}

function livePods(serviceName?: string): readonly PretendPod[] {
  return [...nodes.pods.list()].filter(
    ({ metadata }) =>
      metadata.deletionTimestamp === undefined &&
      metadata.labels?.[labels.service] !== undefined &&
      (serviceName === undefined || metadata.labels[labels.service] === serviceName),
  );
}

const isRunning = ({ status }: PretendPod): boolean => status?.phase === 'Running';

/** Pods by a label or by their node. */
function groupBy(
  pods: readonly PretendPod[],
  keyOf: (pod: PretendPod) => string | undefined,
): Map<string, PretendPod[]> {
  return Map.groupBy(pods, (pod) => keyOf(pod) ?? '');
}

/** Zone of a node, as pretend-nodes.ts lays them out. */
function zoneOf({ spec }: PretendPod): number {
  return Math.floor(Number(spec.nodeName?.slice('gpu-'.length)) / 100);
}

/** A service as the controller reads it, to have its pods made without a controller. */
function serviceOf(name: string, spec: object): ModelService {
  return {
    metadata: { name, namespace, uid: '00000000-0000-4000-8000-000000000000' },
    spec: modelServiceSpec.parse({
      model: { name, source: { hostPath: '/models/mimo' }, precision: 'bf16' },
      resources: { accelerators: 1, cpu: '1', memory: '1Gi' },
      ...spec,
    }),
  } as ModelService;
}

const workerSettings = {
  image: 'registry.example/worker:1',
  cudaImage: 'registry.example/worker-cuda:1',
  imagePullPolicy: 'IfNotPresent',
  natsUrl: 'nats://nats.example:4222',
  cache: { kind: 'pod' },
} as const;

async function createGroups(made: ModelService, count: number): Promise<void> {
  const manifests = Array.from({ length: count }, (_, index) =>
    groupPods(
      made,
      { group: `${made.metadata.name}-${index}`, revision: '1', index, groupToken: 't', life: '1' },
      workerSettings,
    ),
  ).flat() as unknown as readonly (ObjectManifest & { readonly spec: unknown })[];
  const rest = [...manifests];
  await Promise.all(
    Array.from({ length: 16 }, async () => {
      for (let manifest = rest.shift(); manifest !== undefined; manifest = rest.shift()) {
        // Its owner does not exist, and what has no owner is collected.
        const { ownerReferences: _, ...metadata } = manifest.metadata;
        await client.create(resourceTypes.pods, { ...manifest, metadata }, never);
      }
    }),
  );
}

async function describePod(name: string): Promise<string> {
  return plane.kubectl(['describe', 'pod', name, `--namespace=${namespace}`]);
}

async function deletePods(): Promise<void> {
  await plane.kubectl(['delete', 'pods', '--all', '--wait=false', `--namespace=${namespace}`]);
  await waitFor('all pods to be gone', () => [...nodes.pods.list()].length === 0, placingTimeoutMs);
}

const isReady = ({ status }: PretendPod): boolean =>
  status?.conditions?.some((condition) => condition.type === 'Ready' && condition.status === 'True') ?? false;

/** How many ModelServices have a condition that is true. */
async function conditions(type: string): Promise<number> {
  const { items } = await client.list<
    KubeObject & { status?: { conditions?: readonly { type: string; status: string }[] } }
  >(resourceTypes.modelServices, {}, never);
  return items.filter(({ status }) =>
    status?.conditions?.some((condition) => condition.type === type && condition.status === 'True'),
  ).length;
}

/** The queues of all models, as their dispatchers would publish them: every group that runs is routable. */
class PretendDispatchers {
  readonly #queue: Bus;
  readonly #services: readonly string[];
  readonly #closing = new AbortController();
  readonly #running: Promise<unknown>;
  readonly #marks = new Map<string, ReadonlySet<string>>();
  readonly #beganAtMs = Date.now();
  #waitingTokens = 0;

  constructor(queue: Bus, services: readonly string[]) {
    this.#queue = queue;
    this.#services = services;
    this.#running = Promise.all([
      this.#publishAll(),
      ...services.map(async (name) => {
        for await (const marks of queue.drainMarks.follow(name, this.#closing.signal)) {
          this.#marks.set(name, new Set(marks.keys()));
          this.#publish(name);
        }
      }),
    ]);
  }

  /** What waits in every queue, from now on. */
  load(waitingTokens: number): void {
    this.#waitingTokens = waitingTokens;
    for (const name of this.#services) {
      this.#publish(name);
    }
  }

  isMarked(name: string, group: string): boolean {
    return this.#marks.get(name)?.has(group) ?? false;
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await this.#running;
  }

  async #publishAll(): Promise<void> {
    while (!this.#closing.signal.aborted) {
      for (const name of this.#services) {
        this.#publish(name);
      }
      await pause(1_000, this.#closing.signal);
    }
  }

  #publish(model: string): void {
    const groups = groupBy(livePods(model), ({ metadata }) => metadata.labels?.[labels.group]);
    const complete = [...groups]
      .filter(([, pods]) => pods.length === Number(pods[0]?.metadata.labels?.[labels.groupPods]))
      .filter(([, pods]) => pods.every(isRunning))
      .map(([group]) => group);
    const isBusy = this.#waitingTokens > 0;
    const inFlightTokens = isBusy ? 5_000 : 0;
    this.#queue.queueStates.publish({
      model,
      dispatcherEpoch: 1,
      waitingRequests: isBusy ? 40 : 0,
      waitingTokens: this.#waitingTokens,
      runningRequests: isBusy ? complete.length : 0,
      parkedRequests: 0,
      inFlightTokens: complete.length * inFlightTokens,
      oldestWaitingMs: isBusy ? Date.now() - this.#beganAtMs : 0,
      readyGroups: complete.length,
      slots: complete.length * 16,
      arrivedTokens: 0,
      endedTokens: 0,
      waitingFor: [],
      groups: complete.map((group) => ({
        group,
        incarnation: '1',
        revision: '',
        identity: '',
        routable: true,
        draining: this.isMarked(model, group),
        slots: 16,
        inFlightRequests: isBusy ? 1 : 0,
        inFlightTokens,
      })),
    });
  }
}

describe('three hundred machines', () => {
  // None is ever lost, so their leases need not be renewed: three hundred of them are thirty requests a second.
  beforeAll(async () =>
    startFleet(['--node-monitor-grace-period=1h'], { count: nodeCount, leaseRenewMs: 300_000 }),
  );
  afterAll(closeFleet);
  afterEach(deletePods);

  it('keeps the ranks of a group in one zone and spreads the groups over zones and machines', async () => {
    await createGroups(serviceOf('spread', { tensorParallel: 4, placement: 'spread' }), 60);
    await waitFor('240 pods to run', () => livePods().filter(isRunning).length === 240, placingTimeoutMs);
    const groups = groupBy(livePods(), ({ metadata }) => metadata.labels?.[labels.group]);
    const inOneZone = [...groups.values()].filter((pods) => new Set(pods.map(zoneOf)).size === 1);
    console.log(`${inOneZone.length} of 60 groups within one zone`);
    expect(inOneZone.length).toBeGreaterThanOrEqual(57);
    const leaders = livePods().filter(({ metadata }) => metadata.labels?.[labels.rank] === '0');
    expect(new Set(leaders.map(({ spec }) => spec.nodeName)).size).toBe(60);
    const leadersOfZone = [...Map.groupBy(leaders, zoneOf).values()].map((pods) => pods.length);
    console.log(`leaders by zone: ${leadersOfZone.join(', ')}`);
    // A leader that comes up after its other ranks follows them: no more than a rough balance is promised.
    expect(Math.min(...leadersOfZone)).toBeGreaterThanOrEqual(10);
  });

  it(
    'fills 300 machines with 600 groups of four GPUs and reports why number 601 waits',
    async () => {
      const four = serviceOf('four', { tensorParallel: 4, placement: 'pod' });
      const beginMs = performance.now();
      await createGroups(four, 600);
      await waitFor('600 pods to run', () => livePods().filter(isRunning).length === 600, placingTimeoutMs);
      console.log(`600 groups placed and running in ${seconds(beginMs)} s`);
      const perNode = [...groupBy(livePods(), ({ spec }) => spec.nodeName).values()].map(
        (pods) => pods.length,
      );
      expect(perNode).toEqual(Array.from({ length: nodeCount }, () => 2));

      await createGroups(serviceOf('late', { tensorParallel: 4, placement: 'pod' }), 1);
      await waitFor('the scheduler', async () =>
        (await describePod('late-0-0')).includes('FailedScheduling'),
      );
      expect(await describePod('late-0-0')).toContain(
        '0/300 nodes are available: 300 Insufficient nvidia.com/gpu.',
      );

      // One group ends, and the one that waits has its place.
      await client.delete(resourceTypes.pods, 'four-7-0', {}, never);
      await waitFor('the late one to run', () => livePods('late').some(isRunning), placingTimeoutMs);
    },
    longTestMs,
  );

  describe('the controller as a process, over forty services', () => {
    const names = Array.from({ length: 40 }, (_, index) => `svc-${String(index).padStart(2, '0')}`);
    const maxGroups = 3;
    const ranks = 2;
    let directory: string;
    let controller: Child;
    let dispatchers: PretendDispatchers;
    const closes: (() => Promise<unknown>)[] = [];
    beforeAll(async () => {
      directory = await mkdtemp(join(tmpdir(), 'mimo-fleet-'));
      closes.push(async () => rm(directory, { recursive: true, force: true }));
      await plane.kubectl(['apply', '--filename', crdDirectory]);
      await plane.kubectl(['wait', '--for=condition=Established', '--timeout=60s', 'crd', '--all']);
      await plane.kubectl(['apply', '--filename=-'], await chartRights((await findTools()).helm));
      const nats = await startTestNats({ storeDirectory: directory, port: 0 });
      closes.push(async () => nats.close());
      const log = createLog({ process: 'test', level: 'silent' });
      const queueOptions = { servers: [nats.url], clientName: 'test', replicas: 1, log };
      const queue = createNatsBus({ ...queueOptions, recordMaxAgeMs: 3_600_000 });
      closes.push(async () => queue.close());
      await queue.opened(AbortSignal.timeout(30_000));
      const catalog = createModelCatalog(queue.link, queueOptions);
      for (const name of names) {
        await catalog.publish(
          { name, files: new Map([['config.json', Buffer.from('{}')]]), identity: '' },
          never,
        );
      }
      dispatchers = new PretendDispatchers(queue, names);
      closes.push(async () => dispatchers.close());
      const [port = 0] = await freePorts(1);
      controller = await startChild({
        name: 'controller',
        command: [process.execPath, controllerProgram],
        logFile: join(directory, 'controller.log'),
        env: {
          MIMO_CONTROLLER_NAMESPACE: namespace,
          MIMO_CONTROLLER_KUBECONFIG: await plane.kubeconfigForServiceAccount(namespace, serviceAccount),
          MIMO_CONTROLLER_NATS_URLS: nats.url,
          MIMO_CONTROLLER_WORKER_IMAGE: 'registry.example/worker:1',
          MIMO_CONTROLLER_LISTEN: `127.0.0.1:${port}`,
        },
      });
      closes.push(async () => controller.stop(20_000));
      await waitFor(
        'the controller',
        async () => (await fetch(`http://127.0.0.1:${port}/readyz`)).ok,
        60_000,
      );
    });
    afterAll(async () => {
      for (const close of closes.toReversed()) {
        await close();
      }
    });

    it(
      'wakes all of them at once, returns all to zero, and breaks no rule on the way',
      async () => {
        const broken: string[] = [];
        const deleted = new Set<string>();
        let changes = 0;
        const stopCounting = nodes.pods.onChange((key) => {
          changes += 1;
          const pod = nodes.pods.get(key);
          const service = pod?.metadata.labels?.[labels.service];
          if (pod === undefined || service === undefined) {
            return;
          }
          const groups = groupBy(livePods(service), ({ metadata }) => metadata.labels?.[labels.group]);
          if (groups.size > maxGroups) {
            broken.push(`${service} has ${groups.size} groups, more than ${maxGroups}`);
          }
          const group = pod.metadata.labels?.[labels.group] ?? '';
          if (pod.metadata.deletionTimestamp !== undefined && !deleted.has(pod.metadata.uid)) {
            deleted.add(pod.metadata.uid);
            if (!dispatchers.isMarked(service, group)) {
              broken.push(`${pod.metadata.name} was deleted although its group was not marked as draining`);
            }
          }
        });

        for (const name of names) {
          await client.create(
            resourceTypes.modelServices,
            {
              apiVersion: resourceTypes.modelServices.apiVersion,
              kind: resourceTypes.modelServices.kind,
              metadata: { name },
              spec: {
                ...serviceOf(name, { tensorParallel: ranks, placement: 'spread' }).spec,
                scaling: {
                  min: 0,
                  max: maxGroups,
                  targetWaitSeconds: 10,
                  groupTokensPerSecond: 1000,
                  startUpSeconds: 1,
                  memorySeconds: 60,
                  scaleToZeroAfterSeconds: 0,
                },
                drainSeconds: 60,
              },
            },
            never,
          );
        }
        await waitFor(
          'all models to be found',
          async () => (await conditions('ModelFound')) === names.length,
          180_000,
        );
        expect(livePods()).toHaveLength(0);

        const upMs = performance.now();
        dispatchers.load(100_000);
        const wanted = names.length * maxGroups * ranks;
        await waitFor(
          'all groups to serve',
          () => livePods().filter(isReady).length === wanted,
          placingTimeoutMs,
        );
        console.log(
          `${names.length} services from 0 to ${maxGroups} groups, ${wanted} pods Ready, in ${seconds(upMs)} s`,
        );
        expect(deleted.size).toBe(0);
        // Events are sent in the background.
        const scaledUp = async (): Promise<number> => {
          const events = await plane.kubectl(['get', 'events', `--namespace=${namespace}`, '--no-headers']);
          return events
            .split('\n')
            .filter((line) => line.includes(' Scaled ') && line.includes(`0 -> ${maxGroups}`)).length;
        };
        await waitFor('an event of each', async () => (await scaledUp()) >= names.length, 60_000);
        expect(await scaledUp()).toBe(names.length);

        const downMs = performance.now();
        dispatchers.load(0);
        await waitFor('all groups to go', () => livePods().length === 0, 240_000);
        console.log(`${names.length} services back to zero in ${seconds(downMs)} s`);
        await plane.kubectl([
          'delete',
          'modelservices',
          '--all',
          '--timeout=120s',
          `--namespace=${namespace}`,
        ]);
        await waitFor('all pods to be gone', () => [...nodes.pods.list()].length === 0, 60_000);
        stopCounting();
        console.log(`${changes} changes of pods looked at, ${deleted.size} pods deleted`);
        expect(deleted.size).toBe(wanted);
        expect(broken).toEqual([]);
        await controller.stop(20_000);
        expect(await controller.exited).toEqual({ code: 0, signal: null });
      },
      longTestMs,
    );
  });
});

describe('twelve machines, watched closely', () => {
  beforeAll(async () =>
    startFleet(['--node-monitor-grace-period=16s', '--node-monitor-period=2s'], {
      count: 12,
      leaseRenewMs: 2_000,
    }),
  );
  afterAll(closeFleet);

  it('removes only the groups of a lost machine, and tolerates its return', async () => {
    await createGroups(serviceOf('four', { tensorParallel: 4, placement: 'pod' }), 24);
    await waitFor('24 pods to run', () => livePods().filter(isRunning).length === 24, placingTimeoutMs);
    const [victim = ''] = nodes.names;
    const before = livePods().map(({ metadata }) => metadata.name);
    const onVictim = livePods().filter(({ spec }) => spec.nodeName === victim);
    expect(onVictim).toHaveLength(2);
    const beginMs = performance.now();
    nodes.stopNode(victim);
    await waitFor('its pods to be given up', () => livePods().length === before.length - 2, placingTimeoutMs);
    console.log(`pods of a lost machine given up after ${seconds(beginMs)} s`);
    expect(livePods().some(({ spec }) => spec.nodeName === victim)).toBe(false);
    // Nobody can say that they have stopped: they are not gone.
    expect([...nodes.pods.list()].filter(({ spec }) => spec.nodeName === victim)).toHaveLength(2);
    await nodes.startNode(victim);
    await waitFor('its pods to be gone', () => [...nodes.pods.list()].length === before.length - 2);
    expect(await plane.kubectl(['get', 'nodes', '--no-headers'])).not.toContain('NotReady');
  });
});
