// The controller against a real API server and a real queue: the objects that it creates, its statuses and events, and
// that it leaves nothing behind.

import { spawn, type ChildProcess } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { labels, prepareLabels } from '@mimo/controller/decide/labels';
import type { Controller } from '@mimo/controller/controller';
import { hasReason } from '@mimo/controller/kube/api-status';
import { resourceTypes, type KubeObject } from '@mimo/controller/kube/resource';
import type { ModelServiceStatus } from '@mimo/controller/resources/status';
import { pause } from '@mimo/core/process/abort';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { freeAddresses } from '../../cli/src/local/free-ports.ts';
import type { InProcess } from '../harness/in-process.ts';
import { createTestClock, type TestClock } from '../harness/set-clock.ts';
import { waitFor } from '../harness/wait-for.ts';
import { namespace, startStage, type Pod, type Stage } from './controller-stage.ts';

const never = new AbortController().signal;

let stage: Stage;
beforeAll(async () => {
  stage = await startStage();
});
afterAll(async () => stage.close());

interface ServiceObject extends KubeObject {
  readonly status?: ModelServiceStatus;
}

async function createService(name: string, spec: object): Promise<void> {
  const { apiVersion, kind } = resourceTypes.modelServices;
  const model = { name: `model-${name}`, source: { hostPath: '/models/mimo' } };
  const object = { apiVersion, kind, metadata: { name }, spec: { model, ...spec } };
  await stage.client.create(resourceTypes.modelServices, object, never);
}

async function patchService(name: string, spec: object): Promise<void> {
  await stage.client.patch(resourceTypes.modelServices, name, { spec }, {}, never);
}

async function readService(name: string): Promise<ServiceObject> {
  return stage.client.get<ServiceObject>(resourceTypes.modelServices, name, never);
}

async function conditionOf(name: string, type: string): Promise<string> {
  const { status } = await readService(name);
  const found = status?.conditions?.find((condition) => condition.type === type);
  return found === undefined ? 'absent' : `${found.status} ${found.reason}: ${found.message}`;
}

/** The pods of a service's groups. */
function groupPodsOf(service: string): readonly Pod[] {
  return [...stage.pods.list()].filter(({ metadata }) => metadata.labels?.[labels.service] === service);
}

function groupsOf(service: string): readonly string[] {
  const names = groupPodsOf(service)
    .filter(({ metadata }) => metadata.deletionTimestamp === undefined)
    .map(({ metadata }) => metadata.labels?.[labels.group] ?? '');
  return [...new Set(names)].toSorted();
}

function preparePodsOf(service: string): readonly Pod[] {
  return [...stage.pods.list()].filter(
    ({ metadata }) => metadata.labels?.[prepareLabels.service] === service,
  );
}

/** The events of a service that begin so; waits for the first, as they are sent in the background. */
async function eventsFrom(service: string, beginning: string): Promise<readonly string[]> {
  let found: readonly string[] = [];
  await waitFor(`an event "${beginning}" of ${service}`, async () => {
    const { items } = await stage.client.list(resourceTypes.events, {}, never);
    found = items
      .map(
        (item) => item as KubeObject & { reason: string; message: string; involvedObject: { name: string } },
      )
      .filter(({ involvedObject }) => involvedObject.name === service)
      .map(({ reason, message }) => `${reason}: ${message}`)
      .filter((event) => event.startsWith(beginning));
    return found.length > 0;
  });
  return found;
}

async function deleteService(name: string): Promise<void> {
  await stage.client.delete(resourceTypes.modelServices, name, {}, never);
  await waitFor(
    `${name} to be gone`,
    async () => {
      try {
        await readService(name);
        return false;
      } catch (error) {
        return hasReason(error, 'NotFound');
      }
    },
    60_000,
  );
}

async function waitForReady(name: string, groups: number): Promise<void> {
  await waitFor(
    `${groups} groups of ${name} to serve`,
    async () => {
      const seen = (await readService(name)).status?.groups;
      return seen?.ready === groups && seen.wanted === groups && groupsOf(name).length === groups;
    },
    60_000,
  );
}

function sameAs(pod: Pod | undefined): (other: Pod) => boolean {
  return ({ metadata }) => metadata.uid === pod?.metadata.uid;
}

async function pageOf({ address }: Controller, path: string): Promise<string> {
  const response = await fetch(`http://${address}${path}`);
  return `${response.status} ${await response.text()}`;
}

