// The controller put together, and its parts opened in order: client, queue, catalogue, watches, metrics and health,
// then leadership. Watches run on every controller, so that one that takes over knows the cluster already; everything
// that acts runs on the leader alone (rounds.ts).

import { hostname } from 'node:os';

import { ClusterError } from '@mimo/core/process/errors';
import type { Lifecycle } from '@mimo/core/process/lifecycle';
import { startMetrics, type Metrics } from '@mimo/core/process/metrics';
import type { ProcessParts } from '@mimo/core/process/run-process';
import type { Bus } from '@mimo/core/bus/bus';
import type { ModelCatalog } from '@mimo/core/bus/model-catalog';
import { createNatsBus } from '@mimo/core/bus/nats/bus';
import { createModelCatalog } from '@mimo/core/bus/nats/model-catalog';

import type { ControllerConfig } from './config.ts';
import { managedBy } from './decide/labels.ts';
import { KubeClient, loadKubeConfig } from './kube/client.ts';
import { EventRecorder } from './kube/events.ts';
import { startInformer, type Informer, type InformerOptions } from './kube/informer.ts';
import { runLeading } from './kube/leader-election.ts';
import { resourceTypes } from './kube/resource.ts';
import { createControllerMetrics, observeController } from './metrics.ts';
import { readPod, readService, readSupport, readTenant, type TenantRecord } from './observe/records.ts';
import type { Caches } from './reconcile.ts';
import { Rounds } from './rounds.ts';

/** For the last Events to be written. */
const closeEventsMs = 1_000;

/** A running controller. Its lifecycle closes it. */
export interface Controller {
  /** host:port of /metrics, /healthz and /readyz. */
  readonly address: string | undefined;
  readonly leading: boolean;
}

/** Starts the controller; it acts once it leads. Fails if the configuration cannot be used. */
export async function startController(parts: ProcessParts<ControllerConfig>): Promise<Controller> {
  const { config, log, lifecycle } = parts;
  const identity = config.identity || hostname();
  const kubeConfig = loadKubeConfig(config.kubeconfig === '' ? undefined : config.kubeconfig);
  const client = lifecycle.opened('client', new KubeClient(kubeConfig, { namespace: config.namespace }));
  const { bus, catalog } = openBus(parts, identity);
  const events = new EventRecorder({ client, component: 'mimo-controller', instance: identity, log });
  const watches = openWatches(parts, client);
  lifecycle.onClose('events', () => events.close(AbortSignal.timeout(closeEventsMs)));

  const meters = await openMetrics(parts, watches, () => rounds.leading);
  const metrics = createControllerMetrics(meters);
  const { tenants, ...caches } = watches;
  const rounds: Rounds = new Rounds({ config, client, bus, catalog, events, caches, tenants, metrics, log });
  observeController(meters, {
    isLeading: () => rounds.leading,
    waitingRounds: () => rounds.waiting,
    groups: () => rounds.gauges,
    watches: Object.entries(watches),
  });
  const election = { client, leaseName: config.leaseName, identity, log };
  lead(lifecycle, (signal) => runLeading(election, (term) => rounds.lead(term), signal));
  return {
    address: meters.address,
    get leading() {
      return rounds.leading;
    },
  };
}

function openBus(
  { config, log, lifecycle }: ProcessParts<ControllerConfig>,
  identity: string,
): { readonly bus: Bus; readonly catalog: ModelCatalog } {
  const replicas = config.natsReplicas;
  const bus = createNatsBus({
    servers: config.natsUrls,
    credentialsFile: config.natsCredentialsFile,
    clientName: `controller-${identity}`,
    replicas,
    recordMaxAgeMs: config.recordMaxAgeMs,
    log,
  });
  lifecycle.opened('bus', bus);
  return { bus, catalog: createModelCatalog(bus.link, { replicas, log }) };
}

/** The watched state of the API server: the caches of the rounds, and the tenants. */
interface Watches extends Caches {
  readonly tenants: Informer<TenantRecord>;
}

function openWatches({ log, lifecycle }: ProcessParts<ControllerConfig>, client: KubeClient): Watches {
  const labelSelector = Object.entries(managedBy)
    .map((pair) => pair.join('='))
    .join(',');
  const ours = { labelSelector };
  const watch = <T>(options: Omit<InformerOptions<T>, 'client' | 'log'>): Informer<T> =>
    lifecycle.opened(`watch of ${options.type.plural}`, startInformer({ client, log, ...options }));
  return {
    services: watch({
      type: resourceTypes.modelServices,
      parse: readService,
      index: ({ service }) => service?.spec.model.name,
    }),
    pods: watch({
      type: resourceTypes.pods,
      selection: ours,
      parse: (pod, before) => readPod(pod, before, client.clock.nowMs()),
      index: ({ service }) => service,
    }),
    budgets: watch({ type: resourceTypes.podDisruptionBudgets, selection: ours, parse: readSupport }),
    rankServices: watch({ type: resourceTypes.services, selection: ours, parse: readSupport }),
    tenants: watch({ type: resourceTypes.tenants, parse: readTenant }),
  };
}

/** The page of metrics, and beside it health: ready once every watch has read its resources. */
async function openMetrics(
  { config, lifecycle }: ProcessParts<ControllerConfig>,
  watches: Watches,
  isLeading: () => boolean,
): Promise<Metrics> {
  const metrics = await startMetrics({
    process: 'controller',
    listenAddress: config.listen,
    pages: {
      '/healthz': () => ({ ok: true, text: 'ok' }),
      '/readyz': () => {
        const missing = Object.entries(watches).flatMap(([name, { synced }]) => (synced ? [] : [name]));
        return missing.length === 0
          ? { ok: true, text: isLeading() ? 'leading' : 'standing by' }
          : { ok: false, text: `not read yet: ${missing.join(', ')}` };
      },
    },
  });
  return lifecycle.opened('metrics', metrics);
}

/** Stands for election until the process drains, which releases the lease; a failure ends the process. */
function lead(lifecycle: Lifecycle, run: (signal: AbortSignal) => Promise<void>): void {
  const ended = run(lifecycle.draining).catch((error: unknown) => lifecycle.end(ClusterError.from(error)));
  lifecycle.onDrain('leadership', () => ended);
}
