// The queue's own troubles, on a real nats-server: its disk is lost or full, its streams are deleted or at their
// limits. Gateways are whole, groups follow a script. What is asserted is what clients, operators and the disk see;
// nothing is timed.

import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import * as grpc from '@grpc/grpc-js';
import { jetstream, type JetStreamManager } from '@nats-io/jetstream';
import { connect, type NatsConnection } from '@nats-io/transport-node';

import { ClusterError } from '@mimo/core/process/errors';
import { callServerStream, callUnary } from '@mimo/core/grpc/client';
import { createLog } from '@mimo/core/process/log';
import type { Bus } from '@mimo/core/bus/bus';
import { createNatsBus } from '@mimo/core/bus/nats/bus';
import { parseGatewayConfig } from '@mimo/gateway/config';
import { HealthCheckResponse_ServingStatus, HealthClient, HealthService } from '@mimo/proto/health';
import { GenerateRequest, InferenceServiceClient, InferenceServiceService } from '@mimo/proto/inference';
import { RequestRecord } from '@mimo/proto/queue';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { openGateway, type TestGateway } from '../harness/in-process.ts';
import type { NatsServer } from '../../cli/src/local/nats-server.ts';
import { startTestNats } from '../harness/nats.ts';
import { mountSmall } from '../harness/small-volume.ts';
import { startScriptedGroup, type ScriptedGroup } from '../harness/scripted-group.ts';
import { waitFor } from '../harness/wait-for.ts';

const model = 'mimo-demo';
const modelDirectory = join(import.meta.dirname, '../../models/mimo-demo');
const log = createLog({ process: 'test', level: 'silent' });

let directory: string;
let closes: (() => Promise<unknown> | void)[] = [];
let server: NatsServer;

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'mimo-queue-trouble-'));
});

afterEach(async () => {
  for (const close of closes.toReversed()) {
    await close();
  }
  closes = [];
  await rm(directory, { recursive: true, force: true });
});

async function startServer(options: {
  storeDirectory: string;
  port?: number;
  config?: string;
}): Promise<void> {
  const configFile = join(directory, 'nats.conf');
  await writeFile(configFile, options.config ?? '');
  server = await startTestNats({ port: 0, ...options, configFile });
  const started = server;
  closes.push(() => started.close());
}

function openQueue(): Bus {
  const queue = createNatsBus({
    servers: [server.url],
    clientName: 'test',
    replicas: 1,
    recordMaxAgeMs: 3_600_000,
    log,
  });
  closes.push(() => queue.close());
  return queue;
}

interface Door {
  readonly gateway: TestGateway;
  readonly client: InferenceServiceClient;
}

async function openDoor(env: Record<string, string> = {}): Promise<Door> {
  const config = parseGatewayConfig({
    MIMO_GATEWAY_LISTEN: '127.0.0.1:0',
    MIMO_GATEWAY_METRICS_LISTEN: '127.0.0.1:0',
    MIMO_GATEWAY_MODELS: `${model}=${modelDirectory}`,
    MIMO_GATEWAY_NATS: server.url,
    ...env,
  });
  const gateway = await openGateway(config, log);
  closes.push(() => gateway.close());
  const client = new InferenceServiceClient(gateway.address, grpc.credentials.createInsecure());
  closes.push(() => client.close());
  return { gateway, client };
}

async function openGroup(
  queue: Bus,
  options: Partial<Parameters<typeof startScriptedGroup>[0]> = {},
): Promise<ScriptedGroup> {
  await queue.opened(AbortSignal.timeout(30_000));
  const group = await startScriptedGroup({ model, group: 'g', queue, ...options });
  closes.push(() => group.close());
  return group;
}

/** The streams as an operator sees them. */
async function openManager(): Promise<JetStreamManager> {
  const connection: NatsConnection = await connect({ servers: server.url });
  closes.push(() => connection.close());
  return jetstream(connection).jetstreamManager();
}

interface Asked {
  /** Rejects where the request is refused. */
  readonly started: Promise<void>;
  /** The completion, or the code it ended with. */
  readonly end: Promise<readonly number[] | string>;
  readonly leave: () => void;
}

