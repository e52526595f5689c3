// The chart's NetworkPolicies as a network enforces them: a service with one pod per rank answers through them, while
// strangers and our own pods reach only the ports that the policies name. Without the policies everything is reachable,
// so the policies make the difference.

import type { V1Pod } from '@kubernetes/client-node';

import { waitFor } from '../../harness/wait-for.ts';
import { namespace } from '../installation.ts';
import { startLoad } from '../load.ts';
import { check, checkNothingWrong, expectedAnswer, question, type Figures, type World } from '../scenario.ts';

const ranks = 2;
const elsewhere = 'mimo-e2e-elsewhere';
/** Whose pods the chart lets read metrics. */
const monitoring = 'monitoring';
/** Dropped packets say nothing: longer than the second SYN takes, which a busy machine may need. */
const connectTimeoutMs = 3_000;

/** Prints those of its arguments, `host:port` each, that let it connect. */
const connectScript = `
const { connect } = require('node:net');
for (const target of process.argv.slice(1)) {
  const [host, port] = target.split(':');
  const socket = connect({ host, port: Number(port), timeout: ${connectTimeoutMs} });
  socket.on('connect', () => { console.log(target); socket.destroy(); });
  socket.on('timeout', () => socket.destroy());
  socket.on('error', () => undefined);
}`;

/** What pods try to reach, by name: `host:port`. */
type Targets = Readonly<Record<string, string>>;

/**
 * Who reaches what under the policies; everybody tries everything. A pod's own ports are no business of the network.
 */
const reachable: Readonly<Record<string, readonly string[]>> = {
  neighbour: ['gateway', 'API server'],
  stranger: ['gateway', 'API server'],
  prometheus: ['gateway', 'gateway metrics', 'worker metrics', 'controller metrics', 'API server'],
  gateway: ['gateway metrics', 'worker', 'queue'],
  follower: ['queue'],
  controller: ['controller metrics', 'queue', 'API server'],
};

interface Place {
  readonly namespace: string;
  readonly pod: string;
}

export async function policies(world: World): Promise<Figures> {
  const { cluster, installation, say } = world;
  await installation.applyModelService({
    tensorParallel: ranks,
    placement: 'spread',
    scaling: { min: 1, max: 1 },
    drainSeconds: 5,
  });
  await installation.waitForGroups(1);
  const load = await startLoad({
    installation,
    signal: world.signal,
    request: question,
    expected: expectedAnswer(world, ranks),
    lanes: 1,
  });
  const podOf = async (part: string, label = ''): Promise<V1Pod> => {
    const selector = `app.kubernetes.io/name=mimo-${part}${label}`;
    const text = await cluster.kubectl('get', 'pods', '-n', namespace, '-l', selector, '-o', 'json');
    const [pod] = (JSON.parse(text) as { readonly items: readonly V1Pod[] }).items;
    check(pod !== undefined, `there is no pod with ${selector}`);
    return pod;
  };
  const gateway = await podOf('gateway');
  const worker = await podOf('worker', ',mimo-cluster.dev/rank=0');
  const controller = await podOf('controller');
  const queue = await podOf('nats');
  const targets: Targets = {
    gateway: `mimo-mimo-cluster-gateway.${namespace}.svc.cluster.local:50051`,
    'gateway metrics': `${addressOf(gateway)}:9464`,
    worker: `${addressOf(worker)}:50052`,
    'worker metrics': `${addressOf(worker)}:9464`,
    'controller metrics': `${addressOf(controller)}:9465`,
    queue: `${addressOf(queue)}:4222`,
    "queue's monitor": `${addressOf(queue)}:8222`,
    'API server': 'kubernetes.default.svc.cluster.local:443',
  };
  const places: Readonly<Record<string, Place>> = {
    ...(await createStrangers(world, gateway)),
    gateway: placeOf(gateway),
    follower: placeOf(await podOf('worker', ',mimo-cluster.dev/rank=1')),
    controller: placeOf(controller),
  };

  const tried = { places, targets };
  await waitForReach(world, { ...tried, expected: reachable, when: 'under the policies' });
  say(`${Object.keys(places).length} pods reach what the policies name, and nothing else`);
  await installation.upgrade('networkPolicy.enabled=false', 'nats.networkPolicy.enabled=false');
  const everything = Object.fromEntries(Object.keys(places).map((name) => [name, Object.keys(targets)]));
  await waitForReach(world, { ...tried, expected: everything, when: 'without policies' });
  say('without the policies everybody reaches everything');
  await installation.upgrade('networkPolicy.enabled=true', 'nats.networkPolicy.enabled=true');
  await waitForReach(world, { ...tried, expected: reachable, when: 'under the policies again' });

  const report = await load.stop();
  checkNothingWrong(report.wrong);
  await cluster.kubectl('delete', 'pod', '-n', namespace, 'neighbour', '--timeout=60s');
  await cluster.kubectl('delete', 'namespace', elsewhere, monitoring, '--wait=false');
  await installation.deleteModelService();
  const pairs = Object.keys(places).length * Object.keys(targets).length;
  const allowed = Object.values(reachable).flat().length;
  return { allowed, denied: pairs - allowed, requests: report.requests, wrong: report.wrong.length };
}

