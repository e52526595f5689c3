// A short prompt behind long ones, through the whole cluster: it is assigned to the group although long prompts wait
// there, and gets its first token while most of them are still being read.

import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { callServerStream } from '@mimo/core/grpc/client';
import { InferenceServiceService } from '@mimo/proto/inference';
import { SamplingParams } from '@mimo/proto/sampling';

import { ask, chatRequest, startTestCluster, type TestCluster } from '../harness/cluster.ts';
import { waitFor } from '../harness/wait-for.ts';

const longPrompts = 10;

describe('a short prompt behind long ones', () => {
  let cluster: TestCluster;
  beforeAll(async () => {
    cluster = await startTestCluster();
  });
  afterAll(() => cluster.close());

  it('gets its first token before they are read', async () => {
    let read = 0;
    const readLong = async (): Promise<void> => {
      const request = {
        model: 'mimo-demo',
        input: { $case: 'tokenIds' as const, value: { ids: Array<number>(2_000).fill(17) } },
        sampling: SamplingParams.fromPartial({ temperature: 0, maxTokens: 1 }),
      };
      for await (const { event } of callServerStream(cluster.client, InferenceServiceService.generate, {
        request,
      })) {
        read += event?.$case === 'finish' ? 1 : 0;
      }
    };
    const reading = Array.from({ length: longPrompts }, readLong);
    await waitFor('all of them to be with the group', async () => {
      const { heartbeat } = await cluster.stats(0);
      return read + (heartbeat?.running.length ?? 0) >= longPrompts;
    });
    let readBefore = Number.NaN;
    await ask(cluster.client, {
      request: chatRequest('What is 47 + 85?', { maxTokens: 1 }),
      onMessage: ({ event }) => {
        readBefore = event?.$case === 'delta' ? read : readBefore;
      },
    });
    await Promise.all(reading);
    expect(readBefore).toBeLessThan(longPrompts / 2);
  });
});
