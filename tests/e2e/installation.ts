// MiMo Cluster installed in a real cluster by its own chart, and the actions of a client and an operator: send
// requests, apply, inspect, upgrade, uninstall. Owns the settings that make it fit two processors and start in seconds.
// Asserts nothing.

import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { chmod, cp, mkdir } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { promisify } from 'node:util';

import * as grpc from '@grpc/grpc-js';
import {
  CustomObjectsApi,
  KubeConfig,
  PatchStrategy,
  setHeaderOptions,
  Watch,
} from '@kubernetes/client-node';
import type { V1Pod } from '@kubernetes/client-node';

import type { ModelServiceStatus } from '@mimo/controller/resources/status';
import { callUnary } from '@mimo/core/grpc/client';
import { createLog } from '@mimo/core/process/log';
import type { Bus } from '@mimo/core/bus/bus';
import { createNatsBus } from '@mimo/core/bus/nats/bus';
import { InferenceServiceService, type InferenceServiceClient } from '@mimo/proto/inference';

import { createClient } from '../harness/cluster.ts';
import { controlPlaneAddress } from '../harness/kubernetes/addresses.ts';
import type { RealCluster } from '../harness/kubernetes/cluster.ts';
import type { BuiltImage, ImageName } from '../harness/kubernetes/images.ts';
import { writeOtherCheckpoint } from '../harness/other-checkpoint.ts';
import { waitFor } from '../harness/wait-for.ts';

const root = resolve(import.meta.dirname, '../..');
const chart = join(root, 'charts/mimo-cluster');
const release = 'mimo';
const apiKey = 'tests-api-key';
const checkpointClaim = 'checkpoints';

/** Where another checkpoint lies on the volume of the demonstration model. */
export const otherCheckpointPath = 'other';

/** In which everything is installed; it enforces the strictest Pod Security. */
export const namespace = 'mimo-e2e';

/** The name that clients ask for, which is also the ModelService's. */
export const modelName = 'mimo-demo';

export interface InstallOptions {
  readonly cluster: RealCluster;
  readonly helm: string;
  /** Of gateway, worker and controller, and of the queue server: all given to every node already. */
  readonly images: Readonly<Record<Exclude<ImageName, 'worker-cuda'>, BuiltImage>>;
  /** Further values of the chart, as `--set` takes them. */
  readonly values?: readonly string[];
}

/** A ModelService as it is stored. */
interface StoredModelService {
  readonly metadata: { readonly uid: string; readonly generation: number; readonly resourceVersion: string };
  readonly spec: Readonly<Record<string, unknown>>;
  readonly status?: ModelServiceStatus;
}

/** What is installed. Close it; that ends the connections, `uninstall` takes the release away. */
export interface Installation {
  /** To the gateways' Service, with an API key in `metadata`. */
  readonly client: InferenceServiceClient;
  readonly metadata: grpc.Metadata;
  /** Names of the models that the gateway serves. */
  listModels(): Promise<readonly string[]>;
  /** What the dispatcher publishes, and heartbeats. */
  readonly queue: Bus;
  helm(...args: readonly string[]): Promise<string>;
  /** `helm upgrade` that keeps the values, and waits until every Deployment has followed. */
  upgrade(...values: readonly string[]): Promise<void>;
  applyModelService(spec: Readonly<Record<string, unknown>>): Promise<void>;
  /** A merge patch of the spec. */
  patchSpec(spec: Readonly<Record<string, unknown>>): Promise<void>;
  modelService(): Promise<StoredModelService>;
  /** Hears of every stored version from this moment; the returned function ends it. */
  watchModelService(onVersion: (service: StoredModelService) => void): Promise<() => void>;
  deleteModelService(): Promise<void>;
  /** The worker pods that are not being deleted; prepare pods are not among them. */
  workerPods(): Promise<readonly V1Pod[]>;
  /** Waits until exactly so many groups serve, none other lives, and the dispatcher holds a channel to each. */
  waitForGroups(count: number, timeoutMs?: number): Promise<void>;
  uninstall(): Promise<void>;
  close(): Promise<void>;
}

const group = 'mimo-cluster.dev';
const version = 'v1alpha1';
const plural = 'modelservices';