/** Waits until every pod reaches what is expected of it; says what is other where it stays so. */
async function waitForReach(
  world: World,
  options: {
    readonly places: Readonly<Record<string, Place>>;
    readonly targets: Targets;
    readonly expected: typeof reachable;
    readonly when: string;
  },
): Promise<void> {
  const { places, targets, expected, when } = options;
  let wrong: readonly string[] = [];
  await waitFor(
    `connections ${when}`,
    async () => {
      const seen = await Promise.all(
        Object.entries(places).map(async ([name, place]) =>
          differences(name, expected[name] ?? [], await reach(world, place, targets)),
        ),
      );
      wrong = seen.flat();
      return wrong.length === 0;
    },
    120_000,
  ).catch((error: unknown) => {
    check(wrong.length === 0, `${when}: ${wrong.join('; ')}`);
    throw error;
  });
}

function differences(name: string, expected: readonly string[], seen: readonly string[]): readonly string[] {
  return [
    ...seen.filter((target) => !expected.includes(target)).map((target) => `${name} reaches ${target}`),
    ...expected.filter((target) => !seen.includes(target)).map((target) => `${name} cannot reach ${target}`),
  ];
}

/** Names of the targets to which a pod can connect. */
async function reach({ cluster }: World, { namespace: of, pod }: Place, targets: Targets): Promise<string[]> {
  const run = ['node', '--input-type=commonjs', '--eval', connectScript, ...Object.values(targets)];
  const connected = (await cluster.kubectl('exec', '-n', of, pod, '--', ...run)).split('\n');
  return Object.entries(targets).flatMap(([name, target]) => (connected.includes(target) ? [name] : []));
}

/** A pod beside ours without their labels, one elsewhere that wears a gateway's, and one that may read metrics. */
async function createStrangers({ cluster }: World, gateway: V1Pod): Promise<Readonly<Record<string, Place>>> {
  const strangers: Readonly<Record<string, Place & { readonly labels?: Record<string, string> }>> = {
    neighbour: { namespace, pod: 'neighbour' },
    stranger: { namespace: elsewhere, pod: 'stranger', labels: gateway.metadata?.labels ?? {} },
    prometheus: { namespace: monitoring, pod: 'prometheus' },
  };
  const image = gateway.spec?.containers[0]?.image;
  await cluster.apply(
    ...[elsewhere, monitoring].map((name) => ({
      apiVersion: 'v1',
      kind: 'Namespace',
      metadata: { name },
    })),
    ...Object.values(strangers).map(({ namespace: of, pod, labels }) => ({
      apiVersion: 'v1',
      kind: 'Pod',
      metadata: { namespace: of, name: pod, labels },
      spec: {
        terminationGracePeriodSeconds: 1,
        automountServiceAccountToken: false,
        containers: [
          {
            name: 'idle',
            image,
            imagePullPolicy: 'Never',
            command: ['node', '--eval', 'setInterval(() => {}, 2 ** 30)'],
            securityContext: {
              runAsNonRoot: true,
              readOnlyRootFilesystem: true,
              allowPrivilegeEscalation: false,
              capabilities: { drop: ['ALL'] },
              seccompProfile: { type: 'RuntimeDefault' },
            },
          },
        ],
      },
    })),
  );
  for (const { namespace: of, pod } of Object.values(strangers)) {
    await cluster.kubectl('wait', '-n', of, '--for=condition=Ready', `pod/${pod}`, '--timeout=120s');
  }
  return strangers;
}

function addressOf({ metadata, status }: V1Pod): string {
  check(status?.podIP !== undefined, `${metadata?.name} has no address`);
  return status.podIP;
}

function placeOf({ metadata }: V1Pod): Place {
  return { namespace, pod: metadata?.name ?? '' };
}
