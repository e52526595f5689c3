// The controller's output: its log, its statuses, its events and its metrics hold no key, no password, no token and no
// Secret, even when the API server quotes a rejected object, or fails. Every possible source holds a marker.

import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, open, readFile, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { KubeClient, loadKubeConfig } from '@mimo/controller/kube/client';
import { resourceTypes, type KubeObject } from '@mimo/controller/kube/resource';
import { ClusterError } from '@mimo/core/process/errors';
import { createLog } from '@mimo/core/process/log';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { freeAddresses } from '../../cli/src/local/free-ports.ts';
import { formatKubeconfig } from '../harness/kubernetes/control-plane.ts';
import { waitFor } from '../harness/wait-for.ts';
import { namespace, serviceAccount, startStage, type Stage } from './controller-stage.ts';

const never = new AbortController().signal;
const main = join(import.meta.dirname, '../../controller/src/main.ts');
const keysSecret = 'mimo-tenant-keys';

/** Each is found nowhere but where it was put. */
const markers = {
  plainKey: 'marker-plain-key-71c04f2e9b',
  hash: 'feedc0de'.repeat(8),
  otherEntry: 'marker-other-entry-8a3d',
  secretAnnotation: 'marker-annotation-of-a-secret-c5f1',
  formerKeys: 'marker-former-keys-file-19be',
  hubToken: 'marker-hub-token-60d7',
  variable: 'marker-value-of-a-variable-e284',
  refusedVariable: 'marker-refused-variable-47aa',
  serviceAnnotation: 'marker-annotation-of-a-service-02cd',
  tenantAnnotation: 'marker-annotation-of-a-tenant-b9e6',
  natsPassword: 'marker-nats-password-f313',
  kubeconfig: 'marker-in-a-kubeconfig-d8a0',
  natsFile: 'marker-in-a-credentials-file-35c9',
};

/** A text as it is, and within base64, at any place there. */
function formsOf(text: string): readonly string[] {
  const inBase64 = [0, 1, 2].map((shift) => {
    const encoded = Buffer.from('.'.repeat(shift) + text).toString('base64');
    // What the letters before and behind it have a part in.
    return encoded.slice(shift === 0 ? 0 : 4, -4);
  });
  return [text, ...inBase64];
}

function findSecrets(
  places: Readonly<Record<string, string>>,
  more: readonly string[] = [],
): readonly string[] {
  return Object.entries(places).flatMap(([place, text]) =>
    [...Object.values(markers), ...more]
      .filter((secret) => formsOf(secret).some((form) => text.includes(form)))
      .map((secret) => `${secret} in ${place}`),
  );
}

/** Policies that quote what they refuse, as policy engines do: each is there until it is deleted. */
function quotingPolicy(name: string, { resource, says }: { resource: string; says: string }): string {
  const user = `system:serviceaccount:${namespace}:${serviceAccount}`;
  const policy = {
    apiVersion: 'admissionregistration.k8s.io/v1',
    kind: 'ValidatingAdmissionPolicy',
    metadata: { name },
    spec: {
      failurePolicy: 'Fail',
      matchConstraints: {
        resourceRules: [
          { apiGroups: [''], apiVersions: ['v1'], operations: ['CREATE', 'UPDATE'], resources: [resource] },
        ],
      },
      matchConditions: [{ name: 'controller', expression: `request.userInfo.username == "${user}"` }],
      validations: [{ expression: 'false', messageExpression: says }],
    },
  };
  const binding = {
    ...policy,
    kind: 'ValidatingAdmissionPolicyBinding',
    spec: { policyName: name, validationActions: ['Deny'] },
  };
  return `${JSON.stringify(policy)}\n${JSON.stringify(binding)}`.replace('\n', '\n---\n');
}

let stage: Stage;
let directory: string;
beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'mimo-controller-secrets-'));
  stage = await startStage();
});
afterAll(async () => {
  await stage.close();
  await rm(directory, { recursive: true });
});

async function makeSecret(name: string, entries: Readonly<Record<string, string>>): Promise<void> {
  const data = Object.fromEntries(
    Object.entries(entries).map(([key, value]) => [key, Buffer.from(value).toString('base64')]),
  );
  const annotations = { 'example.com/last-applied': markers.secretAnnotation };
  const secret = { apiVersion: 'v1', kind: 'Secret', metadata: { name, annotations }, data };
  await stage.client.apply(resourceTypes.secrets, secret, {}, never);
}

async function makeTenant(name: string): Promise<void> {
  const { apiVersion, kind } = resourceTypes.tenants;
  const annotations = { 'example.com/note': markers.tenantAnnotation };
  const spec = { apiKeys: [{ secretName: name }] };
  await stage.client.create(
    resourceTypes.tenants,
    { apiVersion, kind, metadata: { name, annotations }, spec },
    never,
  );
}