/** Asks with a prompt of ids: scripted groups say it back. */
function ask({ client }: Door, ids: readonly number[]): Asked {
  const abort = new AbortController();
  const started = Promise.withResolvers<void>();
  const request = GenerateRequest.fromPartial({
    model,
    input: { $case: 'tokenIds', value: { ids: [...ids] } },
    sampling: { temperature: 0 },
  });
  const read = async (): Promise<readonly number[]> => {
    const tokenIds: number[] = [];
    const stream = callServerStream(client, InferenceServiceService.generate, {
      request,
      signal: abort.signal,
    });
    for await (const { event } of stream) {
      if (event?.$case === 'started') {
        started.resolve();
      } else if (event?.$case === 'delta') {
        if (event.value.index !== tokenIds.length) {
          throw new Error(`index ${event.value.index} came where ${tokenIds.length} is next`);
        }
        tokenIds.push(...event.value.tokenIds);
      }
    }
    return tokenIds;
  };
  const end = read().catch((error: unknown) => {
    started.reject(error);
    return ClusterError.from(error).code;
  });
  started.promise.catch(() => undefined);
  return { started: started.promise, end, leave: () => abort.abort() };
}

/** Asks until the request is taken. */
async function askUntilTaken(door: Door, ids: readonly number[]): Promise<Asked> {
  let asked = ask(door, ids);
  await waitFor('the request to be taken', async () => {
    const taken = await asked.started.then(
      () => true,
      () => false,
    );
    if (!taken) {
      asked = ask(door, ids);
    }
    return taken;
  });
  return asked;
}

/** What the request is refused with; undefined if it is taken. */
async function refusalOf({ started }: Asked): Promise<ClusterError | undefined> {
  return started.then(
    () => undefined,
    (error: unknown) => ClusterError.from(error),
  );
}

async function metricsOf({ gateway }: Door): Promise<string> {
  return (await fetch(`http://${gateway.metricsAddress}/metrics`)).text();
}

async function isServing(
  { gateway }: Door,
  service = 'mimo.inference.v1.InferenceService',
): Promise<boolean> {
  const client = new HealthClient(gateway.address, grpc.credentials.createInsecure());
  try {
    const { status } = await callUnary(client, HealthService.check, { request: { service } });
    return status === HealthCheckResponse_ServingStatus.SERVING;
  } finally {
    client.close();
  }
}

/** Prompts in the order in which groups got them, by their first ids. */
const firstIds = (group: ScriptedGroup): (number | undefined)[] => group.prompts.map(([first]) => first);

describe('a queue that lost its records', () => {
  const losses: Readonly<Record<string, (storeDirectory: string) => Promise<void>>> = {
    'with its disk': async (storeDirectory) => {
      const { port } = server;
      server.child.kill();
      await server.child.exited;
      await rm(storeDirectory, { recursive: true });
      await startServer({ storeDirectory, port });
    },
    'with its streams, which somebody deleted': async () => {
      const manager = await openManager();
      await Promise.all(
        ['REQUESTS', 'KV_DISPATCHERS', 'KV_GROUPS'].map((name) => manager.streams.delete(name)),
      );
    },
    'with its stream alone': async () => {
      await (await openManager()).streams.delete('REQUESTS');
    },
    'from its stream, which somebody purged': async () => {
      await (await openManager()).streams.purge('REQUESTS');
    },
  };

  it.each(Object.entries(losses))(
    '%s: gateways record their requests again, in the old order; running streams continue, once',
    async (_name, lose) => {
      const storeDirectory = join(directory, 'nats');
      await startServer({ storeDirectory });
      const queue = openQueue();
      const group = await openGroup(queue, { maxSequences: 1, stepMs: 2 });
      const doors = [await openDoor(), await openDoor()];
      const doorOf = (index: number): Door => doors[index % 2] as Door;
      group.stall();
      const running = ask(doorOf(0), [1, 300, 301, 302]);
      await running.started;
      await waitFor('the first to run', () => group.prompts.length === 1);
      const waiting: Asked[] = [];
      for (let index = 0; index < 6; index += 1) {
        const asked = ask(doorOf(index), [10 + index]);
        await asked.started;
        waiting.push(asked);
      }

      await lose(storeDirectory);
      const fresh = [
        await askUntilTaken(doorOf(1), [20]),
        await askUntilTaken(doorOf(0), [21]),
        await askUntilTaken(doorOf(1), [22]),
      ];
      await waitFor('all records to be there again', async () => (await queue.records.count()) === 10);

      group.resume();
      expect(await running.end).toEqual([1, 300, 301, 302]);
      expect(await Promise.all(waiting.map((each) => each.end))).toEqual([
        [10],
        [11],
        [12],
        [13],
        [14],
        [15],
      ]);
      expect(await Promise.all(fresh.map((each) => each.end))).toEqual([[20], [21], [22]]);
      expect(firstIds(group)).toEqual([1, 10, 11, 12, 13, 14, 15, 20, 21, 22]);
      await waitFor('nothing to be left', async () => (await queue.records.count()) === 0);
    },
  );

  it('assigns a free slot to the older requests when it comes back', async () => {
    const storeDirectory = join(directory, 'nats');
    await startServer({ storeDirectory });
    const queue = openQueue();
    const group = await openGroup(queue, { maxSequences: 1, stepMs: 2 });
    const doors = [await openDoor(), await openDoor()] as const;
    group.stall();
    const running = ask(doors[0], [1]);
    await waitFor('the first to run', () => group.prompts.length === 1);
    const waiting = [ask(doors[1], [10])];
    await waiting[0]?.started;
    const { port } = server;
    server.child.kill();
    await server.child.exited;
    group.resume();
    expect(await running.end).toEqual([1]);
    await rm(storeDirectory, { recursive: true });
    await startServer({ storeDirectory, port });
    const fresh = await Promise.all(doors.map((door, index) => askUntilTaken(door, [20 + index])));
    await Promise.all([...waiting, ...fresh].map((each) => each.end));
    expect(firstIds(group).slice(0, 2)).toEqual([1, 10]);
    expect(group.prompts).toHaveLength(4);
  });
});

