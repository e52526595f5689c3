// Specs that change during a rollout: a revert, many edits in a row, a group without free GPUs. The serving groups
// stay, and `kubectl describe` reports the cause.

import { waitFor } from '../../harness/wait-for.ts';
import { modelName, namespace } from '../installation.ts';
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

const groups = 2;
const edits = 10;
/** Is nowhere: a group of it never serves. */
const missingImage = { image: 'mimo-cluster/worker:missing', imagePullPolicy: 'Never' };
/** Takes it back. */
const chartsImage = { image: null, imagePullPolicy: null };

export async function revert(world: World): Promise<Figures> {
  const { cluster, installation, say } = world;
  const spec = { ...oneRank, scaling: { min: groups, max: groups }, drainSeconds: 5 };
  await installation.applyModelService({ ...spec, template: { annotations: { edit: 'none' } } });
  await installation.waitForGroups(groups);
  const load = await startLoad({
    installation,
    signal: world.signal,
    request: question,
    expected: expectedAnswer(world, 1),
    lanes: 2,
  });
  const serving = await identities(world);

  await installation.patchSpec({ template: missingImage });
  await waitFor(
    'a group of the broken revision',
    async () => (await identities(world)).length > groups,
    60_000,
  );
  await installation.patchSpec({ template: chartsImage });
  await installation.waitForGroups(groups);
  check(isSame(await identities(world), serving), 'a revert in mid-rollout replaced groups that served');
  say('reverted in mid-rollout: the groups that served stay');

  // However far apart they come, none of the revisions between gets to replace a group.
  for (let edit = 1; edit < edits; edit++) {
    await installation.patchSpec({ template: { ...missingImage, annotations: { edit: String(edit) } } });
  }
  await installation.patchSpec({ template: { ...chartsImage, annotations: { edit: 'none' } } });
  await installation.waitForGroups(groups);
  check(isSame(await identities(world), serving), 'edits that end where they began replaced groups');
  say(`${edits} edits in a row, the last one undoes them: the groups that served stay`);

  // Twice what a machine has; computed on the CPU, if it ever were.
  await installation.patchSpec({ resources: { accelerators: 8, executionProvider: 'cpu' } });
  const describe = (): Promise<string> =>
    cluster.kubectl('describe', 'modelservice', '-n', namespace, modelName);
  let text = '';
  await waitFor(
    'kubectl describe to say what is missing',
    async () => {
      text = await describe();
      return /Insufficient nvidia\.com\/gpu/.test(text);
    },
    60_000,
  );
  const ready = await readyIdentities(world);
  check(
    serving.every((uid) => ready.includes(uid)),
    'an unschedulable group cost one that served',
  );
  say('no GPUs for the new revision: the groups that served stay, kubectl describe names nvidia.com/gpu');
  await installation.patchSpec({ resources: { accelerators: 0, executionProvider: null } });
  await installation.waitForGroups(groups);
  check(isSame(await identities(world), serving), 'undoing the unschedulable revision replaced groups');

  const report = await load.stop();
  checkNothingWrong(report.wrong);
  await installation.deleteModelService();
  return { edits, requests: report.requests, wrong: report.wrong.length };
}

async function identities({ installation }: World): Promise<readonly string[]> {
  return (await installation.workerPods()).map(({ metadata }) => metadata?.uid ?? '').toSorted();
}

async function readyIdentities({ installation }: World): Promise<readonly string[]> {
  return (await installation.workerPods()).flatMap(({ metadata, status }) =>
    status?.conditions?.some(({ type, status: is }) => type === 'Ready' && is === 'True') === true
      ? [metadata?.uid ?? '']
      : [],
  );
}

function isSame(left: readonly string[], right: readonly string[]): boolean {
  return left.join() === right.join();
}
