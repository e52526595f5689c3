// Streams while groups drain, are killed again and again, or stall until their streams move and then resume: a client
// sees only a pause. MIMO_DRAINS and MIMO_KILL_SECONDS run the loops for longer; every change runs short ones.

import { setTimeout as sleep } from 'node:timers/promises';

import type { QueueState } from '@mimo/core/bus/signals';
import { afterEach, describe, expect, it } from 'vitest';

import { freeAddresses } from '../../cli/src/local/free-ports.ts';
import { ask, chatRequest, startTestCluster, type TestCluster } from '../harness/cluster.ts';
import { expectStreams, keepStreaming, startStreams } from '../harness/disturbed-streams.ts';
import { waitFor } from '../harness/wait-for.ts';

const drains = Number(process.env['MIMO_DRAINS'] ?? 6);
const killSeconds = Number(process.env['MIMO_KILL_SECONDS'] ?? 15);
/** Of two groups in turn: the local supervisor gives a group up whose lives are shorter than 10 s again and again. */
const killEveryMs = 7_000;
const slackMs = 120_000;

let cluster: TestCluster;
const following = { stop: new AbortController(), states: [] as QueueState[] };

afterEach(async () => {
  following.stop.abort();
  await cluster.close();
});

/** Starts a cluster, and follows the state of its queue. */
async function start(options: Parameters<typeof startTestCluster>[0]): Promise<void> {
  const [metricsAddress = ''] = await freeAddresses(1);
  cluster = await startTestCluster({
    ...options,
    gatewayEnv: { MIMO_GATEWAY_METRICS_LISTEN: metricsAddress },
  });
  following.stop = new AbortController();
  following.states.length = 0;
  void (async () => {
    for await (const state of cluster.queue.queueStates.follow(cluster.modelName, following.stop.signal)) {
      following.states.push(state);
    }
  })();
  movesOf = async () => {
    const page = await (await fetch(`http://${metricsAddress}/metrics`)).text();
    const lines = page.split('\n').filter((line) => line.startsWith('gateway_moves_total{'));
    const sum = (cause: string): number =>
      lines
        .filter((line) => line.includes(`cause="${cause}"`))
        .reduce((total, line) => total + Number(line.split(' ').at(-1)), 0);
    return { broken: sum('broken'), handedOver: sum('handed over') };
  };
}

/** Streams with tokens delivered that were moved, by why. */
let movesOf: () => Promise<{ readonly broken: number; readonly handedOver: number }>;

const groupState = (group: string): QueueState['groups'][number] | undefined =>
  following.states.at(-1)?.groups.find((each) => each.group === group);

async function expectNothingHeld(): Promise<void> {
  await waitFor(
    'everything to be let go of',
    async () => Object.values(await cluster.held()).every((count) => count === 0),
    60_000,
  );
}