/** Undefined: nobody has looked at the budget as it is now. */
async function allowedEvictions(name: string): Promise<number | undefined> {
  const type = resourceTypes.podDisruptionBudgets;
  const { metadata, status } = await stage.client.get(type, `${name}-groups`, never);
  const { observedGeneration, disruptionsAllowed } = status as {
    readonly observedGeneration?: number;
    readonly disruptionsAllowed?: number;
  };
  return observedGeneration === metadata.generation ? disruptionsAllowed : undefined;
}

describe('a controller', () => {
  let controller: Controller & InProcess;
  beforeAll(async () => {
    controller = await stage.startController();
    await waitFor('leadership', () => controller.leading, 60_000);
  });
  afterAll(async () => controller.close());

  it('prepares a model at zero, wakes all groups in one decision, drains them, and leaves nothing behind', async () => {
    const dispatcher = stage.startDispatcher('model-chat');
    await createService('chat', {
      tensorParallel: 2,
      placement: 'spread',
      scaling: {
        min: 0,
        max: 4,
        targetWaitSeconds: 10,
        groupTokensPerSecond: 1000,
      },
      drainSeconds: 30,
    });
    await waitFor('the model to be found', async () =>
      (await conditionOf('chat', 'ModelFound')).startsWith('True'),
    );
    await waitFor('the prepare pod to be gone', () => preparePodsOf('chat').length === 0);
    expect(groupsOf('chat')).toEqual([]);
    expect(await conditionOf('chat', 'Ready')).toContain('True AtZero');

    // Forty requests within a fifth of a second: 40 000 tokens need four groups.
    const beginMs = performance.now();
    for (let request = 0; request < 40; request++) {
      dispatcher.arrive(1, 1000);
    }
    await waitFor('groups', () => groupsOf('chat').length > 0);
    const decisionMs = performance.now() - beginMs;
    console.log(`from the first record to the first group's pod: ${decisionMs.toFixed(0)} ms`);
    expect(decisionMs).toBeLessThan(25_000);
    await waitFor('all groups to serve', async () => (await readService('chat')).status?.groups?.ready === 4);
    expect(groupPodsOf('chat')).toHaveLength(8);
    expect(await eventsFrom('chat', 'Scaled: 0 ->')).toEqual([expect.stringContaining('0 -> 4')]);

    const inFlight = Object.fromEntries(groupsOf('chat').map((group) => [group, 10_000]));
    dispatcher.load = { waitingRequests: 0, waitingTokens: 0, inFlight };

    // One group still works: it is the last to go, and not before it holds nothing.
    const [busy = ''] = groupsOf('chat');
    dispatcher.load = { waitingRequests: 0, waitingTokens: 0, inFlight: { [busy]: 5000 } };
    await patchService('chat', { scaling: { max: 1 } });
    await waitFor('one group to be left', () => groupsOf('chat').length === 1, 60_000);
    expect(groupsOf('chat')).toEqual([busy]);

    await stage.client.delete(resourceTypes.modelServices, 'chat', {}, never);
    await waitFor('the last group to be marked', () => dispatcher.marks.has(busy));
    expect(groupsOf('chat')).toEqual([busy]);
    dispatcher.load = { waitingRequests: 0, waitingTokens: 0, inFlight: {} };
    await deleteService('chat').catch(() => undefined);
    await waitFor('the pods to be gone', () => groupPodsOf('chat').length === 0);
    await waitFor('the marks to be gone', () => dispatcher.marks.size === 0);
    for await (const models of stage.catalog.follow(never)) {
      expect(models.map(({ name }) => name)).not.toContain('model-chat');
      break;
    }
    // The garbage collector takes the Service and the disruption budget; it looks for types that it does not know yet
    // every half a minute.
    const left = async (): Promise<string> =>
      stage.plane.kubectl([
        'get',
        'pods,services,poddisruptionbudgets',
        `--namespace=${namespace}`,
        '--output=name',
      ]);
    await waitFor('nothing to be left', async () => (await left()) === '', 120_000);
  });

  it('reports a missing model, creates no groups, does not retry, and continues once the spec is corrected', async () => {
    stage.kubelet.prepare = { exitCode: 3, message: 'prepare: /checkpoint holds no config.json' };
    const uids = new Set<string>();
    const stop = stage.pods.onChange(() => {
      for (const { metadata } of preparePodsOf('lost')) {
        uids.add(metadata.uid);
      }
    });
    await createService('lost', { scaling: { min: 1, max: 1 } });
    await waitFor('the condition', async () =>
      (await conditionOf('lost', 'ModelFound')).startsWith('False NotFound'),
    );
    expect(await conditionOf('lost', 'ModelFound')).toContain('/checkpoint holds no config.json');
    await pause(6_000, never);
    expect(uids.size).toBe(1);
    expect(groupsOf('lost')).toEqual([]);
    const described = await stage.plane.kubectl([
      'describe',
      'modelservice/lost',
      `--namespace=${namespace}`,
    ]);
    expect(described).toContain('ModelNotFound');
    expect(await conditionOf('lost', 'Ready')).toContain('/checkpoint holds no config.json');

    stage.kubelet.prepare = undefined;
    await patchService('lost', { model: { source: { hostPath: '/models/other' } } });
    await waitFor('a group', () => groupsOf('lost').length === 1);
    // The status is written after the group.
    await waitFor('the condition to turn', async () =>
      (await conditionOf('lost', 'ModelFound')).startsWith('True'),
    );
    stop();
    await deleteService('lost');
  });

  it('replaces groups one by one, keeps the serving ones when that is reverted, and rebuilds a group once', async () => {
    const dispatcher = stage.startDispatcher('model-roll');
    await createService('roll', { scaling: { min: 3, max: 3 }, drainSeconds: 1 });
    await waitForReady('roll', 3);
    const before = groupsOf('roll');

    // The new groups do not start: the old ones serve on, and come back as they are.
    stage.kubelet.starts = false;
    await patchService('roll', { template: { env: [{ name: 'MIMO_WORKER_LOG_LEVEL', value: 'debug' }] } });
    await waitFor('a surge', () => groupsOf('roll').length === 4);
    await pause(3_000, never);
    expect(groupsOf('roll')).toEqual(expect.arrayContaining([...before]));
    expect(groupsOf('roll')).toHaveLength(4);
    await patchService('roll', { template: { env: [] } });
    await waitFor('the surge to be gone', () => groupsOf('roll').length === 3);
    expect(groupsOf('roll')).toEqual(before);

    stage.kubelet.starts = true;
    await patchService('roll', { template: { env: [{ name: 'MIMO_WORKER_LOG_LEVEL', value: 'debug' }] } });
    await waitFor(
      'all groups to be replaced',
      () => !groupsOf('roll').some((group) => before.includes(group)),
      60_000,
    );
    await waitForReady('roll', 3);
    await waitFor('the marks to be gone', () => dispatcher.marks.size === 0);

    const [victim] = groupPodsOf('roll');
    const known = new Set(groupPodsOf('roll').map(({ metadata }) => metadata.uid));
    await stage.kubelet.end(victim as Pod, { exitCode: 137, reason: 'OOMKilled', message: '' });
    await waitFor('the group to be gone', () => !groupPodsOf('roll').some(sameAs(victim)));
    await waitForReady('roll', 3);
    const rebuilt = groupPodsOf('roll').filter(({ metadata }) => !known.has(metadata.uid));
    expect(rebuilt).toHaveLength(1);
    expect(await eventsFrom('roll', 'GroupFailed')).toEqual([
      expect.stringContaining('rank-0: OOMKilled, exit code 137'),
    ]);
    await deleteService('roll');
  });

  it('shows in kubectl describe alone why it did not scale', async () => {
    stage.startDispatcher('model-stuck');
    await createService('stuck', { scaling: { min: 1, max: 2 } });
    await waitForReady('stuck', 1);
    await patchService('stuck', {
      model: { precision: 'bf16' },
      resources: { accelerators: 1 },
      scaling: { min: 2 },
    });
    const described = async (): Promise<string> =>
      stage.plane.kubectl(['describe', 'modelservice/stuck', `--namespace=${namespace}`]);
    await waitFor('the words of the scheduler', async () =>
      (await described()).includes('Insufficient nvidia.com/gpu'),
    );
    expect((await readService('stuck')).status?.lastDecision?.blocker).toContain(
      'Insufficient nvidia.com/gpu',
    );
    expect((await readService('stuck')).status?.groups?.ready).toBe(1);
    await deleteService('stuck');

    await stage.plane.kubectl(['create', 'quota', 'few', '--hard=pods=1', `--namespace=${namespace}`]);
    stage.startDispatcher('model-refused');
    await createService('refused', { scaling: { min: 3, max: 3 } });
    await waitFor('the words of the API server', async () =>
      (await conditionOf('refused', 'Degraded')).includes('exceeded quota'),
    );
    await stage.plane.kubectl(['delete', 'quota', 'few', `--namespace=${namespace}`]);
    await waitForReady('refused', 3);
    await deleteService('refused');
  });

  it('keeps the count and the groups while the queue is unreachable', async () => {
    stage.startDispatcher('model-held');
    await createService('held', { scaling: { min: 0, max: 4 }, drainSeconds: 60 });
    await patchService('held', { scaling: { min: 2 } });
    await waitForReady('held', 2);
    const before = groupsOf('held');
    await stage.stopNats();
    await waitFor('the queue to be unknown', async () =>
      (await conditionOf('held', 'ScalingActive')).includes('QueueUnknown'),
    );
    await patchService('held', { scaling: { min: 0 } });
    await pause(5_000, never);
    expect(groupsOf('held')).toEqual(before);
    // Also their gates: what nobody knows is not that they cannot be reached.
    expect((await readService('held')).status?.groups?.ready).toBe(2);
    expect((await readService('held')).status?.lastDecision).toMatchObject({
      wanted: 2,
      reason: 'QueueUnknown',
    });
    await stage.startNats();
    await waitFor('the queue to be known', async () =>
      (await conditionOf('held', 'ScalingActive')).startsWith('True'),
    );
    await deleteService('held');
  });

  it('serves a model for the oldest service that names it', async () => {
    const model = { name: 'model-shared', source: { hostPath: '/models/mimo' } };
    stage.startDispatcher('model-shared');
    await createService('first', { model, scaling: { min: 1, max: 1 } });
    await waitForReady('first', 1);
    // Creation times have seconds.
    await pause(1_100, never);
    await createService('second', { model, scaling: { min: 1, max: 1 } });
    await waitFor('the refusal', async () =>
      (await conditionOf('second', 'ModelFound')).includes(
        'ModelService first already serves a model of this name',
      ),
    );
    expect(groupsOf('second')).toEqual([]);
    await deleteService('first');
    await waitForReady('second', 1);
    await deleteService('second');
  });

  it('allows one group to be evicted, and no other until it is rebuilt', async () => {
    stage.startDispatcher('model-evict');
    await createService('evict', { tensorParallel: 2, placement: 'spread', scaling: { min: 2, max: 2 } });
    await waitForReady('evict', 2);
    const [groupA = '', groupB = ''] = groupsOf('evict');
    const evict = async (pod: string): Promise<string> => {
      const eviction = { apiVersion: 'policy/v1', kind: 'Eviction', metadata: { name: pod, namespace } };
      const path = `/api/v1/namespaces/${namespace}/pods/${pod}/eviction`;
      return stage.plane.kubectl(['create', '--raw', path, '--filename=-'], JSON.stringify(eviction)).then(
        () => 'evicted',
        (error: unknown) => String(error),
      );
    };
    await waitFor('one eviction to be allowed', async () => (await allowedEvictions('evict')) === 1);
    stage.kubelet.starts = false;
    expect(await evict(`${groupA}-0`)).toBe('evicted');
    await waitFor('the rest of the group to be gone', () => !groupsOf('evict').includes(groupA));
    await pause(2_000, never);
    expect(await evict(`${groupB}-1`)).toContain("would violate the pod's disruption budget");
    stage.kubelet.starts = true;
    await waitForReady('evict', 2);
    await waitFor('one eviction to be allowed', async () => (await allowedEvictions('evict')) === 1);
    expect(await evict(`${groupB}-1`)).toBe('evicted');
    await deleteService('evict');
  });

  it("writes the tenants' keys, and reports on each tenant what is missing", async () => {
    const sha256 = 'c'.repeat(64);
    const tenant = { apiVersion: resourceTypes.tenants.apiVersion, kind: 'Tenant' };
    for (const name of ['team-a', 'team-b']) {
      const spec = { apiKeys: [{ secretName: name }], allowedModels: ['mimo'] };
      const object = { ...tenant, metadata: { name }, spec };
      await stage.client.create(resourceTypes.tenants, object, never);
    }
    const addSecret = async (name: string): Promise<string> =>
      stage.plane.kubectl([
        'create',
        'secret',
        'generic',
        name,
        `--from-literal=apiKey=${sha256.replace('c', name.at(-1) ?? '')}`,
        `--namespace=${namespace}`,
      ]);
    const keys = async (): Promise<unknown> => {
      const secret: KubeObject & { readonly data?: Readonly<Record<string, string>> } =
        await stage.client.get(resourceTypes.secrets, 'mimo-tenant-keys', never);
      return JSON.parse(Buffer.from(secret.data?.['keys.json'] ?? '', 'base64').toString());
    };
    const ready = async (name: string): Promise<string> => {
      const { status } = await stage.client.get(resourceTypes.tenants, name, never);
      const { conditions } = status as { conditions?: { type: string; status: string; message: string }[] };
      const found = conditions?.find(({ type }) => type === 'Ready');
      return `${found?.status} ${found?.message}`;
    };
    await addSecret('team-a');
    await waitFor('the key of one', async () => (await ready('team-a')).startsWith('True'));
    await waitFor('what the other lacks', async () =>
      (await ready('team-b')).includes('False Secret team-b does not exist'),
    );
    expect(await keys()).toMatchObject({ keys: [{ tenant: 'team-a', models: ['mimo'] }] });
    await addSecret('team-b');
    await waitFor('the key of the other', async () => (await ready('team-b')).startsWith('True'));
    expect(await keys()).toMatchObject({ keys: [{ tenant: 'team-a' }, { tenant: 'team-b' }] });
    await stage.client.delete(resourceTypes.tenants, 'team-a', {}, never);
    await waitFor('one key to be left', async () => JSON.stringify(await keys()).includes('team-b'));
    await waitFor('the other to be gone', async () => !JSON.stringify(await keys()).includes('team-a'));
    await stage.client.delete(resourceTypes.tenants, 'team-b', {}, never);
  });

  it('serves its metrics and its health', async () => {
    expect(await pageOf(controller, '/healthz')).toBe('200 ok\n');
    expect(await pageOf(controller, '/readyz')).toBe('200 leading\n');
    expect(await pageOf(controller, '/other')).toBe('404 ');
    const metrics = await pageOf(controller, '/metrics');
    for (const line of [
      /controller_reconcile_total\{result="done".*\} \d+/,
      /controller_reconcile_seconds_bucket/,
      /controller_last_event_age_seconds\{resource="pods".*\} [\d.]+/,
      /controller_leader(\{.*\})? 1/,
      /controller_scale_decisions_total\{service="chat",reason="Backlog".*\} \d/,
    ]) {
      expect(metrics).toMatch(line);
    }
  });

  it('resumes a rollout after the API server was killed in the middle of it', async () => {
    stage.startDispatcher('model-cut');
    await createService('cut', { scaling: { min: 4, max: 4 }, rollout: { maxSurge: 2 }, drainSeconds: 1 });
    await waitForReady('cut', 4);
    const before = groupsOf('cut');
    const created = new Set<string>();
    const stop = stage.pods.onChange(() => {
      for (const { metadata } of groupPodsOf('cut')) {
        created.add(metadata.uid);
      }
    });
    await patchService('cut', { template: { env: [{ name: 'MIMO_WORKER_LOG_LEVEL', value: 'debug' }] } });
    await waitFor('the rollout to begin', () => groupsOf('cut').some((group) => !before.includes(group)));
    await stage.plane.stopApiserver('SIGKILL');
    await pause(2_000, never);
    await stage.plane.startApiserver();
    await waitFor(
      'the rollout to end',
      async () => {
        const { groups } = (await readService('cut')).status ?? {};
        const replaced = !groupsOf('cut').some((group) => before.includes(group));
        return groups?.updated === 4 && groups.ready === 4 && groupsOf('cut').length === 4 && replaced;
      },
      120_000,
    );
    // Nothing was created twice: four groups, and four in their place.
    expect(created.size).toBe(8);
    stop();
    await deleteService('cut');
  });

  it('tolerates other writers of its objects', async () => {
    stage.startDispatcher('model-busy');
    const disturbing = new AbortController();
    const disturb = (async () => {
      for (let count = 0; !disturbing.signal.aborted; count++) {
        const annotations = { 'example.com/count': String(count) };
        await stage.client
          .patch(resourceTypes.modelServices, 'busy', { metadata: { annotations } }, {}, never)
          .catch(() => undefined);
        await pause(5, disturbing.signal);
      }
    })();
    await createService('busy', { scaling: { min: 2, max: 2 } });
    await waitForReady('busy', 2);
    await deleteService('busy');
    disturbing.abort();
    await disturb;
    await waitFor('the pods to be gone', () => groupPodsOf('busy').length === 0);
    expect(groupsOf('busy')).toEqual([]);
  });
});

