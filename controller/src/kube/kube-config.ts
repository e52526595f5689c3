// Where the API server is and how to show who we are: in a cluster by the files of the pod's service account, elsewhere
// by a kubeconfig file. Files are read again for every request, since tokens and certificates rotate; a plugin's
// answer is kept until it expires. Knows HTTP headers and TLS material, and nothing of requests.

import { execFile } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { isIPv6 } from 'node:net';
import { dirname, resolve } from 'node:path';
import { promisify } from 'node:util';

import { ClusterError } from '@mimo/core/errors';
import { parse } from 'yaml';
import { z } from 'zod';

/** What a connection and a request need to be trusted, both ways; PEM. */
export interface Credentials {
  readonly ca?: string;
  readonly cert?: string;
  readonly key?: string;
  readonly servername?: string;
  readonly rejectUnauthorized?: boolean;
  /** For the header `Authorization: Bearer`. */
  readonly token?: string;
}

/** One API server under one identity. */
export interface KubeConfig {
  readonly url: string;
  /** Of the context, or of the pod. */
  readonly namespace: string | undefined;
  /** As they are now. */
  credentials(): Promise<Credentials>;
  /** The API server did not accept what `credentials` gave: what was kept is asked for anew. */
  refused(): void;
}

/** Where a pod finds its cluster. */
export interface PodEnvironment {
  readonly env: Readonly<Record<string, string | undefined>>;
  readonly directory: string;
}

const serviceAccountDirectory = '/var/run/secrets/kubernetes.io/serviceaccount';
/** So much before its end, what a plugin gave counts as expired. */
const expiryMarginMs = 10_000;
const pluginTimeoutMs = 30_000;

const execSchema = z.object({
  apiVersion: z.string(),
  command: z.string().min(1),
  args: z.array(z.string()).nullish(),
  env: z.array(z.object({ name: z.string(), value: z.string() })).nullish(),
});

const clusterSchema = z.object({
  server: z.url({ protocol: /^https?$/ }),
  'certificate-authority': z.string().optional(),
  'certificate-authority-data': z.string().optional(),
  'insecure-skip-tls-verify': z.boolean().optional(),
  'tls-server-name': z.string().optional(),
  'proxy-url': z.undefined('is not supported').optional(),
});

const userSchema = z.object({
  'client-certificate': z.string().optional(),
  'client-certificate-data': z.string().optional(),
  'client-key': z.string().optional(),
  'client-key-data': z.string().optional(),
  token: z.string().optional(),
  tokenFile: z.string().optional(),
  exec: execSchema.optional(),
  'auth-provider': z.undefined('is not supported').optional(),
});

const fileSchema = z.object({
  'current-context': z.string(),
  contexts: z.array(
    z.object({
      name: z.string(),
      context: z.object({ cluster: z.string(), user: z.string(), namespace: z.string().optional() }),
    }),
  ),
  clusters: z.array(z.object({ name: z.string(), cluster: clusterSchema })),
  users: z.array(z.object({ name: z.string(), user: userSchema })),
});

const answerSchema = z.object({
  status: z.object({
    expirationTimestamp: z.iso.datetime({ offset: true }).optional(),
    token: z.string().optional(),
    clientCertificateData: z.string().optional(),
    clientKeyData: z.string().optional(),
  }),
});

/**
 * Finds the API server: by a kubeconfig file, or as a pod of its cluster where none is given. Fails with
 * `invalid_argument` where the file cannot be used, and with `failed_precondition` outside any cluster.
 */
export function loadKubeConfig(file: string | undefined, pod: Partial<PodEnvironment> = {}): KubeConfig {
  if (file === undefined) {
    return inCluster({ env: process.env, directory: serviceAccountDirectory, ...pod });
  }
  let content: unknown;
  try {
    content = parse(readFileSync(file, 'utf8'));
  } catch (error) {
    const { message } = ClusterError.from(error);
    throw new ClusterError('invalid_argument', `kubeconfig ${file}: ${message}`, { cause: error });
  }
  const checked = fileSchema.safeParse(content);
  if (!checked.success) {
    throw new ClusterError('invalid_argument', `kubeconfig ${file}: ${z.prettifyError(checked.error)}`);
  }
  return fromFile(file, checked.data);
}

