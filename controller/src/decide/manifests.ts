// The Kubernetes objects of a ModelService: the pods of one group, the prepare pod, the headless Service that names the
// ranks, and the disruption budget. Pure: the same arguments give the same objects. Their containers and volumes are in
// containers.ts, their labels and names in labels.ts.

import {
  resourceGroup,
  resourceVersion,
  type ModelService,
  type ModelServiceSpec,
} from '../resources/resources.ts';
import {
  podSecurity,
  prepareContainer,
  rankContainer,
  volumesOf,
  type Manifest,
  type WorkerSettings,
} from './containers.ts';
import {
  disruptionBudgetName,
  labels,
  lifeAnnotation,
  managedBy,
  podName,
  preparePodName,
  prepareLabels,
  rankServiceName,
  routableCondition,
} from './labels.ts';
import { terminationGraceSeconds, workerPort, type GroupIdentity } from './worker-environment.ts';

/**
 * A group on a machine that does not answer is rebuilt elsewhere after half a minute; Kubernetes' own limit is five
 * minutes.
 */
const lostMachineTolerations = ['not-ready', 'unreachable'].map((condition) => ({
  key: `node.kubernetes.io/${condition}`,
  operator: 'Exists',
  effect: 'NoExecute',
  tolerationSeconds: 30,
}));

/**
 * Whether a pod's tolerations limit how long it outlives its machine's failure; Kubernetes takes the shortest of
 * several.
 */
function isSaid(condition: string, tolerations: ModelServiceSpec['template']['tolerations']): boolean {
  return tolerations.some(
    ({ key = condition, value = '', effect = 'NoExecute' }) =>
      key === condition && value === '' && effect === 'NoExecute',
  );
}

/** Time limit for fetching and compiling a model. */
const prepareLimitSeconds = 3 * 3600;

/** The pods of a group in order of rank: one for `pod`, tensorParallel of them for `spread`. */
export function groupPods(
  service: ModelService,
  identity: GroupIdentity & { readonly life: string },
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
          ...commonLabels(service, 'group'),
          [labels.service]: metadata.name,
          [labels.revision]: identity.revision,
          [labels.group]: identity.group,
          [labels.index]: String(identity.index),
          [labels.rank]: String(pod),
          [labels.groupPods]: String(podsOfGroup.length),
        },
        annotations: { ...spec.template.annotations, [lifeAnnotation]: identity.life },
        ownerReferences: [ownerOf(service)],
      },
      spec: {
        ...podFields(spec, settings),
        // With the headless Service this makes <pod>.<service>-ranks.<namespace>.svc.
        hostname: name,
        subdomain: rankServiceName(metadata.name),
        readinessGates: [{ conditionType: routableCondition }],
        ...placementOf(service, identity, { pod, pods: podsOfGroup.length }),
        initContainers: [
          prepareContainer(service, identity, { settings, rank: ranksOfPod[0] ?? 0, publish: false }),
        ],
        containers: ranksOfPod.map((rank) => rankContainer(service, identity, { settings, rank })),
      },
    };
  });
}

/** Finds the model before any group exists, and publishes it. */
export function preparePod(service: ModelService, modelHash: string, settings: WorkerSettings): Manifest {
  const { spec, metadata } = service;
  const name = preparePodName(metadata.name, modelHash);
  const identity = { group: name, revision: modelHash, index: 0, groupToken: 'unset' };
  return {
    apiVersion: 'v1',
    kind: 'Pod',
    metadata: {
      name,
      namespace: metadata.namespace,
      labels: {
        ...commonLabels(service, 'prepare'),
        [prepareLabels.service]: metadata.name,
        [prepareLabels.hash]: modelHash,
      },
      annotations: spec.template.annotations,
      ownerReferences: [ownerOf(service)],
    },
    spec: {
      ...podFields(spec, settings),
      activeDeadlineSeconds: prepareLimitSeconds,
      containers: [prepareContainer(service, identity, { settings, rank: 0, publish: true })],
    },
  };
}

