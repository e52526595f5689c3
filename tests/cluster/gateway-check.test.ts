// The image's check, as the chart's `helm test` runs it: a process that asks a real gateway.

import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { createLog } from '@mimo/core/process/log';
import { parseGatewayConfig } from '@mimo/gateway/config';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';

import { bareEnvironment } from '../harness/bare-environment.ts';
import { openGateway, type TestGateway } from '../harness/in-process.ts';
import { startScriptedGroup, type ScriptedGroup } from '../harness/scripted-group.ts';

const root = join(import.meta.dirname, '../..');
const model = 'mimo-demo';
const apiKey = 'a-key-of-a-tenant';

let directory: string;
let keysFile: string;
let group: ScriptedGroup;
let gateway: TestGateway | undefined;

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'mimo-check-'));
  keysFile = join(directory, 'keys.json');
  const sha256 = createHash('sha256').update(apiKey).digest('hex');
  await writeFile(keysFile, JSON.stringify({ keys: [{ sha256, tenant: 'alpha' }] }));
  group = await startScriptedGroup({ model, group: 'g', queue: undefined });
});

afterEach(async () => {
  await gateway?.close();
  gateway = undefined;
});

afterAll(async () => {
  await group.close();
  await rm(directory, { recursive: true });
});

async function start(keys: string): Promise<string> {
  const config = parseGatewayConfig({
    MIMO_GATEWAY_LISTEN: '127.0.0.1:0',
    MIMO_GATEWAY_MODELS: `${model}=${join(root, 'models/mimo-demo')}`,
    MIMO_GATEWAY_WORKERS: group.address,
    MIMO_GATEWAY_KEYS_FILE: keys,
  });
  gateway = await openGateway(config, createLog({ process: 'test', level: 'silent' }));
  return gateway.address;
}

interface Answer {
  readonly code: number;
  readonly said: string;
}

async function check(args: readonly string[], key?: string): Promise<Answer> {
  const { promise, resolve } = Promise.withResolvers<Answer>();
  const env = { ...bareEnvironment, ...(key === undefined ? {} : { MIMO_API_KEY: key }) };
  execFile(
    process.execPath,
    [join(root, 'gateway/src/check.ts'), ...args],
    { env },
    (error, stdout, stderr) => resolve({ code: Number(error?.code ?? 0), said: `${stdout}${stderr}`.trim() }),
  );
  return promise;
}

describe('check', () => {
  it('names the models of an open gateway', async () => {
    const answer = await check([`--address=${await start('')}`]);
    expect(answer.code).toBe(0);
    expect(answer.said).toMatch(/^serving mimo-demo \([01] ready\)$/);
  });

  it('passes with a valid key and fails with a wrong one', async () => {
    const address = await start(keysFile);
    expect(await check([`--address=${address}`], apiKey)).toMatchObject({ code: 0 });
    expect(await check([`--address=${address}`], 'another')).toEqual({
      code: 1,
      said: 'check: unknown API key',
    });
  });

  it('accepts a refusal only when the gateway is meant to require keys', async () => {
    const address = await start(keysFile);
    expect(await check([`--address=${address}`, '--closed'])).toEqual({
      code: 0,
      said: 'serving, and calls without an API key are rejected',
    });
    expect(await check([`--address=${address}`])).toMatchObject({ code: 1 });
    await gateway?.close();
    expect(await check([`--address=${await start('')}`, '--closed'])).toEqual({
      code: 1,
      said: 'check: the gateway accepts callers without an API key, and should not',
    });
  });

  it('fails on a draining gateway and reports that it drains', async () => {
    const address = await start('');
    await gateway?.drain(60_000);
    expect(await check([`--address=${address}`, '--timeout-seconds=6'])).toEqual({
      code: 1,
      said: 'check: the gateway does not serve: its health is NOT_SERVING',
    });
  });

  it('fails on an address where nothing listens', async () => {
    const answer = await check(['--address=127.0.0.1:1', '--timeout-seconds=6']);
    expect(answer.code).toBe(1);
    expect(answer.said).toMatch(/^check: the gateway does not serve: .*ECONNREFUSED/);
  });
});
