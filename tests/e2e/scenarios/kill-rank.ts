// Rank 1 of 2 dies: its group is out of rotation within a second of its last heartbeat, its requests continue in the
// other group, and the group is rebuilt, once.

import { waitFor } from '../../harness/wait-for.ts';
import { modelName } from '../installation.ts';
import { startLoad } from '../load.ts';
import {
  check,
  containerId,
  checkNothingWrong,
  expectedAnswer,
  judge,
  question,
  type Figures,
  type World,
} from '../scenario.ts';

const lanes = 4;
const groups = 2;
const outOfRotationGoalMs = 1000;
/** As long as a second rebuilding would need to show itself. */
const quietMs = 15_000;

export async function killRank(world: World): Promise<Figures> {
  const { cluster, installation, say } = world;
  await installation.applyModelService({
    tensorParallel: 2,
    scaling: { min: groups, max: groups },
    drainSeconds: 5,
  });
  await installation.waitForGroups(groups);
  const load = await startLoad({
    installation,
    signal: world.signal,
    request: question,
    expected: expectedAnswer(world, 2),
    lanes,
  });
  const stopping = new AbortController();
  const over = AbortSignal.any([stopping.signal, world.signal]);
  const seen = new Set<string>();
  const following = followPods(world, seen, over);
  following.catch(() => undefined);
  const [victim] = await installation.workerPods();
  const group = victim?.metadata?.labels?.['mimo-cluster.dev/group'];
  check(victim !== undefined && group !== undefined, 'a worker pod has no label that names its group');

  const watching = watchRotation(world, group, over);
  const node = cluster.nodes.find(({ name }) => name === victim.spec?.nodeName);
  const killedMs = performance.now();
  await node?.killContainer(containerId(victim, 'rank-1'));
  say(`killed rank 1 of ${group}`);
  const { lastHeartbeatMs, outMs } = await watching;
  const outOfRotationMs = outMs - lastHeartbeatMs;
  const outOfRotationGoal = judge(world, 'the way out of rotation from the last heartbeat', {
    elapsedMs: outOfRotationMs,
    goalMs: outOfRotationGoalMs,
  });

  const before = seen.size;
  await waitFor('the dead group to be replaced', () => seen.size > groups, 60_000);
  await installation.waitForGroups(groups);
  const rebuiltMs = performance.now() - killedMs;
  say(`${groups} groups again after ${(rebuiltMs / 1000).toFixed(1)} s`);
  await new Promise((resolve) => {
    setTimeout(resolve, quietMs);
  });
  stopping.abort();
  await following;
  check(
    seen.size === groups + 1,
    `${seen.size - groups} groups were built for one that died (${before} before)`,
  );
  const report = await load.stop();
  checkNothingWrong(report.wrong);
  await installation.deleteModelService();
  return {
    outOfRotationMs: Math.round(outOfRotationMs),
    outOfRotationGoal,
    rebuiltMs: Math.round(rebuiltMs),
    groupsRebuilt: seen.size - groups,
    requests: report.requests,
    wrong: report.wrong.length,
    longestPauseMs: report.longestPauseMs,
  };
}

/** Collects the identity of every worker pod that there ever is. */
async function followPods({ installation }: World, seen: Set<string>, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    for (const { metadata } of await installation.workerPods()) {
      seen.add(metadata?.uid ?? '');
    }
    await new Promise((resolve) => {
      setTimeout(resolve, 200);
    });
  }
}

/** When the group's last heartbeat came, and when the dispatcher first said that it is not routable. */
async function watchRotation(
  { installation }: World,
  group: string,
  signal: AbortSignal,
): Promise<{ readonly lastHeartbeatMs: number; readonly outMs: number }> {
  const { queue } = installation;
  const ended = new AbortController();
  const both = AbortSignal.any([signal, ended.signal]);
  let lastHeartbeatMs = performance.now();
  void (async () => {
    for await (const heartbeat of queue.heartbeats.follow(both)) {
      if (heartbeat.group === group) {
        lastHeartbeatMs = performance.now();
      }
    }
  })();
  for await (const state of queue.queueStates.follow(modelName, both)) {
    const own = state.groups.find((each) => each.group === group);
    if (own?.routable !== true) {
      const outMs = performance.now();
      ended.abort();
      return { lastHeartbeatMs: Math.min(lastHeartbeatMs, outMs), outMs };
    }
  }
  throw new Error('the queue was closed');
}