/** Installs the chart and waits until its parts are ready. */
export async function install(options: InstallOptions): Promise<Installation> {
  const { cluster, images } = options;
  await createVolumes(cluster);
  const helm = async (...args: readonly string[]): Promise<string> => {
    const { stdout } = await promisify(execFile)(options.helm, [
      `--kubeconfig=${cluster.kubeconfigFile}`,
      `--namespace=${namespace}`,
      ...args,
    ]);
    return stdout;
  };
  const values = [...settings(images), ...(options.values ?? [])].flatMap((value) => ['--set', value]);
  await helm('install', release, chart, ...values, '--wait', '--timeout=5m');

  const addressOf = async (service: string): Promise<string> =>
    cluster.kubectl('get', 'service', '-n', namespace, service, '-o', 'jsonpath={.spec.clusterIP}');
  const gateway = await cluster.forward({
    host: await addressOf(`${release}-mimo-cluster-gateway`),
    port: 50_051,
  });
  const nats = await cluster.forward({ host: await addressOf(`${release}-nats`), port: 4222 });
  const metadata = new grpc.Metadata();
  metadata.set('authorization', `Bearer ${apiKey}`);
  const client = createClient(`127.0.0.1:${gateway.port}`);
  const queue = createNatsBus({
    servers: [`nats://127.0.0.1:${nats.port}`],
    clientName: 'e2e',
    replicas: 1,
    recordMaxAgeMs: 86_400_000,
    log: createLog({ process: 'e2e', level: 'silent' }),
  });
  await queue.opened(AbortSignal.timeout(60_000));

  const config = new KubeConfig();
  config.loadFromFile(cluster.kubeconfigFile);
  const api = config.makeApiClient(CustomObjectsApi);
  const object = { group, version, namespace, plural, name: modelName };
  const modelService = async (): Promise<StoredModelService> =>
    (await api.getNamespacedCustomObject(object)) as StoredModelService;
  const workerPods = async (): Promise<readonly V1Pod[]> => {
    const selector = `${group}/service=${modelName},app.kubernetes.io/name=mimo-worker`;
    const text = await cluster.kubectl('get', 'pods', '-n', namespace, '-l', selector, '-o', 'json');
    const { items } = JSON.parse(text) as { readonly items: readonly V1Pod[] };
    return items.filter(({ metadata: { deletionTimestamp } = {} }) => deletionTimestamp === undefined);
  };

  return {
    client,
    metadata,
    queue,
    helm,
    listModels: async () => {
      const { models } = await callUnary(client, InferenceServiceService.listModels, {
        request: {},
        metadata,
        timeoutMs: 5_000,
      });
      return models.map(({ name }) => name);
    },
    modelService,
    workerPods,
    upgrade: async (...upgraded) => {
      const set = upgraded.flatMap((value) => ['--set', value]);
      await helm('upgrade', release, chart, '--reuse-values', ...set, '--wait', '--timeout=5m');
    },
    applyModelService: async (spec) => {
      await cluster.apply({
        apiVersion: `${group}/${version}`,
        kind: 'ModelService',
        metadata: { name: modelName, namespace },
        spec: {
          model: { name: modelName, source: { volumeClaim: { claimName: checkpointClaim } } },
          resources: { cpu: '100m', memory: '600Mi' },
          ...spec,
        },
      });
    },
    patchSpec: async (spec) => {
      await api.patchNamespacedCustomObject(
        { ...object, body: { spec } },
        setHeaderOptions('Content-Type', PatchStrategy.MergePatch),
      );
    },
    watchModelService: async (onVersion) => {
      const { metadata: stored } = await modelService();
      const path = `/apis/${group}/${version}/namespaces/${namespace}/${plural}`;
      const watch = await new Watch(config).watch(
        path,
        { fieldSelector: `metadata.name=${modelName}`, resourceVersion: stored.resourceVersion },
        (_, service) => onVersion(service as StoredModelService),
        () => undefined,
      );
      return () => watch.abort();
    },
    deleteModelService: async () => {
      await cluster.kubectl('delete', plural, '-n', namespace, modelName, '--timeout=180s');
    },
    waitForGroups: async (count, timeoutMs = 180_000) => {
      await waitFor(
        `${count} groups and no other`,
        async () => {
          const { metadata: stored, status } = await modelService();
          const { wanted, ready, updated, draining } = status?.groups ?? {};
          return (
            status?.observedGeneration === stored.generation &&
            status.replicas === count &&
            [wanted, ready, updated].every((value) => value === count) &&
            draining === 0
          );
        },
        timeoutMs,
      );
    },
    uninstall: async () => {
      await helm('uninstall', release, '--wait', '--timeout=3m');
    },
    close: async () => {
      client.close();
      await queue.close();
      await Promise.all([gateway.close(), nats.close()]);
    },
  };
}

