// Labels, annotations and names of the controller's objects, by which it finds them again. Names are deterministic: the
// same group of the same revision always has the same pods.

import { resourceGroup } from '../resources/resources.ts';

/** On the pods of groups; `service` is on nothing else, so that it selects them. */
export const labels = {
  service: `${resourceGroup}/service`,
  revision: `${resourceGroup}/revision`,
  group: `${resourceGroup}/group`,
  index: `${resourceGroup}/group-index`,
  rank: `${resourceGroup}/rank`,
  groupPods: `${resourceGroup}/group-pods`,
} as const;

/** On prepare pods: the service and the hash of the model that is prepared. */
export const prepareLabels = {
  service: `${resourceGroup}/prepares`,
  hash: `${resourceGroup}/model-hash`,
} as const;

/** On every object of the controller; its watches select by it. */
export const managedBy = { 'app.kubernetes.io/managed-by': 'mimo-controller' } as const;

/** The mark of a draining group: since when, ISO time. */
export const drainAnnotation = `${resourceGroup}/draining-since`;

/** One life of a group, the same on all its pods: distinguishes a pod of this creation from an older one. */
export const lifeAnnotation = `${resourceGroup}/life`;

/** The readiness gate: true while the dispatcher holds a live channel to the whole group. */
export const routableCondition = `${resourceGroup}/routable`;

/** Keeps a ModelService until its groups have drained and its model is removed from the catalogue. */
export const drainFinalizer = `${resourceGroup}/drain`;

export function groupName(service: string, revision: string, index: number): string {
  return `${service}-${revision}-${index}`;
}

export function podName(group: string, rank: number): string {
  return `${group}-${rank}`;
}

export function preparePodName(service: string, modelHash: string): string {
  return `${service}-${modelHash}-prepare`;
}

/** The headless Service that names the ranks. */
export function rankServiceName(service: string): string {
  return `${service}-ranks`;
}

export function disruptionBudgetName(service: string): string {
  return `${service}-groups`;
}

/** The service of a pod, from the pod's name: the only thing known about a deleted pod. */
export function serviceOfPodName(pod: string): string | undefined {
  return /^(.+)-[0-9a-f]{8}-(?:\d+-\d+|prepare)$/.exec(pod)?.[1];
}
