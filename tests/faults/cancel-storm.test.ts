// A client that opens a stream and cancels it makes an HTTP/2 reset; a plain Node server closes the connection, and every
// stream on it, at some thousand of them. Here the cancels come over the same connection as the streams that must live.

import * as grpc from '@grpc/grpc-js';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { InferenceServiceClient } from '@mimo/proto/inference';

import { ask, chatRequest, createClient, startTestCluster, type TestCluster } from '../harness/cluster.ts';
import { waitFor } from '../harness/wait-for.ts';

const streamCount = 50;
const burstCancels = 5_000;
const sustainedPerSecond = 500;
/** MIMO_STORM_SECONDS=20 runs the whole storm; every change runs a shorter one. */
const sustainedSeconds = Number(process.env['MIMO_STORM_SECONDS'] ?? 4);

/** One stream that runs until it is canceled. */
interface OpenStream {
  /** Its first message has come: the request is recorded. */
  readonly started: Promise<void>;
  readonly ended: Promise<grpc.status>;
  readonly cancel: () => void;
}

/** A few may have come to their own end before their cancel did. */
function expectCanceled(codes: readonly grpc.status[]): void {
  const canceled = codes.filter((code) => code === grpc.status.CANCELLED).length;
  const finished = codes.filter((code) => code === grpc.status.OK).length;
  expect(canceled + finished).toBe(codes.length);
  expect(finished).toBeLessThan(codes.length / 10);
}

describe('a storm of client cancels', () => {
  let cluster: TestCluster;
  let client: InferenceServiceClient;
  let expected: readonly number[];
  const request = chatRequest('What is 47 + 85?', { ignoreEos: true, maxTokens: 200 });
  beforeAll(async () => {
    cluster = await startTestCluster({
      workerEnv: { MIMO_WORKER_MAX_SEQUENCES: String(streamCount + 10) },
      // The whole burst is open at once, on one connection.
      gatewayEnv: { MIMO_GATEWAY_MAX_STREAMS_PER_CONNECTION: String(burstCancels + 2 * streamCount) },
    });
    client = createClient(cluster.parts.gatewayAddress);
    ({ tokenIds: expected } = await ask(client, { request }));
  });
  afterAll(async () => {
    client.close();
    await cluster.close();
  });

  /** Keeps streams running, one after another in each of `streamCount` lanes, until stopped; resolves when all run. */
  async function keepStreaming() {
    const stopping = new AbortController();
    const wrong: string[] = [];
    let right = 0;
    const begun: Promise<void>[] = [];
    const lanes = Array.from({ length: streamCount }, async (_, lane) => {
      const { promise, resolve } = Promise.withResolvers<void>();
      begun.push(promise);
      for (let round = 0; !stopping.signal.aborted; round++) {
        try {
          const { tokenIds } = await ask(client, {
            request,
            onMessage: ({ event }) => event?.$case === 'delta' && resolve(),
          });
          right += 1;
          if (tokenIds.join() !== expected.join()) {
            wrong.push(`lane ${lane}, round ${round}: other tokens`);
          }
        } catch (error) {
          wrong.push(`lane ${lane}, round ${round}: ${String(error)}`);
          resolve();
        }
      }
    });
    await Promise.all(begun);
    return {
      stop: async () => {
        stopping.abort();
        await Promise.all(lanes);
        return { right, wrong };
      },
    };
  }

  function open(): OpenStream {
    const started = Promise.withResolvers<void>();
    const ended = Promise.withResolvers<grpc.status>();
    const call = client.chat(chatRequest('What is 47 + 85?', { ignoreEos: true }));
    call.once('data', () => started.resolve());
    call.on('error', (error: grpc.ServiceError) => {
      started.resolve();
      ended.resolve(error.code);
    });
    call.on('end', () => ended.resolve(grpc.status.OK));
    call.resume();
    return { started: started.promise, ended: ended.promise, cancel: () => call.cancel() };
  }

  async function expectNothingHeld(): Promise<void> {
    await waitFor(
      'everything to be let go of',
      async () => Object.values(await cluster.held()).every((count) => count === 0),
      60_000,
    );
  }

  it(`breaks none of ${streamCount} streams with a burst of ${burstCancels}`, async () => {
    const streams = await keepStreaming();
    const storm = Array.from({ length: burstCancels }, open);
    await Promise.all(storm.map(({ started }) => started));
    for (const stream of storm) {
      stream.cancel();
    }
    const codes = await Promise.all(storm.map(({ ended }) => ended));
    const { right, wrong } = await streams.stop();
    expect(wrong).toEqual([]);
    expect(right).toBeGreaterThanOrEqual(streamCount);
    expectCanceled(codes);
    await expectNothingHeld();
  });

  it(`breaks none of ${streamCount} streams with ${sustainedPerSecond} a second for ${sustainedSeconds} s`, async () => {
    const streams = await keepStreaming();
    const ends: Promise<grpc.status>[] = [];
    const begin = performance.now();
    const total = sustainedPerSecond * sustainedSeconds;
    while (ends.length < total) {
      const due = Math.min(total, ((performance.now() - begin) / 1000) * sustainedPerSecond);
      while (ends.length < due) {
        const stream = open();
        ends.push(stream.ended);
        if (ends.length % 10 === 0) {
          void stream.started.then(stream.cancel);
        } else {
          // The next turn: the request is on its way by then, so that the cancel is a reset and not a call never made.
          setImmediate(stream.cancel);
        }
      }
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
    const codes = await Promise.all(ends);
    const { right, wrong } = await streams.stop();
    expect(wrong).toEqual([]);
    expect(right).toBeGreaterThanOrEqual(streamCount);
    expectCanceled(codes);
    await expectNothingHeld();
  });
});
