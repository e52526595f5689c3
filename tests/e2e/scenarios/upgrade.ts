// `helm upgrade` of gateways and controller under streaming load: new processes take over, old ones finish their
// streams.

import { startLoad } from '../load.ts';
import {
  checkNothingWrong,
  expectedAnswer,
  oneRank,
  question,
  type Figures,
  type World,
} from '../scenario.ts';

export async function upgrade(world: World): Promise<Figures> {
  const { installation, say } = world;
  await installation.applyModelService({ ...oneRank, scaling: { min: 1, max: 1 } });
  await installation.waitForGroups(1);
  const load = await startLoad({
    installation,
    signal: world.signal,
    request: question,
    expected: expectedAnswer(world, 1),
    lanes: 3,
  });
  const begin = performance.now();
  const mark = Date.now();
  await installation.upgrade(`gateway.podAnnotations.upgrade=at-${mark}`);
  say('gateways upgraded');
  await installation.upgrade(`controller.podAnnotations.upgrade=at-${mark}`);
  await installation.waitForGroups(1);
  const elapsedMs = performance.now() - begin;
  const report = await load.stop();
  checkNothingWrong(report.wrong);
  say(
    `gateways and controller upgraded in ${(elapsedMs / 1000).toFixed(0)} s; ${report.requests} requests, none wrong`,
  );
  await installation.deleteModelService();
  return { upgradeMs: Math.round(elapsedMs), requests: report.requests, wrong: report.wrong.length };
}