describe('a queue whose stream is deleted', () => {
  it('accepts the next request and stays ready throughout', async () => {
    await startServer({ storeDirectory: join(directory, 'nats') });
    const queue = openQueue();
    await openGroup(queue);
    const door = await openDoor();
    const manager = await openManager();
    for (let index = 0; index < 5; index += 1) {
      await manager.streams.delete('REQUESTS');
      expect(await ask(door, [30 + index]).end).toEqual([30 + index]);
    }
    expect(await isServing(door)).toBe(true);
    // Without any request too.
    await manager.streams.delete('REQUESTS');
    await waitFor('the stream to be made again', () =>
      manager.streams.info('REQUESTS').then(
        () => true,
        () => false,
      ),
    );
  });
});

describe('a queue whose server is stopped', () => {
  it('is not ready until the server resumes, and loses nothing', async () => {
    await startServer({ storeDirectory: join(directory, 'nats') });
    const queue = openQueue();
    const door = await openDoor();
    const waiting = ask(door, [60]);
    await waiting.started;
    process.kill(server.child.pid, 'SIGSTOP');
    await waitFor('the gateway to be unready', async () => !(await isServing(door)));
    expect(await metricsOf(door)).toMatch(/gateway_queue_connected(\{[^}]*\})? 0\b/);
    process.kill(server.child.pid, 'SIGCONT');
    await waitFor('the gateway to be ready', () => isServing(door));
    await openGroup(queue);
    expect(await waiting.end).toEqual([60]);
  });
});

describe('a queue near its limits', () => {
  it.each([
    ['bytes', { MIMO_GATEWAY_QUEUE_MAX_BYTES: '65536' }, /the queue is full: it holds \d+ bytes of 65536/],
    ['requests', { MIMO_GATEWAY_QUEUE_MAX_REQUESTS: '20' }, /the queue is full: it holds \d+ requests of 20/],
  ])(
    'of %s refuses requests before NATS would, with the reason, and accepts them again',
    async (_limit, env, text) => {
      await startServer({ storeDirectory: join(directory, 'nats') });
      const queue = openQueue();
      const door = await openDoor(env);
      const manager = await openManager();
      const prompt = Array.from({ length: 1_000 }, () => 400);
      const waiting: Asked[] = [];
      let refusal: ClusterError | undefined;
      while (refusal === undefined && waiting.length < 100) {
        const asked = ask(door, prompt);
        refusal = await asked.started.then(
          () => undefined,
          (error: unknown) => ClusterError.from(error),
        );
        waiting.push(asked);
      }
      expect(refusal).toMatchObject({ code: 'resource_exhausted', detail: { retryAfterMs: 5_000 } });
      expect(refusal?.message).toMatch(text);
      expect(waiting.length).toBeGreaterThan(10);
      const { state, config } = await manager.streams.info('REQUESTS');
      expect([
        state.bytes < config.max_bytes,
        state.messages < config.max_msgs || config.max_msgs < 0,
      ]).toEqual([true, true]);
      expect(await metricsOf(door)).toMatch(/gateway_queue_refusals_total\{[^}]*reason="full"[^}]*\} 1\b/);
      expect(await isServing(door)).toBe(true);
      waiting.forEach((each) => each.leave());
      await Promise.all(waiting.map((each) => each.end));
      const after = await askUntilTaken(door, [1]);
      after.leave();
      await after.end;
      await waitFor('nothing to be left', async () => (await queue.records.count()) === 0);
    },
  );
});

