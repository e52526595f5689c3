// A stage for the controller: a real control plane and a real nats-server, and two parts that the tests simulate: a
// kubelet that reports the pods' states and a dispatcher that reports the queue's state. Owns the default behaviour of
// both, so that a test states only the differences. Close it.

import { execFile } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';

import { parseControllerConfig } from '@mimo/controller/config';
import { startController, type Controller } from '@mimo/controller/controller';
import { crdDirectory } from '@mimo/controller/resources/crd-generate';
import { labels, prepareLabels, routableCondition } from '@mimo/controller/decide/labels';
import { hasReason } from '@mimo/controller/kube/api-status';
import { KubeClient, loadKubeConfig } from '@mimo/controller/kube/client';
import { startInformer, type Informer } from '@mimo/controller/kube/informer';
import { resourceTypes, type KubeObject, type ResourceType } from '@mimo/controller/kube/resource';
import { pause } from '@mimo/core/process/abort';
import type { Environment } from '@mimo/core/process/config';
import { createLog, type Log } from '@mimo/core/process/log';
import type { Bus } from '@mimo/core/bus/bus';
import type { ModelCatalog } from '@mimo/core/bus/model-catalog';
import { createNatsBus } from '@mimo/core/bus/nats/bus';
import { createModelCatalog } from '@mimo/core/bus/nats/model-catalog';
import type { QueueState } from '@mimo/core/bus/signals';

import { startInProcess, type InProcess } from '../harness/in-process.ts';
import type { NatsServer } from '../../cli/src/local/nats-server.ts';
import { startControlPlane, type ControlPlane } from '../harness/kubernetes/control-plane.ts';
import { findTools } from '../harness/kubernetes/tools.ts';
import { startTestNats } from '../harness/nats.ts';
import { waitFor } from '../harness/wait-for.ts';

export const namespace = 'models';
export const serviceAccount = 'mimo-controller';
const nodes: ResourceType = { apiVersion: 'v1', kind: 'Node', plural: 'nodes', scope: 'cluster' };
const never = new AbortController().signal;

/** A pod as the API server has it, as far as tests look. */
export interface Pod extends KubeObject {
  readonly spec: { readonly nodeName?: string };
  readonly status: {
    readonly phase?: string;
    readonly conditions?: readonly { readonly type: string; readonly status: string }[];
  };
}

/** How a container ended. */
interface Ending {
  readonly exitCode: number;
  readonly message: string;
  readonly reason?: string;
}

/** A running stage. */
export interface Stage {
  readonly plane: ControlPlane;
  readonly client: KubeClient;
  readonly queue: Bus;
  readonly catalog: ModelCatalog;
  readonly kubelet: PretendKubelet;
  /** Pods of the namespace. */
  readonly pods: Informer<Pod>;
  /** What a controller is told, with the rights of the chart's ServiceAccount. */
  controllerEnvironment(): Promise<Readonly<Record<string, string>>>;
  /** Starts one within this process. */
  startController(more?: Environment): Promise<Controller & InProcess>;
  /** A dispatcher of a model; it is silent until `publish` is set. */
  startDispatcher(model: string): PretendDispatcher;
  /** The queue's server is gone until `startNats`; it keeps its data. */
  stopNats(): Promise<void>;
  startNats(): Promise<void>;
  close(): Promise<void>;
}

