// What the informers keep of each object: only what decisions need, parsed once per change. A ModelService or Tenant
// that breaks a rule (it may be older than the rule) becomes a record with that error.

import { ClusterError } from '@mimo/core/process/errors';
import { z } from 'zod';

import type { ObservedPod } from '../decide/groups.ts';
import type { PreparePod } from '../decide/prepare.ts';
import type { KubeObject, ObjectMetadata } from '../kube/resource.ts';
import {
  isUnmounted,
  observeFailure,
  observePod,
  observePreparePod,
  serviceOfPod,
  type ApiPod,
  type Failure,
} from './observe.ts';
import { parseModelService, type ModelService } from '../resources/resources.ts';
import { parseTenant, type Tenant } from '../resources/tenant.ts';
import { modelServiceStatus, tenantStatus, type ModelServiceStatus } from '../resources/status.ts';

/** A ModelService, as far as it is valid. */
export interface ServiceRecord {
  readonly metadata: ObjectMetadata;
  /** Undefined: it breaks a rule, which `problem` names. */
  readonly service: ModelService | undefined;
  readonly problem: string;
  readonly status: ModelServiceStatus;
}

export function readService(object: KubeObject): ServiceRecord {
  const status = modelServiceStatus.safeParse(object.status ?? {}).data ?? {};
  try {
    return { metadata: object.metadata, service: parseModelService(object), problem: '', status };
  } catch (error) {
    return {
      metadata: object.metadata,
      service: undefined,
      problem: ClusterError.from(error).message,
      status,
    };
  }
}

/** A pod of ours, of ranks or for preparation; `service` is empty if the labels are not ours. */
export interface PodRecord {
  readonly name: string;
  readonly uid: string;
  readonly resourceVersion: string;
  readonly deleting: boolean;
  readonly service: string;
  readonly ownerUid: string;
  /** When it was first seen to wait for its volumes or its network. */
  readonly unmountedSinceMs: number | undefined;
  readonly failed: Failure | undefined;
  readonly rank: ObservedPod | undefined;
  readonly prepare: PreparePod | undefined;
}

/** Reads a pod's state at `nowMs`; `before` is the earlier record under its name. */
export function readPod(object: KubeObject, before: PodRecord | undefined, nowMs: number): PodRecord {
  const pod = object as unknown as ApiPod;
  const { name, uid, resourceVersion, deletionTimestamp, ownerReferences } = object.metadata;
  const known = before?.uid === uid ? before : undefined;
  const failed = observeFailure(pod, known?.failed, nowMs);
  return {
    name,
    uid,
    resourceVersion,
    deleting: deletionTimestamp !== undefined,
    service: serviceOfPod(pod) ?? '',
    ownerUid: ownerReferences?.find(({ controller }) => controller === true)?.uid ?? '',
    unmountedSinceMs: isUnmounted(pod) ? (known?.unmountedSinceMs ?? nowMs) : undefined,
    failed,
    rank: observePod(pod, failed),
    prepare: observePreparePod(pod, failed),
  };
}

/** A machine normally provides a pod's volumes and network within this time. */
const longWaitMs = 60_000;

/**
 * A record at a given time: a pod that has waited long for its volumes or its network is blocked. The kubelet reports
 * the cause only in the pod's events.
 */
export function podAt(record: PodRecord, nowMs: number): PodRecord {
  const { name, unmountedSinceMs: sinceMs, rank, prepare } = record;
  if (sinceMs === undefined || nowMs - sinceMs < longWaitMs) {
    return record;
  }
  const blocker =
    `pod ${name} has waited for its volumes or its network since ${new Date(sinceMs).toISOString()}: ` +
    `kubectl describe pod ${name} shows the cause`;
  return { ...record, rank: rank && { ...rank, blocker }, prepare: prepare && { ...prepare, blocker } };
}

/** A disruption budget, or the Service that names the ranks. */
export interface SupportRecord {
  readonly ownerUid: string;
  readonly minAvailable: number | undefined;
}

const budgetSpec = z.object({ minAvailable: z.int() });

export function readSupport({ metadata, spec }: KubeObject): SupportRecord {
  return {
    ownerUid: metadata.ownerReferences?.find(({ controller }) => controller === true)?.uid ?? '',
    minAvailable: budgetSpec.safeParse(spec).data?.minAvailable,
  };
}

/** A Tenant, as far as it is valid. */
export interface TenantRecord {
  readonly metadata: ObjectMetadata;
  readonly tenant: Tenant | undefined;
  readonly problem: string;
  readonly status: z.output<typeof tenantStatus>;
}

export function readTenant(object: KubeObject): TenantRecord {
  const status = tenantStatus.safeParse(object.status ?? {}).data ?? {};
  try {
    return { metadata: object.metadata, tenant: parseTenant(object), problem: '', status };
  } catch (error) {
    return {
      metadata: object.metadata,
      tenant: undefined,
      problem: ClusterError.from(error).message,
      status,
    };
  }
}
