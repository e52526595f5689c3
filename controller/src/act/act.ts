// Carries out one action at a time: API server, queue, catalogue. Owns the request behind an action, its
// preconditions and the event that reports it. Order and reasons belong to decide/plan.ts. An object that is gone, or
// was replaced by another of its name, is not an error: the plan came from an old observation, and the next one will
// know.

import { randomBytes, randomUUID } from 'node:crypto';

import type { DrainMarks } from '@mimo/core/bus/drain-marks';
import { ClusterError } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';
import type { ModelCatalog } from '@mimo/core/bus/model-catalog';

import type { Manifest, WorkerSettings } from '../decide/containers.ts';
import type { PodRef } from '../decide/groups.ts';
import { drainAnnotation, drainFinalizer, routableCondition } from '../decide/labels.ts';
import { disruptionBudget, groupPods, preparePod, rankService } from '../decide/manifests.ts';
import type { Action } from '../decide/plan.ts';
import type { OwnWrite } from './expectations.ts';
import { httpStatusOf } from '../kube/api-status.ts';
import type { KubeClient } from '../kube/client.ts';
import type { EventRecorder } from '../kube/events.ts';
import { resourceTypes, type KubeObject, type ObjectManifest } from '../kube/resource.ts';
import type { ServiceRecord } from '../observe/records.ts';
import type { ModelService } from '../resources/resources.ts';

/** What actions need. */
export interface ActorOptions {
  readonly client: KubeClient;
  readonly drainMarks: DrainMarks;
  readonly catalog: ModelCatalog;
  readonly events: EventRecorder;
  readonly settings: WorkerSettings;
  readonly log: Log;
}

/** Actions that need no spec: the only ones for a service whose spec is invalid. */
export type PlainAction = Extract<
  Action,
  { readonly kind: 'removeFinalizer' | 'deletePreparePod' | 'patchStatus' }
>;

/** The service that the actions are for. */
export interface ActOn extends PlainActOn {
  readonly service: ModelService;
}

export interface PlainActOn {
  readonly record: ServiceRecord;
  readonly signal: AbortSignal;
  /** Called for each write that the watches will show, even if a later one of the same action fails. */
  readonly onWrite: (write: OwnWrite) => void;
  /** Called with the service's new version. */
  readonly onServiceWrite: (object: KubeObject) => void;
}

type ActionOf<Kind extends Action['kind']> = Extract<Action, { readonly kind: Kind }>;

/** The longest wait for the catalogue: the next round tries again. */
const catalogueTimeoutMs = 5_000;

/** Carries out actions; holds nothing that needs closing. */
export class Actor {
  readonly #options: ActorOptions;

  constructor(options: ActorOptions) {
    this.#options = options;
  }

  /** Carries out an action. Fails with the API server's or the queue's error. */
  async act(action: Action, on: ActOn): Promise<void> {
    const model = on.service.spec.model.name;
    switch (action.kind) {
      case 'addFinalizer': {
        await this.#addFinalizer(on);
        break;
      }
      case 'removeModel': {
        const limit = AbortSignal.any([on.signal, AbortSignal.timeout(catalogueTimeoutMs)]);
        await this.#options.catalog.remove(model, limit);
        break;
      }
      case 'createPreparePod': {
        await this.#create(preparePod(on.service, action.modelHash, this.#options.settings), on);
        this.#tell(on, 'Normal', 'PrepareStarted', `${action.name} finds and prepares the model`);
        break;
      }
      case 'setRoutable': {
        await this.#setRoutable(action, on);
        break;
      }
      case 'markDraining': {
        await this.#options.drainMarks.mark(model, action.group, { sinceUnixMs: action.sinceUnixMs });
        break;
      }
      case 'clearDraining': {
        await this.#options.drainMarks.clear(model, action.group);
        break;
      }
      case 'drainGroup': {
        await this.#drainGroup(action, on);
        break;
      }
      case 'resumeGroup': {
        await this.#resumeGroup(action, on);
        break;
      }
      case 'deleteGroup': {
        await this.#deleteGroup(action, on);
        break;
      }
      case 'createGroup': {
        await this.#createGroup(action, on);
        break;
      }
      case 'removeFinalizer':
      case 'deletePreparePod':
      case 'patchStatus': {
        await this.actPlainly(action, on);
        break;
      }
    }
  }

