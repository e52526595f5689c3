// A step that never ends, in a rank whose process goes on: it answers pings and sends heartbeats. The group takes nothing
// new, ends by itself, and its streams go on in its next life to the text of an undisturbed run.

import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { GroupState } from '@mimo/proto/worker';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { startTestCluster, type TestCluster } from '../harness/cluster.ts';
import { expectStreams, startStreams } from '../harness/disturbed-streams.ts';
import { waitFor } from '../harness/wait-for.ts';

const preload = join(import.meta.dirname, '../harness/hang-step.mjs');
/** A machine that stands still should not be taken for a step that does. */
const stepTimeoutMs = 8_000;

describe.each([
  ['a group of one', 1, 'rank-0 native'],
  ['a group of one', 1, 'rank-0 javascript'],
  ['a follower', 2, 'rank-1 native'],
])('%s whose step never ends', (_, tensorParallel, hang) => {
  let directory: string;
  let cluster: TestCluster;
  beforeEach(async () => {
    directory = await mkdtemp(join(tmpdir(), 'mimo-hang-'));
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
  });
  afterEach(async () => {
    await cluster.close();
    await rm(directory, { recursive: true, force: true });
  });

  it(`says so, and is rebuilt (${hang})`, async () => {
    const states = new Set<GroupState>();
    const following = new AbortController();
    void (async () => {
      for await (const { state } of cluster.queue.followHeartbeats(following.signal)) {
        states.add(state);
      }
    })();
    const expected = await expectStreams(cluster.client, 400);
    const streams = startStreams(cluster.client, expected);
    await streams.begun;
    await writeFile(join(directory, 'hang'), hang);
    const { wrong, same } = await streams.outcome;
    expect(wrong).toEqual([]);
    expect(same).toBe(expected.length);
    await waitFor('the group to begin another life', () => cluster.parts.groups[0]?.life === 2);
    expect(cluster.events.at(-1)).toMatch(/^group-0 lost rank \d \(exit code 1\): starting it again$/);
    const log = await readFile(join(cluster.dataDirectory, 'logs', 'group-0-rank-0.log'), 'utf8');
    expect(log).toMatch(/"rank \d has been in one step for 8 s/);
    expect(states).toContain(GroupState.STALLED);
    expect(states).toContain(GroupState.FAILED);
    following.abort();
  });
});