/** Starts all of it, with the resources defined and the rights of the chart given. */
export async function startStage(): Promise<Stage> {
  const directory = await mkdtemp(join(tmpdir(), 'mimo-stage-'));
  const log = createLog({ process: 'test', level: 'silent' });
  const tools = await findTools();
  const plane = await startControlPlane({ tools });
  const closes: (() => Promise<unknown> | void)[] = [];
  closes.push(
    async () => rm(directory, { recursive: true, force: true }),
    async () => plane.close(),
  );
  const close = async (): Promise<void> => {
    for (const step of closes.splice(0).toReversed()) {
      await step();
    }
  };
  try {
    await plane.kubectl(['apply', '--filename', crdDirectory]);
    await plane.kubectl(['create', 'namespace', namespace]);
    await plane.kubectl(['create', 'serviceaccount', serviceAccount, `--namespace=${namespace}`]);
    await plane.kubectl(['apply', '--filename=-'], await chartRights(tools.helm));
    // The chart makes it, since the controller may make no Secret.
    await plane.kubectl(['create', 'secret', 'generic', 'mimo-tenant-keys', `--namespace=${namespace}`]);
    const established = ['wait', '--for=condition=Established', '--timeout=60s', 'crd', '--all'];
    await plane.kubectl(established);
    await waitFor('the default ServiceAccount', async () =>
      plane.kubectl(['get', 'serviceaccount', 'default', `--namespace=${namespace}`]).then(() => true),
    );
    const client = new KubeClient(loadKubeConfig(plane.kubeconfig), { namespace });
    closes.push(() => client.close());

    let nats: NatsServer = await startTestNats({ storeDirectory: directory, port: 0 });
    const { port, url } = nats;
    closes.push(async () => nats.close());
    const options = { servers: [url], clientName: 'test', replicas: 1, log };
    const queue = createNatsBus({ ...options, recordMaxAgeMs: 3_600_000 });
    const catalog = createModelCatalog(queue.link, options);
    closes.push(async () => queue.close());
    await queue.opened(AbortSignal.timeout(30_000));

    const pods = startInformer<Pod>({
      client,
      type: resourceTypes.pods,
      parse: (object) => object as Pod,
      log,
    });
    closes.push(async () => pods.close());
    const kubelet = new PretendKubelet({ client, pods, catalog, log });
    closes.push(async () => kubelet.close());
    await kubelet.start();

    const controllerEnvironment = async (): Promise<Readonly<Record<string, string>>> => ({
      MIMO_CONTROLLER_NAMESPACE: namespace,
      MIMO_CONTROLLER_KUBECONFIG: await plane.kubeconfigForServiceAccount(namespace, serviceAccount),
      MIMO_CONTROLLER_NATS_URLS: url,
      MIMO_CONTROLLER_WORKER_IMAGE: 'registry.example/worker:1',
      MIMO_CONTROLLER_LISTEN: '127.0.0.1:0',
    });
    return {
      plane,
      client,
      queue,
      catalog,
      kubelet,
      pods,
      controllerEnvironment,
      startController: async (more = {}) => {
        const config = parseControllerConfig({ ...(await controllerEnvironment()), ...more });
        const level = process.env['MIMO_TEST_LOG'] === 'debug' ? 'debug' : 'silent';
        const given = { config, log: createLog({ process: 'controller', level }), graceMs: 10_000 };
        return startInProcess(startController, given);
      },
      startDispatcher: (model) => {
        const dispatcher = new PretendDispatcher(model, queue, kubelet);
        closes.push(async () => dispatcher.close());
        return dispatcher;
      },
      stopNats: async () => nats.close(),
      startNats: async () => {
        nats = await startTestNats({ storeDirectory: directory, port });
      },
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}

/**
 * What the chart gives to the controller: its rights, for the ServiceAccount of the stage, and the Lease that it may
 * hold but not make.
 */
export async function chartRights(helm: string): Promise<string> {
  const chart = join(import.meta.dirname, '../../charts/mimo-cluster');
  const args = ['template', 'mimo', chart, `--namespace=${namespace}`];
  const { stdout } = await promisify(execFile)(helm, [
    ...args,
    '--show-only=templates/controller/rbac.yaml',
    '--show-only=templates/controller/lease.yaml',
    '--set=fullnameOverride=mimo',
  ]);
  return stdout;
}

interface KubeletOptions {
  readonly client: KubeClient;
  readonly pods: Informer<Pod>;
  readonly catalog: ModelCatalog;
  readonly log: Log;
}

/** Takes up what the scheduler binds to its one node, and says of each pod what the test wants said. */
class PretendKubelet {
  /** How prepare pods end; undefined: well, with the model in the catalogue. */
  prepare: Ending | undefined;
  readonly #options: KubeletOptions;
  readonly #closing = new AbortController();
  readonly #seen = new Set<string>();
  #starts = true;
  #stop: (() => void) | undefined;
  #beating: Promise<void> | undefined;

  constructor(options: KubeletOptions) {
    this.#options = options;
  }

  /** The groups whose pods all run, with how many pods they have. */
  get runningGroups(): readonly string[] {
    const groups = Map.groupBy(
      [...this.#options.pods.list()].filter(({ metadata }) => metadata.labels?.[labels.group] !== undefined),
      ({ metadata }) => metadata.labels?.[labels.group] ?? '',
    );
    return [...groups]
      .filter(([, pods]) => pods.length === Number(pods[0]?.metadata.labels?.[labels.groupPods]))
      .filter(([, pods]) =>
        pods.every(
          ({ status, metadata }) => status.phase === 'Running' && metadata.deletionTimestamp === undefined,
        ),
      )
      .map(([group]) => group);
  }

  /** False: ranks stay Pending, as with an image that is pulled forever. */
  set starts(starts: boolean) {
    this.#starts = starts;
    this.#lookAtAll();
  }

  async start(): Promise<void> {
    const { client, pods } = this.#options;
    await client.create(nodes, { apiVersion: 'v1', kind: 'Node', metadata: { name: 'pretend' } }, never);
    this.#beating = this.#beat();
    await pods.whenSynced(AbortSignal.timeout(30_000));
    this.#stop = pods.onChange((key) => this.#lookAt(pods.get(key)));
  }

  #lookAtAll(): void {
    for (const pod of this.#options.pods.list()) {
      this.#lookAt(pod);
    }
  }

  #lookAt(pod: Pod | undefined): void {
    if (pod?.spec.nodeName !== undefined) {
      void this.#look(pod).catch((error: unknown) => this.#options.log.debug({ error }, 'kubelet'));
    }
  }

  /** Ends a container of a pod. */
  async end({ metadata }: Pod, ending: Ending): Promise<void> {
    const phase = ending.exitCode === 0 ? 'Succeeded' : 'Failed';
    for (;;) {
      const pod = await this.#options.client.get<Pod>(resourceTypes.pods, metadata.name, never);
      try {
        await this.#setStatus(pod, { phase, terminated: ending });
        return;
      } catch (error) {
        if (!hasReason(error, 'Conflict')) {
          throw error;
        }
      }
    }
  }

  async close(): Promise<void> {
    this.#closing.abort();
    this.#stop?.();
    await this.#beating;
  }

  async #look(pod: Pod): Promise<void> {
    const { metadata, status } = pod;
    if (metadata.deletionTimestamp !== undefined) {
      // Whatever ran is over at once.
      const options = { uid: metadata.uid, gracePeriodSeconds: 0 };
      await this.#options.client.delete(resourceTypes.pods, metadata.name, options, never);
      return;
    }
    if (metadata.labels?.[prepareLabels.hash] !== undefined) {
      await this.#prepare(pod);
      return;
    }
    const gate = status.conditions?.find(({ type }) => type === routableCondition)?.status === 'True';
    const ready = status.conditions?.find(({ type }) => type === 'Ready')?.status === 'True';
    const running = status.phase === 'Running';
    if (this.#starts && (!running || ready !== gate) && status.phase !== 'Failed') {
      await this.#setStatus(pod, { phase: 'Running', ready: gate });
    }
  }

  async #prepare(pod: Pod): Promise<void> {
    const { uid, labels: named } = pod.metadata;
    if (this.#seen.has(uid)) {
      return;
    }
    this.#seen.add(uid);
    try {
      await this.end(pod, this.prepare ?? (await this.#publishModel(named?.[prepareLabels.service] ?? '')));
    } catch (error) {
      // The next look tries again.
      this.#seen.delete(uid);
      throw error;
    }
  }

  async #publishModel(serviceName: string): Promise<Ending> {
    const service = await this.#options.client.get(resourceTypes.modelServices, serviceName, never);
    const { model } = service.spec as { readonly model: { readonly name: string } };
    const files = new Map([['config.json', Buffer.from('{}')]]);
    await this.#options.catalog.publish({ name: model.name, files, identity: '' }, never);
    return { exitCode: 0, message: '' };
  }

  /** Refused where the pod has changed since: the change is looked at again. */
  async #setStatus(
    { metadata, status }: Pod,
    {
      phase,
      ready,
      terminated,
    }: { readonly phase: string; readonly ready?: boolean; readonly terminated?: Ending },
  ): Promise<void> {
    const now = new Date().toISOString();
    const state =
      terminated === undefined
        ? { running: { startedAt: now } }
        : { terminated: { ...terminated, startedAt: now, finishedAt: now } };
    const others = (status.conditions ?? []).filter(({ type }) => type !== 'Ready');
    const readiness = { type: 'Ready', status: ready === true ? 'True' : 'False', lastTransitionTime: now };
    const container = {
      name: 'rank-0',
      image: 'i',
      imageID: '',
      ready: ready === true,
      restartCount: 0,
      state,
    };
    const { name, resourceVersion } = metadata;
    const patch = {
      metadata: { resourceVersion },
      status: { phase, conditions: [...others, readiness], containerStatuses: [container] },
    };
    await this.#options.client.patch(resourceTypes.pods, name, patch, { subresource: 'status' }, never);
  }

  async #beat(): Promise<void> {
    const { client } = this.#options;
    const amounts = { cpu: '10k', memory: '100Ti', pods: '10k' };
    while (!this.#closing.signal.aborted) {
      const time = new Date().toISOString();
      const ready = {
        type: 'Ready',
        status: 'True',
        reason: 'Pretends',
        message: '',
        lastHeartbeatTime: time,
        lastTransitionTime: time,
      };
      const status = { capacity: amounts, allocatable: amounts, conditions: [ready] };
      await client
        .patch(nodes, 'pretend', { status }, { subresource: 'status' }, never)
        .catch(() => undefined);
      this.#lookAtAll();
      await pause(5_000, this.#closing.signal);
    }
  }
}

