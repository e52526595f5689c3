// planService against a pretend API server, over thousands of seeded schedules: crashes in the middle of a plan,
// caches that lag or stand still, repeated events, lost ranks, failing starts, models that are not found at first, a
// queue that is silent or comes back empty, spec edits and reverts, deletion.
//   SIMULATION_SEED=123 npx vitest run controller/src/decide/simulation.test.ts     replays one; a failure shows its steps
//   SIMULATION_SEEDS=100000 npx vitest run controller/src/decide/simulation.test.ts runs more of them

import { describe, expect, it } from 'vitest';

import { parseModelService, type ModelService, type ModelServiceSpec } from '../resources/resources.ts';
import type { ModelServiceStatus, ScaleDecision } from '../resources/status.ts';
import { modelHashOf, revisionOf } from './revision.ts';
import { noFailures, type FailureMemory } from './failures.ts';
import type { WorkerSettings } from './containers.ts';
import { groupsFromPods, type GroupLoad, type ObservedPod } from './groups.ts';
import { podName } from './labels.ts';
import { planService, type Action } from './plan.ts';
import { noPreparation, planPrepare, type PrepareMemory, type PreparePod } from './prepare.ts';

const replaySeed = process.env['SIMULATION_SEED'];
const seeds = replaySeed === undefined ? Number(process.env['SIMULATION_SEEDS'] ?? 2000) : 1;
const firstSeed = Number(replaySeed ?? 1);
const stepMs = 5000;
const worker: WorkerSettings = {
  image: 'worker:1',
  cudaImage: 'worker:1-cuda',
  imagePullPolicy: 'IfNotPresent',
  natsUrl: 'nats://queue:4222',
  cache: { kind: 'pod' },
};

function createRandom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** What the controller sees: a snapshot of the store at some version, and the service as it was then. */
interface Snapshot {
  readonly version: number;
  readonly pods: readonly ObservedPod[];
  readonly preparePods: readonly PreparePod[];
  readonly service: ModelService;
  readonly wanted: number;
  readonly status: ModelServiceStatus;
}

class Simulation {
  readonly #random: () => number;
  readonly #log: string[] = [];
  readonly #pods = new Map<string, ObservedPod>();
  readonly #preparePods = new Map<string, PreparePod>();
  /** Drain marks as they are stored, and as the dispatcher has seen them. */
  readonly #marks = new Map<string, { readonly sinceUnixMs: number }>();
  #seenMarks: ReadonlySet<string> = new Set();
  #catalogued = false;
  #queueIsUp = true;
  /** Models whose preparation has succeeded once. */
  readonly #prepared = new Set<string>();
  #service: ModelService;
  #wanted: number;
  #status: ModelServiceStatus = {};
  #version = 1;
  #nowMs = 0;
  #nextUid = 1;
  #cache: Snapshot;
  #lastWrite = 0;
  #failures: FailureMemory = noFailures;
  #preparation: PrepareMemory = noPreparation;
  #gone = false;
  creations = 0;