function inCluster({ env, directory }: PodEnvironment): KubeConfig {
  const host = env['KUBERNETES_SERVICE_HOST'];
  const port = env['KUBERNETES_SERVICE_PORT'];
  const read = async (name: string): Promise<string> => readFile(resolve(directory, name), 'utf8');
  let namespace: string;
  try {
    namespace = readFileSync(resolve(directory, 'namespace'), 'utf8').trim();
  } catch (error) {
    const text = 'no kubeconfig is named, and this is no pod with a service account';
    throw new ClusterError('failed_precondition', text, { cause: error });
  }
  if (!host || !port) {
    throw new ClusterError(
      'failed_precondition',
      'KUBERNETES_SERVICE_HOST or KUBERNETES_SERVICE_PORT is missing',
    );
  }
  return {
    url: `https://${isIPv6(host) ? `[${host}]` : host}:${port}`,
    namespace,
    credentials: async () => ({ ca: await read('ca.crt'), token: (await read('token')).trim() }),
    refused: () => undefined,
  };
}

function fromFile(file: string, content: z.output<typeof fileSchema>): KubeConfig {
  const named = <T extends { readonly name: string }>(list: readonly T[], name: string, what: string): T => {
    const found = list.find((each) => each.name === name);
    if (found === undefined) {
      throw new ClusterError('invalid_argument', `kubeconfig ${file}: no ${what} is named ${name}`);
    }
    return found;
  };
  const { context } = named(content.contexts, content['current-context'], 'context');
  const { cluster } = named(content.clusters, context.cluster, 'cluster');
  const { user } = named(content.users, context.user, 'user');
  const plugin = user.exec === undefined ? undefined : new CredentialPlugin(user.exec, dirname(file));
  /** Data in the file wins over a path, which is relative to it. */
  const read = async (data: string | undefined, path: string | undefined): Promise<string | undefined> => {
    if (data !== undefined) {
      return Buffer.from(data, 'base64').toString('utf8');
    }
    return path === undefined ? undefined : readFile(resolve(dirname(file), path), 'utf8');
  };
  return {
    url: cluster.server.replace(/\/$/, ''),
    namespace: context.namespace,
    credentials: async () => {
      const [ca, cert, key, token] = await Promise.all([
        read(cluster['certificate-authority-data'], cluster['certificate-authority']),
        read(user['client-certificate-data'], user['client-certificate']),
        read(user['client-key-data'], user['client-key']),
        user.tokenFile === undefined ? user.token : read(undefined, user.tokenFile),
      ]);
      return withoutUndefined({
        ca,
        cert,
        key,
        token: token?.trim(),
        servername: cluster['tls-server-name'],
        rejectUnauthorized: cluster['insecure-skip-tls-verify'] ? false : undefined,
        ...(await plugin?.credentials()),
      });
    },
    refused: () => plugin?.forget(),
  };
}

/** A program that gives credentials (client.authentication.k8s.io), as those of cloud providers do. */
class CredentialPlugin {
  readonly #exec: z.output<typeof execSchema>;
  readonly #directory: string;
  #kept: { readonly credentials: Credentials; readonly untilUnixMs: number } | undefined;
  #running: Promise<Credentials> | undefined;

  constructor(exec: z.output<typeof execSchema>, directory: string) {
    this.#exec = exec;
    this.#directory = directory;
  }

  async credentials(): Promise<Credentials> {
    if (this.#kept !== undefined && Date.now() < this.#kept.untilUnixMs) {
      return this.#kept.credentials;
    }
    this.#running ??= this.#run().finally(() => {
      this.#running = undefined;
    });
    return this.#running;
  }

  forget(): void {
    this.#kept = undefined;
  }

  async #run(): Promise<Credentials> {
    const { apiVersion, command, args, env } = this.#exec;
    const info = { apiVersion, kind: 'ExecCredential', spec: { interactive: false } };
    const given = Object.fromEntries((env ?? []).map(({ name, value }) => [name, value]));
    const { stdout } = await promisify(execFile)(
      // A bare name is looked up on the PATH, a path is relative to the kubeconfig.
      command.includes('/') ? resolve(this.#directory, command) : command,
      args ?? [],
      {
        env: { ...process.env, ...given, KUBERNETES_EXEC_INFO: JSON.stringify(info) },
        timeout: pluginTimeoutMs,
      },
    );
    const { status } = answerSchema.parse(JSON.parse(stdout));
    const credentials = withoutUndefined({
      token: status.token,
      cert: status.clientCertificateData,
      key: status.clientKeyData,
    });
    const expires = status.expirationTimestamp;
    const untilUnixMs = expires === undefined ? Infinity : Date.parse(expires) - expiryMarginMs;
    this.#kept = { credentials, untilUnixMs };
    return credentials;
  }
}

function withoutUndefined(credentials: {
  readonly [Field in keyof Credentials]: Credentials[Field] | undefined;
}): Credentials {
  return Object.fromEntries(Object.entries(credentials).filter(([, value]) => value !== undefined));
}
