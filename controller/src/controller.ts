// Assembles the controller: client, watches, queue, leadership, the rounds of every service, the tenants' keys,
// metrics and health.
// Its input is the configuration; main.ts owns the process. Watches run on every controller, so that a new leader
// already knows the cluster; actions run only on the leader.

import { hostname } from 'node:os';

import { ClusterError } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';
import { startMetrics, type Metrics } from '@mimo/core/process/metrics';
import type { Bus } from '@mimo/core/bus/bus';
import type { ModelCatalog } from '@mimo/core/bus/model-catalog';
import { createNatsBus } from '@mimo/core/bus/nats/bus';
import { createModelCatalog } from '@mimo/core/bus/nats/model-catalog';

import { Actor } from './act/act.ts';
import { workerSettingsOf, type ControllerConfig } from './config.ts';
import { managedBy, serviceOfPodName } from './decide/labels.ts';
import { KubeClient, loadKubeConfig } from './kube/client.ts';
import { EventRecorder } from './kube/events.ts';
import { startInformer, type Informer } from './kube/informer.ts';
import { runLeading } from './kube/leader-election.ts';
import { resourceTypes, type KubeObject, type ResourceType } from './kube/resource.ts';
import { WorkQueue } from './kube/work-queue.ts';
import { QueueWatch } from './observe/queue-watch.ts';
import { Reconciler, type Caches } from './reconcile.ts';
import { readPod, readService, readSupport, readTenant, type TenantRecord } from './observe/records.ts';
import { keepTenantKeys } from './observe/tenants.ts';

/** Interval of rounds for a service without events: drains end, and rules with times apply. */
const roundMs = 2_000;
/** After a failed round; doubles with each in a row. */
const retryMinMs = 500;
const retryMaxMs = 30_000;
/** Rounds that may wait for the API server at the same time. */
const takers = 4;

/** A running controller. Close it to release the lease and all resources. */
export interface RunningController {
  /** host:port of /metrics, /healthz and /readyz. */
  readonly address: string | undefined;
  readonly leading: boolean;
  /** Rejects if the controller cannot continue. */
  readonly ended: Promise<void>;
  close(): Promise<void>;
}

/** Starts the controller; it acts once it leads. Fails if the configuration cannot be used. */
export async function startController(config: ControllerConfig, log: Log): Promise<RunningController> {
  const controller = new Controller(config, log);
  await controller.start();
  return controller;
}

class Controller implements RunningController {
  readonly ended: Promise<void>;
  readonly #config: ControllerConfig;
  readonly #log: Log;
  readonly #client: KubeClient;
  readonly #bus: Bus;
  readonly #catalog: ModelCatalog;
  readonly #caches: Caches;
  readonly #tenants: Informer<TenantRecord>;
  readonly #events: EventRecorder;
  readonly #identity: string;
  readonly #stopping = new AbortController();
  readonly #end = Promise.withResolvers<void>();
  #metrics: Metrics | undefined;
  #reconciler: Reconciler | undefined;
  #work: WorkQueue | undefined;

