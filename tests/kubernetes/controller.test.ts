// The controller against a real API server and a real queue: what it makes, what it says of it, and that nothing is left.

import { labels, prepareLabels } from '@mimo/controller/decide/labels';
import type { RunningController } from '@mimo/controller/controller';
import { hasReason } from '@mimo/controller/kube/api-status';
import { resourceTypes, type KubeObject } from '@mimo/controller/kube/resource';
import type { ModelServiceStatus } from '@mimo/controller/status';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

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

async function eventsOf(service: string): Promise<readonly string[]> {
  const { items } = await stage.client.list(resourceTypes.events, {}, never);
  return items
    .map((item) => item as KubeObject & { reason: string; message: string; involvedObject: { name: string } })
    .filter(({ involvedObject }) => involvedObject.name === service)
    .map(({ reason, message }) => `${reason}: ${message}`);
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

describe('a controller', () => {
  let controller: RunningController;
  beforeAll(async () => {
    controller = await stage.startController();
    await waitFor('leadership', () => controller.leading, 60_000);
  });
  afterAll(async () => controller.close());

  it('prepares a model at zero, wakes to all groups in one decision, drains them, and leaves nothing', async () => {
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
    expect(decisionMs).toBeLessThan(5_000);
    await waitFor('all groups to serve', async () => (await readService('chat')).status?.groups?.ready === 4);
    expect(groupPodsOf('chat')).toHaveLength(8);
    const scaled = (await eventsOf('chat')).filter((event) => event.startsWith('Scaled: 0 ->'));
    expect(scaled).toEqual([expect.stringContaining('0 -> 4')]);

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
});