/** Gives every rank a stable name before it is ready: ranks must find each other to become ready. */
export function rankService(service: ModelService): Manifest {
  return {
    apiVersion: 'v1',
    kind: 'Service',
    metadata: {
      name: rankServiceName(service.metadata.name),
      namespace: service.metadata.namespace,
      labels: commonLabels(service, 'group'),
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

/** One group at a time: disruption.ts computes how many pods that is. */
export function disruptionBudget(service: ModelService, minAvailable: number): Manifest {
  return {
    apiVersion: 'policy/v1',
    kind: 'PodDisruptionBudget',
    metadata: {
      name: disruptionBudgetName(service.metadata.name),
      namespace: service.metadata.namespace,
      labels: commonLabels(service, 'group'),
      ownerReferences: [ownerOf(service)],
    },
    spec: {
      minAvailable,
      selector: { matchLabels: { [labels.service]: service.metadata.name } },
      // Otherwise a group that never became ready would block the draining of its machine forever.
      unhealthyPodEvictionPolicy: 'AlwaysAllow',
    },
  };
}

function commonLabels({ metadata, spec }: ModelService, component: 'group' | 'prepare'): Manifest {
  return {
    ...spec.template.labels,
    'app.kubernetes.io/name': 'mimo-worker',
    'app.kubernetes.io/component': component,
    'app.kubernetes.io/instance': metadata.name,
    ...managedBy,
  };
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

function podFields(spec: ModelServiceSpec, settings: WorkerSettings): Manifest {
  const { template } = spec;
  const { podDefaults } = settings;
  const accelerated = spec.resources.accelerators > 0 ? podDefaults?.accelerated : undefined;
  const pullSecrets = new Set([
    ...template.imagePullSecrets.map(({ name }) => name),
    ...(podDefaults?.imagePullSecrets ?? []),
  ]);
  return {
    // When a rank ends, so does its group; the controller rebuilds groups, not the kubelet.
    restartPolicy: 'Never',
    terminationGracePeriodSeconds: terminationGraceSeconds,
    enableServiceLinks: false,
    automountServiceAccountToken: false,
    ...definedOnly({
      serviceAccountName: template.serviceAccountName ?? podDefaults?.serviceAccountName,
      priorityClassName: template.priorityClassName,
      runtimeClassName: template.runtimeClassName ?? accelerated?.runtimeClassName,
    }),
    nodeSelector: { ...accelerated?.nodeSelector, ...template.nodeSelector },
    tolerations: [
      ...template.tolerations,
      ...(accelerated?.tolerations ?? []),
      ...lostMachineTolerations.filter(({ key }) => !isSaid(key, template.tolerations)),
    ],
    imagePullSecrets: [...pullSecrets].map((name) => ({ name })),
    securityContext: podSecurity,
    volumes: volumesOf(spec, settings),
  };
}

/**
 * Groups go to different machines and zones, so that one failure affects one group; the ranks of one group go to one
 * zone, because they exchange sums at every layer. These are preferences, not requirements.
 */
function placementOf(
  { metadata }: ModelService,
  { group }: GroupIdentity,
  { pod, pods }: { readonly pod: number; readonly pods: number },
): Manifest {
  const zone = 'topology.kubernetes.io/zone';
  // Selects the same rank of every group: ranks of one group need not be apart.
  const peers = { matchLabels: { [labels.service]: metadata.name, [labels.rank]: String(pod) } };
  const spreadOver = (topologyKey: string): Manifest => ({
    maxSkew: 1,
    topologyKey,
    whenUnsatisfiable: 'ScheduleAnyway',
    labelSelector: peers,
  });
  const ranksOfGroup = { labelSelector: { matchLabels: { [labels.group]: group } }, topologyKey: zone };
  return {
    topologySpreadConstraints: [
      spreadOver('kubernetes.io/hostname'),
      // Only the leader: the other ranks follow it.
      ...(pod === 0 ? [spreadOver(zone)] : []),
    ],
    ...(pods === 1
      ? {}
      : {
          affinity: {
            podAffinity: {
              preferredDuringSchedulingIgnoredDuringExecution: [
                { weight: 100, podAffinityTerm: ranksOfGroup },
              ],
            },
          },
        }),
  };
}

function definedOnly(fields: Readonly<Record<string, string | undefined>>): Manifest {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => (value ?? '') !== ''));
}
