// The Kubernetes objects of a ModelService: the pods of one group, the headless Service that names its ranks, and the
// disruption budget. Pure: the same arguments give the same objects. Owns labels, ports, volumes, probes and the security
// context (Pod Security "restricted", except that a hostPath source breaks it); the worker's variables are worker/src/config.ts.

import { resourceGroup, resourceVersion, type ModelService, type ModelServiceSpec } from '../resources.ts';
import { podName } from './groups.ts';

/** Labels by which pods are found again. */
export const labels = {
  service: `${resourceGroup}/service`,
  revision: `${resourceGroup}/revision`,
  group: `${resourceGroup}/group`,
  index: `${resourceGroup}/group-index`,
  rank: `${resourceGroup}/rank`,
  groupPods: `${resourceGroup}/group-pods`,
} as const;

/** The mark of a draining group: since when, ISO time. */
export const drainAnnotation = `${resourceGroup}/draining-since`;

/** The readiness gate: true while the dispatcher holds a live channel to the whole group. */
export const routableCondition = `${resourceGroup}/routable`;

/** What the controller's own configuration says about workers. */
export interface WorkerSettings {
  readonly image: string;
  readonly natsUrl: string;
}

export interface GroupIdentity {
  readonly group: string;
  readonly revision: string;
  readonly index: number;
  /** Random for each life of a group: ranks turn away those of another life. */
  readonly groupToken: string;
}

const workerPort = 50_052;
const peerPort = 50_152;
/** Between SIGTERM and SIGKILL: handing over takes seconds, long work has drained before the pod is deleted. */
const terminationGraceSeconds = 30;
/** Downloading and compiling 7B on a slow volume takes most of an hour at the worst. */
const startUpLimitSeconds = 3600;

type Manifest = Readonly<Record<string, unknown>>;

/** The pods of a group in order of rank: one for `pod`, tensorParallel of them for `spread`. */
export function groupPods(
  service: ModelService,
  identity: GroupIdentity,
  settings: WorkerSettings,
): readonly Manifest[] {
  const { spec, metadata } = service;
  const ranks = Array.from({ length: spec.tensorParallel }, (_, rank) => rank);
  const podsOfGroup = spec.placement === 'spread' ? ranks.map((rank) => [rank]) : [ranks];
  return podsOfGroup.map((ranksOfPod, pod) => {
    const name = podName(identity.group, pod);
    return {
      apiVersion: 'v1',
      kind: 'Pod',
      metadata: {
        name,
        namespace: metadata.namespace,
        labels: {
          ...spec.template.labels,
          'app.kubernetes.io/name': 'mimo-worker',
          'app.kubernetes.io/instance': metadata.name,
          'app.kubernetes.io/managed-by': 'mimo-controller',
          [labels.service]: metadata.name,
          [labels.revision]: identity.revision,
          [labels.group]: identity.group,
          [labels.index]: String(identity.index),
          [labels.rank]: String(pod),
          [labels.groupPods]: String(podsOfGroup.length),
        },
        annotations: spec.template.annotations,
        ownerReferences: [ownerOf(service)],
      },
      spec: {
        // The name that the Service below gives each rank: <pod>.<service>-ranks.<namespace>.svc.
        hostname: name,
        subdomain: rankServiceName(metadata.name),
        // A rank that ends takes its group with it; the controller rebuilds groups, the kubelet must not.
        restartPolicy: 'Never',
        terminationGracePeriodSeconds: terminationGraceSeconds,
        enableServiceLinks: false,
        automountServiceAccountToken: false,
        ...definedOnly({
          serviceAccountName: spec.template.serviceAccountName,
          priorityClassName: spec.template.priorityClassName,
          runtimeClassName: spec.template.runtimeClassName,
        }),
        nodeSelector: spec.template.nodeSelector,
        tolerations: spec.template.tolerations,
        imagePullSecrets: spec.template.imagePullSecrets,
        readinessGates: [{ conditionType: routableCondition }],
        securityContext: {
          runAsNonRoot: true,
          runAsUser: 10_001,
          fsGroup: 10_001,
          fsGroupChangePolicy: 'OnRootMismatch',
          seccompProfile: { type: 'RuntimeDefault' },
        },
        initContainers: fetchContainers(spec, settings),
        containers: ranksOfPod.map((rank) => rankContainer(service, identity, settings, rank)),
        volumes: volumesOf(spec),
      },
    };
  });
}