  constructor(seed: number) {
    this.#random = createRandom(seed);
    const tensorParallel = this.#pick([1, 2, 4]);
    this.#service = parseModelService({
      metadata: { name: 'chat', namespace: 'models', uid: 'service-uid' },
      spec: {
        model: { name: 'mimo', source: { hostPath: '/models/a' } },
        tensorParallel,
        placement: this.#pick(['pod', 'spread']),
        scaling: { min: 0, max: 6 },
        rollout: this.#pick([
          { maxSurge: 1, maxUnavailable: 0 },
          { maxSurge: 0, maxUnavailable: 1 },
          { maxSurge: 2, maxUnavailable: 1 },
        ]),
        drainSeconds: this.#pick([0, 20, 60]),
      },
    });
    this.#wanted = this.#between(0, 6);
    this.#cache = this.#snapshot();
  }

  /** A schedule with faults, then calm, then deletion. Throws with the step at which an invariant broke. */
  run(): void {
    const steps = this.#between(10, 60);
    for (let step = 0; step < steps; step++) {
      this.#disturb();
      this.#reconcile(true);
      this.#live(true);
    }
    this.#settle(() => this.#hasConverged());
    assertThat(this.#hasConverged(), () => this.#story('it did not converge'));
    this.#assertEmptyPlan();

    this.#editService({ deletionTimestamp: '2026-01-01T00:00:00Z' });
    this.#settle(() => this.#gone);
    assertThat(this.#gone, () => this.#story('the finalizer was not removed'));
    const left = this.#pods.size + this.#preparePods.size + this.#marks.size;
    assertThat(left === 0, () => this.#story('pods or marks are left of a deleted service'));
    assertThat(!this.#catalogued, () =>
      this.#story('the catalogue still has the model of a deleted service'),
    );
  }

  /** Time without faults, until the condition holds or far longer than it may take. */
  #settle(condition: () => boolean): void {
    this.#queueIsUp = true;
    for (let step = 0; step < 300 && !condition(); step++) {
      this.#cache = this.#snapshot();
      this.#reconcile(false);
      this.#live(false);
    }
    this.#note('settled');
  }

  /** The world's own doing: spec edits, scale decisions, lost pods. */
  #disturb(): void {
    const chance = this.#random();
    if (chance < 0.08) {
      this.#wanted = this.#between(0, 6);
      this.#note(`wanted ${this.#wanted}`);
    } else if (chance < 0.16) {
      // One of three templates, so that going back is as common as going on.
      const hostPath = this.#pick(['/models/a', '/models/b', '/models/c']);
      const { spec } = this.#service;
      this.#editService({}, { ...spec, model: { ...spec.model, source: { hostPath } } });
    } else if (chance < 0.26) {
      const victim = this.#pick([...this.#pods.values(), undefined]);
      if (victim !== undefined) {
        this.#change(victim.name, this.#random() < 0.5 ? { phase: 'Failed', ready: false } : undefined);
        this.#note(`lost ${victim.name}`);
      }
    } else if (chance < 0.32) {
      // The process starts again: its memory is gone, its first list is fresh.
      this.#forget();
      this.#note('controller restarts');
    } else if (chance < 0.4) {
      this.#queueIsUp = !this.#queueIsUp;
      this.#note(`the queue is ${this.#queueIsUp ? 'up' : 'silent'}`);
    } else if (chance < 0.43) {
      this.#marks.clear();
      this.#catalogued = false;
      this.#note('the queue comes back empty');
    }
    // The watch delivers, lags or stalls.
    if (this.#random() < 0.6) {
      this.#cache = this.#snapshot();
    }
  }

  #forget(): void {
    this.#failures = noFailures;
    this.#preparation = noPreparation;
    this.#lastWrite = 0;
    this.#cache = this.#snapshot();
  }

  /** Pods start, fail to start, become ready, and leave; the dispatcher sees the marks, sooner or later. */
  #live(faulty: boolean): void {
    this.#nowMs += stepMs;
    if (this.#queueIsUp && this.#random() < 0.7) {
      this.#seenMarks = new Set(this.#marks.keys());
    }
    for (const pod of this.#preparePods.values()) {
      this.#livePreparing(pod, faulty);
    }
    for (const pod of this.#pods.values()) {
      const chance = this.#random();
      if (pod.deleting) {
        if (chance < 0.4) {
          this.#change(pod.name, undefined);
        }
      } else if (pod.phase === 'Pending' && chance < 0.5) {
        this.#change(pod.name, { phase: 'Running' });
      } else if (pod.phase === 'Running' && faulty && chance < 0.02) {
        this.#change(pod.name, { phase: 'Failed', ready: false });
      } else if (pod.phase === 'Running' && pod.ready !== pod.routable) {
        this.#change(pod.name, { ready: pod.routable });
      }
    }
  }

  #livePreparing(pod: PreparePod, faulty: boolean): void {
    const chance = this.#random();
    if (pod.deleting) {
      if (chance < 0.4) {
        this.#changePreparing(pod.name, undefined);
      }
    } else if (pod.phase === 'Pending' && chance < 0.5) {
      this.#changePreparing(pod.name, { phase: 'Running' });
    } else if (pod.phase === 'Running' && faulty && chance < 0.2) {
      const exitCode = this.#pick([1, 3]);
      const failure = exitCode === 3 ? 'no such model' : 'the hub does not answer';
      this.#changePreparing(pod.name, { phase: 'Failed', exitCode, failure, failedMs: this.#nowMs });
    } else if (pod.phase === 'Running' && this.#queueIsUp && chance < 0.8) {
      this.#catalogued = true;
      this.#prepared.add(pod.modelHash);
      this.#changePreparing(pod.name, { phase: 'Succeeded' });
    }
  }

  #loads(): ReadonlyMap<string, GroupLoad> {
    if (!this.#queueIsUp) {
      return new Map();
    }
    const groups = groupsFromPods([...this.#pods.values()], new Map());
    return new Map(
      groups
        .filter(({ pods }) => pods.every(({ phase, deleting }) => phase === 'Running' && !deleting))
        .filter(({ pods }) => pods.length === pods[0]?.groupPods)
        .map(({ name }) => {
          const inFlightRequests = this.#between(0, 3);
          const draining = this.#seenMarks.has(name);
          return [
            name,
            { routable: true, draining, inFlightRequests, inFlightTokens: inFlightRequests * 500 },
          ];
        }),
    );
  }

  #reconcile(faulty: boolean): void {
    const seen = this.#cache;
    const actions = this.#plan(seen);
    this.#assertPlan(seen, actions);
    // A crash in the middle: the remaining actions and the memory of the earlier ones are lost.
    const done = faulty && this.#random() < 0.1 ? this.#between(0, actions.length) : actions.length;
    for (const action of actions.slice(0, done)) {
      this.#act(action, seen, faulty);
    }
    if (done < actions.length) {
      this.#note('controller crashes');
      this.#forget();
    } else if (faulty && this.#random() < 0.1) {
      // The same event again: the second plan must stay within the same bounds.
      const again = this.#plan(this.#cache);
      this.#assertPlan(this.#cache, again);
      for (const action of again) {
        this.#act(action, this.#cache, faulty);
      }
    }
  }

  #plan(seen: Snapshot): readonly Action[] {
    const queue = 'unknown' as const;
    const { metadata } = seen.service;
    const preparation = planPrepare({
      service: metadata.name,
      generation: metadata.generation,
      deleting: metadata.deletionTimestamp !== undefined,
      modelHash: modelHashOf(seen.service.spec),
      pods: seen.preparePods,
      preparedModel: seen.status.preparedModel,
      published: this.#queueIsUp ? this.#catalogued : 'unknown',
      nameTakenBy: undefined,
      memory: this.#preparation,
      nowMs: this.#nowMs,
    });
    this.#preparation = preparation.memory;
    const { actions, failures } = planService({
      service: seen.service,
      revision: knownRevisionOf(seen.service.spec),
      pods: seen.pods,
      loads: this.#loads(),
      loadsComplete: this.#queueIsUp,
      marks: this.#queueIsUp ? new Map(this.#marks) : 'unknown',
      preparation,
      ownsCatalogueEntry: this.#queueIsUp ? this.#catalogued : 'unknown',
      settled: seen.version >= this.#lastWrite,
      decision: decisionOf(seen.wanted),
      queue,
      previous: seen.status,
      failures: this.#failures,
      nowMs: this.#nowMs,
    });
    this.#failures = failures;
    return actions;
  }

  #act(action: Action, seen: Snapshot, faulty: boolean): void {
    this.#note(`${action.kind} ${'group' in action ? action.group : ''}`);
    switch (action.kind) {
      case 'addFinalizer': {
        this.#editService({ finalizers: ['mimo-cluster.dev/drain'] });
        break;
      }
      case 'removeModel': {
        this.#catalogued = false;
        break;
      }
      case 'createPreparePod': {
        const { name, modelHash } = action;
        assertThat(!this.#preparePods.has(name), () => this.#story(`${name} was created while it exists`));
        this.#version += 1;
        this.#preparePods.set(name, {
          name,
          uid: `uid-${this.#nextUid++}`,
          modelHash,
          phase: 'Pending',
          deleting: false,
          exitCode: undefined,
          failedMs: undefined,
          blocker: undefined,
          failure: undefined,
        });
        break;
      }
      case 'deletePreparePod': {
        if (this.#preparePods.get(action.pod.name)?.uid === action.pod.uid) {
          this.#changePreparing(action.pod.name, { deleting: true });
        }
        break;
      }
      case 'markDraining': {
        this.#marks.set(action.group, { sinceUnixMs: action.sinceUnixMs });
        break;
      }
      case 'clearDraining': {
        this.#marks.delete(action.group);
        break;
      }
      case 'removeFinalizer': {
        this.#gone = true;
        this.#editService({ finalizers: [] });
        break;
      }
      case 'setRoutable': {
        this.#changeIf(action.pod, { routable: action.routable });
        break;
      }
      case 'drainGroup':
      case 'resumeGroup': {
        for (const pod of action.pods) {
          this.#changeIf(pod, { drainingSinceMs: action.kind === 'drainGroup' ? this.#nowMs : undefined });
        }
        break;
      }
      case 'deleteGroup': {
        for (const pod of action.pods) {
          this.#changeIf(pod, { deleting: true, ready: false });
        }
        break;
      }
      case 'createGroup': {
        this.#create(action.group, action.revision, action.index, seen.service, faulty);
        break;
      }
      case 'patchStatus': {
        this.#status = action.status;
        break;
      }
    }
    this.#lastWrite = action.kind === 'patchStatus' ? this.#lastWrite : this.#version;
  }

  #create(group: string, revision: string, index: number, service: ModelService, faulty: boolean): void {
    this.creations += 1;
    const model = modelHashOf(service.spec);
    assertThat(this.#prepared.has(model), () =>
      this.#story(`${group} was created before its model was found`),
    );
    assertThat(!this.#queueIsUp || !this.#marks.has(group), () =>
      this.#story(`${group} was created under the drain mark of an earlier life`),
    );
    const { tensorParallel, placement } = service.spec;
    const groupPods = placement === 'spread' ? tensorParallel : 1;
    for (let rank = 0; rank < groupPods; rank++) {
      if (faulty && this.#random() < 0.03) {
        // The API server refuses the rest: half a group is left behind.
        return;
      }
      const name = podName(group, rank);
      assertThat(!this.#pods.has(name), () => this.#story(`pod ${name} was created while it exists`));
      this.#version += 1;
      this.#pods.set(name, {
        name,
        uid: `uid-${this.#nextUid++}`,
        group,
        revision,
        index,
        rank,
        groupPods,
        phase: 'Pending',
        ready: false,
        deleting: false,
        createdMs: this.#nowMs,
        drainingSinceMs: undefined,
        blocker: undefined,
        failure: undefined,
        failedMs: undefined,
        routable: false,
      });
    }
  }

  /** Bounds that hold for every plan, whatever the controller sees. */
  #assertPlan(seen: Snapshot, actions: readonly Action[]): void {
    const { maxSurge, maxUnavailable } = seen.service.spec.rollout;
    const wanted = seen.service.metadata.deletionTimestamp === undefined ? seen.wanted : 0;
    const groups = groupsFromPods(seen.pods, new Map());
    const touched = new Set(
      actions.flatMap((action) =>
        action.kind === 'drainGroup' || action.kind === 'deleteGroup' ? [action.group] : [],
      ),
    );
    const kindsOf = (kind: Action['kind']): number => actions.filter((action) => action.kind === kind).length;
    const created = kindsOf('createGroup');

    const actual = groupsFromPods([...this.#pods.values()], new Map());
    const active = actual.filter(({ state }) => state === 'starting' || state === 'ready').length;
    const growth = created + kindsOf('resumeGroup');
    assertThat(growth === 0 || active + growth <= wanted + maxSurge, () =>
      this.#story(`${active} and ${growth} more groups, wanted ${wanted}`),
    );
    const serving = groups.filter(({ state }) => state === 'ready');
    const kept = serving.filter(({ name }) => !touched.has(name)).length;
    const floor = Math.min(serving.length, Math.max(0, wanted - maxUnavailable));
    assertThat(kept >= floor, () => this.#story(`${kept} of ${serving.length} groups that serve are kept`));

    for (const action of actions) {
      if (action.kind === 'deleteGroup' && action.reason.includes('holds no requests')) {
        assertThat(this.#seenMarks.has(action.group), () =>
          this.#story(`${action.group} was deleted before the dispatcher saw that it drains`),
        );
      }
    }

    const current = knownRevisionOf(seen.service.spec);
    const currentServing = serving.filter((group) => group.revision === current);
    const keptCurrent = currentServing.filter(({ name }) => !touched.has(name)).length;
    assertThat(keptCurrent >= Math.min(currentServing.length, wanted), () =>
      this.#story(`${keptCurrent} of ${currentServing.length} current groups that serve are kept`),
    );
  }

  #hasConverged(): boolean {
    const groups = groupsFromPods([...this.#pods.values()], new Map());
    const revision = knownRevisionOf(this.#service.spec);
    return (
      groups.length === this.#wanted &&
      this.#preparePods.size === 0 &&
      this.#marks.size === 0 &&
      this.#catalogued &&
      groups.every((group) => group.revision === revision && group.state === 'ready')
    );
  }

  #assertEmptyPlan(): void {
    // One more round writes the status that belongs to this state.
    this.#cache = this.#snapshot();
    this.#reconcile(false);
    this.#cache = this.#snapshot();
    const rest = this.#plan(this.#cache);
    assertThat(rest.length === 0, () =>
      this.#story(`planned although nothing changed: ${JSON.stringify(rest)}`),
    );
  }

  #editService(metadata: Partial<ModelService['metadata']>, spec = this.#service.spec): void {
    this.#version += 1;
    const generation = this.#service.metadata.generation + 1;
    this.#service = { metadata: { ...this.#service.metadata, generation, ...metadata }, spec };
    this.#note(`service edited: ${knownRevisionOf(spec)}`);
  }

  /** With a precondition on the uid, as the API server checks it. */
  #changeIf(
    { name, uid }: { readonly name: string; readonly uid: string },
    fields: Partial<ObservedPod>,
  ): void {
    if (this.#pods.get(name)?.uid === uid) {
      this.#change(name, fields);
    }
  }

  #change(name: string, fields: Partial<ObservedPod> | undefined): void {
    const pod = this.#pods.get(name);
    this.#version += 1;
    if (pod === undefined || fields === undefined) {
      this.#pods.delete(name);
    } else {
      this.#pods.set(name, { ...pod, ...fields });
    }
  }

  #changePreparing(name: string, fields: Partial<PreparePod> | undefined): void {
    const pod = this.#preparePods.get(name);
    this.#version += 1;
    if (pod === undefined || fields === undefined) {
      this.#preparePods.delete(name);
    } else {
      this.#preparePods.set(name, { ...pod, ...fields });
    }
  }

  #snapshot(): Snapshot {
    return {
      version: this.#version,
      pods: [...this.#pods.values()],
      preparePods: [...this.#preparePods.values()],
      service: this.#service,
      wanted: this.#wanted,
      status: this.#status,
    };
  }

  #between(low: number, high: number): number {
    return low + Math.floor(this.#random() * (high - low + 1));
  }

  #pick<T>(from: readonly T[]): T {
    return from[this.#between(0, from.length - 1)] as T;
  }

  #note(text: string): void {
    this.#log.push(`${this.#nowMs / 1000} s  ${text}`);
  }

  #story(what: string): string {
    return replaySeed === undefined ? what : `${what}\n${this.#log.join('\n')}`;
  }
}