  constructor(config: ControllerConfig, log: Log) {
    this.#config = config;
    this.#log = log;
    this.#identity = config.identity || hostname();
    const kubeconfig = config.kubeconfig === '' ? undefined : config.kubeconfig;
    this.#client = new KubeClient(loadKubeConfig(kubeconfig), { namespace: config.namespace });
    const replicas = config.natsReplicas;
    const bus = createNatsBus({
      servers: config.natsUrls,
      credentialsFile: config.natsCredentialsFile,
      clientName: `controller-${this.#identity}`,
      replicas,
      recordMaxAgeMs: config.recordMaxAgeMs,
      log,
    });
    this.#bus = bus;
    this.#catalog = createModelCatalog(bus.link, { replicas, log });
    this.#events = new EventRecorder({
      client: this.#client,
      component: 'mimo-controller',
      instance: this.#identity,
      log,
    });
    const ours = {
      labelSelector: Object.entries(managedBy)
        .map((pair) => pair.join('='))
        .join(','),
    };
    const watch = <T>(type: ResourceType, parse: (object: KubeObject) => T, more: object = {}): Informer<T> =>
      startInformer({ client: this.#client, type, parse, log, ...more });
    this.#caches = {
      services: startInformer({
        client: this.#client,
        type: resourceTypes.modelServices,
        parse: readService,
        index: ({ service }) => service?.spec.model.name,
        log,
      }),
      pods: startInformer({
        client: this.#client,
        type: resourceTypes.pods,
        selection: ours,
        parse: (pod, before) => readPod(pod, before, this.#client.clock.nowMs()),
        index: ({ service }) => service,
        log,
      }),
      budgets: watch(resourceTypes.podDisruptionBudgets, readSupport, { selection: ours }),
      rankServices: watch(resourceTypes.services, readSupport, { selection: ours }),
    };
    this.#tenants = watch(resourceTypes.tenants, readTenant);
    this.ended = this.#end.promise;
    this.ended.catch(() => undefined);
  }

  get address(): string | undefined {
    return this.#metrics?.address;
  }

  get leading(): boolean {
    return this.#reconciler !== undefined;
  }

  async start(): Promise<void> {
    this.#metrics = await this.#startMetrics();
    const { leaseName } = this.#config;
    const options = { client: this.#client, leaseName, identity: this.#identity, log: this.#log };
    runLeading(options, (signal) => this.#lead(signal), this.#stopping.signal).then(
      () => this.#end.resolve(),
      (error: unknown) => this.#end.reject(error),
    );
  }

  async close(): Promise<void> {
    this.#stopping.abort(new ClusterError('canceled', 'the controller is closed'));
    await this.ended.catch(() => undefined);
    await this.#events.close(AbortSignal.timeout(1_000));
    await Promise.all(this.#informers().map(([, informer]) => informer.close()));
    await Promise.all([this.#bus.close(), this.#metrics?.close()]);
    this.#client.close();
  }

  #informers(): readonly (readonly [string, Informer<unknown>])[] {
    return [...Object.entries(this.#caches), ['tenants', this.#tenants]];
  }

  /** Acts until the signal fires because lost the leadership or the process stops. */
  async #lead(signal: AbortSignal): Promise<void> {
    await Promise.all(this.#informers().map(([, informer]) => informer.whenSynced(signal)));
    const { services, pods, budgets, rankServices } = this.#caches;
    const work = new WorkQueue({ retryMinMs, retryMaxMs });
    const watch = new QueueWatch({
      bus: this.#bus,
      catalog: this.#catalog,
      log: this.#log,
      onChange: (model) => {
        for (const { metadata } of services.indexed(model)) {
          work.add(metadata.name);
        }
      },
    });
    const settings = workerSettingsOf(this.#config);
    const common = { events: this.#events, settings, log: this.#log };
    const { drainMarks } = this.#bus;
    const actor = new Actor({ client: this.#client, drainMarks, catalog: this.#catalog, ...common });
    const reconciler = new Reconciler({
      namespace: this.#config.namespace,
      caches: this.#caches,
      watch,
      clock: this.#client.clock,
      actor,
      countDecision: this.#countDecision,
      ...common,
    });
    const addOwner = (suffix: string) => (key: string) => {
      const name = nameOf(key);
      if (name.endsWith(suffix)) {
        work.add(name.slice(0, -suffix.length));
      }
    };
    const stops = [
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
    this.#reconciler = reconciler;
    this.#work = work;
    try {
      await Promise.all([
        ...Array.from({ length: takers }, () => this.#takeRounds(reconciler, work, signal)),
        keepTenantKeys(
          {
            client: this.#client,
            tenants: this.#tenants,
            secretName: this.#config.tenantSecret,
            log: this.#log,
          },
          signal,
        ),
      ]);
    } finally {
      this.#reconciler = undefined;
      this.#work = undefined;
      for (const stop of stops) {
        stop();
      }
      work.close();
      await watch.close();
    }
  }

  async #takeRounds(reconciler: Reconciler, work: WorkQueue, signal: AbortSignal): Promise<void> {
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
          this.#log.warn({ error, service: taken.key, retryInMs }, 'round failed');
        }
      }
      this.#countRound({ result });
      this.#timeRound(performance.now() - beginMs);
    }
  }

  #countRound: ReturnType<Metrics['counter']> = () => undefined;
  #timeRound: ReturnType<Metrics['duration']> = () => undefined;
  #countDecision: ReturnType<Metrics['counter']> = () => undefined;

  async #startMetrics(): Promise<Metrics> {
    const metrics = await startMetrics({
      process: 'controller',
      listenAddress: this.#config.listen,
      pages: {
        '/healthz': () => ({ ok: true, text: 'ok' }),
        '/readyz': () => {
          const missing = this.#informers().flatMap(([name, { synced }]) => (synced ? [] : [name]));
          return missing.length === 0
            ? { ok: true, text: this.leading ? 'leading' : 'standing by' }
            : { ok: false, text: `not read yet: ${missing.join(', ')}` };
        },
      },
    });
    this.#countRound = metrics.counter('controller_reconcile_total', 'Rounds of services, by outcome.');
    this.#timeRound = metrics.duration('controller_reconcile_seconds', 'How long a round of a service took.');
    this.#countDecision = metrics.counter(
      'controller_scale_decisions_total',
      'Decisions that changed the number of groups of a service, by reason.',
    );
    metrics.gauge('controller_leader', '1 if this controller is the leader.', () => [
      [this.leading ? 1 : 0, {}],
    ]);
    metrics.gauge('controller_work_queue_keys', 'Services waiting for a round.', () => [
      [this.#work?.length ?? 0, {}],
    ]);
    metrics.gauge(
      'controller_last_event_age_seconds',
      'Time since the API server last sent anything about a resource.',
      () => this.#informers().map(([resource, { lastEventAgeMs }]) => [lastEventAgeMs / 1000, { resource }]),
    );
    const groups = (which: 'wanted' | 'ready') => () =>
      [...(this.#reconciler?.gauges ?? [])].map(
        (gauge) => [gauge[which], { service: gauge.service }] as const,
      );
    metrics.gauge('controller_wanted_groups', 'Groups that a service should have.', groups('wanted'));
    metrics.gauge('controller_ready_groups', 'Groups of a service that are ready.', groups('ready'));
    return metrics;
  }
}

function nameOf(key: string): string {
  return key.slice(key.indexOf('/') + 1);
}
