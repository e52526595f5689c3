// A model at zero: a request wakes it and is answered, many at once raise it to several groups in one decision,
// idleness takes it back to zero. No request is lost, counted at the client.

import type { ModelServiceStatus } from '@mimo/controller/resources/status';

import { ask, type Answer } from '../../harness/cluster.ts';
import { waitFor } from '../../harness/wait-for.ts';
import { check, expectedAnswer, judge, oneRank, question, type Figures, type World } from '../scenario.ts';

const burstRequests = 40;
/** What the burst's tokens ask for, one less than what is allowed. */
const burstGroups = 3;

/** From the sending of a burst to its decision. */
const decisionGoalMs = 1_000;
/**
 * The controller takes what arrives within 300 ms for one burst. Where processes are stopped in the middle of it, what
 * the client, the gateway or the queue is late with is another one and rightly another decision, so there is a second
 * try.
 */
const mostBursts = 3;

type ScaleDecision = NonNullable<ModelServiceStatus['lastDecision']>;

export async function serve(world: World): Promise<Figures> {
  const { installation, say } = world;
  let bursts = 1;
  let tried = await fromZero(world);
  while (!isOneDecision(tried) && bursts < mostBursts) {
    say(`the burst took other than one decision: ${JSON.stringify(tried.raises)}`);
    await backToZero(world);
    // What the controller has learned from the burst goes with its service.
    await installation.deleteModelService();
    await waitFor('the gateway to forget the model', async () => !(await isListed(world)), 120_000);
    tried = await fromZero(world);
    bursts += 1;
  }
  const { raises, decisionMs } = tried;
  const [raise] = raises;
  check(
    raise !== undefined && isOneDecision(tried),
    `of ${bursts} bursts none took one decision from 0 to ${burstGroups}: ${JSON.stringify(raises)}`,
  );
  say(`${burstRequests} requests at once: ${raise.message}; ${raise.formula}`);
  const decisionGoal = judge(world, 'the decision', { elapsedMs: decisionMs, goalMs: decisionGoalMs });
  const zeroMs = await backToZero(world);
  await installation.deleteModelService();
  return {
    fromZeroMs: Math.round(tried.fromZeroMs),
    bursts,
    burstRequests,
    burstMs: Math.round(tried.burstMs),
    requestsLost: tried.requestsLost,
    groupsWanted: raise.wanted,
    firstRecordToDecisionMs: decisionMs,
    decisionGoal,
    idleToZeroMs: Math.round(zeroMs),
  };
}

/** Applies a service that is at zero, asks once, lets it go back to zero, and sends a burst. */
async function fromZero(world: World): Promise<Burst & { readonly fromZeroMs: number }> {
  const { installation, say } = world;
  await applyAtZero(world);
  check((await installation.workerPods()).length === 0, 'a service of min 0 has pods before any request');

  const firstSentMs = performance.now();
  say('model known at zero groups; asking');
  const first = await askOnce(world);
  const fromZeroMs = performance.now() - firstSentMs;
  check(isRight(world, first), `the answer from zero is not the greedy one: ${first.text}`);
  say(`answered from zero in ${(fromZeroMs / 1000).toFixed(1)} s, tokens as expected`);
  await backToZero(world);
  return { fromZeroMs, ...(await sendBurst(world)) };
}

function askOnce({ installation: { client, metadata } }: World): Promise<Answer> {
  return ask(client, { request: question, metadata });
}

function isRight(world: World, answer: Answer): boolean {
  return answer.tokenIds.join() === expectedAnswer(world, 1).tokenIds.join();
}

/** Applies the service, and returns when clients can ask for the model, of which there is no group. */
async function applyAtZero(world: World): Promise<void> {
  const { installation } = world;
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
}

interface Burst {
  /** Decisions that raised the count, in their order. */
  readonly raises: readonly ScaleDecision[];
  /** From the sending of the first request, by this machine's clock: a little more than from its record. */
  readonly decisionMs: number;
  /** To the last answer. */
  readonly burstMs: number;
  readonly requestsLost: number;
}

/** Asks many times at once; fails if a request is lost or its answer another. */
async function sendBurst(world: World): Promise<Burst> {
  const { installation } = world;
  const decisions: ScaleDecision[] = [];
  const stopWatching = await installation.watchModelService(({ status }) => {
    const decision = status?.lastDecision;
    if (decision !== undefined && decision.wanted > decision.before) {
      decisions.push(decision);
    }
  });
  const burstSentUnixMs = Date.now();
  const burstSentMs = performance.now();
  const answers = await Promise.allSettled(Array.from({ length: burstRequests }, () => askOnce(world)));
  const burstMs = performance.now() - burstSentMs;
  const lost = answers.filter(({ status }) => status === 'rejected');
  check(
    lost.length === 0,
    `${lost.length} of ${burstRequests} requests were lost: ${JSON.stringify(lost[0])}`,
  );
  const wrong = answers.filter((result) => result.status === 'fulfilled' && !isRight(world, result.value));
  check(wrong.length === 0, `${wrong.length} of ${burstRequests} answers are not the greedy one`);
  stopWatching();
  const raises = [...new Map(decisions.map((decision) => [decision.time, decision])).values()];
  const [first] = raises;
  check(first !== undefined, 'no decision raised the count');
  const decisionMs = Date.parse(first.time) - burstSentUnixMs;
  return { raises, decisionMs, burstMs, requestsLost: lost.length };
}

function isOneDecision({ raises: [first, ...others] }: Burst): boolean {
  return first?.before === 0 && first.wanted === burstGroups && others.length === 0;
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