/** Everything small: three groups, their rollout and the rest share two processors. */
function settings(images: InstallOptions['images']): readonly string[] {
  const parts = (['gateway', 'worker', 'controller'] as const).flatMap((part) =>
    imageValues(`images.${part}`, images[part]),
  );
  const hash = createHash('sha256').update(apiKey).digest('hex');
  return [
    ...parts,
    ...imageValues('nats.image', images.nats),
    'gateway.replicas=1',
    'gateway.resources.requests.cpu=100m',
    'gateway.resources.requests.memory=128Mi',
    'gateway.drainSeconds=60',
    'gateway.preStopSeconds=3',
    'controller.replicas=1',
    'controller.resources.requests.cpu=50m',
    'controller.resources.requests.memory=64Mi',
    'nats.replicas=1',
    'nats.resources.requests.cpu=50m',
    'nats.resources.requests.memory=64Mi',
    'nats.storage.size=1Gi',
    'nats.storage.storageClassName=queue',
    'modelCache.type=pvc',
    'modelCache.pvc.size=1Gi',
    'modelCache.pvc.storageClassName=model-cache',
    'modelCache.pvc.keepOnUninstall=false',
    // Names are resolved by no pod here.
    `networkPolicy.dnsPeers[0].ipBlock.cidr=${controlPlaneAddress}/32`,
    `nats.networkPolicy.dnsPeers[0].ipBlock.cidr=${controlPlaneAddress}/32`,
    'tenants[0].name=tests',
    `tenants[0].apiKeySha256[0]=${hash}`,
  ];
}

function imageValues(path: string, { name }: BuiltImage): readonly string[] {
  const colon = name.lastIndexOf(':');
  return [
    `${path}.repository=${name.slice(0, colon)}`,
    `${path}.tag=${name.slice(colon + 1)}`,
    `${path}.pullPolicy=Never`,
  ];
}

/**
 * Volumes on this machine's disk, each for the one claim of its class; the checkpoint is a copy that every user can
 * read.
 */
async function createVolumes(cluster: RealCluster): Promise<void> {
  const directory = async (name: string): Promise<string> => {
    const path = join(cluster.sharedDirectory, name);
    await mkdir(path);
    await chmod(path, 0o777);
    return path;
  };
  const checkpoint = join(cluster.sharedDirectory, 'checkpoint');
  await cp(join(root, 'models/mimo-demo'), checkpoint, { recursive: true });
  await writeOtherCheckpoint(join(checkpoint, otherCheckpointPath));
  const storage = '1Gi';
  const volume = (name: string, path: string, accessMode: string): unknown => ({
    apiVersion: 'v1',
    kind: 'PersistentVolume',
    metadata: { name },
    spec: {
      capacity: { storage },
      accessModes: [accessMode],
      storageClassName: name,
      persistentVolumeReclaimPolicy: 'Retain',
      hostPath: { path, type: 'Directory' },
    },
  });
  const labels = {
    'pod-security.kubernetes.io/enforce': 'restricted',
    'pod-security.kubernetes.io/warn': 'restricted',
  };
  await cluster.apply(
    { apiVersion: 'v1', kind: 'Namespace', metadata: { name: namespace, labels } },
    volume('queue', await directory('queue'), 'ReadWriteOnce'),
    volume('model-cache', await directory('model-cache'), 'ReadWriteMany'),
    volume('checkpoint', checkpoint, 'ReadOnlyMany'),
    {
      apiVersion: 'v1',
      kind: 'PersistentVolumeClaim',
      metadata: { name: checkpointClaim, namespace },
      spec: {
        accessModes: ['ReadOnlyMany'],
        storageClassName: 'checkpoint',
        resources: { requests: { storage } },
      },
    },
  );
}
