// One model an answer: two checkpoints under one name, with a real gateway, the catalogue, and real groups, while
// streams run and requests wait. A request that began with one checkpoint never continues with the other.

import { cp, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import type * as grpc from '@grpc/grpc-js';
import { ClusterError } from '@mimo/core/process/errors';
import { createLog } from '@mimo/core/process/log';
import type { Bus } from '@mimo/core/bus/bus';
import { createNatsBus } from '@mimo/core/bus/nats/bus';
import { parseGatewayConfig } from '@mimo/gateway/config';
import type { InferenceServiceClient } from '@mimo/proto/inference';
import type { Heartbeat } from '@mimo/proto/worker';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { openGateway, type TestGateway } from '../harness/in-process.ts';
import { startChild, type Child } from '../../cli/src/local/child-process.ts';
import { freeAddresses } from '../../cli/src/local/free-ports.ts';
import type { NatsServer } from '../../cli/src/local/nats-server.ts';
import { bareEnvironment } from '../harness/bare-environment.ts';
import { ask, chatRequest, createClient } from '../harness/cluster.ts';
import { expectStreams, startStreams } from '../harness/disturbed-streams.ts';
import { startTestNats } from '../harness/nats.ts';
import { writeOtherCheckpoint } from '../harness/other-checkpoint.ts';
import { waitFor } from '../harness/wait-for.ts';

const root = join(import.meta.dirname, '../..');
const demo = join(root, 'models/mimo-demo');
const model = 'mimo-demo';
const log = createLog({ process: 'test', level: 'silent' });
const streamCount = 8;
/** More than are made before the last group goes, also on a busy machine. */
const streamTokens = 1_200;

let directory: string;
let server: NatsServer;
let bus: Bus;
let gateway: TestGateway;
let client: InferenceServiceClient & grpc.Client;
const following = new AbortController();
const beats = new Map<string, Heartbeat>();
const children: Child[] = [];

function variables(checkpoint: string): NodeJS.ProcessEnv {
  return {
    ...process.env,
    MIMO_WORKER_MODEL: model,
    MIMO_WORKER_CHECKPOINT_DIRECTORY: join(directory, checkpoint),
    MIMO_WORKER_CACHE_DIRECTORY: join(directory, 'cache'),
    MIMO_WORKER_NATS_URL: server.url,
  };
}

async function startWorker(
  name: string,
  env: NodeJS.ProcessEnv,
  args: readonly string[] = [],
): Promise<Child> {
  const child = await startChild({
    name,
    command: [process.execPath, join(root, 'worker/src/main.ts'), ...args],
    logFile: join(directory, `${name}.log`),
    env: { ...bareEnvironment, ...env },
  });
  children.push(child);
  return child;
}

async function publish(checkpoint: string): Promise<void> {
  const child = await startWorker('prepare', variables(checkpoint), ['prepare', '--compile', '--publish']);
  const { code } = await child.exited;
  expect({ code, log: code === 0 ? '' : child.logTail() }).toEqual({ code: 0, log: '' });
}

/** A group of one rank, once it is heard of. */
async function startGroup(group: string, checkpoint: string): Promise<Child> {
  const [address = ''] = await freeAddresses(1);
  const child = await startWorker(group, {
    ...variables(checkpoint),
    MIMO_WORKER_GROUP: group,
    MIMO_WORKER_LISTEN: address,
    MIMO_WORKER_MAX_SEQUENCES: String(streamCount),
    MIMO_WORKER_DRAIN_FINISH: '100ms',
  });
  await waitFor(`group ${group}`, () => (beats.get(group)?.maxSequences ?? 0) > 0);
  return child;
}

const runningIn = (group: string): number => beats.get(group)?.running.length ?? 0;

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'mimo-identity-'));
  server = await startTestNats({ storeDirectory: join(directory, 'nats'), port: 0 });
  const connect = { servers: [server.url], clientName: 'test', replicas: 1, log };
  bus = createNatsBus({ ...connect, recordMaxAgeMs: 3_600_000 });
  await bus.opened(AbortSignal.timeout(30_000));
  void (async () => {
    for await (const heartbeat of bus.heartbeats.follow(following.signal)) {
      beats.set(heartbeat.group, heartbeat);
    }
  })();
  await cp(demo, join(directory, 'first'), { recursive: true });
  await writeOtherCheckpoint(join(directory, 'second'));
  const config = { MIMO_GATEWAY_LISTEN: '127.0.0.1:0', MIMO_GATEWAY_NATS: server.url };
  gateway = await openGateway(parseGatewayConfig(config), log);
  client = createClient(gateway.address);
});

afterAll(async () => {
  following.abort();
  client.close();
  await gateway.close();
  await Promise.all(children.map((child) => child.stop(10_000)));
  await bus.close();
  await server.close();
  await rm(directory, { recursive: true, force: true });
});

describe('two checkpoints under one name', () => {
  it('never share an answer: streams and waiting requests keep their first checkpoint or end with ABORTED', async () => {
    await publish('first');
    const one = await startGroup('first-1', 'first');
    const question = chatRequest('What is 47 + 85?', { ignoreEos: true, maxTokens: 60 });
    await waitFor('the model to be served', () =>
      ask(client, { request: question }).then(
        () => true,
        () => false,
      ),
    );
    const old = await ask(client, { request: question });
    const expected = await expectStreams(client, streamTokens);

    // A group of the new content, which takes nothing yet, so that all that comes is the old one's.
    const two = await startGroup('first-2', 'first');
    await bus.drainMarks.mark(model, 'second-1', { sinceUnixMs: Date.now() });
    await publish('second');
    await startGroup('second-1', 'second');
    expect(beats.get('second-1')?.identity).not.toBe(beats.get('first-2')?.identity);

    // A rollout with another group of the old content still there: the streams move to that one.
    const moved = startStreams(client, expected);
    await moved.begun;
    await waitFor('streams in the first group', () => runningIn('first-1') > 0);
    await one.stop(30_000);
    expect(await moved.outcome).toMatchObject({ same: streamCount, wrong: [] });

    // The last group of the old content goes while one of the new is there, with free slots.
    const stranded = startStreams(client, expected);
    await stranded.begun;
    const waiting = ask(client, { request: question }).then(
      () => 'finished',
      (error: unknown) => ClusterError.from(error),
    );
    await waitFor('all records', async () => (await bus.records.count()) === streamCount + 1);
    await bus.drainMarks.clear(model, 'second-1');
    await waitFor('all streams in the last group', () => runningIn('first-2') === streamCount);
    await two.stop(30_000);
    const { same, wrong } = await stranded.outcome;
    expect({ same, wrong: wrong.length }).toEqual({ same: 0, wrong: streamCount });
    for (const line of wrong) {
      expect(line).toMatch(
        /model mimo-demo was replaced after \d+ completion tokens, and no group with the request/,
      );
    }
    expect(await waiting).toMatchObject({
      code: 'aborted',
      message: expect.stringContaining('model mimo-demo was replaced while the request waited') as string,
    });
    expect(runningIn('second-1')).toBe(0);

    // What comes now is the new model's, whole.
    const answers = [
      await ask(client, { request: question }),
      await ask(client, { request: question }),
    ] as const;
    expect(answers[0].tokenIds).toEqual(answers[1].tokenIds);
    expect(answers[0].tokenIds).not.toEqual(old.tokenIds);
  });
});