/** Gives every rank its stable name, also before it is ready: ranks find one another in order to become ready. */
export function rankService(service: ModelService): Manifest {
  return {
    apiVersion: 'v1',
    kind: 'Service',
    metadata: {
      name: rankServiceName(service.metadata.name),
      namespace: service.metadata.namespace,
      labels: { [labels.service]: service.metadata.name },
      ownerReferences: [ownerOf(service)],
    },
    spec: {
      clusterIP: 'None',
      publishNotReadyAddresses: true,
      selector: { [labels.service]: service.metadata.name },
      ports: [{ name: 'grpc', port: workerPort, protocol: 'TCP' }],
    },
  };
}

/** One group at a time: evicting a rank makes its group unready, and the next eviction waits until it is rebuilt. */
export function disruptionBudget(service: ModelService): Manifest {
  return {
    apiVersion: 'policy/v1',
    kind: 'PodDisruptionBudget',
    metadata: {
      name: `${service.metadata.name}-groups`,
      namespace: service.metadata.namespace,
      ownerReferences: [ownerOf(service)],
    },
    spec: {
      maxUnavailable: 1,
      selector: { matchLabels: { [labels.service]: service.metadata.name } },
      // Without this a group that never became ready would keep its machine from ever being emptied.
      unhealthyPodEvictionPolicy: 'AlwaysAllow',
    },
  };
}

function rankServiceName(service: string): string {
  return `${service}-ranks`;
}

function ownerOf({ metadata }: ModelService): Manifest {
  return {
    apiVersion: `${resourceGroup}/${resourceVersion}`,
    kind: 'ModelService',
    name: metadata.name,
    uid: metadata.uid,
    controller: true,
    blockOwnerDeletion: true,
  };
}

function rankContainer(
  service: ModelService,
  identity: GroupIdentity,
  settings: WorkerSettings,
  rank: number,
): Manifest {
  const { spec, metadata } = service;
  const spread = spec.placement === 'spread';
  // Ranks of one pod share its address, so each has ports of its own.
  const offset = spread ? 0 : rank;
  const hostOf = (peer: number): string =>
    spread
      ? `${podName(identity.group, peer)}.${rankServiceName(metadata.name)}.${metadata.namespace}.svc`
      : '127.0.0.1';
  const peers = Array.from(
    { length: spec.tensorParallel },
    (_, peer) => `${hostOf(peer)}:${peerPort + (spread ? 0 : peer)}`,
  );
  const leader = `${podName(identity.group, 0)}.${rankServiceName(metadata.name)}.${metadata.namespace}.svc`;
  const variables: Readonly<Record<string, string>> = {
    MIMO_WORKER_MODEL: spec.model.name,
    MIMO_WORKER_GROUP: identity.group,
    MIMO_WORKER_REVISION: identity.revision,
    MIMO_WORKER_CHECKPOINT_DIRECTORY: checkpointDirectory(spec),
    MIMO_WORKER_CACHE_DIRECTORY: '/cache',
    MIMO_WORKER_PRECISION: spec.model.precision,
    MIMO_WORKER_TENSOR_PARALLEL: String(spec.tensorParallel),
    MIMO_WORKER_RANK: String(rank),
    MIMO_WORKER_LISTEN: `0.0.0.0:${workerPort + offset}`,
    MIMO_WORKER_ADVERTISE: `${leader}:${workerPort}`,
    MIMO_WORKER_NATS_URL: settings.natsUrl,
    MIMO_WORKER_GROUP_TOKEN: identity.groupToken,
    MIMO_WORKER_DRAIN_GRACE: `${terminationGraceSeconds - 5}s`,
    ...(spec.tensorParallel === 1
      ? {}
      : {
          MIMO_WORKER_PEERS: peers.join(','),
          MIMO_WORKER_PEER_LISTEN: `${spread ? '0.0.0.0' : '127.0.0.1'}:${peerPort + offset}`,
        }),
  };
  const { cpu, memory, accelerators, acceleratorResource } = spec.resources;
  const amounts = {
    cpu,
    memory,
    ...(accelerators === 0 ? {} : { [acceleratorResource]: String(accelerators) }),
  };
  const probe = { grpc: { port: workerPort + offset }, timeoutSeconds: 5 };
  return {
    name: `rank-${rank}`,
    image: spec.template.image ?? settings.image,
    imagePullPolicy: spec.template.imagePullPolicy,
    // The template's own variables come last and win.
    env: Object.entries({
      ...variables,
      ...Object.fromEntries(spec.template.env.map((e) => [e.name, e.value])),
    }).map(([name, value]) => ({ name, value })),
    ports: [{ name: `grpc-${rank}`, containerPort: workerPort + offset, protocol: 'TCP' }],
    resources: { requests: amounts, limits: amounts },
    startupProbe: { ...probe, periodSeconds: 2, failureThreshold: startUpLimitSeconds / 2 },
    readinessProbe: { ...probe, periodSeconds: 2, failureThreshold: 2 },
    livenessProbe: { ...probe, periodSeconds: 10, failureThreshold: 6 },
    terminationMessagePolicy: 'FallbackToLogsOnError',
    securityContext: restricted,
    volumeMounts: mountsOf(spec),
  };
}

