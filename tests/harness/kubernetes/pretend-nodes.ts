// Machines with GPUs that do not exist, hundreds of them, for a real scheduler and real controllers: nodes that renew
// their leases, and pods of one namespace that become Running, Ready and gone as a kubelet would report them. After
// KWOK's idea. Owns a kubelet's reports and their times; no container runs, so no address answers.

import { KubeClient, loadKubeConfig } from '@mimo/controller/kube/client';
import { startInformer, type Informer } from '@mimo/controller/kube/informer';
import { keyOf, resourceTypes, type KubeObject, type ResourceType } from '@mimo/controller/kube/resource';
import { WorkQueue } from '@mimo/controller/kube/work-queue';
import { pause } from '@mimo/core/process/abort';
import { createLog } from '@mimo/core/process/log';

/** The resource by which pods ask for GPUs. */
const gpuResource = 'nvidia.com/gpu';

const nodeType: ResourceType = { apiVersion: 'v1', kind: 'Node', plural: 'nodes', scope: 'cluster' };
const nodeLeaseNamespace = 'kube-node-lease';
/** Requests under way at once: more only queue up in the API server. */
const takers = 16;
const retry = { retryMinMs: 20, retryMaxMs: 1_000 };
const nodesPerZone = 100;
const nodesPerRack = 16;

/** A pod as far as a kubelet looks at it. */
export interface PretendPod extends KubeObject {
  readonly spec: {
    readonly nodeName?: string;
    readonly containers: readonly { readonly name: string; readonly image: string }[];
    readonly initContainers?: readonly { readonly name: string; readonly image: string }[];
    readonly readinessGates?: readonly { readonly conditionType: string }[];
  };
  readonly status?: {
    readonly phase?: string;
    readonly podIP?: string;
    readonly startTime?: string;
    readonly conditions?: readonly PodCondition[];
  };
}

interface PodCondition {
  readonly type: string;
  readonly status: string;
  readonly reason?: string;
  readonly message?: string;
  readonly lastTransitionTime?: string;
}

/** How all containers of a pod end. */
export interface Ending {
  readonly exitCode: number;
  /** Such as `Completed`, `Error` or `OOMKilled`. */
  readonly reason: string;
  /** What a container that failed has left as its last words. */
  readonly message?: string;
}

export interface PretendNodesOptions {
  /** Of an administrator: nodes play every kubelet. */
  readonly kubeconfig: string;
  /** Whose pods are taken up. */
  readonly namespace: string;
  readonly count: number;
  readonly gpusPerNode: number;
  /** From a pod's binding to Running; default none. */
  readonly startDelayMs?: (pod: PretendPod) => number;
  /** From a pod's deletion to its end; default none. */
  readonly stopDelayMs?: (pod: PretendPod) => number;
  /** Pods that end by themselves once they have started; default none does. */
  readonly endingOf?: (pod: PretendPod) => Ending | undefined;
  /**
   * Well below the controller-manager's grace period, at whose end a node counts as lost; on a busy machine more so.
   */
  readonly leaseRenewMs?: number;
}

/** A fleet of nodes. Close it; its nodes and pods stay in the API server as they are. */
export interface PretendNodes {
  readonly names: readonly string[];
  /** The namespace's pods, as of the last event. */
  readonly pods: Informer<PretendPod>;
  /** Ends all containers of a pod, as a crash does. */
  end(podName: string, ending: Ending): void;
  /** The machine is cut off: no lease, no word of its pods, no obedience. */
  stopNode(name: string): void;
  /** It is back, with its pods as it left them. */
  startNode(name: string): Promise<void>;
  close(): Promise<void>;
}

/** What a kubelet would say of a pod on its node; `undefined` if it has said so already. Pure. */
export function planPodStatus(
  pod: PretendPod,
  {
    ending,
    podIP,
    now,
  }: { readonly ending: Ending | undefined; readonly podIP: string; readonly now: string },
): (NonNullable<PretendPod['status']> & Readonly<Record<string, unknown>>) | undefined {
  const phase = ending === undefined ? 'Running' : ending.exitCode === 0 ? 'Succeeded' : 'Failed';
  const before = pod.status?.conditions ?? [];
  const isTrue = (type: string): boolean =>
    before.some((entry) => entry.type === type && entry.status === 'True');
  const isReady =
    ending === undefined &&
    (pod.spec.readinessGates ?? []).every(({ conditionType }) => isTrue(conditionType));
  if (pod.status?.phase === phase && isTrue('Ready') === isReady) {
    return undefined;
  }
  const conditions: Readonly<Record<string, boolean>> = {
    Initialized: true,
    PodScheduled: true,
    ContainersReady: ending === undefined,
    Ready: isReady,
  };
  const startTime = pod.status?.startTime ?? now;
  const state =
    ending === undefined
      ? { running: { startedAt: startTime } }
      : { terminated: { ...ending, startedAt: startTime, finishedAt: now } };
  const initDone = {
    terminated: { exitCode: 0, reason: 'Completed', startedAt: startTime, finishedAt: startTime },
  };
  return {
    phase,
    podIP,
    podIPs: [{ ip: podIP }],
    startTime,
    // Others' conditions, such as a readiness gate's, stay as they are: a merge patch gives the whole list.
    conditions: [
      ...before.filter(({ type }) => !(type in conditions)),
      ...Object.entries(conditions).map(([type, value]) => {
        const status = value ? 'True' : 'False';
        const old = before.find((entry) => entry.type === type);
        const since = old?.status === status ? old.lastTransitionTime : undefined;
        return { type, status, lastTransitionTime: since ?? now };
      }),
    ],
    initContainerStatuses: (pod.spec.initContainers ?? []).map((container) =>
      statusOf(container, initDone, true),
    ),
    containerStatuses: pod.spec.containers.map((container) =>
      statusOf(container, state, ending === undefined),
    ),
  };
}

