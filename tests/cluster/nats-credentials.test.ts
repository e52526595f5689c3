// A NATS server that authenticates its clients: every kind of credentials, on a real nats-server, and credentials that
// change while processes run.

import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { nkeys } from '@nats-io/transport-node';

import { createLog } from '@mimo/core/process/log';
import { createNatsBus } from '@mimo/core/bus/nats/bus';
import { NatsLink, type NatsServers } from '@mimo/core/bus/nats/link';
import { createModelCatalog } from '@mimo/core/bus/nats/model-catalog';
import { startHeartbeats } from '@mimo/worker/heartbeats';
import { Heartbeat } from '@mimo/proto/worker';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import type { NatsServer } from '../../cli/src/local/nats-server.ts';
import { startGatewayProcess } from '../harness/gateway-process.ts';
import { startTestNats } from '../harness/nats.ts';
import { waitFor } from '../harness/wait-for.ts';

const log = createLog({ process: 'test', level: 'silent' });
const userConfig = 'authorization { user: mimo, password: "s3:cr@t" }';

let directory: string;
let server: NatsServer | undefined;
let closes: (() => Promise<void>)[] = [];

async function start(config: string): Promise<string> {
  const configFile = join(directory, 'nats.conf');
  await writeFile(configFile, config);
  server = await startTestNats({ storeDirectory: join(directory, 'nats'), port: 0, configFile });
  return `127.0.0.1:${server.port}`;
}

async function write(text: string): Promise<string> {
  const path = join(directory, 'credentials');
  await writeFile(path, text);
  return path;
}

function open(options: Omit<NatsServers, 'clientName'>): ReturnType<typeof createNatsBus> {
  const queue = createNatsBus({
    ...options,
    clientName: 'test',
    replicas: 1,
    recordMaxAgeMs: 3_600_000,
    log,
  });
  closes.push(() => queue.close());
  return queue;
}

/** Whether records can be counted, which only an accepted client can. */
async function isLetIn(queue: ReturnType<typeof createNatsBus>): Promise<boolean> {
  await queue.opened(AbortSignal.timeout(20_000));
  return (await queue.records.count()) === 0;
}

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'mimo-credentials-'));
});

afterEach(async () => {
  await Promise.all(closes.map((close) => close()));
  closes = [];
  await server?.close();
  server = undefined;
  await rm(directory, { recursive: true, force: true });
});

describe('a NATS server that authenticates its clients', () => {
  it('accepts a user from the URL in every process, and no log shows the password', async () => {
    const address = await start(userConfig);
    const url = `nats://mimo:${encodeURIComponent('s3:cr@t')}@${address}`;
    expect(await isLetIn(open({ servers: [url] }))).toBe(true);
    const refused = open({ servers: [address] });
    await expect(refused.opened(AbortSignal.timeout(1_500))).rejects.toMatchObject({ name: 'TimeoutError' });

    const gateway = startGatewayProcess({ MIMO_GATEWAY_LISTEN: '127.0.0.1:0', MIMO_GATEWAY_NATS: url });
    await gateway.address();
    gateway.child.kill('SIGTERM');
    expect(await gateway.exited).toEqual([0, null]);
    expect(gateway.lines.join('\n')).toContain('"NATS connected"');
    expect(gateway.lines.join('\n')).not.toMatch(/s3/);
  });

  it.each([
    ['a user', userConfig, 'mimo:s3:cr@t\n'],
    ['a token', 'authorization { token: "tok-en" }', 'tok-en\n'],
  ])('takes %s from a file', async (_what, config, text) => {
    const servers = [await start(config)];
    const credentialsFile = await write(text);
    expect(await isLetIn(open({ servers, credentialsFile }))).toBe(true);
    const link = new NatsLink({ servers, credentialsFile, clientName: 'test', log });
    closes.push(() => link.close());
    const catalog = createModelCatalog(link, { replicas: 1, log });
    const files = new Map([['config.json', Buffer.from('{}')]]);
    expect(
      await catalog.publish({ name: 'm', files, identity: '' }, AbortSignal.timeout(20_000)),
    ).toMatchObject({
      name: 'm',
    });
  });

  it('accepts the signed credentials of an operator from a file', async () => {
    const { config, credentials } = createOperator();
    const servers = [await start(config)];
    expect(await isLetIn(open({ servers, credentialsFile: await write(credentials) }))).toBe(true);
  });

  it.each([
    ['a password that is refused', 'mimo:marker'],
    ['a token that is refused', 'marker'],
    [
      'signed credentials that are broken',
      '-----BEGIN NATS USER JWT-----\nmarker\n------END NATS USER JWT------\n',
    ],
    ['two lines', 'mimo:marker\nmarker'],
  ])('logs no word of %s', async (_what, text) => {
    const address = await start(userConfig);
    const gateway = startGatewayProcess({
      MIMO_GATEWAY_LISTEN: '127.0.0.1:0',
      MIMO_GATEWAY_NATS: address,
      MIMO_GATEWAY_NATS_CREDENTIALS_FILE: await write(text),
      MIMO_GATEWAY_LOG_LEVEL: 'debug',
    });
    await waitFor('a word of the gateway', () => gateway.lines.length > 0);
    await new Promise((resolve) => setTimeout(resolve, 1_000));
    gateway.child.kill('SIGTERM');
    await gateway.exited;
    expect(gateway.lines.join('\n')).not.toContain('marker');
  });

  it('is retried until the credentials are right, by heartbeats too', async () => {
    const servers = [await start(userConfig)];
    const credentialsFile = await write('mimo:wrong');
    const queue = open({ servers, credentialsFile });
    const heartbeat = Heartbeat.fromPartial({ model: 'm', group: 'g' });
    const link = new NatsLink({ servers, credentialsFile, clientName: 'test', log });
    closes.push(() => link.close());
    const sender = startHeartbeats({ link, intervalMs: 100, read: () => heartbeat, log });
    closes.push(async () => sender.close());
    await expect(queue.opened(AbortSignal.timeout(3_000))).rejects.toMatchObject({ name: 'TimeoutError' });
    await write('mimo:s3:cr@t');
    expect(await isLetIn(queue)).toBe(true);
    for await (const { group } of queue.heartbeats.follow(AbortSignal.timeout(20_000))) {
      expect(group).toBe('g');
      break;
    }
  });

  it('is reached again after its password and the file change', async () => {
    const servers = [await start(userConfig)];
    const credentialsFile = await write('mimo:s3:cr@t');
    const queue = open({ servers, credentialsFile });
    expect(await isLetIn(queue)).toBe(true);
    await server?.close();
    const configFile = join(directory, 'nats.conf');
    await writeFile(configFile, userConfig.replace('s3:cr@t', 'new'));
    const port = Number(servers[0]?.split(':')[1]);
    server = await startTestNats({ storeDirectory: join(directory, 'nats'), port, configFile });
    await waitFor('the loss', () => !queue.connected);
    await write('mimo:new');
    await waitFor('the connection', () => queue.connected);
  });

  it('is not contacted when the credentials file is missing: that is an error at once', () => {
    expect(() => open({ servers: ['127.0.0.1:1'], credentialsFile: '/nowhere' })).toThrow(
      expect.objectContaining({
        code: 'invalid_argument',
        message: 'cannot read the NATS credentials file /nowhere',
      }),
    );
  });
});

