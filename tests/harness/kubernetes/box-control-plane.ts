// etcd, kube-apiserver, kube-controller-manager and kube-scheduler in a box, for nodes in other boxes. Owns their flags
// and certificates. A client needs only the kubeconfig file, on this machine's loopback too.

import { readFileSync } from 'node:fs';
import { request } from 'node:https';
import { join } from 'node:path';

import { ClusterError } from '@mimo/core/process/errors';

import { waitFor } from '../wait-for.ts';
import { apiPort, apiServiceAddress, clusterDomain, controlPlaneAddress, serviceRange } from './addresses.ts';
import type { Box, BoxProcess } from './box.ts';
import { createPki, type PairFiles, type Pki } from './pki.ts';
import { forward, type Forward } from './forward.ts';

const readyTimeoutMs = 180_000;
const loopback = 'http://127.0.0.1:2379';

/** Paths of the programs of a control plane. */
export interface ControlPlaneTools {
  readonly etcd: string;
  readonly kubeApiserver: string;
  readonly kubeControllerManager: string;
  readonly kubeScheduler: string;
}

/** A running control plane. It ends with its box. */
export interface BoxControlPlane {
  readonly pki: Pki;
  /** Of an administrator, through a port of this machine's loopback. */
  readonly kubeconfigFile: string;
  /** Of the API server's port. Closed with the cluster. */
  readonly forward: Forward;
  /** https://… as seen from the boxes. */
  readonly internalUrl: string;
  readonly etcd: BoxProcess;
  readonly apiserver: BoxProcess;
  /** Starts etcd again on what it had stored. */
  restartEtcd(): Promise<void>;
  restartApiserver(): Promise<void>;
  /** Waits until the API server says that it is ready. */
  ready(): Promise<void>;
}

export async function startBoxControlPlane(box: Box, tools: ControlPlaneTools): Promise<BoxControlPlane> {
  const pki = await createPki(join(box.directory, 'pki'));
  const internalUrl = `https://${controlPlaneAddress}:${apiPort}`;
  const [server, kubeletClient, admin, controllerManager, scheduler] = await Promise.all([
    pki.issueServer('kube-apiserver', {
      dnsNames: ['localhost', 'kubernetes', 'kubernetes.default', 'kubernetes.default.svc'],
      addresses: ['127.0.0.1', controlPlaneAddress, apiServiceAddress],
    }),
    pki.issueClient('apiserver-kubelet', { user: 'apiserver-kubelet', group: 'system:masters' }),
    pki.issueClient('admin', { user: 'admin', group: 'system:masters' }),
    pki.issueClient('controller-manager', { user: 'system:kube-controller-manager' }),
    pki.issueClient('scheduler', { user: 'system:kube-scheduler' }),
  ]);
  const startEtcd = (): Promise<BoxProcess> => box.start('etcd', etcdCommand(box, tools));
  const startApiserver = (): Promise<BoxProcess> =>
    box.start('kube-apiserver', apiserverCommand(tools, { pki, server, kubeletClient }));
  let etcd = await startEtcd();
  let apiserver = await startApiserver();
  const apiForward = await forward(box, { host: '127.0.0.1', port: apiPort });
  const { port } = apiForward;
  const kubeconfigFile = await pki.writeKubeconfig('admin', `https://127.0.0.1:${port}`, admin);
  const ready = (): Promise<void> => waitUntilReady(port, { pki, admin, apiserver });
  await ready();
  await box.start('kube-controller-manager', [
    tools.kubeControllerManager,
    `--kubeconfig=${await pki.writeKubeconfig('controller-manager', internalUrl, controllerManager)}`,
    `--service-account-private-key-file=${pki.serviceAccountKeyFile}`,
    `--root-ca-file=${pki.certificateFile}`,
    `--cluster-signing-cert-file=${pki.certificateFile}`,
    `--cluster-signing-key-file=${pki.keyFile}`,
    '--use-service-account-credentials',
    '--allocate-node-cidrs=false',
    '--leader-elect=false',
    '--bind-address=127.0.0.1',
    '--kube-api-qps=200',
    '--kube-api-burst=400',
    // The default of 50 s is for fleets; a test of a lost node waits for this.
    '--node-monitor-grace-period=12s',
  ]);
  await box.start('kube-scheduler', [
    tools.kubeScheduler,
    `--kubeconfig=${await pki.writeKubeconfig('scheduler', internalUrl, scheduler)}`,
    '--leader-elect=false',
    '--bind-address=127.0.0.1',
  ]);
  return {
    pki,
    kubeconfigFile,
    internalUrl,
    forward: apiForward,
    get etcd() {
      return etcd;
    },
    get apiserver() {
      return apiserver;
    },
    restartEtcd: async () => {
      etcd = await startEtcd();
    },
    restartApiserver: async () => {
      apiserver = await startApiserver();
    },
    ready,
  };
}

