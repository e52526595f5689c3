// Faults of machines and of what runs on them, under streaming load: kill -9 of kubelet, containerd and etcd, of
// controller, queue server and gateway, a machine that is far away and one that is cut off. Serving continues wherever
// the fault leaves a path.

import type { V1Pod } from '@kubernetes/client-node';

import type { RealCluster } from '../../harness/kubernetes/cluster.ts';
import { cut, delay, heal, roundTripMs } from '../../harness/kubernetes/network-faults.ts';
import { waitFor } from '../../harness/wait-for.ts';
import { namespace } from '../installation.ts';
import { startLoad } from '../load.ts';
import {
  check,
  containerId,
  checkNothingWrong,
  expectedAnswer,
  oneRank,
  question,
  type Figures,
  type World,
} from '../scenario.ts';

const lanes = 2;
const groups = 2;
const farAwayMs = 15_000;
/** A dispatcher's lease lives 5 s after it; finding a lost part takes less; the rest is this machine's. */
const waitLimitMs = 20_000;

export async function faults(world: World): Promise<Figures> {
  const { cluster, installation, say } = world;
  await installation.applyModelService({
    ...oneRank,
    scaling: { min: groups, max: groups },
    drainSeconds: 5,
  });
  await installation.waitForGroups(groups);
  const figures: Record<string, number> = {};
  const during = async (name: string, fault: Fault): Promise<void> => {
    const { tolerated } = fault;
    const load = await startLoad({
      installation,
      signal: world.signal,
      request: question,
      expected: expectedAnswer(world, 1),
      lanes,
      ...(tolerated === undefined ? {} : { tolerated }),
    });
    const begin = performance.now();
    await fault.act();
    const elapsedMs = Math.round(performance.now() - begin);
    const { requests, wrong, unavailable, longestPauseMs, longestWaitMs } = await load.stop();
    checkNothingWrong(wrong);
    figures[`${name}Ms`] = elapsedMs;
    figures[`${name}Unavailable`] = unavailable;
    figures[`${name}LongestPauseMs`] = longestPauseMs;
    figures[`${name}LongestWaitMs`] = longestWaitMs;
    check(longestWaitMs < waitLimitMs, `${name}: a request waited ${longestWaitMs} ms for its first token`);
    say(
      `${name}: ${requests} requests, ${unavailable} unavailable, longest pause ${longestPauseMs} ms, wait ${longestWaitMs} ms`,
    );
  };

  const [node] = cluster.nodes;
  check(node !== undefined, 'there is no node');
  await during('kubeletKilled', {
    act: async () => {
      await node.kubelet.kill();
      await node.restartKubelet();
      await serveOn(world);
    },
  });
  await during('containerdKilled', {
    act: async () => {
      await node.containerd.kill();
      await node.restartContainerd();
      await serveOn(world);
    },
  });
  await during('etcdKilled', {
    act: async () => {
      await cluster.controlPlane.etcd.kill();
      await cluster.controlPlane.restartEtcd();
      await cluster.controlPlane.ready();
      await serveOn(world);
    },
  });
  await during('controllerKilled', {
    act: async () => {
      await killPod(world, 'mimo-controller', 'controller');
      await serveOn(world);
    },
  });
  // A request that cannot be recorded is refused; one that runs needs no queue.
  await during('queueKilled', {
    tolerated: 'refusal',
    act: async () => {
      await killPod(world, 'mimo-nats', 'nats');
      await serveOn(world);
    },
  });
  // Its streams end with it.
  await during('gatewayKilled', {
    tolerated: 'break',
    act: async () => {
      await killPod(world, 'mimo-gateway', 'gateway');
      await serveOn(world);
    },
  });
  await during('delay', {
    act: async () => {
      figures['delayRoundTripMs'] = await farAway(world);
    },
  });
  await during('partition', { act: () => partition(world) });
  await installation.deleteModelService();
  return figures;
}