const revisions = new WeakMap<ModelServiceSpec, string>();

/** Hashing is most of the time otherwise. */
function knownRevisionOf(spec: ModelServiceSpec): string {
  const revision = revisions.get(spec) ?? revisionOf(spec, worker);
  revisions.set(spec, revision);
  return revision;
}

/** Far cheaper than `expect`, which matters a million times a run. */
function assertThat(holds: boolean, story: () => string): void {
  if (!holds) {
    throw new Error(story());
  }
}

function decisionOf(wanted: number): ScaleDecision {
  return {
    wanted,
    before: wanted,
    reason: 'RecentLoad',
    message: '',
    formula: '',
    clamps: [],
    inputs: { readyGroups: 0, startingGroups: 0, groupTokensPerSecond: 1, startUpSeconds: 1 },
  };
}

describe('planService under seeded schedules', () => {
  it(`keeps its invariants and converges (${seeds} schedules from ${firstSeed})`, () => {
    let creations = 0;
    for (let seed = firstSeed; seed < firstSeed + seeds; seed++) {
      const simulation = new Simulation(seed);
      try {
        simulation.run();
      } catch (error) {
        throw new Error(`seed ${seed}; replay with SIMULATION_SEED=${seed}`, { cause: error });
      }
      creations += simulation.creations;
    }
    // A simulation in which nothing happens proves nothing.
    expect(creations).toBeGreaterThan(seeds * 2);
  }, 600_000);
});
