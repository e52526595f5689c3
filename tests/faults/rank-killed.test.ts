// A group that loses a rank while streams run: every stream continues from its delivered tokens to the text of an
// undisturbed run, in a second group if there is one, else in the same group once it is back. Nothing is left behind.

import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { ask, chatRequest, socketCount, startTestCluster, type TestCluster } from '../harness/cluster.ts';
import { expectStreams, startStreams, type ExpectedStream } from '../harness/disturbed-streams.ts';
import { isAlive, waitFor } from '../harness/wait-for.ts';

/** For the rank that stalls; the others should not mistake a paused machine for a stalled rank. */
const peerTimeoutMs = 8_000;
/** More than is made before the signal comes. */
const maxTokens = 1_000;

describe.each([
  ['the only group, which comes back', 1],
  ['one group of two', 2],
])('%s, losing a rank while streams run', (_, groupCount) => {
  let cluster: TestCluster;
  let expected: readonly ExpectedStream[];
  beforeAll(async () => {
    cluster = await startTestCluster({
      groups: groupCount,
      workerEnv: { MIMO_WORKER_PEER_TIMEOUT: `${peerTimeoutMs}ms` },
    });
    expected = await expectStreams(cluster.client, maxTokens);
  });
  afterAll(async () => {
    await cluster.close();
  });

  const gatewayPid = (): number => cluster.parts.gateway.children[0]?.pid ?? 0;
  const rankPids = (): number[] => cluster.parts.groups[0]?.children.map(({ pid }) => pid) ?? [];

  it.each([
    ['a follower is killed', 1, 'SIGKILL'],
    ['the leader is killed', 0, 'SIGKILL'],
    ['a follower stalls', 1, 'SIGSTOP'],
  ] as const)('loses, repeats and changes no token when %s', async (__, rank, signal) => {
    await ask(cluster.client, { request: chatRequest('What is 47 + 85?') });
    const socketsBefore = await socketCount(gatewayPid());
    const livesBefore = cluster.parts.groups[0]?.life ?? 0;
    const before = rankPids();

    const streams = startStreams(cluster.client, expected);
    await streams.begun;
    expect((await cluster.stats(0)).heartbeat?.running.length).toBeGreaterThan(0);
    process.kill(before[rank] ?? 0, signal);
    const { wrong, same } = await streams.outcome;
    expect(wrong).toEqual([]);
    expect(same).toBe(expected.length);

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
    expect(cluster.parts.groups[0]?.life).toBe(livesBefore + 1);
    const lastEvent = cluster.events.at(-1) ?? '';
    expect(lastEvent).toMatch(/^group-0 lost rank \d \((SIGKILL|exit code 1)\): starting it again$/);
  });
});