function statusOf(
  { name, image }: { readonly name: string; readonly image: string },
  state: object,
  ready: boolean,
): object {
  return { name, image, imageID: 'pretend', ready, started: ready, restartCount: 0, state };
}

/** Creates the nodes, starts their leases, and takes up what is bound to them; returns when all nodes are there. */
export async function startPretendNodes(options: PretendNodesOptions): Promise<PretendNodes> {
  const nodes = new Fleet(options);
  try {
    await nodes.start();
    return nodes;
  } catch (error) {
    await nodes.close();
    throw error;
  }
}

class Fleet implements PretendNodes {
  readonly names: readonly string[];
  readonly pods: Informer<PretendPod>;
  readonly #options: PretendNodesOptions;
  readonly #client: KubeClient;
  readonly #leases: KubeClient;
  readonly #work = new WorkQueue(retry);
  readonly #closing = new AbortController();
  readonly #running: Promise<void>[] = [];
  readonly #stopped = new Set<string>();
  /** By uid. When each pod may start or go, its address, and its end if it had one. */
  readonly #startAtMs = new Map<string, number>();
  readonly #goAtMs = new Map<string, number>();
  readonly #endings = new Map<string, Ending>();
  readonly #addresses = new Map<string, string>();
  #addressCount = 0;

  constructor(options: PretendNodesOptions) {
    this.#options = options;
    this.names = Array.from({ length: options.count }, (_, index) => `gpu-${String(index).padStart(4, '0')}`);
    const config = loadKubeConfig(options.kubeconfig);
    this.#client = new KubeClient(config, { namespace: options.namespace });
    this.#leases = new KubeClient(config, { namespace: nodeLeaseNamespace });
    this.pods = startInformer<PretendPod>({
      client: this.#client,
      type: resourceTypes.pods,
      parse: (object) => object as PretendPod,
      log: createLog({ process: 'pretend-nodes', level: 'silent' }),
    });
  }

