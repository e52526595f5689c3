// One ModelService: observe, decide, act. Owns the order of a round, and keeps the memories of services between rounds
// (service-memory.ts). All decisions are made in decide/, all actions by act/.

import type { Log } from '@mimo/core/process/log';

import type { Actor, ActOn } from './act/act.ts';
import { actInOrder } from './act/act-in-order.ts';
import { decideScale } from './decide/autoscale.ts';
import type { WorkerSettings } from './decide/containers.ts';
import { planDisruption } from './decide/disruption.ts';
import { groupsFromPods, isServing, type ReplicaGroup } from './decide/groups.ts';
import { disruptionBudgetName, drainFinalizer, rankServiceName } from './decide/labels.ts';
import { planService, type Action } from './decide/plan.ts';
import { planPrepare, type Preparation } from './decide/prepare.ts';
import { observeStartUps, readyInMs } from './decide/start-up.ts';
import type { ApiClock } from './kube/api-clock.ts';
import type { EventRecorder } from './kube/events.ts';
import type { Informer } from './kube/informer.ts';
import { resourceTypes, type ObjectMetadata } from './kube/resource.ts';
import type { ControllerMetrics } from './metrics.ts';
import type { QueueObservation, QueueWatch } from './observe/queue-watch.ts';
import { podAt, type PodRecord, type ServiceRecord, type SupportRecord } from './observe/records.ts';
import type { ModelService } from './resources/resources.ts';
import { modelHashOf, revisionOf } from './decide/revision.ts';
import { createServiceMemory, latestStatus, type ServiceMemory } from './service-memory.ts';
import type { Condition, ModelServiceStatus, ScaleDecision } from './resources/status.ts';

/** The API server's state, kept current by watches. Pods are indexed by their service, services by their model. */
export interface Caches {
  readonly services: Informer<ServiceRecord>;
  readonly pods: Informer<PodRecord>;
  readonly budgets: Informer<SupportRecord>;
  readonly rankServices: Informer<SupportRecord>;
}

export interface ReconcilerOptions {
  readonly namespace: string;
  readonly caches: Caches;
  readonly watch: QueueWatch;
  /** The API server's time, which all decisions use. */
  readonly clock: ApiClock;
  readonly actor: Actor;
  readonly events: EventRecorder;
  readonly settings: WorkerSettings;
  readonly log: Log;
  readonly countDecision: ControllerMetrics['decisions'];
}

/** What one round goes by. */
interface Seen {
  readonly record: ServiceRecord;
  readonly service: ModelService;
  readonly pods: readonly PodRecord[];
  /** Those of them that are ranks. */
  readonly ranks: readonly NonNullable<PodRecord['rank']>[];
  readonly groups: readonly ReplicaGroup[];
  readonly queue: QueueObservation;
  readonly previous: ModelServiceStatus;
  readonly deleting: boolean;
  /** Other services of the same model name. */
  readonly sharers: readonly ServiceRecord[];
  readonly memory: ServiceMemory;
  /** Whether every own write has come back. */
  readonly settled: boolean;
  readonly nowMs: number;
}

/** A service's figures, for metrics. */
export interface ServiceGauge {
  readonly service: string;
  readonly wanted: number;
  readonly ready: number;
}

/** Reconciles the services of one namespace while this process leads. */
export class Reconciler {
  readonly #options: ReconcilerOptions;
  readonly #memories = new Map<string, ServiceMemory>();
  readonly #gauges = new Map<string, ServiceGauge>();

  constructor(options: ReconcilerOptions) {
    this.#options = options;
  }

  /** Wanted and ready groups of each service, as of its last round. */
  get gauges(): Iterable<ServiceGauge> {
    return this.#gauges.values();
  }

