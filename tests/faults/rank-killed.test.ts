import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { ClusterError } from '@mimo/core/errors';

import { ask, chatRequest, socketCount, startTestCluster, type TestCluster } from '../harness/cluster.ts';
import { isAlive, waitFor } from '../harness/wait-for.ts';

const streamCount = 8;
const peerTimeoutMs = 3_000;

describe('a group that loses a rank while streams run', () => {
  let cluster: TestCluster;
  beforeAll(async () => {
    cluster = await startTestCluster({ workerEnv: { MIMO_WORKER_PEER_TIMEOUT: `${peerTimeoutMs}ms` } });
  });
  afterAll(async () => {
    await cluster.close();
  });

  const gatewayPid = (): number => cluster.parts.gateway.children[0]?.pid ?? 0;
  const rankPids = (): number[] => cluster.parts.groups[0]?.children.map(({ pid }) => pid) ?? [];

  /** Starts streams that would run long, waits until each has had tokens, and gives how each of them ends. */
  async function startStreams(): Promise<Promise<string>[]> {
    const begun: Promise<void>[] = [];
    const ends = Array.from({ length: streamCount }, async (_, index) => {
      const { promise, resolve } = Promise.withResolvers<void>();
      begun.push(promise);
      let tokens = 0;
      try {
        await ask(cluster.client, {
          request: chatRequest(`What is ${index} + 85?`, { ignoreEos: true, temperature: 1 }),
          onMessage: ({ event }) => {
            tokens += event?.$case === 'delta' ? event.value.tokenIds.length : 0;
            if (tokens >= 10) {
              resolve();
            }
          },
        });
        return 'finished';
      } catch (error) {
        return ClusterError.from(error).code;
      }
    });
    await Promise.all(begun);
    return ends;
  }

  it.each([
    ['a follower is killed', 1, 'SIGKILL'],
    ['the leader is killed', 0, 'SIGKILL'],
    ['a follower stalls', 1, 'SIGSTOP'],
  ] as const)('tells every client, recovers and holds nothing when %s', async (_, rank, signal) => {
    await ask(cluster.client, { request: chatRequest('What is 47 + 85?') });
    const socketsBefore = await socketCount(gatewayPid());
    const livesBefore = cluster.parts.groups[0]?.life ?? 0;
    const before = rankPids();

    const ends = await startStreams();
    expect((await cluster.stats(0)).heartbeat?.running).toHaveLength(streamCount);
    process.kill(before[rank] ?? 0, signal);
    const outcomes = await Promise.all(ends);
    for (const code of outcomes) {
      expect(['aborted', 'unavailable']).toContain(code);
    }

    await waitFor(
      'the group to begin another life',
      () => (cluster.parts.groups[0]?.life ?? 0) > livesBefore,
    );
    await cluster.ready();
    const answer = await ask(cluster.client, { request: chatRequest('What is 47 + 85?') });
    expect(answer.text.trim()).toBe('132');

    await waitFor('everything to be let go of', async () => {
      const held = await cluster.held();
      const sockets = await socketCount(gatewayPid());
      return Object.values(held).every((count) => count === 0) && sockets === socketsBefore;
    });
    expect(before.map(isAlive)).toEqual([false, false]);
    expect(rankPids().map(isAlive)).toEqual([true, true]);
    const lastEvent = cluster.events.at(-1) ?? '';
    expect(lastEvent).toMatch(/^group-0 lost rank \d \((SIGKILL|exit code 1)\): starting it again$/);
  });
});
