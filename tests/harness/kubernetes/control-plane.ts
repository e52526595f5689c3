// A real control plane on loopback for tests: etcd, kube-apiserver, kube-controller-manager and kube-scheduler with
// their certificates, in a directory of its own. Owns their start, their ends and their faults. No kubelet: what is
// bound to a node runs only where pretend nodes or a node in a box take it up.

import { execFile } from 'node:child_process';
import { generateKeyPairSync } from 'node:crypto';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import https from 'node:https';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';

import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';

import { startChild, type Child } from '../../../cli/src/local/child-process.ts';
import { freePorts } from '../../../cli/src/local/free-ports.ts';
import { createAuthority, type Authority, type KeyPair } from './certificates.ts';
import type { KubernetesTools } from './tools.ts';

const readyTimeoutMs = 60_000;
const readyPollMs = 50;
const stopGraceMs = 10_000;
const kubectlMaxBytes = 64 * 2 ** 20;
/** Of the benchmark range, which is nobody's; the first is the API server's own Service. */
const serviceRange = '198.19.0.0/16';
const apiServiceAddress = '198.19.0.1';

/** What may differ from a control plane with the defaults of Kubernetes. */
export interface ControlPlaneOptions {
  readonly tools: KubernetesTools;
  readonly apiserverFlags?: readonly string[];
  /** Without them the controller-manager's own limit of 20 requests a second rules every test of scale. */
  readonly controllerManagerFlags?: readonly string[];
  readonly schedulerFlags?: readonly string[];
}

/** A running control plane. Close it. */
export interface ControlPlane {
  readonly url: string;
  /** Path of the administrator's kubeconfig. */
  readonly kubeconfig: string;
  /** Holds kubeconfigs, logs (`<component>.log`) and etcd's data; gone after `close`. */
  readonly directory: string;
  readonly authorityCertificate: string;
  /** From the start of the first process to readiness of all four. */
  readonly startMs: number;
  /** Runs kubectl as administrator, with `input` on its standard input; gives its output. Fails with its words. */
  kubectl(args: readonly string[], input?: string): Promise<string>;
  /** Writes a kubeconfig for a certificate of that user and those groups; gives its path. */
  kubeconfigForUser(user: string, groups?: readonly string[]): Promise<string>;
  /**
   * Writes a kubeconfig with a token of that ServiceAccount (TokenRequest), so with its rights alone; gives its path.
   */
  kubeconfigForServiceAccount(namespace: string, name: string): Promise<string>;
  /** SIGTERM, or SIGKILL; returns when it is gone. Clients see refused connections. */
  stopApiserver(signal?: 'SIGTERM' | 'SIGKILL'): Promise<void>;
  /** On the same port and data; returns when it is ready. */
  startApiserver(): Promise<void>;
  /** Process ids of what runs, for tests that look at or kill them. */
  pids(): readonly number[];
  close(): Promise<void>;
}

function base64(text: string): string {
  return Buffer.from(text).toString('base64');
}

/** A kubeconfig's text, in JSON, which is YAML: one cluster, one user with a client certificate or a token. */
export function formatKubeconfig(
  url: string,
  authorityCertificate: string,
  user: KeyPair | { readonly token: string },
): string {
  return JSON.stringify({
    apiVersion: 'v1',
    kind: 'Config',
    clusters: [
      {
        name: 'test',
        cluster: { server: url, 'certificate-authority-data': base64(authorityCertificate) },
      },
    ],
    users: [
      {
        name: 'test',
        user:
          'token' in user
            ? { token: user.token }
            : {
                'client-certificate-data': base64(user.certificate),
                'client-key-data': base64(user.key),
              },
      },
    ],
    contexts: [{ name: 'test', context: { cluster: 'test', user: 'test' } }],
    'current-context': 'test',
  });
}

/** Whether a path of a loopback server answers 200; a certificate not signed by an authority we know is no obstacle. */
async function answers(url: string, client?: KeyPair & { readonly ca: string }): Promise<boolean> {
  return new Promise((resolve) => {
    const request = https.get(
      url,
      client === undefined
        ? { rejectUnauthorized: false, agent: false }
        : { ca: client.ca, cert: client.certificate, key: client.key, agent: false },
      (response) => {
        response.resume();
        resolve(response.statusCode === 200);
      },
    );
    request.setTimeout(2_000, () => request.destroy());
    request.once('error', () => resolve(false));
  });
}

/**
 * Waits until a component is ready; fails with `unavailable` and the end of its log where it ends or takes too long.
 */
