// A step that never ends, in a rank whose process still runs: it answers pings and sends heartbeats. The group accepts
// nothing new, ends by itself, and its streams continue in its next incarnation to the text of an undisturbed run. A
// paused process does not blame its step.

import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

import { GroupState } from '@mimo/proto/worker';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { startTestCluster, type TestCluster } from '../harness/cluster.ts';
import { expectStreams, startStreams } from '../harness/disturbed-streams.ts';
import { waitFor } from '../harness/wait-for.ts';

const preload = join(import.meta.dirname, '../harness/hang-step.mjs');
/** A machine that stands still should not be taken for a step that does. */
const stepTimeoutMs = 8_000;
const maxTokens = 400;

let directory: string;
let cluster: TestCluster;

async function start(tensorParallel: number): Promise<void> {
  cluster = await startTestCluster({
    tensorParallel,
    workerEnv: {
      NODE_OPTIONS: `--import=${preload}`,
      MIMO_TEST_HANG: join(directory, 'hang'),
      MIMO_WORKER_STEP_TIMEOUT: `${stepTimeoutMs}ms`,
      // Nobody else notices.
      MIMO_WORKER_PEER_TIMEOUT: '10m',
    },
  });
}

/** The logs of the group's ranks: which of them notices first is open. */
async function readLogs(): Promise<string> {
  const logs = join(cluster.dataDirectory, 'logs');
  const names = (await readdir(logs)).filter((name) => name.startsWith('group-0-'));
  return (await Promise.all(names.map((name) => readFile(join(logs, name), 'utf8')))).join('');
}

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'mimo-hang-'));
});

afterEach(async () => {
  await cluster.close();
  await rm(directory, { recursive: true, force: true });
});

describe('a group whose step never ends', () => {
  it.each([
    [1, 'rank-0 native'],
    [1, 'rank-0 javascript'],
    [2, 'rank-1 native'],
  ])('says so, and is rebuilt: %s ranks, %s', async (tensorParallel, hang) => {
    await start(tensorParallel);
    const states = new Set<GroupState>();
    const following = new AbortController();
    void (async () => {
      for await (const { state } of cluster.queue.heartbeats.follow(following.signal)) {
        states.add(state);
      }
    })();
    const expected = await expectStreams(cluster.client, maxTokens);
    const streams = startStreams(cluster.client, expected);
    await streams.begun;
    await writeFile(join(directory, 'hang'), hang);
    const { wrong, same } = await streams.outcome;
    expect(wrong).toEqual([]);
    expect(same).toBe(expected.length);
    await waitFor('the group to begin another life', () => cluster.parts.groups[0]?.life === 2);
    expect(cluster.events.at(-1)).toMatch(/^group-0 lost rank \d \(exit code 1\): starting it again$/);
    expect(await readLogs()).toMatch(/"rank \d has been in one step for 8 s/);
    expect(states).toContain(GroupState.STALLED);
    expect(states).toContain(GroupState.FAILED);
    following.abort();
  });
});

describe('a group whose process is stopped', () => {
  it('continues when the process resumes', async () => {
    await start(1);
    const expected = await expectStreams(cluster.client, maxTokens);
    const streams = startStreams(cluster.client, expected);
    await streams.begun;
    const pid = cluster.parts.groups[0]?.children[0]?.pid ?? 0;
    process.kill(pid, 'SIGSTOP');
    await sleep(1.5 * stepTimeoutMs);
    process.kill(pid, 'SIGCONT');
    const { wrong, same } = await streams.outcome;
    expect(wrong).toEqual([]);
    expect(same).toBe(expected.length);
    expect(cluster.parts.groups[0]?.life).toBe(1);
    expect(await readLogs()).not.toContain('in one step');
  });
});
