// The containers and volumes of a group's pods and of the prepare pod. Pure. Owns ports, probes, volumes, the worker's
// variables (worker/src/config.ts reads them) and the security context: Pod Security "restricted", which only a
// hostPath violates.

import { amountOf } from '../resources/quantity.ts';
import { executionProviderOf, type ModelService, type ModelServiceSpec } from '../resources/resources.ts';
import { podName, rankServiceName } from './labels.ts';

/** A Kubernetes object, or a part of one. */
export type Manifest = Readonly<Record<string, unknown>>;

/** Where shards are stored: on a claim or in a directory of the host, shared by pods, or separately in each pod. */
export type ModelCache =
  | { readonly kind: 'claim'; readonly claimName: string }
  | { readonly kind: 'hostPath'; readonly path: string }
  | { readonly kind: 'pod' };

/** The worker part of the controller's configuration. */
export interface WorkerSettings {
  readonly image: string;
  /** For services with accelerators. */
  readonly cudaImage: string;
  readonly imagePullPolicy: string;
  readonly natsUrl: string;
  /** The Secret whose entry `credentials` the servers require; absent or empty: they require none. */
  readonly natsCredentialsSecret?: string;
  readonly cache: ModelCache;
  /** Defaults for pods whose service sets no value. */
  readonly podDefaults?: PodDefaults;
}

interface PodDefaults {
  /** Empty: the namespace's default. */
  readonly serviceAccountName: string;
  /** Names of Secrets, beside the service's own. */
  readonly imagePullSecrets: readonly string[];
  readonly accelerated: AcceleratedPods;
}

/** Placement of pods with accelerators; a service's own values win, part by part. */
interface AcceleratedPods {
  /** Empty: the machine's default. */
  readonly runtimeClassName: string;
  readonly nodeSelector: Readonly<Record<string, string>>;
  readonly tolerations: readonly Toleration[];
}

export interface Toleration {
  readonly key: string;
  readonly operator: 'Exists' | 'Equal';
  readonly value?: string;
  readonly effect?: string;
}

export interface GroupIdentity {
  readonly group: string;
  readonly revision: string;
  readonly index: number;
  /** Random for each life of a group: ranks reject ranks of another life. */
  readonly groupToken: string;
}

export const workerPort = 50_052;
const peerPort = 50_152;
const metricsPort = 9464;
/** Time between SIGTERM and SIGKILL: a hand-over takes seconds, and long work has drained before the pod is deleted. */
export const terminationGraceSeconds = 30;
/** Loading 7B from a slow volume takes almost an hour in the worst case. */
const startUpLimitSeconds = 3600;
const threadsMax = 256;
/** A directory, not a file: only then does the kubelet update changed credentials in running pods. */
const credentialsDirectory = '/etc/mimo/nats';

export function imageOf({ resources, template }: ModelServiceSpec, settings: WorkerSettings): string {
  return template.image ?? (executionProviderOf(resources) === 'cuda' ? settings.cudaImage : settings.image);
}

/** The cache of a service: its own claim, else the controller's setting. */
export function cacheOf({ template }: ModelServiceSpec, settings: WorkerSettings): ModelCache {
  return template.cacheVolumeClaim === undefined
    ? settings.cache
    : { kind: 'claim', claimName: template.cacheVolumeClaim };
}

/** One rank of a group. */
export function rankContainer(
  service: ModelService,
  identity: GroupIdentity,
  { settings, rank }: { readonly settings: WorkerSettings; readonly rank: number },
): Manifest {
  const { spec } = service;
  const offset = portOffset(spec, rank);
  const probe = { grpc: { port: workerPort + offset }, timeoutSeconds: 5 };
  return {
    name: `rank-${rank}`,
    ...imageFields(spec, settings),
    env: rankVariables(service, identity, { settings, rank }),
    ports: [
      { name: `grpc-${rank}`, containerPort: workerPort + offset, protocol: 'TCP' },
      ...(spec.tensorParallel === 1
        ? []
        : [{ name: `peer-${rank}`, containerPort: peerPort + offset, protocol: 'TCP' }]),
      ...(rank === 0 ? [{ name: 'metrics', containerPort: metricsPort, protocol: 'TCP' }] : []),
    ],
    resources: amountsOf(spec, { accelerators: true }),
    startupProbe: { ...probe, periodSeconds: 2, failureThreshold: startUpLimitSeconds / 2 },
    readinessProbe: { ...probe, periodSeconds: 2, failureThreshold: 2 },
    livenessProbe: { ...probe, periodSeconds: 10, failureThreshold: 6 },
    terminationMessagePolicy: 'FallbackToLogsOnError',
    securityContext: restricted,
    volumeMounts: mountsOf(spec, settings),
  };
}

