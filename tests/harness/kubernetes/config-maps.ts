// ConfigMaps as the plainest objects of a real API server, for tests to write, read and watch. Owns the namespaces of
// these tests, and clients that reach the server through a fault proxy.

import type { KubeConfig } from '@kubernetes/client-node';
import { KubeClient, loadKubeConfig, type KubeClientOptions } from '@mimo/controller/kube/client';
import type { KubeObject, ObjectManifest, ResourceType } from '@mimo/controller/kube/resource';

export const configMaps: ResourceType = { apiVersion: 'v1', kind: 'ConfigMap', plural: 'configmaps' };

const namespaces: ResourceType = {
  apiVersion: 'v1',
  kind: 'Namespace',
  plural: 'namespaces',
  scope: 'cluster',
};

export interface ConfigMap extends KubeObject {
  readonly data?: Readonly<Record<string, string>>;
}

/** The manifest of a ConfigMap. */
export function configMap(
  name: string,
  data: Readonly<Record<string, string>> = {},
  metadata: Partial<KubeObject['metadata']> = {},
): ObjectManifest {
  return { apiVersion: 'v1', kind: 'ConfigMap', metadata: { ...metadata, name }, data };
}

/** A kubeconfig whose server is reached at another URL, such as a proxy's. */
export function kubeConfigVia(kubeconfig: string, url: string | undefined): KubeConfig {
  const config = loadKubeConfig(kubeconfig);
  if (url !== undefined) {
    config.clusters = config.clusters.map((cluster) => ({ ...cluster, server: url }));
  }
  return config;
}

/** Makes a namespace and a client for it; the kubeconfig's user must be allowed to make one. */
export async function createNamespace(
  kubeconfig: string,
  namespace: string,
  options: KubeClientOptions = {},
): Promise<KubeClient> {
  const client = new KubeClient(loadKubeConfig(kubeconfig), { namespace, ...options });
  const manifest = { apiVersion: 'v1', kind: 'Namespace', metadata: { name: namespace } };
  await client.create(namespaces, manifest, AbortSignal.timeout(30_000));
  return client;
}
