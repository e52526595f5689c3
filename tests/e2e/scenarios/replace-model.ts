// A model whose checkpoint is edited while streams run, with a drain too short for them: no answer mixes two models,
// streams that cannot continue end with ABORTED, and new requests are answered throughout.

import { ClusterError } from '@mimo/core/process/errors';

import { ask } from '../../harness/cluster.ts';
import { otherCheckpointPath } from '../installation.ts';
import { check, expectedAnswer, oneRank, question, type Figures, type World } from '../scenario.ts';

const lanes = 4;
/** Streams are handed over almost at once, so that some are in the middle. */
const env = [{ name: 'MIMO_WORKER_DRAIN_FINISH', value: '100ms' }];

export async function replaceModel(world: World): Promise<Figures> {
  const { installation, say } = world;
  const first = expectedAnswer(world, 1).tokenIds.join();
  const scaling = { min: 1, max: 1 };
  await installation.applyModelService({ ...oneRank, scaling, drainSeconds: 0, template: { env } });
  await installation.waitForGroups(1);

  const answers: string[] = [];
  const errors: ClusterError[] = [];
  const stopping = new AbortController();
  const { client, metadata } = installation;
  const running = Array.from({ length: lanes }, async () => {
    while (!stopping.signal.aborted && !world.signal.aborted) {
      await ask(client, { request: question, metadata, signal: world.signal }).then(
        ({ tokenIds }) => answers.push(tokenIds.join()),
        (error: unknown) => errors.push(ClusterError.from(error)),
      );
    }
  });
  const replace = async (path: string): Promise<string> => {
    await installation.patchSpec({ model: { source: { volumeClaim: { path } } } });
    await installation.waitForGroups(1);
    return (await ask(client, { request: question, metadata })).tokenIds.join();
  };
  const second = await replace(otherCheckpointPath);
  say(`the checkpoint was replaced: ${answers.length} answers, ${errors.length} errors`);
  check(second !== first, 'the other checkpoint gives the same answer');
  const again = await replace('.');
  check(again === first, 'the first checkpoint does not give its answer again');
  stopping.abort();
  await Promise.all(running);

  const mixed = answers.filter((answer) => answer !== first && answer !== second);
  check(mixed.length === 0, `${mixed.length} of ${answers.length} answers are of neither model`);
  const wrong = errors.filter(({ code, message }) => code !== 'aborted' || !message.includes('was replaced'));
  check(wrong.length === 0, `clients saw: ${wrong.map(String).slice(0, 5).join('; ')}`);
  await installation.deleteModelService();
  return {
    answers: answers.length,
    ofTheSecond: answers.filter((answer) => answer === second).length,
    mixed: mixed.length,
    aborted: errors.length,
  };
}