/** What a test says of a queue. */
interface Load {
  readonly waitingRequests: number;
  readonly waitingTokens: number;
  /** Tokens in flight of each group. */
  readonly inFlight: Readonly<Record<string, number>>;
}

const publishMs = 200;

/** Publishes the state of one model's queue: the groups are those that run, and drain as they are marked. */
class PretendDispatcher {
  load: Load = { waitingRequests: 0, waitingTokens: 0, inFlight: {} };
  silent = false;
  epoch = 1;
  readonly #model: string;
  readonly #queue: Bus;
  readonly #kubelet: PretendKubelet;
  readonly #closing = new AbortController();
  readonly #running: Promise<unknown>;
  #marks: ReadonlySet<string> = new Set();
  #arrivedTokens = 0;

  constructor(model: string, queue: Bus, kubelet: PretendKubelet) {
    this.#model = model;
    this.#queue = queue;
    this.#kubelet = kubelet;
    this.#running = Promise.all([this.#publishAll(), this.#follow()]);
  }

  get marks(): ReadonlySet<string> {
    return this.#marks;
  }

  /** Requests arrive. */
  arrive(requests: number, tokensEach: number): void {
    this.#arrivedTokens += requests * tokensEach;
    this.load = {
      ...this.load,
      waitingRequests: this.load.waitingRequests + requests,
      waitingTokens: this.load.waitingTokens + requests * tokensEach,
    };
    this.publish();
  }

