// `node worker/src/main.ts prepare` as a pod runs it: a process with nothing but its environment, a hub on loopback,
// a real nats-server. The tests check its exit code, its last line on standard error, and the files that it leaves.

import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { cp, mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { createLog } from '@mimo/core/process/log';
import type { CatalogModel } from '@mimo/core/bus/model-catalog';
import { NatsLink } from '@mimo/core/bus/nats/link';
import { createModelCatalog } from '@mimo/core/bus/nats/model-catalog';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';

import type { NatsServer } from '../../cli/src/local/nats-server.ts';
import { bareEnvironment } from '../harness/bare-environment.ts';
import { startTestHub, type TestHub } from '../harness/hub.ts';
import { startTestNats } from '../harness/nats.ts';
import { waitFor } from '../harness/wait-for.ts';

const root = join(import.meta.dirname, '../..');
const demo = join(root, 'models/mimo-demo');
const repository = 'org/mimo-demo';
const weights = 'model.safetensors';

let directory: string;
let server: NatsServer;
let hub: TestHub;
let checkpoint: string;
let cache: string;
let children: ChildProcess[] = [];

interface Run {
  readonly child: ChildProcess;
  /** Log lines and errors so far. */
  readonly lines: readonly string[];
  /** Exit code and the last line on standard error. */
  readonly ended: Promise<{ readonly code: unknown; readonly last: string }>;
}

function prepare(args: readonly string[], env: Readonly<Record<string, string>> = {}): Run {
  const child = spawn(process.execPath, [join(root, 'worker/src/main.ts'), 'prepare', ...args], {
    env: {
      ...bareEnvironment,
      MIMO_WORKER_MODEL: 'demo',
      MIMO_WORKER_CHECKPOINT_DIRECTORY: checkpoint,
      MIMO_WORKER_CACHE_DIRECTORY: cache,
      MIMO_WORKER_TENSOR_PARALLEL: '2',
      MIMO_WORKER_NATS_URL: server.url,
      ...env,
    },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  children.push(child);
  const lines: string[] = [];
  let errors = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => lines.push(...text.trimEnd().split('\n')));
  child.stderr.setEncoding('utf8').on('data', (text: string) => (errors += text));
  const ended = once(child, 'close').then(([code]) => ({
    code: code as unknown,
    last: errors.trimEnd().split('\n').at(-1) ?? '',
  }));
  return { child, lines, ended };
}

function fromHub(env: Readonly<Record<string, string>> = {}): Readonly<Record<string, string>> {
  return { MIMO_WORKER_HUB_REPOSITORY: repository, MIMO_WORKER_HUB_ENDPOINT: hub.url, ...env };
}

/** The models of the catalogue. */
async function published(): Promise<readonly CatalogModel[]> {
  const log = createLog({ process: 'test', level: 'silent' });
  const link = new NatsLink({ servers: [server.url], clientName: 'test', log });
  const catalog = createModelCatalog(link, { replicas: 1, log });
  try {
    for await (const models of catalog.follow(AbortSignal.timeout(20_000))) {
      return models;
    }
  } finally {
    await link.close();
  }
  throw new Error('the catalogue cannot be read');
}

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'mimo-prepare-'));
  server = await startTestNats({ storeDirectory: join(directory, 'nats'), port: 0 });
});

beforeEach(async () => {
  hub = await startTestHub({ repositories: { [repository]: demo } });
  const own = await mkdtemp(join(directory, 'test-'));
  checkpoint = join(own, 'checkpoints', repository, 'main');
  cache = join(own, 'cache');
});

afterEach(async () => {
  children.forEach((child) => child.kill('SIGKILL'));
  children = [];
  await hub.close();
});

afterAll(async () => {
  await server.close();
  await rm(directory, { recursive: true, force: true });
});

