// Clients that do not read: from the first byte, after some tokens, a byte at a time, forever. None of them keeps a
// slot from a client that reads, and once they read they get the same text.

import { constants } from 'node:http2';

import * as grpc from '@grpc/grpc-js';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';

import { SamplingParams } from '@mimo/proto/sampling';

import {
  ask,
  chatRequest,
  createClient,
  startTestCluster,
  type Answer,
  type TestCluster,
} from '../harness/cluster.ts';
import { openSlowReader, tokenIdsOf, type SlowReader } from '../harness/slow-reader.ts';
import { waitFor } from '../harness/wait-for.ts';

const slots = 16;
/** Drafts, penalties and a seed: nothing of a sequence's state may be lost when it is parked. */
const long = chatRequest('What is 47 + 85?', {
  ignoreEos: true,
  maxTokens: 400,
  temperature: 0.9,
  topP: 0.95,
  seed: 11,
  repetitionPenalty: 1.1,
  presencePenalty: 0.3,
  frequencyPenalty: 0.1,
});
const short = chatRequest('What is 47 + 85?', { maxTokens: 20 });

const readers: SlowReader[] = [];

function openTo(cluster: TestCluster, options: Parameters<typeof openSlowReader>[1]): SlowReader {
  const reader = openSlowReader(cluster.parts.gatewayAddress, options);
  readers.push(reader);
  return reader;
}

function closeReaders(): void {
  readers.splice(0).forEach((reader) => reader.close());
}

describe('clients that do not read', () => {
  let cluster: TestCluster;
  let expected: readonly number[];
  const open = (options: Parameters<typeof openSlowReader>[1]): SlowReader => openTo(cluster, options);
  beforeAll(async () => {
    cluster = await startTestCluster({
      workerEnv: { MIMO_WORKER_MAX_SEQUENCES: String(slots), MIMO_WORKER_PARK_AFTER: '300ms' },
      gatewayEnv: { MIMO_GATEWAY_CLIENT_STALL: '20s' },
    });
    ({ tokenIds: expected } = await ask(cluster.client, { request: long }));
  });
  afterEach(async () => {
    closeReaders();
    await waitFor(
      'everything to be let go of',
      async () => Object.values(await cluster.held()).every((count) => count === 0),
      60_000,
    );
  });
  afterAll(() => cluster.close());

  it('get no slot before they read the first byte, however many they are, and their text once they do', async () => {
    const reader = open({ windowBytes: 0 });
    const streams = Array.from({ length: 40 }, () => reader.chat(long));
    await waitFor('all to be recorded', async () => (await cluster.held()).records === streams.length);
    const { tokenIds } = await ask(cluster.client, { request: short });
    expect(tokenIds.length).toBeGreaterThan(0);
    expect((await cluster.held()).runningRequests).toBe(0);
    reader.readOn(1_000_000);
    for (const stream of streams) {
      expect(await stream.ended).toMatchObject({ status: grpc.status.OK });
      expect(tokenIdsOf(stream.messages())).toEqual(expected);
    }
  });

  it('lose their slots when they stop in the middle, and get the same text when they read again', async () => {
    const reader = open({ windowBytes: 600 });
    const streams = Array.from({ length: slots }, () => reader.chat(long));
    await waitFor('every slot to be held by one without credit', async () => {
      const { heartbeat } = await cluster.stats(0);
      return heartbeat?.runningSequences === slots && heartbeat.parkableSequences === slots;
    });
    const answers = await Promise.all(
      Array.from({ length: slots }, () => ask(cluster.client, { request: short })),
    );
    expect(answers).toHaveLength(slots);
    expect((await cluster.held()).runningRequests, 'those that were needed are gone').toBeLessThan(slots);
    reader.readOn(1_000_000);
    for (const stream of streams) {
      expect(await stream.ended).toMatchObject({ status: grpc.status.OK });
      expect(tokenIdsOf(stream.messages())).toEqual(expected);
    }
  });

  it('keep their slots while no other request waits', async () => {
    const reader = open({ windowBytes: 600 });
    const streams = [reader.chat(long), reader.chat(long)];
    await waitFor('both to be without credit', async () => {
      return (await cluster.stats(0)).heartbeat?.parkableSequences === 2;
    });
    await ask(cluster.client, { request: short });
    expect((await cluster.stats(0)).heartbeat?.runningSequences).toBe(2);
    reader.readOn(1_000_000);
    for (const stream of streams) {
      expect(await stream.ended).toMatchObject({ status: grpc.status.OK });
      expect(tokenIdsOf(stream.messages())).toEqual(expected);
    }
  });

  it('get the whole text when they read a byte at a time', async () => {
    const stream = open({ windowBytes: 1, reads: true }).chat(long);
    await ask(cluster.client, { request: short });
    expect(await stream.ended).toMatchObject({ status: grpc.status.OK });
    expect(tokenIdsOf(stream.messages())).toEqual(expected);
  });
});

describe('clients that never read again', () => {
  let cluster: TestCluster;
  beforeAll(async () => {
    cluster = await startTestCluster({
      gatewayEnv: { MIMO_GATEWAY_CLIENT_STALL: '2s', MIMO_GATEWAY_MAX_REQUESTS: '20' },
    });
  });
  afterEach(closeReaders);
  afterAll(() => cluster.close());

  it('lose their streams with a status that says why, or with a reset if they do not read the status', async () => {
    const never = openTo(cluster, { windowBytes: 0 });
    const late = openTo(cluster, { windowBytes: 600 });
    const [first, second] = [never.chat(long), late.chat(long)];
    await waitFor('both to be recorded', async () => (await cluster.held()).records === 2);
    await waitFor('both to be given up', async () => (await cluster.held()).records === 0);
    late.readOn(1_000_000);
    expect(await second.ended).toMatchObject({
      status: grpc.status.DEADLINE_EXCEEDED,
      message: 'the client read nothing for 2000 ms (MIMO_GATEWAY_CLIENT_STALL)',
    });
    expect(tokenIdsOf(second.messages()).length).toBeGreaterThan(0);
    expect(await first.ended).toMatchObject({
      status: undefined,
      resetCode: constants.NGHTTP2_ENHANCE_YOUR_CALM,
    });
  });

  it('lose their streams on a half-open connection too, which returns nothing, not even a reset', async () => {
    const reader = openTo(cluster, { windowBytes: 1_000_000 });
    const wordy = { ...long, sampling: SamplingParams.fromPartial({ ...long.sampling, logprobs: 20 }) };
    Array.from({ length: 16 }, () => reader.chat(wordy));
    await waitFor('all to be recorded', async () => (await cluster.held()).records === 16);
    reader.freeze();
    const { tokenIds } = await ask(cluster.client, { request: short });
    expect(tokenIds.length).toBeGreaterThan(0);
    await waitFor('all to be given up', async () => (await cluster.held()).records === 0, 60_000);
  });

  it('give way to new requests in a full gateway', async () => {
    const reader = openTo(cluster, { windowBytes: 0 });
    const client = createClient(cluster.parts.gatewayAddress);
    Array.from({ length: 20 }, () => reader.chat(long));
    await waitFor('the gateway to be full', async () => (await cluster.held()).records === 20);
    const answers: Answer[] = [];
    await waitFor('one to give way', async () => {
      answers.push(
        ...(await ask(client, { request: short }).then(
          (answer) => [answer],
          () => [],
        )),
      );
      return answers.length > 0;
    });
    expect(answers[0]?.tokenIds.length).toBeGreaterThan(0);
    client.close();
  });
});
