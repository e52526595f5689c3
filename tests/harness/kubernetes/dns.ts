// The cluster's DNS: CoreDNS in the control plane's box, behind the Service address that every pod queries. Owns its
// configuration and that Service.

import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';

import { waitFor } from '../wait-for.ts';
import { clusterDomain, controlPlaneAddress, dnsServiceAddress } from './addresses.ts';
import type { Box, BoxProcess } from './box.ts';

export interface DnsOptions {
  readonly box: Box;
  readonly coredns: string;
  /** As seen from the box, with the right to watch Services, EndpointSlices and namespaces. */
  readonly kubeconfigFile: string;
  readonly apply: (manifests: readonly unknown[]) => Promise<void>;
}

/**
 * Starts the server; it ends with its box. Names of pods that are not ready resolve only where their Service says so.
 */
export async function startDns(options: DnsOptions): Promise<BoxProcess> {
  const { box } = options;
  const configFile = join(box.directory, 'Corefile');
  await writeFile(
    configFile,
    `.:53 {
  errors
  ready
  # A test waits for names to appear and to go: five seconds is the longest that an old answer lives.
  cache {
    success 4096 5
    denial 4096 1
  }
  kubernetes ${clusterDomain} {
    kubeconfig ${options.kubeconfigFile}
    ttl 5
  }
}
`,
  );
  const server = await box.start('coredns', [options.coredns, '-conf', configFile]);
  const ports = [
    { name: 'dns', port: 53, protocol: 'UDP' },
    { name: 'dns-tcp', port: 53, protocol: 'TCP' },
  ];
  const metadata = { name: 'kube-dns', namespace: 'kube-system' };
  await options.apply([
    { apiVersion: 'v1', kind: 'Service', metadata, spec: { clusterIP: dnsServiceAddress, ports } },
    {
      apiVersion: 'discovery.k8s.io/v1',
      kind: 'EndpointSlice',
      metadata: { ...metadata, labels: { 'kubernetes.io/service-name': metadata.name } },
      addressType: 'IPv4',
      ports,
      endpoints: [{ addresses: [controlPlaneAddress], conditions: { ready: true } }],
    },
  ]);
  await waitFor('cluster DNS to be ready', async () =>
    box.run('/bin/busybox', 'wget', '-qO-', 'http://127.0.0.1:8181/ready').then(() => true),
  );
  return server;
}
