// Faults of machines and of what runs on them, under streaming load: kill -9 of kubelet, containerd and etcd, of the
// queue server and of a gateway, and a machine that is cut off. What serves goes on wherever the fault leaves it a way.

import { cut, heal } from '../../harness/kubernetes/network-faults.ts';
import { waitFor } from '../../harness/wait-for.ts';
import { namespace } from '../installation.ts';
import { startLoad, type Load } from '../load.ts';
import {
  check,
  checkNothingWrong,
  expectedAnswer,
  oneRank,
  question,
  type Figures,
  type World,
} from '../scenario.ts';

const lanes = 2;
const groups = 2;

export async function faults(world: World): Promise<Figures> {
  const { cluster, installation, say } = world;
  await installation.applyModelService({
    ...oneRank,
    scaling: { min: groups, max: groups },
    drainSeconds: 5,
    template: { tolerations: quickTolerations },
  });
  await installation.waitForGroups(groups);
  const figures: Record<string, number> = {};
  const during = async (name: string, act: (load: Load) => Promise<void>): Promise<void> => {
    const load = await startLoad({
      installation,
      request: question,
      expected: expectedAnswer(world, 1),
      lanes,
    });
    const begin = performance.now();
    await act(load);
    const report = await load.stop();
    checkNothingWrong(report.wrong);
    const elapsedMs = Math.round(performance.now() - begin);
    figures[`${name}Ms`] = elapsedMs;
    say(`${name}: ${report.requests} requests, none wrong, longest pause ${report.longestPauseMs} ms`);
  };

  const [node] = cluster.nodes;
  check(node !== undefined, 'there is no node');
  await during('kubeletKilled', async () => {
    await node.kubelet.kill();
    await node.restartKubelet();
    await serveOn(world);
  });
  await during('containerdKilled', async () => {
    await node.containerd.kill();
    await node.restartContainerd();
    await serveOn(world);
  });
  await during('etcdKilled', async () => {
    await cluster.controlPlane.etcd.kill();
    await cluster.controlPlane.restartEtcd();
    await cluster.controlPlane.ready();
    await serveOn(world);
  });
  await during('queueKilled', async () => {
    await cluster.kubectl('delete', 'pod', '-n', namespace, 'mimo-nats-0', '--grace-period=0', '--force');
    await cluster.kubectl('rollout', 'status', '-n', namespace, 'statefulset/mimo-nats', '--timeout=120s');
    await serveOn(world);
  });
  figures['partitionRejoinedMs'] = await partition(world);
  await installation.deleteModelService();
  return figures;
}

/** A machine that is gone counts as lost after seconds, not after Kubernetes' five minutes. */
const quickTolerations = ['not-ready', 'unreachable'].map((condition) => ({
  key: `node.kubernetes.io/${condition}`,
  operator: 'Exists',
  effect: 'NoExecute',
}));

/** Serves for some seconds, and all groups are there. */
async function serveOn({ installation }: World): Promise<void> {
  await new Promise((resolve) => {
    setTimeout(resolve, 5_000);
  });
  await installation.waitForGroups(groups);
}

/** Cuts off the second machine, waits until all groups serve without it, and heals it. */
async function partition(world: World): Promise<number> {
  const { cluster, installation, say } = world;
  const lost = cluster.nodes[1];
  check(lost !== undefined, 'there is no second node');
  await cut(lost.box, cluster.controlPlaneBox);
  say(`${lost.name} is cut off`);
  await waitFor(
    'the cut-off machine to count as lost',
    async () => {
      const path = '{.status.conditions[?(@.type=="Ready")].status}';
      return (await cluster.kubectl('get', 'node', lost.name, '-o', `jsonpath=${path}`)) === 'Unknown';
    },
    90_000,
  );
  await heal(lost.box, cluster.controlPlaneBox);
  const begin = performance.now();
  await cluster.kubectl('wait', '--for=condition=Ready', `node/${lost.name}`, '--timeout=120s');
  await installation.waitForGroups(groups);
  return Math.round(performance.now() - begin);
}
