// What a controller does while it leads: rounds of the services that have changed or whose time has come, and the
// tenants' keys. Owns when a service gets a round and what happens after one that failed; reconcile.ts is the round.

import { ClusterError } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';
import type { Bus } from '@mimo/core/bus/bus';
import type { ModelCatalog } from '@mimo/core/bus/model-catalog';

import { Actor } from './act/act.ts';
import { workerSettingsOf, type ControllerConfig } from './config.ts';
import { serviceOfPodName } from './decide/labels.ts';
import type { KubeClient } from './kube/client.ts';
import type { EventRecorder } from './kube/events.ts';
import type { Informer } from './kube/informer.ts';
import { WorkQueue } from './kube/work-queue.ts';
import type { ControllerMetrics } from './metrics.ts';
import { QueueWatch } from './observe/queue-watch.ts';
import type { TenantRecord } from './observe/records.ts';
import { keepTenantKeys } from './observe/tenants.ts';
import { Reconciler, type Caches, type ServiceGauge } from './reconcile.ts';

/** Interval of rounds for a service without events: drains end, and rules with times apply. */
const roundMs = 2_000;
/** After a failed round; doubles with each in a row. */
const retryMinMs = 500;
const retryMaxMs = 30_000;
/** Rounds that may wait for the API server at the same time. */
const takers = 4;

/** What rounds work with. */
export interface RoundsParts {
  readonly config: ControllerConfig;
  readonly client: KubeClient;
  readonly bus: Bus;
  readonly catalog: ModelCatalog;
  readonly events: EventRecorder;
  readonly caches: Caches;
  readonly tenants: Informer<TenantRecord>;
  readonly metrics: ControllerMetrics;
  readonly log: Log;
}

/** One time of leading. */
interface Term {
  readonly reconciler: Reconciler;
  readonly work: WorkQueue;
}

/** The rounds of a controller, which run during each of its terms as the leader. */
export class Rounds {
  readonly #parts: RoundsParts;
  #term: Term | undefined;

  constructor(parts: RoundsParts) {
    this.#parts = parts;
  }

  get leading(): boolean {
    return this.#term !== undefined;
  }

  /** Services that wait for a round. */
  get waiting(): number {
    return this.#term?.work.length ?? 0;
  }

  /** Wanted and ready groups of each service; nothing while another controller leads. */
  get gauges(): Iterable<ServiceGauge> {
    return this.#term?.reconciler.gauges ?? [];
  }

  /** Acts until the signal fires because lost the leadership or the process stops. */
  async lead(signal: AbortSignal): Promise<void> {
    const { caches, client, config, log, tenants } = this.#parts;
    const informers = [...Object.values(caches), tenants] as readonly Informer<unknown>[];
    await Promise.all(informers.map((informer) => informer.whenSynced(signal)));
    const work = new WorkQueue({ retryMinMs, retryMaxMs });
    const watch = this.#openWatch(work);
    const term = { reconciler: this.#createReconciler(watch), work };
    const stops = this.#followCaches(work, watch);
    this.#term = term;
    try {
      await Promise.all([
        ...Array.from({ length: takers }, () => this.#takeRounds(term, signal)),
        keepTenantKeys({ client, tenants, secretName: config.tenantSecret, log }, signal),
      ]);
    } finally {
      this.#term = undefined;
      for (const stop of stops) {
        stop();
      }
      work.close();
      await watch.close();
    }
  }

  /** What queue and catalogue say of a model makes a round due for its services. */
  #openWatch(work: WorkQueue): QueueWatch {
    const { bus, caches, catalog, log } = this.#parts;
    const onChange = (model: string): void => {
      for (const { metadata } of caches.services.indexed(model)) {
        work.add(metadata.name);
      }
    };
    return new QueueWatch({ bus, catalog, log, onChange });
  }

  #createReconciler(watch: QueueWatch): Reconciler {
    const { bus, caches, catalog, client, config, events, log, metrics } = this.#parts;
    const settings = workerSettingsOf(config);
    return new Reconciler({
      namespace: config.namespace,
      caches,
      watch,
      clock: client.clock,
      actor: new Actor({ client, drainMarks: bus.drainMarks, catalog, events, settings, log }),
      events,
      settings,
      log,
      countDecision: metrics.decisions,
    });
  }

  /** A change of a service, or of something that belongs to one, makes a round due. Gives what stops the following. */
  #followCaches(work: WorkQueue, watch: QueueWatch): readonly (() => void)[] {
    const { services, pods, budgets, rankServices } = this.#parts.caches;
    const addOwner = (suffix: string) => (key: string) => {
      const name = nameOf(key);
      if (name.endsWith(suffix)) {
        work.add(name.slice(0, -suffix.length));
      }
    };
    return [
      services.onChange((key) => {
        work.add(nameOf(key));
        watch.follow([...services.list()].flatMap(({ service }) => service?.spec.model.name ?? []));
      }),
      pods.onChange((key) => {
        const name = serviceOfPodName(nameOf(key));
        if (name !== undefined) {
          work.add(name);
        }
      }),
      budgets.onChange(addOwner('-groups')),
      rankServices.onChange(addOwner('-ranks')),
    ];
  }

  async #takeRounds({ reconciler, work }: Term, signal: AbortSignal): Promise<void> {
    const { log, metrics } = this.#parts;
    while (!signal.aborted) {
      const taken = await work.take(signal).catch((error: unknown) => {
        if (signal.aborted) {
          return undefined;
        }
        throw error;
      });
      if (taken === undefined) {
        return;
      }
      const beginMs = performance.now();
      let result = 'done';
      try {
        const there = await reconciler.reconcile(taken.key, signal);
        taken.done();
        if (there) {
          work.addAfter(taken.key, roundMs);
        }
      } catch (caught) {
        const error = ClusterError.from(caught);
        result = error.code;
        const retryInMs = taken.failed();
        if (!signal.aborted) {
          log.warn({ error, service: taken.key, retryInMs }, 'round failed');
        }
      }
      metrics.rounds({ result });
      metrics.roundTime(performance.now() - beginMs);
    }
  }
}

function nameOf(key: string): string {
  return key.slice(key.indexOf('/') + 1);
}
