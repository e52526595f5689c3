// A replica group without a gateway: two real ranks, spoken to over their own Session protocol, and their heartbeats.

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import * as grpc from '@grpc/grpc-js';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { callUnary } from '@mimo/core/grpc/client';
import { createLog } from '@mimo/core/process/log';
import type { Bus } from '@mimo/core/bus/bus';
import { createNatsBus } from '@mimo/core/bus/nats/bus';
import { HealthCheckResponse_ServingStatus, HealthClient, HealthService } from '@mimo/proto/health';
import { SamplingParams } from '@mimo/proto/sampling';
import {
  FinishKind,
  GroupState,
  Submit,
  WorkerServiceClient,
  WorkerServiceService,
  type Heartbeat,
  type SequenceDelta,
  type SessionRequest,
  type SessionResponse,
} from '@mimo/proto/worker';
import { compile } from '@mimo/worker/compiler/compile';
import { shardDirectoryIn } from '@mimo/worker/shard-cache';

import { startChild, type Child } from '../../cli/src/local/child-process.ts';
import { freePorts } from '../../cli/src/local/free-ports.ts';
import {
  cacheDirectoryFrom,
  findNatsServer,
  startNatsServer,
  type NatsServer,
} from '../../cli/src/local/nats-server.ts';
import { waitFor } from '../harness/wait-for.ts';

const repository = join(import.meta.dirname, '../..');
const modelDirectory = join(repository, 'models/mimo-demo');
const model = 'mimo-demo';
const prompt = [10, 11, 12];
const sampling = SamplingParams.fromPartial({
  temperature: 1,
  topP: 1,
  topK: 0,
  minP: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  seed: 5,
  maxTokens: 40,
  ignoreEos: true,
  draftTokens: 1,
});

/** A gateway's end of one session: what has come, by slot. */
class SessionPeer {
  readonly deltas: SequenceDelta[] = [];
  readonly call: grpc.ClientDuplexStream<SessionRequest, SessionResponse>;
  welcome: Extract<NonNullable<SessionResponse['message']>, { $case: 'welcome' }>['value'] | undefined;
  ended: { readonly code: grpc.status } | undefined;

  constructor(client: WorkerServiceClient, asked = model) {
    this.call = client.session();
    this.call.on('data', ({ message }: SessionResponse) => {
      if (message?.$case === 'welcome') {
        this.welcome = message.value;
      } else if (message?.$case === 'frame') {
        this.deltas.push(...message.value.deltas);
      }
    });
    this.call.on('error', (error: grpc.ServiceError) => {
      this.ended = { code: error.code };
    });
    this.call.on('end', () => {
      this.ended ??= { code: grpc.status.OK };
    });
    this.send({ $case: 'hello', value: { gatewayId: 'test', model: asked } });
  }
  send(message: NonNullable<SessionRequest['message']>): void {
    this.call.write({ message });
  }
  submit(slot: number, fields: Partial<Submit> = {}): void {
    const submit = { slot, requestId: `r${slot}`, epoch: 1, tokenIds: prompt, creditTokens: 1_000, sampling };
    this.send({ $case: 'submit', value: { ...Submit.fromPartial(submit), ...fields } });
  }
  tokensOf(slot: number): number[] {
    return this.deltas.filter((delta) => delta.slot === slot).flatMap(({ tokenIds }) => tokenIds);
  }
  finishOf(slot: number): SequenceDelta['finish'] {
    return this.deltas.find((delta) => delta.slot === slot && delta.finish !== undefined)?.finish;
  }
  async finished(slot: number): Promise<NonNullable<SequenceDelta['finish']>> {
    await waitFor(`slot ${slot} to finish`, () => this.finishOf(slot) !== undefined);
    return this.finishOf(slot) as NonNullable<SequenceDelta['finish']>;
  }
}

