// Groups that come and go under streaming load: scale-downs and rolling upgrades, over and over. Clients see no error,
// no repeated or missing index, and the text of an undisturbed run.

import { startLoad } from '../load.ts';
import {
  check,
  checkNothingWrong,
  expectedAnswer,
  oneRank,
  question,
  type Figures,
  type World,
} from '../scenario.ts';

const lanes = 4;
const mostGroups = 3;
/** Shorter than a stream lasts under this load: what is left at its end moves to another group. */
const drainSeconds = 1;

const fixed = (count: number): Readonly<Record<string, unknown>> => ({ scaling: { min: count, max: count } });

export async function lifecycle(world: World): Promise<Figures> {
  const { installation, say, scaleDowns, rollouts } = world;
  await installation.applyModelService({ ...oneRank, ...fixed(mostGroups), drainSeconds });
  await installation.waitForGroups(mostGroups);
  const load = await startLoad({
    installation,
    signal: world.signal,
    request: question,
    expected: expectedAnswer(world, 1),
    lanes,
  });
  say(`${mostGroups} groups serve ${lanes} streams`);

  const downBegin = performance.now();
  let groups = mostGroups;
  let downs = 0;
  while (downs < scaleDowns) {
    if (groups === 1) {
      groups = mostGroups;
    } else {
      groups -= 1;
      downs += 1;
    }
    await installation.patchSpec(fixed(groups));
    await installation.waitForGroups(groups);
    checkNothingWrong(load.report().wrong);
    if (downs % 10 === 0 && groups !== mostGroups) {
      say(`${downs} scale-downs, ${load.report().requests} requests`);
    }
  }
  const downMs = performance.now() - downBegin;
  say(`${downs} scale-downs in ${(downMs / 1000).toFixed(0)} s`);

  await installation.patchSpec(fixed(2));
  await installation.waitForGroups(2);
  const rollBegin = performance.now();
  for (let rollout = 1; rollout <= rollouts; rollout++) {
    const before = new Set((await installation.workerPods()).map(({ metadata }) => metadata?.uid));
    await installation.patchSpec({ template: { annotations: { rollout: String(rollout) } } });
    await installation.waitForGroups(2);
    const after = (await installation.workerPods()).map(({ metadata }) => metadata?.uid);
    check(!after.some((uid) => before.has(uid)), `rollout ${rollout} left a pod of the old revision`);
    checkNothingWrong(load.report().wrong);
    if (rollout % 5 === 0) {
      say(`${rollout} rollouts, ${load.report().requests} requests`);
    }
  }
  const rollMs = performance.now() - rollBegin;
  const report = await load.stop();
  checkNothingWrong(report.wrong);
  say(`${rollouts} rollouts in ${(rollMs / 1000).toFixed(0)} s; ${report.requests} requests, none wrong`);
  await installation.deleteModelService();
  return {
    scaleDowns: downs,
    scaleDownsMs: Math.round(downMs),
    rollouts,
    rolloutsMs: Math.round(rollMs),
    requests: report.requests,
    tokens: report.tokens,
    wrong: report.wrong.length,
    longestPauseMs: report.longestPauseMs,
  };
}
