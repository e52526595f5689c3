// The containers and volumes of a group's pods and of the prepare pod. Pure. Owns probes, volumes and the security
// context: Pod Security "restricted", which only a hostPath violates.

import { executionProviderOf, type ModelService, type ModelServiceSpec } from '../resources/resources.ts';
import {
  credentialsDirectory,
  metricsPort,
  peerPort,
  portOffset,
  rankVariables,
  workerPort,
  type GroupIdentity,
} from './worker-environment.ts';

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

/** Loading 7B from a slow volume takes almost an hour in the worst case. */
const startUpLimitSeconds = 3600;
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

function amountsOf({ resources }: ModelServiceSpec, asked: { readonly accelerators: boolean }): Manifest {
  const { cpu, memory, accelerators, acceleratorResource } = resources;
  const amounts = {
    cpu,
    memory,
    ...(asked.accelerators && accelerators > 0 ? { [acceleratorResource]: String(accelerators) } : {}),
  };
  return { requests: amounts, limits: amounts };
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