describe('a replica group of two ranks', () => {
  let directory: string;
  let nats: NatsServer;
  let bus: Bus;
  let ranks: readonly Child[] = [];
  let shardDirectory: string;
  let addresses: readonly string[];
  let client: WorkerServiceClient;
  const heartbeats: Heartbeat[] = [];
  const following = { stop: new AbortController() };

  beforeEach(async () => {
    const signal = new AbortController().signal;
    directory = await mkdtemp(join(tmpdir(), 'mimo-group-'));
    const cacheDirectory = cacheDirectoryFrom(process.env);
    const binary = await findNatsServer({ cacheDirectory, signal, onProgress: () => undefined });
    if (binary === null) {
      throw new Error('this test needs a nats-server: on the PATH, or Go to build it');
    }
    const set = {
      cacheDirectory,
      checkpointDirectory: modelDirectory,
      precision: 'int8',
      tensorParallel: 2,
    } as const;
    shardDirectory = await shardDirectoryIn(set);
    await compile({ ...set, modelDirectory, outDirectory: shardDirectory }, signal);
    nats = await startNatsServer({ binary, storeDirectory: join(directory, 'nats'), port: 0 });
    bus = createNatsBus({
      servers: [nats.url],
      clientName: 'test',
      replicas: 1,
      recordMaxAgeMs: 60_000,
      log: createLog({ process: 'test', level: 'silent' }),
    });
    heartbeats.length = 0;
    following.stop = new AbortController();
    const { signal: stop } = following.stop;
    void (async () => {
      for await (const heartbeat of bus.heartbeats.follow(stop)) {
        heartbeats.push(heartbeat);
      }
    })();
    await waitFor('the bus', () => bus.connected);
  });

  async function startGroup(env: NodeJS.ProcessEnv = {}): Promise<void> {
    const ports = await freePorts(4);
    addresses = ports.slice(2).map((port) => `127.0.0.1:${port}`);
    ranks = await Promise.all(
      [0, 1].map(async (rank) =>
        startChild({
          name: `rank ${rank}`,
          command: [process.execPath, join(repository, 'worker/src/main.ts')],
          logFile: join(directory, `rank-${rank}.log`),
          env: {
            ...process.env,
            MIMO_WORKER_MODEL: model,
            MIMO_WORKER_SHARD_DIRECTORY: shardDirectory,
            MIMO_WORKER_TENSOR_PARALLEL: '2',
            MIMO_WORKER_RANK: String(rank),
            MIMO_WORKER_PEERS: ports
              .slice(0, 2)
              .map((port) => `127.0.0.1:${port}`)
              .join(','),
            MIMO_WORKER_LISTEN: addresses[rank],
            MIMO_WORKER_NATS_URL: nats.url,
            MIMO_WORKER_MAX_SEQUENCES: '4',
            ...env,
          },
        }),
      ),
    );
    client = new WorkerServiceClient(addresses[0] ?? '', grpc.credentials.createInsecure());
    await waitFor('the group to be ready', () => heartbeats.at(-1)?.state === GroupState.READY);
  }
  afterEach(async () => {
    client.close();
    following.stop.abort();
    await bus.close();
    await Promise.all(ranks.map((rank) => rank.stop(5_000)));
    await nats.close();
    await rm(directory, { recursive: true });
  });

  it('serves sessions with credit, aborts and deadlines, and reports what it holds', async () => {
    await startGroup();
    const first = heartbeats.find(({ state }) => state === GroupState.READY);
    expect(first).toMatchObject({ model, group: 'group-0', worldSize: 2, maxSequences: 4, draftTokens: 1 });
    expect(first?.address).toBe(addresses[0]);
    for (const address of addresses) {
      const health = new HealthClient(address, grpc.credentials.createInsecure());
      const { status } = await callUnary(health, HealthService.check, { request: { service: '' } });
      expect(status).toBe(HealthCheckResponse_ServingStatus.SERVING);
      health.close();
    }

    const session = new SessionPeer(client);
    session.submit(1);
    const whole = await session.finished(1);
    expect(whole).toMatchObject({ kind: FinishKind.LENGTH, completionTokens: 40 });
    expect(session.tokensOf(1)).toHaveLength(40);
    expect(session.welcome).toMatchObject({
      group: 'group-0',
      model,
      maxContextTokens: 2048,
      draftTokens: 1,
    });

    // Credit for seven tokens, then for the rest: the same tokens, and none beyond the credit in between.
    session.submit(2, { creditTokens: 7 });
    await waitFor('the credit to be used', () => session.tokensOf(2).length === 7);
    await waitFor('the sequence to be held', async () => {
      const { heartbeat } = await callUnary(client, WorkerServiceService.stats, { request: {} });
      return heartbeat?.running.length === 1 && heartbeat.kvBlocksUsed > 0;
    });
    expect(session.tokensOf(2)).toHaveLength(7);
    session.send({ $case: 'credit', value: { slot: 2, epoch: 1, tokens: 100 } });
    await session.finished(2);
    expect(session.tokensOf(2)).toEqual(session.tokensOf(1));

    // A resumed sequence draws what it would have drawn.
    const delivered = session.tokensOf(1).slice(0, 15);
    session.submit(3, { tokenIds: [...prompt, ...delivered], resumedTokens: delivered.length });
    await session.finished(3);
    expect([...delivered, ...session.tokensOf(3)]).toEqual(session.tokensOf(1));

    const endless = { ...sampling, maxTokens: 2_000 };
    session.submit(4, { sampling: endless });
    await waitFor('tokens', () => session.tokensOf(4).length > 0);
    session.send({ $case: 'abort', value: { slot: 4, epoch: 1 } });
    expect(await session.finished(4)).toMatchObject({ kind: FinishKind.ABORTED });
    session.submit(5, { sampling: endless, timeLeftMs: 150 });
    expect(await session.finished(5)).toMatchObject({
      kind: FinishKind.ERROR,
      errorCode: 'deadline_exceeded',
    });
    session.submit(6, { tokenIds: [] });
    session.submit(7, { tokenIds: [1, 9_999_999] });
    expect(await session.finished(6)).toMatchObject({
      kind: FinishKind.ERROR,
      errorCode: 'invalid_argument',
    });
    expect(await session.finished(7)).toMatchObject({
      kind: FinishKind.ERROR,
      errorCode: 'invalid_argument',
    });

    // A second session with slots of the same numbers; the first one's end does not touch it.
    const other = new SessionPeer(client);
    session.submit(8, { sampling: endless });
    other.submit(8, { sampling: endless, creditTokens: 100 });
    await waitFor('both to run', () => session.tokensOf(8).length > 0 && other.tokensOf(8).length > 0);
    session.call.cancel();
    other.send({ $case: 'credit', value: { slot: 8, epoch: 1, tokens: 100 } });
    await waitFor('the other to go on', () => other.tokensOf(8).length === 200);
    other.call.end();
    await waitFor('nothing to be held', async () => {
      const { heartbeat, sessions } = await callUnary(client, WorkerServiceService.stats, { request: {} });
      return heartbeat?.running.length === 0 && heartbeat.kvBlocksUsed === 0 && sessions === 0;
    });

    const stranger = new SessionPeer(client, 'another-model');
    await waitFor('the stranger to be turned away', () => stranger.ended !== undefined);
    expect(stranger.ended?.code).toBe(grpc.status.NOT_FOUND);
    const numbers = heartbeats.map(({ sequenceNumber }) => sequenceNumber);
    expect(numbers).toEqual(numbers.toSorted((a, b) => a - b));
    expect(new Set(heartbeats.map(({ incarnation }) => incarnation)).size).toBe(1);
  });

  it('drains on SIGTERM: finishes running sequences, refuses new ones, exits with 0 on every rank', async () => {
    await startGroup({ MIMO_WORKER_DRAIN_FINISH: '60s', MIMO_WORKER_DRAIN_GRACE: '90s' });
    const session = new SessionPeer(client);
    // It stops where its credit ends, and has not finished when the group is asked to.
    session.submit(1, { sampling: { ...sampling, maxTokens: 400 }, creditTokens: 100 });
    await waitFor('tokens', () => session.tokensOf(1).length > 0);
    for (const rank of ranks) {
      process.kill(rank.pid, 'SIGTERM');
    }
    await waitFor('the group to say so', () => heartbeats.at(-1)?.state === GroupState.DRAINING);
    session.submit(2);
    expect(await session.finished(2)).toMatchObject({ kind: FinishKind.ERROR, errorCode: 'unavailable' });
    session.send({ $case: 'credit', value: { slot: 1, epoch: 1, tokens: 300 } });
    expect(await session.finished(1)).toMatchObject({ kind: FinishKind.LENGTH, completionTokens: 400 });
    expect(session.tokensOf(1)).toHaveLength(400);
    expect(await Promise.all(ranks.map(({ exited }) => exited))).toEqual([
      { code: 0, signal: null },
      { code: 0, signal: null },
    ]);
  });

  it.each([
    ['every rank', [0, 1]],
    ['the leader alone', [0]],
    ['the follower alone', [1]],
  ])(
    'hands over sequences that do not finish in time on SIGTERM to %s, and exits with 0 on every rank',
    async (_, asked) => {
      await startGroup({ MIMO_WORKER_DRAIN_FINISH: '300ms' });
      const session = new SessionPeer(client);
      session.submit(1, { sampling: { ...sampling, maxTokens: 100 } });
      await session.finished(1);
      const endless = { ...sampling, maxTokens: 2_000 };
      // Whatever the machine does, neither gets to its end.
      session.submit(2, { sampling: endless, creditTokens: 1_000 });
      session.submit(3, { sampling: endless, creditTokens: 3 });
      await waitFor('tokens', () => session.tokensOf(2).length > 0 && session.tokensOf(3).length === 3);
      for (const rank of asked) {
        process.kill(ranks[rank]?.pid ?? 0, 'SIGTERM');
      }
      for (const slot of [2, 3]) {
        const finish = await session.finished(slot);
        expect(finish).toMatchObject({ kind: FinishKind.ERROR, errorCode: 'unavailable' });
        const tokens = session.tokensOf(slot);
        expect(finish.completionTokens).toBe(tokens.length);
        expect(finish.draftedTokens).toBeGreaterThan(0);
        const common = Math.min(tokens.length, 100);
        expect(tokens.slice(0, common)).toEqual(session.tokensOf(1).slice(0, common));
      }
      expect(session.tokensOf(2).length).toBeLessThanOrEqual(1_000);
      await waitFor('the group to say so', () => heartbeats.at(-1)?.state === GroupState.DRAINING);
      expect(await Promise.all(ranks.map(({ exited }) => exited))).toEqual([
        { code: 0, signal: null },
        { code: 0, signal: null },
      ]);
    },
  );

  it.each([
    // Its leader says so; nobody is left to say it of the leader.
    ['follower', 1, GroupState.FAILED],
    ['leader', 0, GroupState.READY],
  ])('notices by itself that its %s is gone, also while idle', async (_, killed, lastState) => {
    await startGroup({ MIMO_WORKER_PEER_TIMEOUT: '10m' });
    ranks[killed]?.kill();
    // Not by its silence: the test would be over before.
    expect(await ranks[1 - killed]?.exited).toEqual({ code: 1, signal: null });
    await waitFor('its last word', () => heartbeats.at(-1)?.state === lastState);
  });

  async function loseRank(killed: number): Promise<SessionPeer> {
    await startGroup();
    const session = new SessionPeer(client);
    session.submit(1, { sampling: { ...sampling, maxTokens: 2_000 } });
    await waitFor('tokens', () => session.tokensOf(1).length > 0);
    ranks[killed]?.kill();
    expect(await ranks[1 - killed]?.exited).toEqual({ code: 1, signal: null });
    await waitFor('the session to end', () => session.ended !== undefined);
    return session;
  }

  it('ends on every rank when the follower is killed, and logs why', async () => {
    const session = await loseRank(1);
    expect(session.finishOf(1)).toMatchObject({ kind: FinishKind.ERROR, errorCode: 'aborted' });
    expect(session.ended?.code).toBe(grpc.status.ABORTED);
    await waitFor('the group to say so', () => heartbeats.at(-1)?.state === GroupState.FAILED);
  });

  it('ends on every rank when the leader is killed', async () => {
    const session = await loseRank(0);
    expect(session.ended?.code).toBe(grpc.status.UNAVAILABLE);
  });
});