async function waitUntilReady(child: Child, isReady: () => Promise<boolean>): Promise<void> {
  const ended = new AbortController();
  void child.exited.finally(() => ended.abort());
  const giveUp = AbortSignal.any([AbortSignal.timeout(readyTimeoutMs), ended.signal]);
  while (!(await isReady())) {
    if (giveUp.aborted) {
      throw new ClusterError('unavailable', `${child.name} did not become ready:\n${child.logTail()}`);
    }
    await pause(readyPollMs, giveUp);
  }
}

/** Everything under one directory, and the keys of those who start with the cluster. */
interface Files {
  readonly directory: string;
  readonly authority: Authority;
  path(name: string): string;
  write(name: string, text: string): Promise<string>;
}

async function writeServerFiles(files: Files): Promise<void> {
  const { authority } = files;
  // RSA, since every reader of service accounts' tokens takes it.
  const accounts = generateKeyPairSync('rsa', {
    modulusLength: 2048,
    publicKeyEncoding: { type: 'spki', format: 'pem' },
    privateKeyEncoding: { type: 'pkcs8', format: 'pem' },
  });
  const frontProxy = await createAuthority('front-proxy');
  const server = await authority.issue({
    commonName: 'kube-apiserver',
    dnsNames: [
      'kubernetes',
      'kubernetes.default',
      'kubernetes.default.svc',
      'kubernetes.default.svc.cluster.local',
      'localhost',
    ],
    addresses: ['127.0.0.1', apiServiceAddress],
  });
  await Promise.all([
    files.write('ca.crt', authority.certificate),
    files.write('ca.key', authority.key),
    files.write('front-proxy.crt', frontProxy.certificate),
    files.write('accounts.key', accounts.privateKey),
    files.write('accounts.pub', accounts.publicKey),
    files.write('server.crt', server.certificate),
    files.write('server.key', server.key),
  ]);
}

