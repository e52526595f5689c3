// A real group that stalls or dies whenever it holds certain requests, and the fate of the other requests in it. Two
// gateways, a real nats-server and a real rank, which the test stops and kills as a fault in its step thread would.

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { callUnary } from '@mimo/core/grpc/client';
import { ClusterError } from '@mimo/core/process/errors';
import { createLog } from '@mimo/core/process/log';
import type { Bus } from '@mimo/core/bus/bus';
import { createNatsBus } from '@mimo/core/bus/nats/bus';
import { parseGatewayConfig } from '@mimo/gateway/config';
import {
  InferenceServiceService,
  type ChatRequest,
  type InferenceServiceClient,
} from '@mimo/proto/inference';
import { compile } from '@mimo/worker/compiler/compile';
import { shardDirectoryIn } from '@mimo/worker/shard-cache';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { openGateway, type TestGateway } from '../harness/in-process.ts';
import { startChild, type Child } from '../../cli/src/local/child-process.ts';
import { freeAddresses } from '../../cli/src/local/free-ports.ts';
import { cacheDirectoryFrom, type NatsServer } from '../../cli/src/local/nats-server.ts';
import { ask, chatRequest, createClient } from '../harness/cluster.ts';
import { startTestNats } from '../harness/nats.ts';
import { waitFor } from '../harness/wait-for.ts';

const root = join(import.meta.dirname, '../..');
const demo = join(root, 'models/mimo-demo');
const model = 'mimo-demo';
const log = createLog({ process: 'test', level: 'silent' });

let directory: string;
let server: NatsServer;
let bus: Bus;
let gateways: TestGateway[];
let clients: InferenceServiceClient[];
let rank: Child;
let following: AbortController;
/** Requests that break the group that they are in. */
const poisons = new Set<string>();
/** Called as soon as the group says that it has one of them. */
let onPoisoned: (requestId: string, incarnation: string) => void = () => undefined;

async function startRank(): Promise<void> {
  const set = {
    cacheDirectory: cacheDirectoryFrom(process.env),
    checkpointDirectory: demo,
    precision: 'int8',
    tensorParallel: 1,
  } as const;
  const shardDirectory = await shardDirectoryIn(set);
  await compile({ ...set, modelDirectory: demo, outDirectory: shardDirectory }, new AbortController().signal);
  const [address = ''] = await freeAddresses(1);
  rank = await startChild({
    name: 'rank',
    command: [process.execPath, join(root, 'worker/src/main.ts')],
    logFile: join(directory, 'rank.log'),
    env: {
      ...process.env,
      MIMO_WORKER_MODEL: model,
      MIMO_WORKER_GROUP: 'g',
      MIMO_WORKER_SHARD_DIRECTORY: shardDirectory,
      MIMO_WORKER_LISTEN: address,
      MIMO_WORKER_NATS_URL: server.url,
      // To see a request before its prompt has been read.
      MIMO_WORKER_HEARTBEAT_INTERVAL: '20ms',
      MIMO_WORKER_MAX_BATCH_TOKENS: '32',
      MIMO_WORKER_PREFILL_CHUNK_TOKENS: '16',
    },
  });
}

/** A question whose prompt takes the group a while, so that nobody has made progress when it breaks. */
function long(question: string, more: Parameters<typeof chatRequest>[1] = {}): ChatRequest {
  return chatRequest(`${'Think about it well. '.repeat(60)}${question}`, {
    maxTokens: 40,
    ignoreEos: true,
    ...more,
  });
}

/** Asks a poison; resolves with how it ended. */
function askPoison(client: InferenceServiceClient, signal?: AbortSignal): Promise<string> {
  let requestId = '';
  return ask(client, {
    request: long('What breaks you?'),
    ...(signal === undefined ? {} : { signal }),
    onMessage: ({ event }) => {
      if (event?.$case === 'started') {
        ({ requestId } = event.value);
        poisons.add(requestId);
      }
    },
  }).then(
    () => 'finish',
    (error: unknown) => ClusterError.from(error).code,
  );
}

const questions = [1, 2, 3, 4].map((number) => long(`What is ${number} + 85?`));