  /** The same, for actions that need no spec. */
  async actPlainly(action: PlainAction, on: PlainActOn): Promise<void> {
    switch (action.kind) {
      case 'removeFinalizer': {
        const { uid, finalizers = [] } = on.record.metadata;
        const path = `/metadata/finalizers/${finalizers.indexOf(drainFinalizer)}`;
        const patch = [
          { op: 'test', path: '/metadata/uid', value: uid },
          { op: 'test', path, value: drainFinalizer },
          { op: 'remove', path },
        ] as const;
        await this.#patchService(patch, {}, on);
        break;
      }
      case 'deletePreparePod': {
        await this.#delete(action.pod, on);
        break;
      }
      case 'patchStatus': {
        await this.#patchStatus(action.status, on);
        break;
      }
    }
  }

  /** Creates or corrects the headless Service. */
  async applyRankService({ service, signal }: Pick<ActOn, 'service' | 'signal'>): Promise<void> {
    await this.#apply(resourceTypes.services, rankService(service), signal);
  }

  /** Updates the disruption budget to the plan. */
  async applyBudget(
    minAvailable: number,
    { service, signal }: Pick<ActOn, 'service' | 'signal'>,
  ): Promise<void> {
    await this.#apply(resourceTypes.podDisruptionBudgets, disruptionBudget(service, minAvailable), signal);
  }