/** Starts a control plane and waits until all of it is ready; fails with `unavailable` and the log of what is not. */
export async function startControlPlane(options: ControlPlaneOptions): Promise<ControlPlane> {
  const { tools } = options;
  const directory = await mkdtemp(join(tmpdir(), 'mimo-control-plane-'));
  const authority = await createAuthority('mimo-test');
  const files: Files = {
    directory,
    authority,
    path: (name) => join(directory, name),
    write: async (name, text) => {
      await writeFile(join(directory, name), text, { mode: 0o600 });
      return join(directory, name);
    },
  };
  const children: Child[] = [];
  const start = async (name: string, command: readonly string[]): Promise<Child> => {
    const child = await startChild({ name, command, logFile: files.path(`${name}.log`) });
    children.push(child);
    return child;
  };
  const close = async (): Promise<void> => {
    // No grace: nothing of it is kept, and the API server would wait for its clients' streams.
    await Promise.all(children.splice(0).map(async (child) => child.stop(0)));
    await rm(directory, { recursive: true, force: true });
  };
  try {
    const begin = performance.now();
    const [etcdPort = 0, peerPort = 0, apiPort = 0, managerPort = 0, schedulerPort = 0] = await freePorts(5);
    const url = `https://127.0.0.1:${apiPort}`;
    await writeServerFiles(files);
    await mkdir(files.path('etcd'));
    const admin = await authority.issue({ commonName: 'admin', organizations: ['system:masters'] });
    const kubeconfig = await files.write(
      'admin.kubeconfig',
      formatKubeconfig(url, authority.certificate, admin),
    );
    const kubeconfigForUser = async (user: string, groups: readonly string[] = []): Promise<string> =>
      files.write(
        `${user.replaceAll(/[^\w.-]/g, '-')}.kubeconfig`,
        formatKubeconfig(
          url,
          authority.certificate,
          await authority.issue({ commonName: user, organizations: groups }),
        ),
      );

    const etcdUrl = `http://127.0.0.1:${etcdPort}`;
    const peerUrl = `http://127.0.0.1:${peerPort}`;
    await start('etcd', [
      tools.etcd,
      `--data-dir=${files.path('etcd')}`,
      `--listen-client-urls=${etcdUrl}`,
      `--advertise-client-urls=${etcdUrl}`,
      `--listen-peer-urls=${peerUrl}`,
      `--initial-advertise-peer-urls=${peerUrl}`,
      `--initial-cluster=default=${peerUrl}`,
      // The data dies with the test; what it would survive is a power cut.
      '--unsafe-no-fsync',
      '--log-level=warn',
    ]);

    let apiserver: Child | undefined;
    const startApiserver = async (): Promise<void> => {
      apiserver = await start('kube-apiserver', [
        tools.kubeApiserver,
        `--etcd-servers=${etcdUrl}`,
        '--advertise-address=127.0.0.1',
        '--bind-address=127.0.0.1',
        `--secure-port=${apiPort}`,
        `--service-cluster-ip-range=${serviceRange}`,
        `--cert-dir=${files.path('apiserver')}`,
        `--tls-cert-file=${files.path('server.crt')}`,
        `--tls-private-key-file=${files.path('server.key')}`,
        `--client-ca-file=${files.path('ca.crt')}`,
        '--authorization-mode=Node,RBAC',
        '--enable-admission-plugins=NodeRestriction',
        '--allow-privileged=true',
        '--service-account-issuer=https://kubernetes.default.svc.cluster.local',
        `--service-account-key-file=${files.path('accounts.pub')}`,
        `--service-account-signing-key-file=${files.path('accounts.key')}`,
        // An address on loopback cannot stand in an EndpointSlice, and the reconciler would say so every ten seconds.
        '--endpoint-reconciler-type=none',
        '--profiling=false',
        ...(options.apiserverFlags ?? []),
      ]);
      await waitUntilReady(apiserver, async () =>
        answers(`${url}/readyz`, { ...admin, ca: authority.certificate }),
      );
    };
    const stopApiserver = async (signal: 'SIGTERM' | 'SIGKILL' = 'SIGTERM'): Promise<void> => {
      const stopped = apiserver;
      if (stopped === undefined) {
        return;
      }
      apiserver = undefined;
      children.splice(children.indexOf(stopped), 1);
      await stopped.stop(signal === 'SIGKILL' ? 0 : stopGraceMs);
    };
    await startApiserver();

    const manager = await start('kube-controller-manager', [
      tools.kubeControllerManager,
      `--kubeconfig=${await kubeconfigForUser('system:kube-controller-manager')}`,
      `--service-account-private-key-file=${files.path('accounts.key')}`,
      `--root-ca-file=${files.path('ca.crt')}`,
      `--cluster-signing-cert-file=${files.path('ca.crt')}`,
      `--cluster-signing-key-file=${files.path('ca.key')}`,
      '--use-service-account-credentials',
      '--allocate-node-cidrs=false',
      '--leader-elect=false',
      '--bind-address=127.0.0.1',
      `--secure-port=${managerPort}`,
      `--cert-dir=${files.path('manager')}`,
      '--kube-api-qps=200',
      '--kube-api-burst=400',
      ...(options.controllerManagerFlags ?? []),
    ]);
    const scheduler = await start('kube-scheduler', [
      tools.kubeScheduler,
      `--kubeconfig=${await kubeconfigForUser('system:kube-scheduler')}`,
      '--leader-elect=false',
      '--bind-address=127.0.0.1',
      `--secure-port=${schedulerPort}`,
      `--cert-dir=${files.path('scheduler')}`,
      '--kube-api-qps=200',
      '--kube-api-burst=400',
      ...(options.schedulerFlags ?? []),
    ]);
    await Promise.all([
      waitUntilReady(manager, async () => answers(`https://127.0.0.1:${managerPort}/healthz`)),
      waitUntilReady(scheduler, async () => answers(`https://127.0.0.1:${schedulerPort}/readyz`)),
    ]);

    const kubectl = async (args: readonly string[], input?: string): Promise<string> => {
      const run = promisify(execFile)(tools.kubectl, ['--kubeconfig', kubeconfig, ...args], {
        maxBuffer: kubectlMaxBytes,
        env: { ...process.env, HOME: directory, KUBECONFIG: undefined },
      });
      run.child.stdin?.end(input);
      return (await run).stdout;
    };
    // Nothing can be created in a namespace before its default ServiceAccount is there.
    await waitUntilReady(manager, async () =>
      kubectl(['get', 'serviceaccount', 'default', '--namespace=default']).then(
        () => true,
        () => false,
      ),
    );
    return {
      url,
      kubeconfig,
      directory,
      authorityCertificate: authority.certificate,
      startMs: performance.now() - begin,
      kubectl,
      kubeconfigForUser,
      kubeconfigForServiceAccount: async (namespace, name) => {
        const token = await kubectl(['create', 'token', name, `--namespace=${namespace}`, '--duration=1h']);
        return files.write(
          `${namespace}-${name}.kubeconfig`,
          formatKubeconfig(url, authority.certificate, { token: token.trim() }),
        );
      },
      stopApiserver,
      startApiserver,
      pids: () => children.map((child) => child.pid),
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}
