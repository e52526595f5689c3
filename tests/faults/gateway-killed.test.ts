import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { ClusterError } from '@mimo/core/process/errors';

import { ask, chatRequest, startTestCluster, type TestCluster } from '../harness/cluster.ts';
import { waitFor } from '../harness/wait-for.ts';

const streamCount = 30;

describe('a cluster whose gateway is killed while requests run and wait', () => {
  let cluster: TestCluster;
  beforeAll(async () => {
    cluster = await startTestCluster({ workerEnv: { MIMO_WORKER_MAX_SEQUENCES: '8' } });
  });
  afterAll(async () => {
    await cluster.close();
  });

  it("ends every client's stream, frees every sequence, clears its records, and serves again", async () => {
    let running = 0;
    const ends = Array.from({ length: streamCount }, async (_, index) =>
      ask(cluster.client, {
        request: chatRequest(`What is ${index} + 85?`, { ignoreEos: true }),
        onMessage: ({ event }) => {
          running += event?.$case === 'delta' && event.value.index === 0 ? 1 : 0;
        },
      }).then(
        () => 'finished',
        ({ code }: ClusterError) => code,
      ),
    );
    await waitFor('the group to be full', () => running >= 8);
    expect((await cluster.held()).records).toBeGreaterThan(streamCount / 2);
    cluster.parts.gateway.children[0]?.kill();
    const codes = await Promise.all(ends);
    expect(codes.filter((code) => code !== 'unavailable' && code !== 'finished')).toEqual([]);
    expect(codes.filter((code) => code === 'unavailable').length).toBeGreaterThan(streamCount / 2);

    await waitFor('the sequences to be freed', async () => {
      const { sequences, runningRequests, kvBlocks } = await cluster.held();
      return sequences + runningRequests + kvBlocks === 0;
    });
    await waitFor('another life of the gateway', () => cluster.parts.gateway.life === 2);
    await cluster.ready();
    const answer = await ask(cluster.client, { request: chatRequest('What is 47 + 85?') });
    expect(answer.text.trim()).toBe('132');
    await waitFor(
      'the records of the dead gateway to be cleared',
      async () => (await cluster.held()).records === 0,
      60_000,
    );
  });
});