describe('a queue whose disk was full', () => {
  it('reports it, and stores again once there is room, without a restart and without losing a request', async (context) => {
    const volume = await mountSmall(join(directory, 'volume'));
    if (volume === undefined) {
      context.skip('needs the right to mount a small filesystem');
      return;
    }
    closes.push(volume.unmount);
    await startServer({ storeDirectory: join(volume.path, 'nats') });
    const queue = openQueue();
    const door = await openDoor();
    const waiting = Array.from({ length: 3 }, (_, index) => ask(door, [40 + index]));
    await Promise.all(waiting.map((each) => each.started));

    await writeFile(volume.ballast, Buffer.alloc(32 * 2 ** 20)).catch(() => undefined);
    const prompt = Array.from({ length: 1_900 }, () => 400);
    const more: Asked[] = [];
    await waitFor('a refusal that names the disk', async () => {
      const asked = ask(door, prompt);
      const refusal = await refusalOf(asked);
      more.push(asked);
      return refusal?.code === 'unavailable' && refusal.message.includes('no space left on device');
    });
    expect(await isServing(door)).toBe(false);
    expect(await isServing(door, '')).toBe(true);
    const metrics = await metricsOf(door);
    expect(metrics).toMatch(/gateway_queue_refusals_total\{[^}]*reason="disk_failed"/);
    expect(metrics).toMatch(/gateway_queue_connected(\{[^}]*\})? 0\b/);
    more.forEach((each) => each.leave());

    await rm(volume.ballast);
    const group = await openGroup(queue);
    expect(await Promise.all(waiting.map((each) => each.end))).toEqual([[40], [41], [42]]);
    expect(await (await askUntilTaken(door, [50])).end).toEqual([50]);
    await waitFor('the gateway to be ready', () => isServing(door));
    await waitFor('nothing to be left', async () => (await queue.records.count()) === 0);
    expect(group.prompts).toHaveLength(4);
  });
});

/** The files of the stream's blocks, by path. */
async function readBlocks(storeDirectory: string): Promise<ReadonlyMap<string, Buffer>> {
  const files = await readdir(storeDirectory, { recursive: true, withFileTypes: true });
  const paths = files
    .map(({ parentPath, name }) => join(parentPath, name))
    .filter((path) => path.includes('/REQUESTS/') && path.endsWith('.blk'));
  const contents = await Promise.all(
    paths.map(async (path) => [path, await readFile(path).catch(() => Buffer.alloc(0))] as const),
  );
  return new Map(contents);
}