  /** One round for the service of this name; false if it is gone. Fails with the error of an action. */
  async reconcile(name: string, signal: AbortSignal): Promise<boolean> {
    const record = this.#options.caches.services.get(`${this.#options.namespace}/${name}`);
    if (record === undefined) {
      this.#memories.delete(name);
      this.#gauges.delete(name);
      return false;
    }
    await (record.service === undefined
      ? this.#refuse(record, signal)
      : this.#round(record, record.service, signal));
    return true;
  }

  async #round(record: ServiceRecord, service: ModelService, signal: AbortSignal): Promise<void> {
    const seen = this.#see(record, service);
    const { memory, groups, deleting, settled, nowMs } = seen;
    const preparation = this.#prepare(seen);
    memory.startUp = observeStartUps(memory.startUp, groups, nowMs);
    const decision = this.#decide(seen, preparation);
    const actions = this.#plan(seen, preparation, decision);
    this.#gauges.set(record.metadata.name, {
      service: record.metadata.name,
      wanted: deleting ? 0 : decision.wanted,
      ready: groups.filter(({ state }) => state === 'ready').length,
    });
    this.#tell(record, memory, { decision, preparation, queue: seen.queue });
    const on: ActOn = {
      record,
      service,
      signal,
      onWrite: (write) => memory.expectations.expect(write, performance.now()),
      onServiceWrite: ({ metadata, status }) => {
        memory.written = {
          resourceVersion: metadata.resourceVersion,
          status: status ?? {},
        };
      },
    };
    if (!deleting && settled) {
      await this.#support(on, seen, decision);
    }
    const { failure, refused } = await actInOrder(this.#options.actor, actions, on, memory.refused);
    memory.refused = refused;
    if (failure !== undefined) {
      throw failure;
    }
  }

  /** The inputs of the round: the pods, the queue, and the memory of earlier rounds. */
  #see(record: ServiceRecord, service: ModelService): Seen {
    const { caches, namespace, watch, clock } = this.#options;
    const nowMs = clock.nowMs();
    const { name, uid } = record.metadata;
    const pods = caches.pods
      .indexed(name)
      .filter(({ ownerUid }) => ownerUid === uid)
      .map((pod) => podAt(pod, nowMs));
    const ranks = pods.flatMap(({ rank }) => rank ?? []);
    const queue = watch.observe(service.spec.model.name, performance.now());
    const groups = groupsFromPods(ranks, queue.loads);
    const memory = this.#memoryOf(record, groups, nowMs);
    const settled = memory.expectations.settle((pod) => {
      const found = caches.pods.get(`${namespace}/${pod}`);
      return found === undefined ? undefined : { ...found };
    }, performance.now());
    return {
      record,
      service,
      pods,
      ranks,
      queue,
      groups,
      memory,
      settled,
      previous: latestStatus(memory, record),
      deleting: service.metadata.deletionTimestamp !== undefined,
      sharers: caches.services.indexed(service.spec.model.name).filter((other) => other.metadata.uid !== uid),
      nowMs,
    };
  }

  #prepare({ record, service, pods, queue, memory, previous, deleting, sharers, nowMs }: Seen): Preparation {
    const preparation = planPrepare({
      service: record.metadata.name,
      generation: service.metadata.generation,
      deleting,
      modelHash: modelHashOf(service.spec),
      pods: pods.flatMap(({ prepare }) => prepare ?? []),
      preparedModel: previous.preparedModel,
      published: queue.published,
      nameTakenBy: deleting ? undefined : sharers.find((other) => isOlder(other, record))?.metadata.name,
      memory: memory.preparation,
      nowMs,
    });
    memory.preparation = preparation.memory;
    return preparation;
  }

  #plan(seen: Seen, preparation: Preparation, decision: ScaleDecision): readonly Action[] {
    const { service, ranks, queue, memory, settled, previous, sharers, nowMs } = seen;
    const { actions, failures } = planService({
      service,
      revision: revisionOf(service.spec, this.#options.settings),
      pods: ranks,
      loads: queue.loads,
      loadsComplete: queue.loadsComplete,
      marks: queue.marks,
      preparation,
      // Models that the catalogue lost, too: gateways may still have them, and would publish them again.
      ownsCatalogueEntry: sharers.length === 0 && (queue.published === 'unknown' ? 'unknown' : true),
      settled,
      decision,
      queue: queue.queue,
      previous,
      failures: memory.failures,
      nowMs,
    });
    memory.failures = failures;
    return actions;
  }

  #decide({ service, memory, groups, queue, nowMs }: Seen, preparation: Preparation): ScaleDecision {
    const { scaling } = service.spec;
    const { startUpMs } = memory.startUp;
    const blocker =
      preparation.blocker ??
      memory.refused?.message ??
      groups.find((group) => group.state === 'starting' && group.blocker !== undefined)?.blocker;
    const { decision, memory: after } = decideScale(
      scaling,
      {
        queue: queue.queue,
        readyGroups: groups.filter(isServing).length,
        startingReadyInMs: readyInMs(groups, startUpMs ?? scaling.startUpSeconds * 1000, nowMs),
        startUpMs,
        blocker: blocker?.slice(0, 1024),
      },
      memory.scale,
      nowMs,
    );
    memory.scale = after;
    return decision;
  }

  /** The Service and the disruption budget of a service's groups. */
  async #support(on: ActOn, { memory, groups, nowMs }: Seen, decision: ScaleDecision): Promise<void> {
    const { caches, namespace, actor } = this.#options;
    const { name, uid } = on.record.metadata;
    if (caches.rankServices.get(`${namespace}/${rankServiceName(name)}`)?.ownerUid !== uid) {
      await actor.applyRankService(on);
    }
    const { placement, tensorParallel } = on.service.spec;
    const wantedPods = decision.wanted * (placement === 'spread' ? tensorParallel : 1);
    const plan = planDisruption(groups, wantedPods, { memory: memory.disruption, nowMs });
    memory.disruption = plan.memory;
    const budget = caches.budgets.get(`${namespace}/${disruptionBudgetName(name)}`);
    if (budget?.ownerUid !== uid || budget.minAvailable !== plan.minAvailable) {
      await actor.applyBudget(plan.minAvailable, on);
    }
  }

  /** Events and counters for the changes of this round. */
  #tell(
    record: ServiceRecord,
    memory: ServiceMemory,
    {
      decision,
      preparation,
      queue,
    }: {
      readonly decision: ScaleDecision;
      readonly preparation: Preparation;
      readonly queue: QueueObservation;
    },
  ): void {
    const { log, countDecision } = this.#options;
    const { name } = record.metadata;
    if (decision.wanted !== decision.before) {
      log.info({ service: name, decision }, 'count changed');
      countDecision({ service: name, reason: decision.reason });
      this.#event(record.metadata, 'Normal', 'Scaled', `${decision.message}; ${decision.formula}`);
    }
    const queueKnown = queue.queue !== 'unknown';
    if (queueKnown !== memory.queueKnown) {
      memory.queueKnown = queueKnown;
      if (!queueKnown) {
        this.#event(
          record.metadata,
          'Warning',
          'QueueUnknown',
          'the queue cannot be read: the count is held',
        );
      }
    }
    const { status, reason, message } = preparation.condition;
    if (`${status} ${reason}` !== memory.modelCondition) {
      memory.modelCondition = `${status} ${reason}`;
      this.#event(record.metadata, status === 'False' ? 'Warning' : 'Normal', `Model${reason}`, message);
    }
  }

  #event(metadata: ObjectMetadata, type: 'Normal' | 'Warning', reason: string, message: string): void {
    this.#options.events.record({ ...resourceTypes.modelServices, metadata }, { type, reason, message });
  }

  #memoryOf(record: ServiceRecord, groups: readonly ReplicaGroup[], nowMs: number): ServiceMemory {
    const { name, uid } = record.metadata;
    const known = this.#memories.get(name);
    if (known?.uid === uid) {
      return known;
    }
    const memory = createServiceMemory(record, groups, nowMs);
    this.#memories.set(name, memory);
    return memory;
  }

  /**
   * A service whose spec breaks a rule: reports it and changes nothing else; if it is deleted, its pods are deleted
   * at once.
   */
  async #refuse(record: ServiceRecord, signal: AbortSignal): Promise<void> {
    const { caches, actor } = this.#options;
    const { metadata, status, problem } = record;
    const on = { record, signal, onWrite: () => undefined, onServiceWrite: () => undefined };
    if (metadata.deletionTimestamp === undefined) {
      const message = problem.slice(0, 1024);
      const before = status.conditions?.find(({ type }) => type === 'Ready');
      if (before?.reason !== 'InvalidSpec' || before.message !== message) {
        const ready: Condition = {
          type: 'Ready',
          status: 'False',
          reason: 'InvalidSpec',
          message,
          observedGeneration: metadata.generation ?? 0,
          lastTransitionTime: this.#options.clock.now(),
        };
        const others = (status.conditions ?? []).filter(({ type }) => type !== 'Ready');
        const next = { ...status, conditions: [...others, ready] };
        await actor.actPlainly({ kind: 'patchStatus', status: next }, on);
      }
      return;
    }
    const pods = caches.pods.indexed(metadata.name).filter(({ ownerUid }) => ownerUid === metadata.uid);
    for (const pod of pods.filter(({ deleting }) => !deleting)) {
      await actor.actPlainly({ kind: 'deletePreparePod', pod, reason: 'the service is deleted' }, on);
    }
    if (pods.length === 0 && metadata.finalizers?.includes(drainFinalizer) === true) {
      await actor.actPlainly({ kind: 'removeFinalizer' }, on);
    }
  }
}

/** Of two services with one model, the older serves it; a service being deleted does not. */
function isOlder(other: ServiceRecord, than: ServiceRecord): boolean {
  const [a, b] = [other.metadata, than.metadata];
  if (a.deletionTimestamp !== undefined) {
    return false;
  }
  return a.creationTimestamp === b.creationTimestamp
    ? a.name < b.name
    : a.creationTimestamp < b.creationTimestamp;
}
