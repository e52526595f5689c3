// The common parts of the end-to-end scenarios: the world that they run in, and how they report a failed expectation.
// Knows no scenario.

import type { V1Pod } from '@kubernetes/client-node';

import type { ChatRequest } from '@mimo/proto/inference';

import { chatRequest, type Answer } from '../harness/cluster.ts';
import type { RealCluster } from '../harness/kubernetes/cluster.ts';
import type { KubernetesTools } from '../harness/kubernetes/tools.ts';
import type { Installation } from './installation.ts';

/** Numbers and words that the closing JSON line shows. */
export type Figures = Readonly<Record<string, number | string>>;

/** Everything that a scenario may use. It leaves no ModelService behind. */
export interface World {
  readonly cluster: RealCluster;
  readonly installation: Installation;
  readonly tools: KubernetesTools;
  /** The greedy answers of an undisturbed run outside the cluster, by the number of ranks. */
  readonly expected: ReadonlyMap<number, Answer>;
  /** Fires when the run is over, also by a failure. */
  readonly signal: AbortSignal;
  /** A line for the user, with the time. */
  readonly say: (line: string) => void;
  /** How often the repeating scenarios repeat. */
  readonly scaleDowns: number;
  readonly rollouts: number;
}

export type Scenario = (world: World) => Promise<Figures>;

/** The one question of all scenarios: greedy, and long enough to be in the middle of it when something happens. */
export const question: ChatRequest = chatRequest('What is 47 + 85?', { ignoreEos: true, maxTokens: 160 });

/** Of one group of one rank, small. */
export const oneRank = { tensorParallel: 1 } as const;

/** The answer that an undisturbed group of so many ranks gives. */
export function expectedAnswer(world: World, ranks: number): Answer {
  const answer = world.expected.get(ranks);
  if (answer === undefined) {
    throw new RangeError(`no answer of ${ranks} ranks was made`);
  }
  return answer;
}

/** What the container runtime calls a container of a pod. */
export function containerId(pod: V1Pod, name: string): string {
  const status = pod.status?.containerStatuses?.find((each) => each.name === name);
  check(status?.containerID !== undefined, `${pod.metadata?.name} has no container ${name}`);
  return status.containerID.replace('containerd://', '');
}

/** Fails the scenario where a condition does not hold. */
export function check(holds: boolean, message: string): asserts holds {
  if (!holds) {
    throw new Error(message);
  }
}

/** Far above every goal: a step that takes this long is not slow but stuck. */
const hopelessMs = 60_000;

/**
 * Says how a time compares with its goal, and gives that for the figures. One that is missed is said loudly and lets
 * the scenario go on, since processes that are stopped for a moment miss it too; a time without any hope fails it.
 */
export function judge(
  { say }: World,
  what: string,
  { elapsedMs, goalMs }: { readonly elapsedMs: number; readonly goalMs: number },
): 'met' | 'MISSED' {
  const text = `${what} took ${elapsedMs.toFixed(0)} ms, goal ${goalMs} ms`;
  check(elapsedMs < hopelessMs, text);
  const verdict = elapsedMs <= goalMs ? 'met' : 'MISSED';
  say(verdict === 'met' ? text : `MISSED: ${text}`);
  return verdict;
}

/** Fails the scenario where a client saw anything wrong. */
export function checkNothingWrong(wrong: readonly string[]): void {
  check(wrong.length === 0, `clients saw ${wrong.length} errors:\n${wrong.slice(0, 20).join('\n')}`);
}
