// `npm run bench -- reconcile [--services N] [--groups N]`: the controller's pure part over many ModelServices: a
// scaling decision and a plan for each, on a converged state. Prints the time of a reconcile and the heap.

import { setImmediate } from 'node:timers/promises';
import { parseArgs } from 'node:util';

import { createScaleMemory, decideScale, type ScaleMemory } from '@mimo/controller/decide/autoscale';
import { noFailures } from '@mimo/controller/decide/failures';
import type { WorkerSettings } from '@mimo/controller/decide/containers';
import type { GroupLoad, ObservedPod } from '@mimo/controller/decide/groups';
import { groupName, podName } from '@mimo/controller/decide/labels';
import { planService, type Action } from '@mimo/controller/decide/plan';
import { noPreparation, planPrepare } from '@mimo/controller/decide/prepare';
import { parseModelService, type ModelService } from '@mimo/controller/resources/resources';
import { modelHashOf, revisionOf } from '@mimo/controller/decide/revision';
import type { ModelServiceStatus } from '@mimo/controller/resources/status';

interface Reconciled {
  readonly service: ModelService;
  readonly revision: string;
  readonly pods: readonly ObservedPod[];
  readonly loads: ReadonlyMap<string, GroupLoad>;
  memory: ScaleMemory;
  status: ModelServiceStatus;
}

const tensorParallel = 2;
const worker: WorkerSettings = {
  image: 'worker:1',
  cudaImage: 'worker:1-cuda',
  imagePullPolicy: 'IfNotPresent',
  natsUrl: 'nats://queue:4222',
  cache: { kind: 'pod' },
};

function createState(index: number, groups: number): Reconciled {
  const service = parseModelService({
    metadata: {
      name: `chat-${index}`,
      namespace: 'models',
      uid: `u${index}`,
      finalizers: ['mimo-cluster.dev/drain'],
    },
    spec: {
      model: { name: `mimo-${index}`, source: { hostPath: '/models' } },
      tensorParallel,
      placement: 'spread',
      scaling: { min: groups, max: groups },
    },
  });
  const revision = revisionOf(service.spec, worker);
  const pods = Array.from({ length: groups * tensorParallel }, (_, at): ObservedPod => {
    const group = groupName(service.metadata.name, revision, Math.floor(at / tensorParallel));
    const rank = at % tensorParallel;
    return {
      name: podName(group, rank),
      uid: `${group}-${rank}`,
      group,
      revision,
      index: Math.floor(at / tensorParallel),
      rank,
      groupPods: tensorParallel,
      phase: 'Running',
      ready: true,
      routable: true,
      deleting: false,
      createdMs: 0,
      drainingSinceMs: undefined,
      blocker: undefined,
      failure: undefined,
      failedMs: undefined,
    };
  });
  const loads = new Map(
    pods.map(({ group }) => [
      group,
      { routable: true, draining: false, inFlightRequests: 3, inFlightTokens: 4000 },
    ]),
  );
  return {
    service,
    revision,
    pods,
    loads,
    memory: createScaleMemory(groups, 0),
    status: { preparedModel: modelHashOf(service.spec) },
  };
}

function reconcile(state: Reconciled, nowMs: number): readonly Action[] {
  const { service, revision, pods, loads, memory } = state;
  const groups = loads.size;
  const queue = {
    waitingRequests: 2,
    waitingTokens: 3000,
    inFlightRequests: groups * 3,
    inFlightTokens: groups * 4000,
    slots: groups * 16,
    oldestWaitingMs: 200,
    arrivedTokens: nowMs,
    endedTokens: nowMs,
    countersEpoch: 1,
  };
  const seen = { queue, readyGroups: groups, startingReadyInMs: [], startUpMs: 60_000 };
  const scaled = decideScale(service.spec.scaling, seen, memory, nowMs);
  state.memory = scaled.memory;
  const preparation = planPrepare({
    service: service.metadata.name,
    generation: service.metadata.generation,
    deleting: false,
    modelHash: modelHashOf(service.spec),
    pods: [],
    preparedModel: state.status.preparedModel,
    published: true,
    nameTakenBy: undefined,
    memory: noPreparation,
    nowMs,
  });
  const { actions } = planService({
    service,
    revision,
    pods,
    loads,
    loadsComplete: true,
    marks: new Map(),
    preparation,
    ownsCatalogueEntry: true,
    settled: true,
    decision: scaled.decision,
    queue,
    previous: state.status,
    failures: noFailures,
    nowMs,
  });
  for (const action of actions) {
    if (action.kind === 'patchStatus') {
      state.status = action.status;
    }
  }
  return actions;
}

/** Runs the benchmark: rounds of all services, two seconds of pretended time apart. */
export async function run(args: readonly string[], signal: AbortSignal): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: { services: { type: 'string', default: '1000' }, groups: { type: 'string', default: '5' } },
  });
  const [services, groups] = [Number(values.services), Number(values.groups)];
  const states = Array.from({ length: services }, (_, index) => createState(index, groups));
  const rounds = 120;
  const roundMs: number[] = [];
  let actions = 0;
  for (let round = 1; round <= rounds; round++) {
    await setImmediate();
    signal.throwIfAborted();
    const begin = performance.now();
    for (const state of states) {
      actions += reconcile(state, round * 2000).filter(({ kind }) => kind !== 'patchStatus').length;
    }
    roundMs.push(performance.now() - begin);
  }
  const sorted = roundMs.toSorted((a, b) => a - b);
  const report = {
    bench: 'reconcile',
    services,
    groups: services * groups,
    pods: services * groups * tensorParallel,
    // Nothing has changed, so a plan that does anything is a mistake.
    actions,
    reconcileP50Microseconds: Math.round(((sorted[rounds / 2] ?? 0) * 1000) / services),
    reconcileWorstRoundMicroseconds: Math.round(((sorted.at(-1) ?? 0) * 1000) / services),
    heapMebibytes: Math.round(process.memoryUsage().heapUsed / 2 ** 20),
    node: process.version,
  };
  console.log(`${report.reconcileP50Microseconds} µs a reconcile, ${report.heapMebibytes} MiB of heap`);
  console.log(JSON.stringify(report));
}