/**
 * Finds the checkpoint and compiles its shards into the cache; with `publish` it also publishes the model to the
 * gateways.
 */
export function prepareContainer(
  service: ModelService,
  identity: GroupIdentity,
  options: { readonly settings: WorkerSettings; readonly rank: number; readonly publish: boolean },
): Manifest {
  const { spec } = service;
  const shared = cacheOf(spec, options.settings).kind !== 'pod';
  return {
    name: 'prepare',
    ...imageFields(spec, options.settings),
    args: [
      'prepare',
      ...(options.publish ? ['--publish'] : []),
      // A prepare pod's private cache is deleted with the pod.
      ...(options.publish && !shared ? [] : ['--compile']),
    ],
    env: rankVariables(service, identity, options),
    resources: amountsOf(spec, { accelerators: false }),
    terminationMessagePolicy: 'FallbackToLogsOnError',
    securityContext: restricted,
    volumeMounts: mountsOf(spec, options.settings),
  };
}

/** The security context of every pod. */
export const podSecurity: Manifest = {
  runAsNonRoot: true,
  runAsUser: 10_001,
  runAsGroup: 10_001,
  fsGroup: 10_001,
  fsGroupChangePolicy: 'OnRootMismatch',
  seccompProfile: { type: 'RuntimeDefault' },
};

const restricted: Manifest = {
  allowPrivilegeEscalation: false,
  readOnlyRootFilesystem: true,
  capabilities: { drop: ['ALL'] },
};

function imageFields(spec: ModelServiceSpec, settings: WorkerSettings): Manifest {
  return {
    image: imageOf(spec, settings),
    imagePullPolicy: spec.template.imagePullPolicy ?? settings.imagePullPolicy,
  };
}

/** Ranks of one pod share its address, so each has its own ports. */
function portOffset({ placement }: ModelServiceSpec, rank: number): number {
  return placement === 'spread' ? 0 : rank;
}

function rankVariables(
  service: ModelService,
  identity: GroupIdentity,
  { settings, rank }: { readonly settings: WorkerSettings; readonly rank: number },
): readonly Manifest[] {
  const { spec, metadata } = service;
  const { model, speculation, resources, tensorParallel, template } = spec;
  const spread = spec.placement === 'spread';
  const offset = portOffset(spec, rank);
  const peers = Array.from({ length: tensorParallel }, (_, peer) => {
    const host = spread
      ? `${podName(identity.group, peer)}.${rankServiceName(metadata.name)}.${metadata.namespace}.svc`
      : '127.0.0.1';
    return `${host}:${peerPort + portOffset(spec, peer)}`;
  });
  const { hub } = model.source;
  const variables: Readonly<Record<string, string>> = {
    MIMO_WORKER_MODEL: model.name,
    MIMO_WORKER_GROUP: identity.group,
    MIMO_WORKER_REVISION: identity.revision,
    MIMO_WORKER_CHECKPOINT_DIRECTORY: checkpointDirectory(spec),
    ...(hub === undefined
      ? {}
      : { MIMO_WORKER_HUB_REPOSITORY: hub.repository, MIMO_WORKER_HUB_REVISION: hub.revision }),
    MIMO_WORKER_CACHE_DIRECTORY: '/cache',
    MIMO_WORKER_PRECISION: model.precision,
    MIMO_WORKER_DRAFT_TOKENS: String(speculation.draftTokens),
    MIMO_WORKER_ADAPTIVE_SPECULATION: String(speculation.adaptive),
    MIMO_WORKER_TENSOR_PARALLEL: String(tensorParallel),
    MIMO_WORKER_RANK: String(rank),
    MIMO_WORKER_LISTEN: `0.0.0.0:${workerPort + offset}`,
    MIMO_WORKER_ADVERTISE: `$(POD_IP):${workerPort}`,
    ...(rank === 0 ? { MIMO_WORKER_METRICS_LISTEN: `0.0.0.0:${metricsPort}` } : {}),
    MIMO_WORKER_NATS_URL: settings.natsUrl,
    ...(settings.natsCredentialsSecret
      ? { MIMO_WORKER_NATS_CREDENTIALS_FILE: `${credentialsDirectory}/credentials` }
      : {}),
    MIMO_WORKER_GROUP_TOKEN: identity.groupToken,
    MIMO_WORKER_DRAIN_GRACE: `${terminationGraceSeconds - 5}s`,
    MIMO_WORKER_EXECUTION_PROVIDER: executionProviderOf(resources),
    MIMO_WORKER_THREADS: String(Math.min(threadsMax, Math.max(1, Math.floor(amountOf(resources.cpu))))),
    ...(resources.kvCache === undefined
      ? {}
      : { MIMO_WORKER_KV_BYTES: String(Math.floor(amountOf(resources.kvCache))) }),
    ...(tensorParallel === 1
      ? {}
      : {
          MIMO_WORKER_PEERS: peers.join(','),
          MIMO_WORKER_PEER_LISTEN: `${spread ? '0.0.0.0' : '127.0.0.1'}:${peerPort + offset}`,
        }),
    // The template's variables come last and win.
    ...Object.fromEntries(template.env.map(({ name, value }) => [name, value])),
  };
  const { tokenSecret } = hub ?? {};
  return [
    // First: later variables may contain $(POD_IP).
    { name: 'POD_IP', valueFrom: { fieldRef: { fieldPath: 'status.podIP' } } },
    ...(tokenSecret === undefined
      ? []
      : [
          { name: 'HF_TOKEN', valueFrom: { secretKeyRef: { name: tokenSecret.name, key: tokenSecret.key } } },
        ]),
    ...Object.entries(variables).map(([name, value]) => ({ name, value })),
  ];
}

