// Processes that get no processor time for longer than the timeout of any ping, theirs or their peers': a client's
// streams pause and are not lost. SIGSTOP simulates a machine that is busy with something else.

import { fork } from 'node:child_process';
import { once } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';

import type { ClusterError } from '@mimo/core/process/errors';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { ask, chatRequest, createClient, startTestCluster, type TestCluster } from '../harness/cluster.ts';
import { expectStreams, startStreams } from '../harness/disturbed-streams.ts';
import type { ClientReport } from '../harness/starved-client.ts';

/** The client's next ping comes 10 s after the last; grpc-js itself gives up 5 s after that where it is asked to. */
const stoppedMs = 16_000;
/** As a client that makes thousands of calls in one turn stands still beside fifty busy processes. */
const clientStoppedMs = 100_000;

describe('a cluster whose gateway is starved', () => {
  let cluster: TestCluster;
  beforeAll(async () => {
    cluster = await startTestCluster();
  });
  afterAll(() => cluster.close());

  it(`keeps every stream when it is stopped for ${stoppedMs / 1000} s`, async () => {
    const client = createClient(cluster.parts.gatewayAddress);
    const expected = await expectStreams(client, 400);
    const { begun, outcome } = startStreams(client, expected);
    await begun;
    const pid = cluster.parts.gateway.children[0]?.pid ?? 0;
    process.kill(pid, 'SIGSTOP');
    await sleep(stoppedMs);
    process.kill(pid, 'SIGCONT');
    const { same, wrong, longestPauseMs } = await outcome;
    expect(wrong).toEqual([]);
    expect(same).toBe(expected.length);
    expect(longestPauseMs).toBeGreaterThan(stoppedMs / 2);
    client.close();
  });

  it('is reported as lost when it never resumes', async () => {
    const client = createClient(cluster.parts.gatewayAddress);
    const pid = cluster.parts.gateway.children[0]?.pid ?? 0;
    const ended = ask(client, {
      request: chatRequest('Count.', { ignoreEos: true }),
      onMessage: ({ event }) => event?.$case === 'started' && process.kill(pid, 'SIGSTOP'),
    }).then(
      () => 'finished',
      ({ code }: ClusterError) => code,
    );
    expect(await ended).toBe('unavailable');
    cluster.parts.gateway.children[0]?.kill();
    client.close();
  });
});

describe('a client that is starved', () => {
  let cluster: TestCluster;
  beforeAll(async () => {
    cluster = await startTestCluster();
  });
  afterAll(() => cluster.close());

  it(`keeps every stream when it is stopped for ${clientStoppedMs / 1000} s amid a burst of cancels`, async () => {
    const script = new URL('../harness/starved-client.ts', import.meta.url);
    const child = fork(script, [cluster.parts.gatewayAddress]);
    const exited = once(child, 'exit');
    const nextReport = async (): Promise<ClientReport> =>
      (await Promise.race([once(child, 'message'), exited]))[0];
    try {
      expect(await nextReport()).toEqual({ kind: 'open' });
      child.kill('SIGSTOP');
      await sleep(clientStoppedMs);
      child.kill('SIGCONT');
      const ended = nextReport();
      child.send('cancel');
      expect(await ended).toMatchObject({ outcome: { same: 8, wrong: [] }, canceled: 500 });
    } finally {
      child.kill('SIGKILL');
    }
  });
});