describe('two controllers', () => {
  it('act one at a time, and the other takes over the existing objects', async () => {
    stage.startDispatcher('model-pair');
    const first = await stage.startController({ MIMO_CONTROLLER_IDENTITY: 'first' });
    await waitFor('leadership', () => first.leading, 60_000);
    const second = await stage.startController({ MIMO_CONTROLLER_IDENTITY: 'second' });
    try {
      await createService('pair', { scaling: { min: 2, max: 2 } });
      await waitForReady('pair', 2);
      expect([first.leading, second.leading]).toEqual([true, false]);
      const before = groupPodsOf('pair').map(({ metadata }) => metadata.uid);
      const beginMs = performance.now();
      await first.close();
      await waitFor('the other to lead', () => second.leading, 60_000);
      console.log(`the other leads after ${(performance.now() - beginMs).toFixed(0)} ms`);
      await patchService('pair', { scaling: { min: 3, max: 3 } });
      await waitForReady('pair', 3);
      const after = groupPodsOf('pair').map(({ metadata }) => metadata.uid);
      expect(after).toEqual(expect.arrayContaining(before));
      await deleteService('pair');
    } finally {
      await second.close();
    }
  });
});

describe('two controllers whose clocks are ten minutes apart', () => {
  const main = join(import.meta.dirname, '../../controller/src/main.ts');
  const minuteMs = 60_000;
  const children: ChildProcess[] = [];
  afterAll(() => children.forEach((child) => child.kill('SIGKILL')));

  /** Starts one as a process and waits until it leads. */
  async function lead(clock: TestClock): Promise<ChildProcess> {
    const [address = ''] = await freeAddresses(1);
    const env = { ...(await stage.controllerEnvironment()), ...clock.env, MIMO_CONTROLLER_LISTEN: address };
    const child = spawn(process.execPath, [main], { env, stdio: 'ignore' });
    children.push(child);
    await waitFor(
      'leadership',
      async () => (await (await fetch(`http://${address}/readyz`)).text()).trim() === 'leading',
    );
    return child;
  }

  it('drain a group for its full time, even when a clock is set and the other takes over', async () => {
    const directory = await mkdtemp(join(tmpdir(), 'mimo-clocks-'));
    const behind = createTestClock(directory, 'behind', -5 * minuteMs);
    const first = await lead(behind);
    const dispatcher = stage.startDispatcher('model-late');
    await createService('late', { scaling: { min: 2, max: 2 }, drainSeconds: 120 });
    await waitForReady('late', 2);
    const inFlight = Object.fromEntries(groupsOf('late').map((group) => [group, 5_000]));
    dispatcher.load = { waitingRequests: 0, waitingTokens: 0, inFlight };
    await patchService('late', { scaling: { min: 1, max: 1 } });
    await waitFor('a group to be marked', () => dispatcher.marks.size === 1);
    const pods = groupPodsOf('late').map(({ metadata }) => metadata.uid);

    await behind.set(5 * minuteMs, [first.pid ?? 0]);
    // Some rounds.
    await pause(5_000, never);
    expect(groupPodsOf('late').map(({ metadata }) => metadata.uid)).toEqual(pods);
    first.kill('SIGKILL');
    await lead(createTestClock(directory, 'ahead', 10 * minuteMs));
    await pause(5_000, never);
    expect(groupPodsOf('late').map(({ metadata }) => metadata.uid)).toEqual(pods);
    // What it writes is by the API server's clock, which is this machine's.
    const { status } = await readService('late');
    for (const { type, lastTransitionTime } of status?.conditions ?? []) {
      expect([type, Math.abs(Date.parse(lastTransitionTime) - Date.now()) < 4 * minuteMs]).toEqual([
        type,
        true,
      ]);
    }

    dispatcher.load = { waitingRequests: 0, waitingTokens: 0, inFlight: {} };
    await waitForReady('late', 1);
    await deleteService('late');
    await rm(directory, { recursive: true });
  });
});