describe('prepare', () => {
  it('fetches, compiles and publishes a model, and repeats none of it the second time', async () => {
    const first = prepare(['--compile', '--publish'], fromHub());
    expect(await first.ended).toEqual({ code: 0, last: '' });
    expect((await readdir(checkpoint)).toSorted()).toEqual(
      [...(await readdir(demo)), 'fetched.json'].toSorted(),
    );
    expect(await readFile(join(checkpoint, weights))).toEqual(await readFile(join(demo, weights)));
    const shards = await readdir(join(cache, 'shards'));
    expect(shards).toEqual([expect.stringMatching(/^main-[0-9a-f]{8}-int8-tp2$/)]);
    expect(await published()).toEqual([
      {
        name: 'demo',
        digest: expect.stringMatching(/^[0-9a-f]{64}$/) as string,
        identity: expect.stringMatching(/^[0-9a-f]{16}\.[0-9a-f]{16}$/) as string,
        isStored: true,
      },
    ]);
    const reads = hub.reads.length;

    const second = prepare(['--compile', '--publish'], fromHub());
    expect(await second.ended).toEqual({ code: 0, last: '' });
    expect(hub.reads.length).toBe(reads);
    expect(second.lines.find((line) => line.includes('"shards ready"'))).toContain('"upToDate":true');
    expect(await published()).toHaveLength(1);
  });

  it('prepares an existing checkpoint without a hub', async () => {
    checkpoint = demo;
    const run = prepare(['--compile']);
    expect(await run.ended).toEqual({ code: 0, last: '' });
    expect(hub.reads).toEqual([]);
  });

  it('shares one volume among several: one fetches and compiles, the others wait and find it', async () => {
    const runs = [1, 2, 3].map(() => prepare(['--compile'], fromHub()));
    expect(await Promise.all(runs.map(({ ended }) => ended))).toEqual(
      [1, 2, 3].map(() => ({ code: 0, last: '' })),
    );
    expect(hub.reads.filter(({ path }) => path === weights)).toHaveLength(1);
    const compiled = runs.filter(({ lines }) => lines.some((line) => line.includes('"upToDate":false')));
    expect(compiled).toHaveLength(1);
  });

  it('resumes a download after its connection broke', async () => {
    hub.breakOff(weights, 800_000, 3);
    const run = prepare([], fromHub());
    expect(await run.ended).toEqual({ code: 0, last: '' });
    const from = hub.reads.filter(({ path }) => path === weights).map((read) => read.from);
    expect(from).toHaveLength(4);
    expect(from).toEqual(from.toSorted((a, b) => a - b));
    expect(from.at(-1)).toBeGreaterThan(1_000_000);
    expect(await readFile(join(checkpoint, weights))).toEqual(await readFile(join(demo, weights)));
  });

  it('resumes the work of a killed process', async () => {
    hub.stall(weights, 1_500_000);
    const killed = prepare([], fromHub());
    await waitFor('half a file', async () => {
      const partial = (await readdir(checkpoint)).find((name) => name.startsWith(`${weights}.`)) ?? '';
      return (await stat(join(checkpoint, partial))).size === 1_500_000;
    });
    killed.child.kill('SIGKILL');
    await killed.ended;
    expect(await readdir(checkpoint)).not.toContain(weights);
    await hub.close();
    hub = await startTestHub({ repositories: { [repository]: demo } });
    const run = prepare([], fromHub());
    expect(await run.ended).toEqual({ code: 0, last: '' });
    expect(hub.reads).toEqual([{ path: weights, from: 1_500_000 }]);
    expect(await readdir(checkpoint)).not.toContainEqual(expect.stringContaining('.partial'));
  });

  it('fetches a corrupt file again, and exits with a retryable code if it stays corrupt', async () => {
    hub.lie('tokenizer.json', 1);
    expect(await prepare([], fromHub()).ended).toEqual({ code: 0, last: '' });
    await rm(checkpoint, { recursive: true });
    hub.lie(weights, 2);
    expect(await prepare([], fromHub()).ended).toEqual({
      code: 1,
      last: `prepare: ${weights} of ${repository} does not match the hub's sha256 digest`,
    });
    expect(await readdir(checkpoint)).not.toContainEqual(expect.stringContaining(weights));
  });

  it('exits with 3 when the hub has no such model, or denies access to it', async () => {
    expect(await prepare([], fromHub({ MIMO_WORKER_HUB_REPOSITORY: 'org/other' })).ended).toEqual({
      code: 3,
      last: 'prepare: the hub has no model org/other with revision main, or HF_TOKEN may not read it (status 404)',
    });
    expect(await prepare([], fromHub({ MIMO_WORKER_HUB_REVISION: 'v9' })).ended).toMatchObject({ code: 3 });
    await hub.close();
    hub = await startTestHub({ repositories: { [repository]: demo }, token: 'hf_secret' });
    expect(await prepare([], fromHub()).ended).toMatchObject({ code: 3 });
    const run = prepare([], fromHub({ HF_TOKEN: 'hf_secret' }));
    expect(await run.ended).toEqual({ code: 0, last: '' });
    expect(run.lines.join('')).not.toContain('hf_secret');
  });

  it('exits with 3 for another kind of checkpoint, before it fetches the weights', async () => {
    const other = join(directory, 'other');
    await cp(demo, other, { recursive: true });
    await writeFile(join(other, 'config.json'), '{"hidden_act":"gelu"}');
    await hub.close();
    hub = await startTestHub({ repositories: { [repository]: other } });
    const { code, last } = await prepare([], fromHub()).ended;
    expect(code).toBe(3);
    expect(last).toMatch(/^prepare: config\.json: .*hidden_act: only "silu" is supported/);
    expect(hub.reads.map(({ path }) => path)).not.toContain(weights);
    await rm(join(other, 'config.json'));
    await rm(checkpoint, { recursive: true });
    expect(await prepare([], fromHub()).ended).toEqual({
      code: 3,
      last: `prepare: ${repository} is not a MiMo checkpoint: it has no config.json`,
    });
  });

  it('exits with 3 when the checkpoint or tokenizer is missing, or cannot be split as requested', async () => {
    expect(await prepare([]).ended).toEqual({ code: 3, last: `prepare: ${checkpoint}: has no config.json` });
    checkpoint = join(directory, 'mute');
    await mkdir(checkpoint);
    for (const file of ['config.json', weights]) {
      await cp(join(demo, file), join(checkpoint, file));
    }
    expect(await prepare(['--publish']).ended).toEqual({
      code: 3,
      last: `prepare: ${checkpoint}: has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt`,
    });
    checkpoint = demo;
    const { code } = await prepare(['--compile'], { MIMO_WORKER_TENSOR_PARALLEL: '3' }).ended;
    expect(code).toBe(3);
  });

  it('exits with 1 when the hub cannot be reached, or publishing fails', async () => {
    const away = { MIMO_WORKER_HUB_ENDPOINT: 'http://127.0.0.1:1' };
    const run = prepare([], fromHub(away));
    expect(await run.ended).toEqual({
      code: 1,
      last: expect.stringMatching(
        /^prepare: the hub did not answer for org\/mimo-demo: fetch failed/,
      ) as string,
    });
    checkpoint = demo;
    const stopped = prepare(['--publish'], { MIMO_WORKER_NATS_URL: 'nats://127.0.0.1:1' });
    await waitFor('the checkpoint', () => stopped.lines.some((line) => line.includes('checkpoint found')));
    stopped.child.kill('SIGTERM');
    expect(await stopped.ended).toEqual({ code: 1, last: 'prepare: stopped by SIGTERM' });
  });

  it.each([
    ['a token with a control character', { HF_TOKEN: 'hf_marker\u0001' }],
    ['a token with a line break', { HF_TOKEN: 'hf_mar\nhf_marker' }],
    ['a token of another kind', { HF_TOKEN: 'marker' }],
    ['a password in the address', { MIMO_WORKER_HUB_ENDPOINT: 'http://user:marker@127.0.0.1:9' }],
    ['an address that is none', { MIMO_WORKER_HUB_ENDPOINT: 'marker' }],
  ])('quotes no word of %s', async (_, env) => {
    const run = prepare([], fromHub(env));
    const { code, last } = await run.ended;
    expect(code).not.toBe(0);
    expect(`${last} ${run.lines.join('')}`).not.toContain('marker');
  });

  it('exits with 2 and names every invalid setting or argument', async () => {
    const run = prepare([], { MIMO_WORKER_HUB_REPOSITORY: 'a/b/c', MIMO_WORKER_HUB_ENDPOINT: 'hub' });
    expect(await run.ended).toEqual({
      code: 2,
      last:
        'prepare: invalid configuration:; MIMO_WORKER_HUB_REPOSITORY must be organisation/name, not "a/b/c"; ' +
        'MIMO_WORKER_HUB_ENDPOINT must be a URL such as https://huggingface.co',
    });
    expect(await prepare(['--comple']).ended).toMatchObject({ code: 2 });
    expect(await prepare(['--publish'], { MIMO_WORKER_NATS_URL: '' }).ended).toEqual({
      code: 2,
      last: 'prepare: --publish needs MIMO_WORKER_NATS_URL',
    });
  });
});
