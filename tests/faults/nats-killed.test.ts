import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import type { ClusterError } from '@mimo/core/process/errors';

import { ask, chatRequest, startTestCluster, type Answer, type TestCluster } from '../harness/cluster.ts';
import { waitFor } from '../harness/wait-for.ts';

const streamCount = 8;

describe('a cluster whose nats-server is killed while streams run', () => {
  let cluster: TestCluster;
  beforeAll(async () => {
    cluster = await startTestCluster();
  });
  afterAll(async () => {
    await cluster.close();
  });

  it('finishes every running stream, serves again once the server is back, and leaks nothing', async () => {
    const begun: Promise<void>[] = [];
    const streams = Array.from({ length: streamCount }, async (_, index): Promise<Answer> => {
      const { promise, resolve } = Promise.withResolvers<void>();
      begun.push(promise);
      return ask(cluster.client, {
        request: chatRequest(`What is ${index} + 85?`, { ignoreEos: true, maxTokens: 600 }),
        onMessage: ({ event }) => event?.$case === 'delta' && resolve(),
      });
    });
    await Promise.all(begun);
    cluster.parts.nats?.children[0]?.kill();
    for (const { tokenIds } of await Promise.all(streams)) {
      expect(tokenIds).toHaveLength(600);
    }

    await waitFor('another life of the server', () => cluster.parts.nats?.life === 2);
    await cluster.ready();
    const answers: string[] = [];
    await waitFor('an answer', async () => {
      const answer = ask(cluster.client, { request: chatRequest('What is 47 + 85?') });
      answers.push(
        await answer.then(
          ({ text }) => text.trim(),
          ({ code }: ClusterError) => code,
        ),
      );
      return answers.at(-1) !== 'unavailable';
    });
    expect(answers.at(-1)).toBe('132');
    await waitFor('everything to be let go of', async () =>
      Object.values(await cluster.held()).every((count) => count === 0),
    );
    expect(cluster.events).toEqual(['the queue lost nats-server (SIGKILL): starting it again']);
  });
});
