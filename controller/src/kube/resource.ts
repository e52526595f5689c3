// What every Kubernetes object has, and how a type's objects are addressed. Owns the URL paths of the API and the keys
// under which objects are cached and queued; knows only which types we use, not their spec or status.

import { resourceGroup, resourceVersion } from '../resources/resources.ts';

/** A type of objects at the API server. */
export interface ResourceType {
  /** Such as `v1` or `apps/v1`. */
  readonly apiVersion: string;
  readonly kind: string;
  /** As in the URL. */
  readonly plural: string;
  /** Cluster-wide types have no namespace in their URL. */
  readonly scope?: 'namespace' | 'cluster';
}

export interface OwnerReference {
  readonly apiVersion: string;
  readonly kind: string;
  readonly name: string;
  readonly uid: string;
  readonly controller?: boolean;
  readonly blockOwnerDeletion?: boolean;
}

/** What the API server keeps of every object. Times are ISO texts, from lists and watches alike. */
export interface ObjectMetadata {
  readonly name: string;
  readonly namespace?: string;
  readonly uid: string;
  /** Opaque; equal means the same state of the object. */
  readonly resourceVersion: string;
  readonly generation?: number;
  readonly labels?: Readonly<Record<string, string>>;
  readonly annotations?: Readonly<Record<string, string>>;
  readonly creationTimestamp: string;
  readonly deletionTimestamp?: string;
  readonly finalizers?: readonly string[];
  readonly ownerReferences?: readonly OwnerReference[];
}

/** An object as the API server returns it. The caller reads a type's own fields with a schema. */
export interface KubeObject {
  readonly apiVersion: string;
  readonly kind: string;
  readonly metadata: ObjectMetadata;
  readonly spec?: unknown;
  readonly status?: unknown;
}

/** An object to write, without the fields that the API server fills in. */
export interface ObjectManifest {
  readonly apiVersion: string;
  readonly kind: string;
  readonly metadata: { readonly name: string } & Partial<ObjectMetadata>;
  readonly [field: string]: unknown;
}

const custom = `${resourceGroup}/${resourceVersion}`;

/** The types that the controller reads or writes. */
export const resourceTypes = {
  pods: { apiVersion: 'v1', kind: 'Pod', plural: 'pods' },
  services: { apiVersion: 'v1', kind: 'Service', plural: 'services' },
  secrets: { apiVersion: 'v1', kind: 'Secret', plural: 'secrets' },
  events: { apiVersion: 'v1', kind: 'Event', plural: 'events' },
  leases: { apiVersion: 'coordination.k8s.io/v1', kind: 'Lease', plural: 'leases' },
  podDisruptionBudgets: {
    apiVersion: 'policy/v1',
    kind: 'PodDisruptionBudget',
    plural: 'poddisruptionbudgets',
  },
  modelServices: { apiVersion: custom, kind: 'ModelService', plural: 'modelservices' },
  tenants: { apiVersion: custom, kind: 'Tenant', plural: 'tenants' },
} as const satisfies Record<string, ResourceType>;

/** The key under which an object is cached and queued: `namespace/name`, or `name` of a cluster-wide one. */
export function keyOf({
  metadata,
}: {
  readonly metadata: { readonly name: string; readonly namespace?: string };
}): string {
  return metadata.namespace === undefined ? metadata.name : `${metadata.namespace}/${metadata.name}`;
}

/** The URL path of a type's collection, or of one object or subresource in it. */
export function resourcePath(
  type: ResourceType,
  namespace: string | undefined,
  ...rest: readonly string[]
): string {
  const base = type.apiVersion.includes('/') ? `/apis/${type.apiVersion}` : `/api/${type.apiVersion}`;
  const scope =
    type.scope === 'cluster' || namespace === undefined ? [] : ['namespaces', encodeURIComponent(namespace)];
  return [base, ...scope, type.plural, ...rest.map(encodeURIComponent)].join('/');
}