describe('streams', () => {
  it(
    `are unaffected by ${drains} groups that drain under them, one after another`,
    async () => {
      // Shorter than the streams, so that most of what runs is handed over.
      await start({ groups: 2, tensorParallel: 1, workerEnv: { MIMO_WORKER_DRAIN_FINISH: '20ms' } });
      const { queue, modelName } = cluster;
      const expected = await expectStreams(cluster.client, 1_200);
      const streams = keepStreaming(cluster.client, expected);
      for (let drain = 0; drain < drains; drain += 1) {
        const group = `group-${drain % 2}`;
        const supervisor = cluster.parts.groups[drain % 2];
        const { incarnation } = groupState(group) ?? {};
        const life = supervisor?.life ?? 0;
        // Every third is evicted: the signal comes without a mark, while it computes.
        const evicted = drain % 3 === 2;
        if (!evicted) {
          await queue.drainMarks.mark(modelName, group, { sinceUnixMs: Date.now() });
          await waitFor('the mark to be seen', () => groupState(group)?.draining === true);
        }
        for (const child of supervisor?.children ?? []) {
          process.kill(child.pid, 'SIGTERM');
        }
        await waitFor('the next life', () => (supervisor?.life ?? 0) > life);
        await waitFor('its heartbeats', () => groupState(group)?.incarnation !== incarnation);
        await queue.drainMarks.clear(modelName, group);
        await waitFor('the group to be routable', () => {
          const state = groupState(group);
          return state?.routable === true && !state.draining && state.inFlightRequests > 0;
        });
      }
      const moves = await movesOf();
      const { same, wrong, longestPauseMs } = await streams.stop();
      console.log(
        `${drains} drains: ${same} streams unharmed, ${wrong.length} harmed, ${moves.handedOver} handed over, ` +
          `${moves.broken} broken, longest pause ${Math.round(longestPauseMs)} ms`,
      );
      expect(wrong).toEqual([]);
      expect(same).toBeGreaterThanOrEqual(expected.length);
      // How many are still running when the signal comes is up to the machine.
      expect(moves.handedOver).toBeGreaterThan(0);
      // A leader that the machine itself holds up for three seconds is given up, which is not the drains' doing.
      expect(moves.broken).toBeLessThan(moves.handedOver);
      const ends = cluster.events.filter((event) => event.includes('lost'));
      expect(ends).toHaveLength(drains);
      expect(ends.every((event) => event.includes('(exit code 0)'))).toBe(true);
      await expectNothingHeld();
    },
    slackMs + drains * 15_000,
  );

  it(
    `survive a rank killed every ${killEveryMs / 1000} s for ${killSeconds} s, follower and leader in turn`,
    async () => {
      await start({ groups: 2, tensorParallel: 2 });
      const expected = await expectStreams(cluster.client, 400);
      const streams = keepStreaming(cluster.client, expected);
      const endMs = performance.now() + killSeconds * 1_000;
      let kills = 0;
      while (performance.now() < endMs) {
        await sleep(killEveryMs);
        const ranks = cluster.parts.groups[kills % 2]?.children ?? [];
        ranks[1 - (Math.floor(kills / 2) % 2)]?.kill();
        kills += 1;
      }
      const { same, wrong, longestPauseMs } = await Promise.race([streams.stop(), cluster.parts.givenUp]);
      const moves = await movesOf();
      console.log(
        `${kills} kills: ${same} streams unharmed, ${wrong.length} harmed, ${moves.broken} moved, ` +
          `longest pause ${Math.round(longestPauseMs)} ms`,
      );
      expect(wrong).toEqual([]);
      expect(moves.broken).toBeGreaterThan(0);
      await cluster.ready();
      await expectNothingHeld();
    },
    slackMs + killSeconds * 3_000,
  );

  it('get nothing from a stalled leader that resumes after they have moved', async () => {
    await start({ groups: 2, tensorParallel: 1 });
    // Long ones: some must still run when the signal comes.
    const expected = await expectStreams(cluster.client, 1_500);
    await waitFor('both to be known', () =>
      ['group-0', 'group-1'].every((each) => groupState(each)?.routable === true),
    );
    const streams = startStreams(cluster.client, expected);
    await streams.begun;
    const running = await Promise.all(
      [0, 1].map(async (group) => (await cluster.stats(group)).heartbeat?.running.length ?? 0),
    );
    const index = running[0] === Math.max(...running) ? 0 : 1;
    const group = `group-${index}`;
    const leader = cluster.parts.groups[index]?.children[0]?.pid ?? 0;
    const { incarnation } = groupState(group) ?? {};
    process.kill(leader, 'SIGSTOP');
    const stoppedMs = performance.now();
    await waitFor('it to be out of rotation', () => groupState(group)?.routable !== true);
    console.log(`out of rotation ${Math.round(performance.now() - stoppedMs)} ms after the stop`);
    // Whatever is asked meanwhile goes to the other one.
    const answer = await ask(cluster.client, { request: chatRequest('What is 47 + 85?') });
    expect(answer.text.trim()).toBe('132');
    // All at once, with their session.
    await waitFor('its streams to be moved', async () => (await movesOf()).broken > 0);
    process.kill(leader, 'SIGCONT');
    const { wrong, same } = await streams.outcome;
    expect(wrong).toEqual([]);
    expect(same).toBe(expected.length);
    await waitFor('the same life to be back', () => groupState(group)?.routable === true);
    expect(groupState(group)?.incarnation).toBe(incarnation);
    await expectNothingHeld();
  });
});
