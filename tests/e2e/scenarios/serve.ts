// A model at zero: a request wakes it and is answered, many at once raise it to several groups in one decision, idleness
// takes it back to zero. No request is lost, counted at the client.

import type { ModelServiceStatus } from '@mimo/controller/status';

import { ask, type Answer } from '../../harness/cluster.ts';
import { waitFor } from '../../harness/wait-for.ts';
import { check, expectedAnswer, oneRank, question, type Figures, type World } from '../scenario.ts';

const burstRequests = 40;
/** What the burst's tokens ask for, one less than what is allowed. */
const burstGroups = 3;

type ScaleDecision = NonNullable<ModelServiceStatus['lastDecision']>;

export async function serve(world: World): Promise<Figures> {
  const { installation, say, decisionLimitMs } = world;
  const { client, metadata } = installation;
  const expected = expectedAnswer(world, 1);
  const askOnce = (): Promise<Answer> => ask(client, { request: question, metadata });
  const isRight = (answer: Answer): boolean => answer.tokenIds.join() === expected.tokenIds.join();

  await installation.applyModelService({
    ...oneRank,
    scaling: {
      min: 0,
      max: burstGroups + 1,
      // Forty times about 185 tokens, prompt and permitted completion, are 3 groups x 500 tokens/s x 5 s.
      groupTokensPerSecond: 500,
      targetWaitSeconds: 5,
      startUpSeconds: 10,
      memorySeconds: 60,
      scaleToZeroAfterSeconds: 10,
    },
    drainSeconds: 20,
  });
  await waitFor(
    'the model to be known to the gateway',
    async () => (await installation.modelService()).status?.groups?.wanted === 0 && (await isListed(world)),
    120_000,
  );
  check((await installation.workerPods()).length === 0, 'a service of min 0 has pods before any request');

  const firstSentMs = performance.now();
  say('model known at zero groups; asking');
  const first = await askOnce();
  const fromZeroMs = performance.now() - firstSentMs;
  check(isRight(first), `the answer from zero is not the greedy one: ${first.text}`);
  say(`answered from zero in ${(fromZeroMs / 1000).toFixed(1)} s, tokens as expected`);
  await backToZero(world);

  const decisions: ScaleDecision[] = [];
  const stopWatching = await installation.watchModelService(({ status }) => {
    const decision = status?.lastDecision;
    if (decision !== undefined && decision.wanted > decision.before) {
      decisions.push(decision);
    }
  });
  const burstSentUnixMs = Date.now();
  const burstSentMs = performance.now();
  const answers = await Promise.allSettled(Array.from({ length: burstRequests }, askOnce));
  const burstMs = performance.now() - burstSentMs;
  const lost = answers.filter(({ status }) => status === 'rejected');
  check(
    lost.length === 0,
    `${lost.length} of ${burstRequests} requests were lost: ${JSON.stringify(lost[0])}`,
  );
  const wrong = answers.filter((result) => result.status === 'fulfilled' && !isRight(result.value));
  check(wrong.length === 0, `${wrong.length} of ${burstRequests} answers are not the greedy one`);
  stopWatching();
  const raises = [...new Map(decisions.map((decision) => [decision.time, decision])).values()];
  const [raise] = raises;
  check(raise !== undefined, 'no decision raised the count');
  // From the sending of the first request, by this machine's clock: a little more than from its record.
  const decisionMs = Date.parse(raise.time) - burstSentUnixMs;
  say(`${burstRequests} requests at once: after ${decisionMs} ms ${raise.message}; ${raise.formula}`);
  check(
    raise.before === 0 && raise.wanted === burstGroups,
    `the first decision is not from 0 to ${burstGroups}: ${JSON.stringify(raises)}`,
  );
  check(raises.length === 1, `the burst took more than one decision: ${JSON.stringify(raises)}`);
  check(decisionMs < decisionLimitMs, `the decision took ${decisionMs} ms, not ${decisionLimitMs}`);
  const zeroMs = await backToZero(world);
  await installation.deleteModelService();
  return {
    fromZeroMs: Math.round(fromZeroMs),
    burstRequests,
    burstMs: Math.round(burstMs),
    requestsLost: lost.length,
    groupsWanted: raise.wanted,
    firstRecordToDecisionMs: decisionMs,
    idleToZeroMs: Math.round(zeroMs),
  };
}

async function isListed({ installation }: World): Promise<boolean> {
  return (await installation.listModels()).includes(question.model);
}

async function backToZero({ installation, say }: World): Promise<number> {
  const begin = performance.now();
  await installation.waitForGroups(0);
  await waitFor('the last pod to go', async () => (await installation.workerPods()).length === 0, 60_000);
  const elapsedMs = performance.now() - begin;
  say(`idle: back to zero groups after ${(elapsedMs / 1000).toFixed(1)} s`);
  return elapsedMs;
}
