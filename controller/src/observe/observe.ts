// Pods as the API server has them -> the inputs of decisions. Pure. An unreadable object of ours (without a group's
// labels) is ignored. Collects messages for people: why a pod does not start, and its last message. Kubelets stamp by
// their machine's clock: such stamps only order the containers of one pod. The time of a pod's event is when the
// controller first saw it.

import type { ObservedPod } from '../decide/groups.ts';
import { drainAnnotation, labels, prepareLabels, routableCondition } from '../decide/labels.ts';
import type { PreparePod } from '../decide/prepare.ts';

interface ApiCondition {
  readonly type: string;
  readonly status: string;
  readonly reason?: string | undefined;
  readonly message?: string | undefined;
}

interface ApiContainerStatus {
  readonly name: string;
  readonly state?: {
    readonly waiting?: { readonly reason?: string; readonly message?: string } | undefined;
    readonly terminated?:
      | {
          readonly exitCode: number;
          readonly reason?: string;
          readonly message?: string;
          /** By the kubelet's clock. */
          readonly finishedAt?: string;
        }
      | undefined;
  };
}

/** The fields of a pod that are read. */
export interface ApiPod {
  readonly metadata: {
    readonly name: string;
    readonly uid: string;
    readonly resourceVersion?: string;
    readonly creationTimestamp?: string;
    readonly deletionTimestamp?: string;
    readonly labels?: Readonly<Record<string, string>>;
    readonly annotations?: Readonly<Record<string, string>>;
    readonly ownerReferences?: readonly { readonly uid: string; readonly controller?: boolean }[];
  };
  readonly status?: {
    readonly phase?: string;
    readonly reason?: string;
    readonly message?: string;
    readonly conditions?: readonly ApiCondition[];
    readonly containerStatuses?: readonly ApiContainerStatus[];
    readonly initContainerStatuses?: readonly ApiContainerStatus[];
  };
}

/** The service of a pod, which is a rank or a prepare pod. */
export function serviceOfPod({ metadata }: ApiPod): string | undefined {
  return metadata.labels?.[labels.service] ?? metadata.labels?.[prepareLabels.service];
}

/** Whether the ModelService with this uid owns the pod: a pod of an earlier service of the same name is not ours. */
export function isOwnedBy({ metadata }: ApiPod, uid: string): boolean {
  return metadata.ownerReferences?.some((owner) => owner.uid === uid && owner.controller === true) === true;
}

/** A pod of a group, and how it failed; undefined for any other. */
export function observePod(pod: ApiPod, failed: Failure | undefined): ObservedPod | undefined {
  const { metadata, status } = pod;
  const named = metadata.labels ?? {};
  const group = named[labels.group];
  const revision = named[labels.revision];
  const [index, rank, groupPods] = [labels.index, labels.rank, labels.groupPods].map((label) =>
    Number(named[label]),
  );
  if (
    group === undefined ||
    revision === undefined ||
    !isCount(index) ||
    !isCount(rank) ||
    !isCount(groupPods)
  ) {
    return undefined;
  }
  const isTrue = (type: string): boolean =>
    status?.conditions?.some((condition) => condition.type === type && condition.status === 'True') === true;
  const since = Date.parse(metadata.annotations?.[drainAnnotation] ?? '');
  return {
    name: metadata.name,
    uid: metadata.uid,
    group,
    revision,
    index,
    rank,
    groupPods,
    phase: phaseOf(pod, failed),
    ready: isTrue('Ready'),
    deleting: metadata.deletionTimestamp !== undefined,
    createdMs: timeOf(metadata.creationTimestamp) ?? 0,
    drainingSinceMs: Number.isNaN(since) ? undefined : since,
    blocker: blockerOf(pod),
    failure: failed?.words,
    failedMs: failed?.seenMs,
    routable: isTrue(routableCondition),
  };
}

/** A prepare pod, and how it failed; undefined for any other. */
export function observePreparePod(pod: ApiPod, failed: Failure | undefined): PreparePod | undefined {
  const modelHash = pod.metadata.labels?.[prepareLabels.hash];
  if (modelHash === undefined) {
    return undefined;
  }
  return {
    name: pod.metadata.name,
    uid: pod.metadata.uid,
    modelHash,
    phase: phaseOf(pod, failed),
    deleting: pod.metadata.deletionTimestamp !== undefined,
    exitCode: failed?.exitCode,
    failedMs: failed?.seenMs,
    blocker: blockerOf(pod),
    failure: failed?.words,
  };
}

function isCount(value: number | undefined): value is number {
  return value !== undefined && Number.isInteger(value) && value >= 0;
}