describe('records on disk', () => {
  const secret = Array.from({ length: 64 }, (_, index) => 140_000 + index * 37);
  const secretRecord = RequestRecord.fromPartial({
    requestId: 'secret',
    model,
    gatewayId: 'nobody',
    promptTokenIds: secret,
  });
  const marker = Buffer.from(
    RequestRecord.encode(RequestRecord.fromPartial({ promptTokenIds: secret })).finish(),
  ).subarray(8);

  async function isOnDisk(storeDirectory: string): Promise<boolean> {
    const files = await readdir(storeDirectory, { recursive: true, withFileTypes: true });
    const contents = await Promise.all(
      files
        .filter((file) => file.isFile())
        .map(({ parentPath, name }) => readFile(join(parentPath, name)).catch(() => Buffer.alloc(0))),
    );
    return contents.some((content) => content.includes(marker));
  }

  it('are overwritten when their requests end, even in a block that others share', async () => {
    const storeDirectory = join(directory, 'nats');
    await startServer({ storeDirectory });
    const queue = openQueue();
    await queue.opened(AbortSignal.timeout(30_000));
    const neighbour = { ...secretRecord, requestId: 'neighbour', promptTokenIds: [1] };
    await queue.records.publish(neighbour);
    const place = await queue.records.publish(secretRecord);
    await queue.records.publish({ ...neighbour, requestId: 'another' });
    await waitFor('the record to reach the disk', () => isOnDisk(storeDirectory));
    expect(await queue.records.erase(place)).toBe(true);
    await waitFor('the record to be gone from the disk', async () => !(await isOnDisk(storeDirectory)));
    expect(await queue.records.count()).toBe(2);
  });

  it('are erased from an encrypted store too, while older ones in the same file keep their place in the order', async () => {
    const storeDirectory = join(directory, 'nats');
    const config = `jetstream { sync_interval: "1s", cipher: chachapoly, key: "${'k'.repeat(64)}" }`;
    await startServer({ storeDirectory, config });
    const queue = openQueue();
    const doors = [
      await openDoor({ MIMO_GATEWAY_ERASE_AFTER: '2s' }),
      await openDoor({ MIMO_GATEWAY_ERASE_AFTER: '2s' }),
    ] as const;
    const older = [ask(doors[1], [10]), ask(doors[1], [11])];
    await Promise.all(older.map((each) => each.started));
    // As long as no move comes between, what the file grows by is the record's ciphertext.
    let written: readonly Buffer[] = [];
    await waitFor('a record to be written at the end of a file', async () => {
      const before = await readBlocks(storeDirectory);
      const secretAsked = ask(
        doors[1],
        Array.from({ length: 1_900 }, (_, index) => 300 + (index % 97)),
      );
      await secretAsked.started;
      await waitFor('the record to be in a file', async () => {
        written = [...(await readBlocks(storeDirectory))].map(([path, content]) =>
          content.subarray(before.get(path)?.length ?? 0),
        );
        return written.some(({ length }) => length > 1_900);
      }).catch(() => (written = []));
      secretAsked.leave();
      await secretAsked.end;
      return written.some(({ length }) => length > 1_900);
    });
    const pieces = written.flatMap((bytes) =>
      Array.from({ length: Math.floor(bytes.length / 64) }, (_, at) => bytes.subarray(64 * at, 64 * at + 64)),
    );
    await waitFor('its ciphertext to be gone', async () => {
      const files = [...(await readBlocks(storeDirectory)).values()];
      return pieces.every((piece) => files.every((file) => !file.includes(piece)));
    });
    expect(await queue.records.count()).toBe(2);
    // Another dispatcher finds what was written again.
    await doors[0].gateway.close();
    const younger = await askUntilTaken(doors[1], [12]);
    const group = await openGroup(queue, { maxSequences: 1 });
    expect(await Promise.all([...older, younger].map((each) => each.end))).toEqual([[10], [11], [12]]);
    expect(firstIds(group)).toEqual([10, 11, 12]);
    await waitFor('nothing to be left', async () => (await queue.records.count()) === 0);
  });

  it('are complete, and unreadable once the server encrypts, including those written before', async () => {
    const storeDirectory = join(directory, 'nats');
    await startServer({ storeDirectory });
    const queue = openQueue();
    await queue.opened(AbortSignal.timeout(30_000));
    await queue.records.publish(secretRecord);
    await waitFor('the record to reach the disk', () => isOnDisk(storeDirectory));
    const { port } = server;
    await server.close();
    const config = `jetstream { cipher: chachapoly, key: "${'k'.repeat(64)}" }`;
    await startServer({ storeDirectory, port, config });
    await waitFor('the queue to come back', () => queue.records.fault === undefined);
    await queue.records.publish({ ...secretRecord, requestId: 'secret too' });
    const manager = await openManager();
    for (const requestId of ['secret', 'secret=20too']) {
      const stored = await manager.streams.getMessage('REQUESTS', {
        last_by_subj: `requests.${model}.${requestId}`,
      });
      expect(RequestRecord.decode(stored?.data ?? new Uint8Array()).promptTokenIds).toEqual(secret);
    }
    await server.close();
    expect(await isOnDisk(storeDirectory)).toBe(false);
  });
});