async function makeService(name: string, env: readonly object[]): Promise<void> {
  const { apiVersion, kind } = resourceTypes.modelServices;
  const annotations = { 'example.com/note': markers.serviceAnnotation };
  const source = { hub: { repository: 'a/b', tokenSecret: { name: 'hub-token' } } };
  const spec = { model: { name: `model-${name}`, source }, scaling: { min: 1, max: 1 }, template: { env } };
  await stage.client.create(
    resourceTypes.modelServices,
    { apiVersion, kind, metadata: { name, annotations }, spec },
    never,
  );
}

/** What the controller says of objects, and to `kubectl describe`. */
async function readSaid(): Promise<{ statuses: string; events: string }> {
  const lists = await Promise.all(
    [resourceTypes.modelServices, resourceTypes.tenants].map((type) => stage.client.list(type, {}, never)),
  );
  const statuses = lists.flatMap(({ items }) => items.map((item: KubeObject) => item.status));
  const { items: events } = await stage.client.list(resourceTypes.events, {}, never);
  return { statuses: JSON.stringify(statuses), events: JSON.stringify(events) };
}

describe('a controller', () => {
  it('passes on no secret that it reads or writes, or that the API server quotes', async () => {
    const env = await stage.controllerEnvironment();
    const [listen = ''] = await freeAddresses(1);
    const natsUrl = env['MIMO_CONTROLLER_NATS_URLS']?.replace(
      'nats://',
      `nats://user:${markers.natsPassword}@`,
    );
    const token = /"token":\s*"([^"]+)"/.exec(
      await readFile(env['MIMO_CONTROLLER_KUBECONFIG'] ?? '', 'utf8'),
    )?.[1];
    const logFile = join(directory, 'controller.log');
    const output = await open(logFile, 'w');
    const readLog = async (): Promise<string> => readFile(logFile, 'utf8');

    await makeSecret('hashed', { apiKey: markers.hash, other: markers.otherEntry });
    await makeSecret('plain', { apiKey: markers.plainKey });
    await makeSecret('hub-token', { token: markers.hubToken });
    await makeSecret(keysSecret, { 'keys.json': `${markers.formerKeys} is not JSON` });
    await makeTenant('hashed');
    await makeTenant('plain');
    const quoteSecret = quotingPolicy('quotes-secrets', {
      resource: 'secrets',
      says: "'refused: ' + string(object.data['keys.json'])",
    });
    const quotePod = quotingPolicy('quotes-pods', {
      resource: 'pods',
      says: "'refused: ' + object.spec.containers[0].env.filter(e, e.name == 'REFUSED').map(e, e.value).join(',')",
    });
    await stage.plane.kubectl(['apply', '--filename=-'], quoteSecret);
    await stage.plane.kubectl(['apply', '--filename=-'], quotePod);
    // The policy is in force once it refuses this, and quotes it.
    const quoted = Buffer.from(markers.formerKeys).toString('base64').slice(0, 24);
    await waitFor('the policy to quote', async () =>
      stage.plane
        .kubectl([
          'annotate',
          'secret',
          keysSecret,
          'example.com/tried=1',
          `--namespace=${namespace}`,
          `--as=system:serviceaccount:${namespace}:${serviceAccount}`,
        ])
        .then(
          () => false,
          (error: unknown) => String(error).includes(quoted),
        ),
    );

    const child = spawn(process.execPath, [main], {
      env: {
        ...env,
        MIMO_CONTROLLER_NATS_URLS: natsUrl,
        MIMO_CONTROLLER_LISTEN: listen,
        MIMO_CONTROLLER_LOG_LEVEL: 'debug',
      },
      stdio: ['ignore', output.fd, output.fd],
    });
    try {
      await waitFor('the Secret to be refused', async () =>
        (await readLog()).includes('cannot write the tenant keys'),
      );
      await makeService('quoted', [
        { name: 'REFUSED', value: markers.refusedVariable },
        { name: 'HELD', value: markers.variable },
      ]);
      await waitFor('the pod to be refused', async () =>
        (await readSaid()).statuses.includes('refused: ***'),
      );
      for (const policy of ['quotes-secrets', 'quotes-pods']) {
        await stage.plane.kubectl(['delete', `validatingadmissionpolicybinding/${policy}`]);
      }
      await waitFor('the keys to be written', async () =>
        (await readLog()).includes('"wrote the tenant keys"'),
      );
      await waitFor('a group', () => stage.kubelet.runningGroups.length === 1, 60_000);

      await stage.plane.stopApiserver('SIGKILL');
      await waitFor('the API server to be missed', async () =>
        (await readLog()).includes('list or watch failed'),
      );
      await stage.plane.startApiserver();
      await stage.stopNats();
      await waitFor('NATS to be missed', async () => (await readLog()).includes('NATS disconnected'));
      await stage.startNats();
      await waitFor('NATS to be back', async () => (await readLog()).includes('NATS reconnected'));
      await waitFor('what is wrong to be said', async () =>
        (await readSaid()).statuses.includes('Secret plain: entry apiKey'),
      );

      const metrics = await (await fetch(`http://${listen}/metrics`)).text();
      expect(metrics).toContain('controller_reconcile_total');
      const places = { log: await readLog(), ...(await readSaid()), metrics };
      expect(token).toMatch(/^ey/);
      expect(findSecrets(places, [token ?? ''])).toEqual([]);
    } finally {
      child.kill('SIGKILL');
      await once(child, 'exit');
      await output.close();
    }
  });

  it.each<[string, (file: string) => Readonly<Record<string, string>>, string]>([
    [
      'a kubeconfig that does not parse',
      (file) => ({ MIMO_CONTROLLER_KUBECONFIG: file }),
      `users:\n- user: {token: ${markers.kubeconfig}\n  x: [`,
    ],
    [
      'a file of credentials that does not parse',
      (file) => ({ MIMO_CONTROLLER_NATS_CREDENTIALS_FILE: file }),
      `-----BEGIN NATS USER JWT-----\n${markers.natsFile}\n`,
    ],
    [
      'a list of servers with a hole',
      () => ({ MIMO_CONTROLLER_NATS_URLS: `nats://u:${markers.natsPassword}@127.0.0.1:1,,` }),
      '',
    ],
  ])('does not start with %s, and quotes nothing of it', async (_, change, content) => {
    const file = join(directory, 'given');
    await writeFile(file, content);
    const env = { ...(await stage.controllerEnvironment()), ...change(file) };
    const { status, stdout, stderr } = spawnSync(process.execPath, [main], { env, encoding: 'utf8' });
    expect(status).not.toBe(0);
    expect(stderr).toContain('controller: ');
    expect(findSecrets({ stdout, stderr })).toEqual([]);
  });
});