/** When a rank ends, its pod counts as ended, even while its other ranks still run. */
function phaseOf({ status }: ApiPod, failed: Failure | undefined): ObservedPod['phase'] {
  const ended = (status?.containerStatuses ?? []).filter(({ state }) => state?.terminated !== undefined);
  if (failed !== undefined) {
    return 'Failed';
  }
  if (status?.phase === 'Succeeded' || status?.phase === 'Failed' || ended.length > 0) {
    return 'Succeeded';
  }
  return status?.phase === 'Running' ? 'Running' : 'Pending';
}

/** Reasons of a waiting container that do not resolve soon by themselves. */
const blockingReasons = new Set([
  'ErrImagePull',
  'ImagePullBackOff',
  'ErrImageNeverPull',
  'InvalidImageName',
  'ImageInspectError',
  'RegistryUnavailable',
  'CreateContainerConfigError',
  'CreateContainerError',
  'RunContainerError',
]);

/** Why a pod does not start: the message of the scheduler, or about its images. */
function blockerOf({ status }: ApiPod): string | undefined {
  const scheduled = status?.conditions?.find(({ type }) => type === 'PodScheduled');
  if (scheduled?.status === 'False') {
    return limited(scheduled.message ?? scheduled.reason ?? 'it cannot be placed');
  }
  for (const { name, state } of containersOf(status)) {
    const { reason, message } = state?.waiting ?? {};
    if (reason !== undefined && blockingReasons.has(reason)) {
      return limited(`${name}: ${reason}${message === undefined ? '' : `: ${message}`}`);
    }
  }
  return undefined;
}

/** Whether a pod waits on its machine for its volumes and its network, before any image is pulled. */
export function isUnmounted({ status }: ApiPod): boolean {
  const isPlaced = status?.conditions?.some(
    ({ type, status: held }) => type === 'PodScheduled' && held === 'True',
  );
  const hasStarted = status?.conditions?.find(({ type }) => type === 'PodReadyToStartContainers');
  return isPlaced === true && status?.phase === 'Pending' && hasStarted?.status === 'False';
}

/** How a pod failed. */
export interface Failure {
  readonly words: string;
  readonly exitCode: number | undefined;
  /** When the controller first saw it. */
  readonly seenMs: number;
}

/**
 * The message of the container that failed first, or the reason why the whole pod failed. A container that ends
 * because its pod is deleted has not failed, whatever its exit code: a pod being deleted has failed only if it had
 * failed `before`.
 */
export function observeFailure(
  { metadata, status }: ApiPod,
  before: Failure | undefined,
  nowMs: number,
): Failure | undefined {
  if (metadata.deletionTimestamp !== undefined) {
    return before;
  }
  const seenMs = before?.seenMs ?? nowMs;
  const failed = containersOf(status).flatMap(({ name, state }) => {
    const { terminated } = state ?? {};
    if (terminated === undefined || terminated.exitCode === 0) {
      return [];
    }
    const finishedMs = timeOf(terminated.finishedAt) ?? 0;
    const { exitCode, reason, message } = terminated;
    const why =
      reason === undefined || reason === 'Error'
        ? `exit code ${exitCode}`
        : `${reason}, exit code ${exitCode}`;
    return [{ words: wordsOf(`${name}: ${why}`, message), finishedMs, exitCode }];
  });
  const [first] = failed.toSorted((a, b) => a.finishedMs - b.finishedMs);
  if (first !== undefined) {
    return { words: first.words, exitCode: first.exitCode, seenMs };
  }
  if (status?.phase !== 'Failed') {
    return undefined;
  }
  // Evicted, or its machine is gone.
  return { words: wordsOf(status.reason ?? 'failed', status.message), exitCode: undefined, seenMs };
}

function containersOf(status: ApiPod['status']): readonly ApiContainerStatus[] {
  return [...(status?.initContainerStatuses ?? []), ...(status?.containerStatuses ?? [])];
}

/** The last line of a message: the kubelet reports the end of the log, and the error is in its last line. */
function wordsOf(what: string, message: string | undefined): string {
  const lines = (message ?? '').split('\n').map((line) => line.trim());
  const last = lines.findLast((line) => line !== '');
  return limited(last === undefined ? what : `${what}: ${last}`);
}

function limited(text: string): string {
  return text.length <= 900 ? text : `${text.slice(0, 897)}...`;
}

function timeOf(text: string | undefined): number | undefined {
  const time = Date.parse(text ?? '');
  return Number.isNaN(time) ? undefined : time;
}