function etcdCommand(box: Box, tools: ControlPlaneTools): readonly string[] {
  return [
    tools.etcd,
    `--data-dir=${join(box.directory, 'etcd')}`,
    `--listen-client-urls=${loopback}`,
    `--advertise-client-urls=${loopback}`,
    '--listen-peer-urls=http://127.0.0.1:2380',
    '--initial-advertise-peer-urls=http://127.0.0.1:2380',
    '--initial-cluster=default=http://127.0.0.1:2380',
    // What a power cut would lose is of no interest to a test; what a kill -9 would lose is written all the same.
    '--unsafe-no-fsync',
    '--log-level=warn',
  ];
}

function apiserverCommand(
  tools: ControlPlaneTools,
  pairs: {
    readonly pki: Pki;
    readonly server: PairFiles;
    readonly kubeletClient: PairFiles;
  },
): readonly string[] {
  const { pki, server, kubeletClient } = pairs;
  return [
    tools.kubeApiserver,
    `--etcd-servers=${loopback}`,
    `--advertise-address=${controlPlaneAddress}`,
    '--bind-address=0.0.0.0',
    `--secure-port=${apiPort}`,
    `--service-cluster-ip-range=${serviceRange}`,
    `--tls-cert-file=${server.certificateFile}`,
    `--tls-private-key-file=${server.keyFile}`,
    `--client-ca-file=${pki.certificateFile}`,
    '--authorization-mode=Node,RBAC',
    '--enable-admission-plugins=NodeRestriction',
    '--allow-privileged=true',
    `--service-account-issuer=https://kubernetes.default.svc.${clusterDomain}`,
    `--service-account-key-file=${pki.serviceAccountPublicKeyFile}`,
    `--service-account-signing-key-file=${pki.serviceAccountKeyFile}`,
    `--kubelet-client-certificate=${kubeletClient.certificateFile}`,
    `--kubelet-client-key=${kubeletClient.keyFile}`,
    `--kubelet-certificate-authority=${pki.certificateFile}`,
    '--kubelet-preferred-address-types=InternalIP',
  ];
}

async function waitUntilReady(
  port: number,
  use: { readonly pki: Pki; readonly admin: PairFiles; readonly apiserver: BoxProcess },
): Promise<void> {
  const credentials = {
    ca: readFileSync(use.pki.certificateFile),
    cert: readFileSync(use.admin.certificateFile),
    key: readFileSync(use.admin.keyFile),
  };
  await waitFor(
    'the API server to be ready',
    async () =>
      !use.apiserver.isRunning() || (await statusOf({ ...credentials, port, path: '/readyz' })) === 200,
    readyTimeoutMs,
  );
  if (!use.apiserver.isRunning()) {
    throw new ClusterError('unavailable', `the API server ended:\n${use.apiserver.logTail()}`);
  }
}

async function statusOf(options: {
  readonly ca: Buffer;
  readonly cert: Buffer;
  readonly key: Buffer;
  readonly port: number;
  readonly path: string;
}): Promise<number | undefined> {
  const { promise, resolve, reject } = Promise.withResolvers<number | undefined>();
  request({ ...options, host: '127.0.0.1', timeout: 5_000, agent: false }, (response) => {
    response.resume();
    resolve(response.statusCode);
  })
    .on('timeout', () => reject(new Error('no answer within 5 s')))
    .on('error', reject)
    .end();
  return promise;
}