type Key = ReturnType<typeof nkeys.createUser>;

function encode(value: object): string {
  return Buffer.from(JSON.stringify(value)).toString('base64url');
}

/** A claim as NATS reads it, signed by its issuer. */
function sign(issuer: Key, subject: Key, nats: object): string {
  const claims = {
    jti: subject.getPublicKey(),
    iat: Math.floor(Date.now() / 1_000),
    iss: issuer.getPublicKey(),
    sub: subject.getPublicKey(),
    name: 'test',
    nats: { version: 2, ...nats },
  };
  const body = `${encode({ typ: 'JWT', alg: 'ed25519-nkey' })}.${encode(claims)}`;
  return `${body}.${Buffer.from(issuer.sign(Buffer.from(body))).toString('base64url')}`;
}

/**
 * An operator, an account with JetStream and a user, as `nsc` makes them: the server's configuration and a .creds
 * file.
 */
function createOperator(): { readonly config: string; readonly credentials: string } {
  const [operator, system, account] = [nkeys.createOperator(), nkeys.createAccount(), nkeys.createAccount()];
  const user = nkeys.createUser();
  const unlimited = { subs: -1, data: -1, payload: -1 };
  const accountLimits = { ...unlimited, imports: -1, exports: -1, wildcards: true, conn: -1, leaf: -1 };
  const storage = { mem_storage: -1, disk_storage: -1, streams: -1, consumer: -1 };
  const systemJwt = sign(operator, system, { type: 'account', limits: accountLimits });
  const accountJwt = sign(operator, account, { type: 'account', limits: { ...accountLimits, ...storage } });
  const userJwt = sign(account, user, { type: 'user', ...unlimited, pub: {}, sub: {} });
  const seed = Buffer.from(user.getSeed()).toString();
  return {
    config: [
      `operator: ${sign(operator, operator, { type: 'operator' })}`,
      `system_account: ${system.getPublicKey()}`,
      'resolver: MEMORY',
      'resolver_preload: {',
      `  ${system.getPublicKey()}: ${systemJwt}`,
      `  ${account.getPublicKey()}: ${accountJwt}`,
      '}',
    ].join('\n'),
    credentials: [
      '-----BEGIN NATS USER JWT-----',
      userJwt,
      '------END NATS USER JWT------',
      '',
      '-----BEGIN USER NKEY SEED-----',
      seed,
      '------END USER NKEY SEED------',
      '',
    ].join('\n'),
  };
}