  publish(): void {
    const { waitingRequests, waitingTokens, inFlight } = this.load;
    const groups = this.#kubelet.runningGroups.map((group) => ({
      group,
      incarnation: '1',
      revision: '',
      identity: '',
      routable: true,
      draining: this.#marks.has(group),
      slots: 16,
      inFlightRequests: (inFlight[group] ?? 0) > 0 ? 1 : 0,
      inFlightTokens: inFlight[group] ?? 0,
    }));
    const state: QueueState = {
      model: this.#model,
      dispatcherEpoch: this.epoch,
      waitingRequests,
      waitingTokens,
      runningRequests: groups.reduce((sum, group) => sum + group.inFlightRequests, 0),
      parkedRequests: 0,
      inFlightTokens: groups.reduce((sum, group) => sum + group.inFlightTokens, 0),
      oldestWaitingMs: 0,
      readyGroups: groups.length,
      slots: groups.length * 16,
      arrivedTokens: this.#arrivedTokens,
      endedTokens: 0,
      waitingFor: [],
      groups,
    };
    this.#queue.queueStates.publish(state);
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await this.#running;
  }

  async #publishAll(): Promise<void> {
    while (!this.#closing.signal.aborted) {
      if (!this.silent) {
        this.publish();
      }
      await pause(publishMs, this.#closing.signal);
    }
  }

  async #follow(): Promise<void> {
    for await (const marks of this.#queue.drainMarks.follow(this.#model, this.#closing.signal)) {
      this.#marks = new Set(marks.keys());
      this.publish();
    }
  }
}