interface Fault {
  readonly tolerated?: 'refusal' | 'break';
  /** Brings the fault about and waits until all is as before. */
  readonly act: () => Promise<void>;
}

/** SIGKILL to the process of one part of the release; the kubelet starts it again. */
async function killPod({ cluster }: World, part: string, container: string): Promise<void> {
  const selector = `app.kubernetes.io/name=${part}`;
  const text = await cluster.kubectl('get', 'pods', '-n', namespace, '-l', selector, '-o', 'json');
  const [pod] = (JSON.parse(text) as { readonly items: readonly V1Pod[] }).items;
  check(pod !== undefined, `there is no pod with ${selector}`);
  const node = cluster.nodes.find(({ name }) => name === pod.spec?.nodeName);
  await node?.killContainer(containerId(pod, container));
}

/** Serves for some seconds, and all groups are there. */
async function serveOn({ installation }: World): Promise<void> {
  await new Promise((resolve) => {
    setTimeout(resolve, 5_000);
  });
  await installation.waitForGroups(groups);
}

/** The machine on which only groups run: it must have some of them, and not all. */
async function groupsMachine({ cluster, installation }: World): Promise<{
  readonly node: RealCluster['nodes'][number];
  readonly group: string;
  readonly text: string;
}> {
  const node = cluster.nodes[1];
  check(node !== undefined, 'there is no second node');
  const pods = await installation.workerPods();
  const there = pods.filter(({ spec }) => spec?.nodeName === node.name);
  const text = `${node.name}, with ${there.length} of ${pods.length} groups`;
  const group = there[0]?.metadata?.labels?.['mimo-cluster.dev/group'];
  check(group !== undefined && there.length < pods.length, `the machine to lose is ${text}`);
  return { node, group, text };
}

/**
 * Serves over a line of 100 ms each way, as between continents, on which no group is lost; gives the round trip.
 */
async function farAway(world: World): Promise<number> {
  const { cluster, installation, tools, say } = world;
  const { node, group, text } = await groupsMachine(world);
  const names = async (): Promise<string> =>
    (await installation.workerPods()).map(({ metadata }) => metadata?.uid).join();
  const before = await names();
  const line = await delay(node.box, { program: tools.delay, delayMs: 100, jitterMs: 30 });
  const elapsedMs = await roundTripMs(cluster.controlPlaneBox, node.box);
  say(`${text}, is ${elapsedMs} ms away`);
  check(elapsedMs > 100, `a round trip takes ${elapsedMs} ms`);
  const until = AbortSignal.any([world.signal, AbortSignal.timeout(farAwayMs)]);
  let worked = 0;
  let states = 0;
  for await (const state of installation.queue.queueStates.follow(question.model, until)) {
    const own = state.groups.find((each) => each.group === group);
    states += 1;
    worked += own?.routable === true && own.inFlightRequests > 0 ? 1 : 0;
  }
  await line.end();
  await installation.waitForGroups(groups);
  say(`the far group was at work in ${worked} of ${states} states`);
  check(worked > states / 10, `the far group was at work in ${worked} of ${states} states`);
  check((await names()) === before, 'a group was rebuilt while its machine was far away');
  return Math.round(elapsedMs);
}

/** Cuts off the machine on which only groups run, until it counts as lost, and heals it. */
async function partition(world: World): Promise<void> {
  const { cluster, installation, say } = world;
  const { node, text } = await groupsMachine(world);
  await cut(node.box, cluster.controlPlaneBox);
  say(`${text}, is cut off`);
  const path = 'jsonpath={.status.conditions[?(@.type=="Ready")].status}';
  await waitFor(
    'the cut-off machine to count as lost',
    async () => (await cluster.kubectl('get', 'node', node.name, '-o', path)) === 'Unknown',
    90_000,
  );
  await heal(node.box, cluster.controlPlaneBox);
  await cluster.kubectl('wait', '--for=condition=Ready', `node/${node.name}`, '--timeout=120s');
  await installation.waitForGroups(groups);
}