  async #addFinalizer(on: ActOn): Promise<void> {
    const { uid, resourceVersion, finalizers = [] } = on.record.metadata;
    // The version protects finalizers that others added meanwhile.
    const metadata = { uid, resourceVersion, finalizers: [...finalizers, drainFinalizer] };
    await this.#patchService({ metadata }, {}, on);
  }

  async #drainGroup({ group, pods, reason }: ActionOf<'drainGroup'>, on: ActOn): Promise<void> {
    const sinceMs = this.#options.client.clock.nowMs();
    await this.#annotate(pods, new Date(sinceMs).toISOString(), on);
    this.#tell(on, 'Normal', 'GroupDraining', `${group}: ${reason}`);
    await this.#mark(group, (marks, model) => marks.mark(model, group, { sinceUnixMs: sinceMs }), on.service);
  }

  async #resumeGroup({ group, pods }: ActionOf<'resumeGroup'>, on: ActOn): Promise<void> {
    await this.#annotate(pods, null, on);
    this.#tell(on, 'Normal', 'GroupResumed', `${group} serves again`);
    await this.#mark(group, (marks, model) => marks.clear(model, group), on.service);
  }

  async #deleteGroup({ group, pods, reason, failed }: ActionOf<'deleteGroup'>, on: ActOn): Promise<void> {
    await settleAll(pods.map((pod) => this.#delete(pod, on)));
    if (failed) {
      this.#tell(on, 'Warning', 'GroupFailed', `${group} is ${reason}`);
    } else {
      this.#tell(on, 'Normal', 'GroupDeleted', `${group}: ${reason}`);
    }
  }

  /** All pods of one incarnation are created by one call, so that they share the random values drawn here. */
  async #createGroup({ group, revision, index }: ActionOf<'createGroup'>, on: ActOn): Promise<void> {
    const drawn = { groupToken: randomBytes(16).toString('hex'), life: randomUUID() };
    const pods = groupPods(on.service, { group, revision, index, ...drawn }, this.#options.settings);
    await settleAll(pods.map((pod) => this.#create(pod, on)));
    const count = `${pods.length} ${pods.length === 1 ? 'pod' : 'pods'}`;
    this.#tell(on, 'Normal', 'GroupCreated', `${group} of ${count}`);
  }

  /** Replaces the whole status. */
  async #patchStatus(status: unknown, on: PlainActOn): Promise<void> {
    const patch = [
      { op: 'test', path: '/metadata/uid', value: on.record.metadata.uid },
      { op: 'add', path: '/status', value: status },
    ] as const;
    await this.#patchService(patch, { subresource: 'status' }, on);
  }

  async #patchService(
    patch: Parameters<KubeClient['patch']>[2],
    options: Parameters<KubeClient['patch']>[3],
    { record, signal, onServiceWrite }: PlainActOn,
  ): Promise<void> {
    const type = resourceTypes.modelServices;
    onServiceWrite(await this.#options.client.patch(type, record.metadata.name, patch, options, signal));
  }

  async #setRoutable(
    { pod, routable }: { readonly pod: PodRef; readonly routable: boolean },
    on: ActOn,
  ): Promise<void> {
    const condition = {
      type: routableCondition,
      status: routable ? 'True' : 'False',
      reason: routable ? 'Reached' : 'NotReached',
      message: routable
        ? 'the dispatcher holds a channel to the whole group'
        : 'the dispatcher does not reach the whole group',
      lastTransitionTime: this.#options.client.clock.now(),
    };
    const manifest = { apiVersion: 'v1', kind: 'Pod', metadata: pod, status: { conditions: [condition] } };
    await this.#ifThere(pod, on, async () => {
      const options = { subresource: 'status' } as const;
      const object = await this.#options.client.apply(resourceTypes.pods, manifest, options, on.signal);
      on.onWrite(writeOf(object));
    });
  }

  async #annotate(pods: readonly PodRef[], since: string | null, on: ActOn): Promise<void> {
    await settleAll(
      pods.map((pod) =>
        this.#ifThere(pod, on, async () => {
          const patch = { metadata: { uid: pod.uid, annotations: { [drainAnnotation]: since } } };
          const object = await this.#options.client.patch(resourceTypes.pods, pod.name, patch, {}, on.signal);
          on.onWrite(writeOf(object));
        }),
      ),
    );
  }

  async #create(manifest: Manifest, on: ActOn): Promise<void> {
    const pod = manifest as unknown as ObjectManifest;
    on.onWrite(writeOf(await this.#options.client.create(resourceTypes.pods, pod, on.signal)));
  }

  async #delete(pod: PodRef, on: PlainActOn): Promise<void> {
    const { name, uid } = pod;
    await this.#ifThere(pod, on, async () => {
      await this.#options.client.delete(resourceTypes.pods, name, { uid }, on.signal);
      on.onWrite({ name, uid, resourceVersion: undefined });
    });
  }

  /** Changes a pod; does nothing if it is gone or was replaced by another of its name. */
  async #ifThere({ name, uid }: PodRef, { signal }: PlainActOn, act: () => Promise<void>): Promise<void> {
    try {
      await act();
    } catch (error) {
      // A failed precondition on the uid returns 409 or 422, and so do other errors: read the pod to find out.
      const status = httpStatusOf(error);
      if (
        status !== 404 &&
        !((status === 409 || status === 422) && (await this.#isGone(name, uid, signal)))
      ) {
        throw error;
      }
    }
  }

  async #isGone(name: string, uid: string, signal: AbortSignal): Promise<boolean> {
    try {
      return (await this.#options.client.get(resourceTypes.pods, name, signal)).metadata.uid !== uid;
    } catch (error) {
      return httpStatusOf(error) === 404;
    }
  }

  async #apply(
    type: (typeof resourceTypes)['services' | 'podDisruptionBudgets'],
    manifest: Manifest,
    signal: AbortSignal,
  ): Promise<void> {
    await this.#options.client.apply(type, manifest as unknown as ObjectManifest, {}, signal);
  }

  /**
   * Notifies the dispatcher at once. If that fails, the pods' annotation is the truth, and the next plan follows it.
   */
  async #mark(
    group: string,
    act: (marks: DrainMarks, model: string) => Promise<void>,
    { spec }: ModelService,
  ): Promise<void> {
    try {
      await act(this.#options.drainMarks, spec.model.name);
    } catch (error) {
      this.#options.log.warn({ error: ClusterError.from(error), group }, 'cannot write the drain mark');
    }
  }

  #tell({ record }: ActOn, type: 'Normal' | 'Warning', reason: string, message: string): void {
    this.#options.events.record(
      { ...resourceTypes.modelServices, metadata: record.metadata },
      { type, reason, message },
    );
  }
}

function writeOf({ metadata }: KubeObject): OwnWrite {
  return { name: metadata.name, uid: metadata.uid, resourceVersion: metadata.resourceVersion };
}

/** Waits for all, then fails with the first failure; successes were reported. */
async function settleAll(acts: readonly Promise<void>[]): Promise<void> {
  const results = await Promise.allSettled(acts);
  const failed = results.find((result) => result.status === 'rejected');
  if (failed !== undefined) {
    throw ClusterError.from(failed.reason);
  }
}