function askAll(): Promise<{ readonly tokenIds: readonly number[] }[]> {
  return Promise.all(
    questions.map((request, index) => ask(clients[index % clients.length]!, { request, timeoutMs: 170_000 })),
  );
}

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'mimo-poison-'));
  server = await startTestNats({ storeDirectory: join(directory, 'nats'), port: 0 });
  bus = createNatsBus({
    servers: [server.url],
    clientName: 'test',
    replicas: 1,
    recordMaxAgeMs: 3_600_000,
    log,
  });
  await bus.opened(AbortSignal.timeout(30_000));
  poisons.clear();
  following = new AbortController();
  void (async () => {
    for await (const { incarnation, running } of bus.heartbeats.follow(following.signal)) {
      const poison = running.find(({ requestId }) => poisons.has(requestId));
      if (poison !== undefined) {
        onPoisoned(poison.requestId, incarnation);
      }
    }
  })();
  const config = parseGatewayConfig({
    MIMO_GATEWAY_LISTEN: '127.0.0.1:0',
    MIMO_GATEWAY_NATS: server.url,
    MIMO_GATEWAY_MODELS: `${model}=${demo}`,
  });
  gateways = await Promise.all([openGateway(config, log), openGateway(config, log)]);
  clients = gateways.map(({ address }) => createClient(address));
  await startRank();
});

afterEach(async () => {
  following.abort();
  clients.forEach((client) => client.close());
  await Promise.all(gateways.map((gateway) => gateway.close()));
  await rank.stop(10_000);
  await bus.close();
  await server.close();
  await rm(directory, { recursive: true, force: true });
});

describe('a group that breaks with a request in it', () => {
  it('ends that request, while its neighbours at any gateway get their whole answers', async () => {
    const expected = await askAll();
    let lives = 0;
    let reviving: Promise<void> = Promise.resolve();
    const revive = async (dead: Child): Promise<void> => {
      await dead.exited;
      await startRank();
      onPoisoned = strike;
    };
    const struck = new Set<string>();
    const strike = (_requestId: string, incarnation: string): void => {
      // A late heartbeat of a life that is over must not end the next one.
      if (struck.has(incarnation)) {
        return;
      }
      struck.add(incarnation);
      const dying = rank;
      onPoisoned = () => undefined;
      lives += 1;
      dying.kill();
      reviving = revive(dying);
    };
    onPoisoned = strike;
    const poison = askPoison(clients[0]!);
    const answers = await askAll();
    expect(await poison).toBe('aborted');
    await reviving;
    expect(lives).toBeGreaterThanOrEqual(3);
    // Three or four, and one more for each trial that is disturbed (suspicion.ts).
    expect(lives).toBeLessThanOrEqual(7);
    expect(answers.map(({ tokenIds }) => tokenIds)).toEqual(expected.map(({ tokenIds }) => tokenIds));
  });

  it('blames no other request when it stalls and that request is cancelled before the break, again and again', async () => {
    const expected = await askAll();
    const answers = askAll();
    for (let round = 0; round < 4; round += 1) {
      const struck = Promise.withResolvers<string>();
      onPoisoned = (requestId) => {
        onPoisoned = () => undefined;
        process.kill(rank.pid, 'SIGSTOP');
        struck.resolve(requestId);
      };
      const poison = askPoison(clients[round % 2]!);
      const requestId = await struck.promise;
      // Its client thinks better of it, and asks the gateway that does not hold it.
      const other = clients[(round + 1) % 2]!;
      const cancel = { request: { requestId } };
      expect(await callUnary(other, InferenceServiceService.cancel, cancel)).toEqual({ cancelled: true });
      expect(await poison).toBe('canceled');
      poisons.clear();
      // Its gateways find out by themselves that it is gone.
      await waitFor('the sessions to break', () => gateways.every((each) => each.counts().sequences === 0));
      rank.kill();
      await rank.exited;
      await startRank();
    }
    expect((await answers).map(({ tokenIds }) => tokenIds)).toEqual(expected.map(({ tokenIds }) => tokenIds));
  });
});
