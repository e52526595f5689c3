// Real processes whose wall clocks differ by minutes and are set while streams run: no client sees a difference.
// Processes exchange time left, and each uses its monotonic clock.

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import type { ClusterError } from '@mimo/core/process/errors';
import type { QueueState } from '@mimo/core/bus/signals';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { ask, chatRequest, createClient, startTestCluster, type TestCluster } from '../harness/cluster.ts';
import { expectStreams, startStreams, type ExpectedStream } from '../harness/disturbed-streams.ts';
import { startGatewayProcess, type GatewayProcess } from '../harness/gateway-process.ts';
import { createTestClock, type TestClock } from '../harness/set-clock.ts';
import { waitFor } from '../harness/wait-for.ts';

const minuteMs = 60_000;
const question = chatRequest('What is 47 + 85?');
const endless = chatRequest('Count.', { ignoreEos: true });

describe('a cluster of processes whose clocks differ', () => {
  let directory: string;
  let cluster: TestCluster;
  let gateway: TestClock;
  let worker: TestClock;
  let expected: readonly ExpectedStream[];

  const setClocks = (clocks: { readonly gateway: number; readonly worker: number }): Promise<unknown> =>
    Promise.all([
      gateway.set(
        clocks.gateway,
        cluster.parts.gateway.children.map(({ pid }) => pid),
      ),
      worker.set(
        clocks.worker,
        cluster.parts.groups.flatMap(({ children }) => children.map(({ pid }) => pid)),
      ),
    ]);

  beforeAll(async () => {
    directory = await mkdtemp(join(tmpdir(), 'mimo-clocks-'));
    gateway = createTestClock(directory, 'gateway', 5 * minuteMs);
    worker = createTestClock(directory, 'worker', -5 * minuteMs);
    cluster = await startTestCluster({
      gatewayEnv: { ...gateway.env, MIMO_GATEWAY_MAX_WAIT: '120s' },
      workerEnv: { ...worker.env, MIMO_WORKER_MAX_SEQUENCES: '8' },
    });
    expected = await expectStreams(cluster.client, 60);
  });
  afterAll(async () => {
    await cluster.close();
    await rm(directory, { recursive: true });
  });

  const differences = [
    { gateway: 5, worker: -5 },
    { gateway: -5, worker: 5 },
    { gateway: 0, worker: 0.5 },
    { gateway: 0, worker: -5 },
    { gateway: -5, worker: 0 },
    { gateway: 60 * 24, worker: 0 },
  ];
  it.each(differences)(
    'keeps deadlines with the gateway $gateway and the worker $worker minutes ahead',
    async (by) => {
      await setClocks({ gateway: by.gateway * minuteMs, worker: by.worker * minuteMs });
      const answer = await ask(cluster.client, { request: question, timeoutMs: 60_000 });
      expect(answer.text.trim()).toBe('132');
      const beganMs = performance.now();
      const late = await ask(cluster.client, { request: endless, timeoutMs: 500 }).then(
        () => 'finished',
        ({ code }: ClusterError) => code,
      );
      expect(late).toBe('deadline_exceeded');
      expect(performance.now() - beganMs).toBeGreaterThan(499);
      await waitFor('the engine to be free', async () => (await cluster.held()).sequences === 0);
    },
  );

  it('is unaffected when clocks are set while streams run and requests wait', async () => {
    await setClocks({ gateway: 0, worker: 0 });
    // Twice as many as there are slots.
    const first = startStreams(cluster.client, expected);
    await first.begun;
    const second = startStreams(cluster.client, expected);
    for (const [ahead, behind] of [
      [5, -5],
      [-5, 5],
      [-10, -10],
      [10, 10],
      [0, 0],
    ] as const) {
      await setClocks({ gateway: ahead * minuteMs, worker: behind * minuteMs });
    }
    const outcomes = await Promise.all([first.outcome, second.outcome]);
    expect(outcomes.flatMap(({ wrong }) => wrong)).toEqual([]);
    expect(cluster.events).toEqual([]);
    await waitFor('nothing to be held', async () => {
      const { records, sequences } = await cluster.held();
      return records + sequences === 0;
    });
  });

  it('shares its groups with a gateway whose clock is ten minutes apart, which takes over dispatching', async () => {
    await setClocks({ gateway: 5 * minuteMs, worker: 0 });
    const clock = createTestClock(directory, 'other', -5 * minuteMs);
    const other: GatewayProcess = startGatewayProcess({
      ...clock.env,
      MIMO_GATEWAY_LISTEN: '127.0.0.1:0',
      MIMO_GATEWAY_NATS: cluster.parts.natsUrl ?? '',
      MIMO_GATEWAY_MODELS: `${cluster.modelName}=${join(import.meta.dirname, '../../models/mimo-demo')}`,
    });
    const client = createClient(await other.address());
    const states: QueueState[] = [];
    const stop = new AbortController();
    const follow = async (): Promise<void> => {
      for await (const state of cluster.queue.queueStates.follow(cluster.modelName, stop.signal)) {
        states.push(state);
      }
    };
    const following = follow();
    try {
      // Recorded by one, dispatched by the other, more than there are slots: some wait.
      const before = startStreams(client, expected);
      await before.begun;
      const waiting = startStreams(client, expected);
      await waitFor('requests to wait', () => (states.at(-1)?.waitingRequests ?? 0) > 0);
      const firstEpoch = states.at(-1)?.dispatcherEpoch ?? 0;
      cluster.parts.gateway.children[0]?.kill();
      await waitFor('the other to dispatch', () => (states.at(-1)?.dispatcherEpoch ?? 0) > firstEpoch);
      const outcomes = await Promise.all([before.outcome, waiting.outcome]);
      expect(outcomes.flatMap(({ wrong }) => wrong)).toEqual([]);
      const answer = await ask(client, { request: question, timeoutMs: 60_000 });
      expect(answer.text.trim()).toBe('132');
      // As long as the oldest waited, on either clock: far from the ten minutes that they are apart.
      expect(Math.max(...states.map(({ oldestWaitingMs }) => oldestWaitingMs))).toBeLessThan(4 * minuteMs);
      expect(Math.min(...states.map(({ oldestWaitingMs }) => oldestWaitingMs))).toBeGreaterThanOrEqual(0);
    } finally {
      stop.abort();
      await following;
      client.close();
      other.child.kill('SIGKILL');
      await other.exited;
    }
  });

  it('reconnects to its queue although a clock is set back while the server is down', async () => {
    await waitFor('another life of the gateway', () => cluster.parts.gateway.life === 2);
    await cluster.ready();
    await setClocks({ gateway: 5 * minuteMs, worker: 5 * minuteMs });
    const { nats } = cluster.parts;
    const natsPid = nats?.children[0]?.pid ?? 0;
    process.kill(natsPid, 'SIGKILL');
    await setClocks({ gateway: -5 * minuteMs, worker: -5 * minuteMs });
    await waitFor('another nats-server', () => (nats?.life ?? 0) === 2);
    await cluster.ready();
    await waitFor('the gateway to have its queue', async () => {
      const { records } = await cluster.held();
      await ask(cluster.client, { request: question, timeoutMs: 60_000 });
      return records === 0;
    });
    const answer = await ask(cluster.client, { request: question, timeoutMs: 60_000 });
    expect(answer.text.trim()).toBe('132');
  });
});