function amountsOf({ resources }: ModelServiceSpec, asked: { readonly accelerators: boolean }): Manifest {
  const { cpu, memory, accelerators, acceleratorResource } = resources;
  const amounts = {
    cpu,
    memory,
    ...(asked.accelerators && accelerators > 0 ? { [acceleratorResource]: String(accelerators) } : {}),
  };
  return { requests: amounts, limits: amounts };
}

function checkpointDirectory({ model }: ModelServiceSpec): string {
  const { hub, volumeClaim } = model.source;
  if (hub !== undefined) {
    return `/cache/checkpoints/${hub.repository}/${hub.revision}`;
  }
  return volumeClaim === undefined ? '/checkpoint' : `/checkpoint/${volumeClaim.path}`;
}

/** The volumes that the containers mount. */
export function volumesOf(spec: ModelServiceSpec, settings: WorkerSettings): readonly Manifest[] {
  const { volumeClaim, hostPath } = spec.model.source;
  return [
    { name: 'cache', ...cacheVolume(cacheOf(spec, settings)) },
    // Ranks of one pod exchange partial sums through shared memory; the default of 64 MiB is too little.
    { name: 'shared-memory', emptyDir: { medium: 'Memory', sizeLimit: '1Gi' } },
    { name: 'temporary', emptyDir: { sizeLimit: '1Gi' } },
    ...(settings.natsCredentialsSecret
      ? [
          {
            name: 'nats-credentials',
            secret: { secretName: settings.natsCredentialsSecret, defaultMode: 0o440 },
          },
        ]
      : []),
    ...(volumeClaim === undefined ? [] : [{ name: 'checkpoint', ...claimOf(volumeClaim.claimName, true) }]),
    ...(hostPath === undefined
      ? []
      : [{ name: 'checkpoint', hostPath: { path: hostPath, type: 'Directory' } }]),
  ];
}

function cacheVolume(cache: ModelCache): Manifest {
  if (cache.kind === 'claim') {
    return claimOf(cache.claimName, false);
  }
  // The directory must exist and belong to the workers' user: the kubelet would create one that only root can write.
  return cache.kind === 'pod' ? { emptyDir: {} } : { hostPath: { path: cache.path, type: 'Directory' } };
}

function claimOf(claimName: string, readOnly: boolean): Manifest {
  return { persistentVolumeClaim: { claimName, ...(readOnly ? { readOnly } : {}) } };
}

function mountsOf({ model }: ModelServiceSpec, settings: WorkerSettings): readonly Manifest[] {
  return [
    { name: 'cache', mountPath: '/cache' },
    { name: 'shared-memory', mountPath: '/dev/shm' },
    { name: 'temporary', mountPath: '/tmp' },
    ...(settings.natsCredentialsSecret
      ? [{ name: 'nats-credentials', mountPath: credentialsDirectory, readOnly: true }]
      : []),
    ...(model.source.hub === undefined
      ? [{ name: 'checkpoint', mountPath: '/checkpoint', readOnly: true }]
      : []),
  ];
}