describe('the client of the API server', () => {
  const token = 'marker-bearer-token-5b2f';

  it.each<[string, number, (request: string) => string]>([
    ['in plain text', 502, (request) => request],
    ['in a status', 422, (message) => JSON.stringify({ kind: 'Status', code: 422, message })],
    ['in JSON of another kind', 500, (request) => JSON.stringify({ error: request })],
    ['in a success that is not JSON', 200, (request) => request],
  ])('passes on no secret where a proxy answers %s with what it was asked', async (_, status, form) => {
    const server = createServer((request, response) => {
      const chunks: Buffer[] = [];
      request.on('data', (chunk: Buffer) => chunks.push(chunk));
      request.on('end', () => {
        const asked = `${request.headers.authorization} ${Buffer.concat(chunks).toString()}`;
        response.writeHead(status).end(form(asked));
      });
    });
    server.listen(0, '127.0.0.1');
    await once(server, 'listening');
    const kubeconfig = join(directory, 'echo.kubeconfig');
    const { port } = server.address() as AddressInfo;
    await writeFile(kubeconfig, formatKubeconfig(`http://127.0.0.1:${port}`, '', { token }));
    const client = new KubeClient(loadKubeConfig(kubeconfig), { namespace });
    const lines: string[] = [];
    const log = createLog({
      process: 'test',
      level: 'debug',
      destination: { write: (line: string) => void lines.push(line) },
    });
    const secret = {
      apiVersion: 'v1',
      kind: 'Secret',
      metadata: { name: 'x' },
      data: { 'keys.json': Buffer.from(markers.plainKey).toString('base64') },
    };
    const containers = [{ name: 'c', env: [{ name: 'GIVEN', value: markers.variable }] }];
    const pod = { apiVersion: 'v1', kind: 'Pod', metadata: { name: 'x' }, spec: { containers } };
    const calls: readonly (() => Promise<unknown>)[] = [
      () => client.get(resourceTypes.secrets, 'x', never),
      () => client.list(resourceTypes.pods, {}, never),
      () => client.apply(resourceTypes.secrets, secret, {}, never),
      () => client.create(resourceTypes.secrets, secret, never),
      () => client.create(resourceTypes.pods, pod, never),
      () => client.delete(resourceTypes.pods, 'x', {}, never),
      () => client.watch(resourceTypes.pods, { resourceVersion: '1', timeoutSeconds: 1 }, never).next(),
    ];
    try {
      for (const call of calls) {
        const caught: unknown = await call().then(
          () => undefined,
          (error: unknown) => error,
        );
        expect(caught).toBeInstanceOf(ClusterError);
        log.warn({ error: caught }, 'failed');
        lines.push((caught as ClusterError).message);
      }
      expect(findSecrets({ said: lines.join('\n') }, [token])).toEqual([]);
    } finally {
      client.close();
      server.closeAllConnections();
      server.close();
    }
  });
});
