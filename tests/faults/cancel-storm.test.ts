// A client that opens a stream and cancels it makes an HTTP/2 reset; a plain Node server closes the connection, and
// every stream on it, at some thousand of them. Here the cancels come over the same connection as the streams that
// must live; these are another tenant's, as a proxy mixes them.

import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import * as grpc from '@grpc/grpc-js';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { ClusterError, ErrorCode } from '@mimo/core/process/errors';
import { errorFromStatus } from '@mimo/core/grpc/status';
import type { InferenceServiceClient } from '@mimo/proto/inference';

import { ask, chatRequest, createClient, startTestCluster, type TestCluster } from '../harness/cluster.ts';
import { waitFor } from '../harness/wait-for.ts';

const streamCount = 50;
const burstCancels = 5_000;
/** Of one tenant, until a prompt is read; its requests beyond that are refused, and never begin. */
const maxWaitingPrompts = 4_096;
const sustainedPerSecond = 500;
/** MIMO_STORM_SECONDS=20 runs the whole storm; every change runs a shorter one. */
const sustainedSeconds = Number(process.env['MIMO_STORM_SECONDS'] ?? 4);

/** One stream that runs until it is canceled. */
interface OpenStream {
  /** Its first message has come: the request is recorded. */
  readonly started: Promise<void>;
  /** Undefined: it finished. */
  readonly ended: Promise<ClusterError | undefined>;
  readonly cancel: () => void;
}

/**
 * All were canceled, but for a few that came to their own end before their cancel did, and those that a full queue of
 * prompts refused, with a word on when to come again.
 */
function expectCanceled(ends: readonly (ClusterError | undefined)[], maxRefused: number): void {
  const of = (code: ErrorCode | undefined) => ends.filter((end) => end?.code === code);
  const refused = of('resource_exhausted');
  expect(of('canceled').length + of(undefined).length + refused.length).toBe(ends.length);
  expect(of(undefined).length).toBeLessThan(ends.length / 10);
  expect(refused.length).toBeLessThanOrEqual(maxRefused);
  for (const { message, detail } of refused.map((error) => error!)) {
    expect(message).toContain('too many prompts are waiting');
    expect(detail.retryAfterMs).toBeGreaterThan(0);
  }
}

const keys = { honest: 'honest-key-3c7e5a10', storming: 'storming-key-8d24f6b9' };

function metadataOf(key: string): grpc.Metadata {
  const metadata = new grpc.Metadata();
  metadata.set('authorization', `Bearer ${key}`);
  return metadata;
}

describe('a storm of client cancels', () => {
  let cluster: TestCluster;
  let client: InferenceServiceClient;
  let expected: readonly number[];
  let directory: string;
  const metadata = metadataOf(keys.honest);
  const request = chatRequest('What is 47 + 85?', { ignoreEos: true, maxTokens: 200 });
  beforeAll(async () => {
    directory = await mkdtemp(join(tmpdir(), 'mimo-storm-'));
    const keysFile = join(directory, 'keys.json');
    const entries = Object.entries(keys).map(([tenant, key]) => ({ tenant, key }));
    await writeFile(keysFile, JSON.stringify({ keys: entries }), { mode: 0o600 });
    cluster = await startTestCluster({
      apiKey: keys.honest,
      workerEnv: { MIMO_WORKER_MAX_SEQUENCES: String(streamCount + 10) },
      gatewayEnv: {
        MIMO_GATEWAY_KEYS_FILE: keysFile,
        // The whole burst is open at once, on one connection.
        MIMO_GATEWAY_MAX_STREAMS_PER_CONNECTION: String(burstCancels + 2 * streamCount),
      },
    });
    client = createClient(cluster.parts.gatewayAddress);
    ({ tokenIds: expected } = await ask(client, { request, metadata }));
  });
  afterAll(async () => {
    client.close();
    await cluster.close();
    await rm(directory, { recursive: true });
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
            metadata,
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
    const ended = Promise.withResolvers<ClusterError | undefined>();
    const call = client.chat(chatRequest('What is 47 + 85?', { ignoreEos: true }), metadataOf(keys.storming));
    call.once('data', () => started.resolve());
    call.on('error', (error: grpc.ServiceError) => {
      started.resolve();
      ended.resolve(errorFromStatus(error));
    });
    call.on('end', () => ended.resolve(undefined));
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
    const ends = await Promise.all(storm.map(({ ended }) => ended));
    const { right, wrong } = await streams.stop();
    expect(wrong).toEqual([]);
    expect(right).toBeGreaterThanOrEqual(streamCount);
    expectCanceled(ends, burstCancels - maxWaitingPrompts);
    await expectNothingHeld();
  });

  it(`breaks none of ${streamCount} streams with ${sustainedPerSecond} a second for ${sustainedSeconds} s`, async () => {
    const streams = await keepStreaming();
    const ends: Promise<ClusterError | undefined>[] = [];
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
    const ended = await Promise.all(ends);
    const { right, wrong } = await streams.stop();
    expect(wrong).toEqual([]);
    expect(right).toBeGreaterThanOrEqual(streamCount);
    expectCanceled(ended, 0);
    await expectNothingHeld();
  });
});