  async start(): Promise<void> {
    const { signal } = this.#closing;
    await forEach(this.names, async (name) => this.#createNode(name, signal));
    this.#running.push(this.#renewLeases());
    await this.pods.whenSynced(signal);
    this.pods.onChange((key) => this.#work.add(key));
    this.#running.push(...Array.from({ length: takers }, async () => this.#takeWork()));
  }

  end(podName: string, ending: Ending): void {
    const key = `${this.#options.namespace}/${podName}`;
    const pod = this.pods.get(key);
    if (pod !== undefined) {
      this.#endings.set(pod.metadata.uid, ending);
      this.#work.add(key);
    }
  }

  stopNode(name: string): void {
    this.#stopped.add(name);
  }

  async startNode(name: string): Promise<void> {
    this.#stopped.delete(name);
    // The controller-manager has said `Unknown` of it; only its kubelet says otherwise.
    await this.#sayReady(name);
    for (const pod of this.pods.list()) {
      if (pod.spec.nodeName === name) {
        this.#work.add(keyOf(pod));
      }
    }
  }

  async close(): Promise<void> {
    this.#closing.abort();
    this.#work.close();
    await this.pods.close();
    await Promise.allSettled(this.#running);
    this.#client.close();
    this.#leases.close();
  }

  async #createNode(name: string, signal: AbortSignal): Promise<void> {
    const index = this.names.indexOf(name);
    const amounts = {
      cpu: '96',
      memory: '1Ti',
      pods: '110',
      'ephemeral-storage': '1Ti',
      [gpuResource]: String(this.#options.gpusPerNode),
    };
    await this.#client.create(
      nodeType,
      {
        apiVersion: nodeType.apiVersion,
        kind: nodeType.kind,
        metadata: {
          name,
          labels: {
            'kubernetes.io/hostname': name,
            'nvidia.com/gpu.product': 'pretend',
            'topology.kubernetes.io/zone': `zone-${Math.floor(index / nodesPerZone)}`,
            'example.org/rack': `rack-${Math.floor(index / nodesPerRack)}`,
          },
        },
      },
      signal,
    );
    const status = { capacity: amounts, allocatable: amounts };
    await this.#client.patch(nodeType, name, { status }, { subresource: 'status' }, signal);
    await this.#sayReady(name);
    const lease = {
      apiVersion: 'coordination.k8s.io/v1',
      kind: 'Lease',
      metadata: { name },
      spec: { holderIdentity: name, leaseDurationSeconds: 40, renewTime: microTime() },
    };
    await this.#leases.create(resourceTypes.leases, lease, signal);
  }

  async #sayReady(name: string): Promise<void> {
    const time = new Date().toISOString();
    const ready = { type: 'Ready', status: 'True', reason: 'Pretends', message: '' };
    const status = { conditions: [{ ...ready, lastHeartbeatTime: time, lastTransitionTime: time }] };
    await this.#client.patch(nodeType, name, { status }, { subresource: 'status' }, this.#closing.signal);
  }

  async #renewLeases(): Promise<void> {
    const { signal } = this.#closing;
    while (!signal.aborted) {
      await pause(this.#options.leaseRenewMs ?? 10_000, signal);
      // A renewal that fails is made up for by the next.
      await forEach(this.names, async (name) => {
        if (!this.#stopped.has(name) && !signal.aborted) {
          const spec = { renewTime: microTime() };
          await this.#leases.patch(resourceTypes.leases, name, { spec }, {}, signal).catch(() => undefined);
        }
      });
    }
  }

  async #takeWork(): Promise<void> {
    for (;;) {
      const work = await this.#work.take(this.#closing.signal).catch(() => undefined);
      if (work === undefined) {
        return; // Closed.
      }
      try {
        await this.#look(work.key);
        work.done();
      } catch {
        // Most often the pod has changed since; it is looked at again as it is by then.
        work.failed();
      }
    }
  }

  async #look(key: string): Promise<void> {
    const pod = this.pods.get(key);
    const node = pod?.spec.nodeName;
    if (pod === undefined || node === undefined || this.#stopped.has(node)) {
      return;
    }
    const { uid, name, resourceVersion, deletionTimestamp } = pod.metadata;
    const { signal } = this.#closing;
    if (deletionTimestamp !== undefined) {
      const waitMs = remainingMs(this.#goAtMs, uid, () => this.#options.stopDelayMs?.(pod) ?? 0);
      if (waitMs > 0) {
        this.#work.addAfter(key, waitMs);
        return;
      }
      await this.#client.delete(resourceTypes.pods, name, { uid, gracePeriodSeconds: 0 }, signal);
      return;
    }
    const waitMs = remainingMs(this.#startAtMs, uid, () => this.#options.startDelayMs?.(pod) ?? 0);
    if (waitMs > 0) {
      this.#work.addAfter(key, waitMs);
      return;
    }
    const ending = this.#endings.get(uid) ?? this.#options.endingOf?.(pod);
    const podIP = this.#addressOf(uid);
    const status = planPodStatus(pod, { ending, podIP, now: new Date().toISOString() });
    if (status !== undefined) {
      const patch = { metadata: { resourceVersion }, status };
      await this.#client.patch(resourceTypes.pods, name, patch, { subresource: 'status' }, signal);
    }
  }

  /** Of the benchmark range 198.18.0.0/15, which is nobody's. */
  #addressOf(uid: string): string {
    let address = this.#addresses.get(uid);
    if (address === undefined) {
      const number = this.#addressCount++;
      address = `198.18.${(number >> 8) & 0xff}.${number & 0xff}`;
      this.#addresses.set(uid, address);
    }
    return address;
  }
}

/** How long until a moment that is fixed when it is first asked for; 0 once it has come. */
function remainingMs(moments: Map<string, number>, uid: string, delayMs: () => number): number {
  let atMs = moments.get(uid);
  if (atMs === undefined) {
    atMs = performance.now() + delayMs();
    moments.set(uid, atMs);
  }
  return Math.max(0, atMs - performance.now());
}

async function forEach<Item>(items: readonly Item[], action: (item: Item) => Promise<void>): Promise<void> {
  const rest = [...items];
  await Promise.all(
    Array.from({ length: takers }, async () => {
      for (let item = rest.shift(); item !== undefined; item = rest.shift()) {
        await action(item);
      }
    }),
  );
}

/** Leases count in microseconds. */
function microTime(): string {
  return new Date().toISOString().replace('Z', '000Z');
}