const restricted: Manifest = {
  allowPrivilegeEscalation: false,
  readOnlyRootFilesystem: true,
  capabilities: { drop: ['ALL'] },
};

function checkpointDirectory({ model }: ModelServiceSpec): string {
  const { hub, volumeClaim } = model.source;
  if (hub !== undefined) {
    return `/cache/checkpoints/${hub.repository}/${hub.revision}`;
  }
  return volumeClaim === undefined ? '/checkpoint' : `/checkpoint/${volumeClaim.path}`;
}

/** A hub checkpoint is fetched once into the cache, by the worker's image. */
function fetchContainers(spec: ModelServiceSpec, settings: WorkerSettings): readonly Manifest[] {
  const { hub } = spec.model.source;
  if (hub === undefined) {
    return [];
  }
  return [
    {
      name: 'fetch',
      image: spec.template.image ?? settings.image,
      imagePullPolicy: spec.template.imagePullPolicy,
      args: ['fetch', hub.repository, '--revision', hub.revision, '--to', checkpointDirectory(spec)],
      resources: { requests: { cpu: '500m', memory: '512Mi' }, limits: { cpu: '2', memory: '1Gi' } },
      terminationMessagePolicy: 'FallbackToLogsOnError',
      securityContext: restricted,
      volumeMounts: mountsOf(spec),
    },
  ];
}

function volumesOf({ model, template }: ModelServiceSpec): readonly Manifest[] {
  const { volumeClaim, hostPath } = model.source;
  return [
    {
      name: 'cache',
      ...(template.cacheVolumeClaim === undefined
        ? { emptyDir: {} }
        : claimOf(template.cacheVolumeClaim, false)),
    },
    // Ranks of one pod exchange partial sums through shared memory; the default of 64 MiB is too little.
    { name: 'shared-memory', emptyDir: { medium: 'Memory', sizeLimit: '1Gi' } },
    { name: 'temporary', emptyDir: { sizeLimit: '1Gi' } },
    ...(volumeClaim === undefined ? [] : [{ name: 'checkpoint', ...claimOf(volumeClaim.claimName, true) }]),
    ...(hostPath === undefined
      ? []
      : [{ name: 'checkpoint', hostPath: { path: hostPath, type: 'Directory' } }]),
  ];
}

function claimOf(claimName: string, readOnly: boolean): Manifest {
  return { persistentVolumeClaim: { claimName, ...(readOnly ? { readOnly } : {}) } };
}

function mountsOf({ model }: ModelServiceSpec): readonly Manifest[] {
  return [
    { name: 'cache', mountPath: '/cache' },
    { name: 'shared-memory', mountPath: '/dev/shm' },
    { name: 'temporary', mountPath: '/tmp' },
    ...(model.source.hub === undefined
      ? [{ name: 'checkpoint', mountPath: '/checkpoint', readOnly: true }]
      : []),
  ];
}

function definedOnly(fields: Readonly<Record<string, string | undefined>>): Manifest {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined));
}
