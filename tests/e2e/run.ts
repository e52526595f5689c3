// The end-to-end run: images, cluster, chart, scenarios, uninstall, one after another. Owns their order and the closing
// figures; a scenario that fails ends the run, after the state of everything was saved.

import { ask, startTestCluster, type Answer } from '../harness/cluster.ts';
import { startRealCluster, type RealCluster } from '../harness/kubernetes/cluster.ts';
import { findImages } from '../harness/kubernetes/images.ts';
import { findTools } from '../harness/kubernetes/tools.ts';
import { waitFor } from '../harness/wait-for.ts';
import { dumpState } from './dump.ts';
import { install, namespace, type Installation } from './installation.ts';
import { check, oneRank, question, type Figures, type Scenario } from './scenario.ts';
import { faults } from './scenarios/faults.ts';
import { killRank } from './scenarios/kill-rank.ts';
import { lifecycle } from './scenarios/lifecycle.ts';
import { policies } from './scenarios/policies.ts';
import { replaceModel } from './scenarios/replace-model.ts';
import { revert } from './scenarios/revert.ts';
import { serve } from './scenarios/serve.ts';
import { upgrade } from './scenarios/upgrade.ts';

/** In the order in which they run. */
export const scenarios = {
  serve,
  policies,
  'kill-rank': killRank,
  revert,
  'replace-model': replaceModel,
  upgrade,
  lifecycle,
  faults,
} as const satisfies Readonly<Record<string, Scenario>>;

/** Leaves nothing but groups on the other nodes, which are for losing. */
const onFirstNode = ['gateway', 'controller', 'nats'].map(
  (part) => String.raw`${part}.nodeSelector.kubernetes\.io/hostname=node-1`,
);

export type ScenarioName = keyof typeof scenarios;

export interface EndToEndOptions {
  readonly scenarios: readonly ScenarioName[];
  readonly scaleDowns: number;
  readonly rollouts: number;
  /** Leaves a cluster in which a scenario failed as it is, until the signal. */
  readonly hold: boolean;
  readonly signal: AbortSignal;
  readonly say: (line: string) => void;
}

/** The closing line. Times in milliseconds. */
export interface EndToEndResult {
  readonly imagesMs: number;
  readonly clusterMs: number;
  readonly installMs: number;
  readonly uninstallMs?: number;
  readonly totalMs: number;
  readonly scenarios: Readonly<Record<string, Figures>>;
  readonly failed?: string;
  /** Where the state at a failure was saved. */
  readonly savedState?: string;
}

export async function runEndToEnd(options: EndToEndOptions): Promise<EndToEndResult> {
  const { say, signal } = options;
  const stopwatch = createStopwatch();
  const find = { signal, onProgress: say };
  const tools = await findTools(find);
  const images = await findImages(['gateway', 'worker', 'controller', 'nats'], find);
  const imagesMs = stopwatch();
  say('images built');
  const expected = await undisturbedAnswers(
    options.scenarios.some((name) => name === 'policies' || name === 'kill-rank') ? [1, 2] : [1],
  );
  say('answers of an undisturbed run made');
  stopwatch();

  const needsMore = options.scenarios.includes('faults');
  const cluster = await startRealCluster({
    tools,
    nodes: needsMore ? 2 : 1,
    gpusPerNode: 4,
    onProgress: say,
  });
  const figures: Record<string, Figures> = {};
  let clusterMs = 0;
  let installMs = 0;
  let installation: Installation | undefined;
  const over = new AbortController();
  const result = (): EndToEndResult => ({
    imagesMs,
    clusterMs,
    installMs,
    totalMs: Math.round(performance.now()),
    scenarios: figures,
  });
  try {
    for (const { archive } of Object.values(images)) {
      await cluster.importImage(archive);
    }
    clusterMs = stopwatch();
    say(`cluster up, images on ${cluster.nodes.length} nodes`);
    installation = await install({
      cluster,
      helm: tools.helm,
      images,
      values: needsMore ? onFirstNode : [],
    });
    installMs = stopwatch();
    say('chart installed, everything ready');
    await installation.helm('test', 'mimo');
    for (const name of options.scenarios) {
      signal.throwIfAborted();
      say(`== ${name}`);
      figures[name] = await scenarios[name]({
        cluster,
        installation,
        tools,
        expected,
        signal: over.signal,
        say,
        scaleDowns: options.scaleDowns,
        rollouts: options.rollouts,
      });
    }
    // With a serving service: an uninstall needs no clean-up before it.
    await installation.applyModelService({ ...oneRank, scaling: { min: 1, max: 1 }, drainSeconds: 5 });
    await installation.waitForGroups(1);
    stopwatch();
    await installation.uninstall();
    let left = '';
    // Pods have their grace, and the claim of the queue goes after its pod.
    await waitFor(
      'everything to be gone',
      async () => {
        left = await leftBehind(cluster);
        return left === '';
      },
      120_000,
    ).catch(() => undefined);
    check(left === '', `uninstall left behind: ${left}`);
    const uninstallMs = stopwatch();
    say('uninstalled: nothing of the release is left');
    return { ...result(), uninstallMs };
  } catch (error) {
    const failed = error instanceof Error ? (error.stack ?? error.message) : String(error);
    const savedState = await dumpState(cluster);
    say(`failed: ${failed}\nthe state is saved in ${savedState}`);
    if (options.hold) {
      say(`held until Ctrl-C: kubectl --kubeconfig ${cluster.kubeconfigFile}`);
      await new Promise((resolve) => {
        signal.addEventListener('abort', resolve);
      });
    }
    return { ...result(), failed: error instanceof Error ? error.message : failed, savedState };
  } finally {
    over.abort();
    await installation?.close();
    await cluster.close();
  }
}

/** What greedy decoding gives outside of Kubernetes, by the number of ranks: nothing moves and nobody else asks. */
async function undisturbedAnswers(ranks: readonly number[]): Promise<ReadonlyMap<number, Answer>> {
  const answers = new Map<number, Answer>();
  for (const tensorParallel of ranks) {
    const cluster = await startTestCluster({ tensorParallel, nats: false });
    try {
      answers.set(tensorParallel, await ask(cluster.client, { request: question }));
    } finally {
      await cluster.close();
    }
  }
  return answers;
}

/** Objects of the release that still exist. Ours are the namespace, the volumes and the claim of the checkpoint. */
async function leftBehind(cluster: RealCluster): Promise<string> {
  const kinds =
    'pods,services,deployments,statefulsets,replicasets,jobs,secrets,configmaps,serviceaccounts,roles,rolebindings,' +
    'networkpolicies,poddisruptionbudgets,persistentvolumeclaims,leases,modelservices,tenants';
  const text = await cluster.kubectl('get', kinds, '-n', namespace, '-o', 'name');
  const ours = new Set([
    'serviceaccount/default',
    'configmap/kube-root-ca.crt',
    'persistentvolumeclaim/checkpoints',
  ]);
  return text
    .split('\n')
    .filter((name) => name !== '' && !ours.has(name))
    .join(', ');
}

/** Gives the milliseconds since the last call. */
function createStopwatch(): () => number {
  let last = performance.now();
  return () => {
    const now = performance.now();
    const elapsed = Math.round(now - last);
    last = now;
    return elapsed;
  };
}
