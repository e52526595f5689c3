// A whole gateway, in a pod, in `mimo up` or inside a test: opens everything in order, and drains and closes it in
// reverse. Knows neither the environment nor signals: main.ts does.

import { randomUUID } from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import { hostname, tmpdir } from 'node:os';
import { join } from 'node:path';

import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import { startGrpcServer } from '@mimo/core/grpc/server';
import type { Log } from '@mimo/core/process/log';
import { startMetrics } from '@mimo/core/process/metrics';
import type { Bus } from '@mimo/core/bus/bus';
import { NatsLink } from '@mimo/core/bus/nats/link';
import { createMemoryBus } from '@mimo/core/bus/memory/bus';
import type { ModelCatalog } from '@mimo/core/bus/model-catalog';
import { createNatsBus } from '@mimo/core/bus/nats/bus';
import { createModelCatalog } from '@mimo/core/bus/nats/model-catalog';

import type { Heartbeat } from '@mimo/proto/worker';

import { authenticateNobody } from './admission/auth.ts';
import { Completions } from './completions.ts';
import type { GatewayConfig } from './config.ts';
import { runDispatcher } from './dispatcher/dispatcher.ts';
import { Groups } from './dispatcher/groups.ts';
import { createInferenceService } from './doors/grpc.ts';
import { openKeysFile } from './admission/keys-file.ts';
import { createGatewayMetrics, observeQueues, type ReceivedState } from './metrics.ts';
import { loadModels } from './models.ts';
import { pollHeartbeats } from './polled-heartbeats.ts';
import { Requests } from './requests.ts';
import { ServedModels } from './served-models.ts';
import { Sessions } from './session.ts';

/** Counters for leak tests: all zero when nothing runs. `sessions` stay open while their groups live. */
export interface GatewayCounts {
  readonly requests: number;
  readonly deletingRecords: number;
  readonly sessions: number;
  readonly sequences: number;
}

/** A running gateway. Drain it, then close it. */
export interface Gateway {
  readonly gatewayId: string;
  /** host:port of the gRPC door. */
  readonly address: string;
  readonly metricsAddress: string | undefined;
  readonly queueKind: Bus['kind'];
  counts(): GatewayCounts;
  /**
   * Leaves dispatching to other gateways, asks the clients to make their next calls elsewhere, then takes no more
   * requests and waits for the running ones, until the signal fires.
   */
  drain(signal: AbortSignal): Promise<void>;
  /** Ends running requests with `unavailable`, and frees everything. */
  close(): Promise<void>;
}

/** In health checks: the process, which is alive, and the service, which can take requests. */
const processName = '';
const serviceName = 'mimo.inference.v1.InferenceService';
const readinessMs = 250;
/** A queue that is there answers much sooner; one that is not should not keep the gateway from saying so. */
const openQueueMs = 5_000;
/**
 * What the catalogue may hold beside the queue: in the chart, whose queue has 40 % of the volume and may take twice
 * that on disk, 5 % and at most 10 %.
 */
const catalogShare = 1 / 8;
/** Two versions of a model of MiMo's size, the one that goes and the one that comes. */
const minCatalogBytes = 32 * 2 ** 20;
/**
 * Time to fetch and read the catalogue's models: a gateway that is ready without them would reject models that others
 * serve.
 */
const catchUpMs = 30_000;
/** A call takes no longer from a client's hand to here; a tenth of it on most networks. */
const onTheirWayMs = 250;
/** For the last statuses to reach their clients. */
const closeGraceMs = 1_000;

/**
 * Starts a gateway. Fails with `failed_precondition` for an unusable directory, `invalid_argument` for an invalid
 * keys file, `unavailable` if an address is in use; the queue may connect later.
 */
export async function startGateway(config: GatewayConfig, log: Log): Promise<Gateway> {
  const gatewayId = `${hostname()}-${randomUUID().slice(0, 8)}`;
  const keys =
    config.keysFile === ''
      ? undefined
      : await openKeysFile({ path: config.keysFile, optional: config.keysFileOptional, log });
  if (keys === undefined) {
    log.warn('no keys file: every caller is accepted as tenant anonymous');
  }
  const authenticate = keys?.authenticate ?? authenticateNobody;
  const meters = await startMetrics({
    process: 'gateway',
    listenAddress: config.metricsListenAddress === '' ? undefined : config.metricsListenAddress,
  });
  const metrics = createGatewayMetrics(meters);
  const prompts = { maxReaders: config.promptReaders, timeoutMs: config.promptTimeoutMs, metrics, log };
  const own = await loadModels(config.models, prompts).catch(async (error: unknown) => {
    await meters.close();
    throw error;
  });
  const bus = openBus(config, gatewayId, log);
  const catalogue = openCatalog(config, gatewayId, log);
  const leave = async (error: unknown): Promise<never> => {
    for (const { encoder } of own) {
      await encoder.close();
    }
    await catalogue?.link.close();
    await bus.close();
    await meters.close();
    throw error;
  };
  const modelsDirectory = await createModelsDirectory(config.modelsDirectory || tmpdir()).catch(leave);
  const groups = new Groups();
  const sessions = new Sessions(gatewayId, log);
  const eraseAfterMs = config.eraseAfterMs === 0 ? Number.POSITIVE_INFINITY : config.eraseAfterMs;
  const requests = new Requests({
    bus,
    sessions,
    groups,
    maxWaitMs: config.maxWaitMs,
    eraseAfterMs,
    clientStallMs: config.clientStallMs,
    metrics,
    log,
  });
  const resigning = new AbortController();
  const stopping = new AbortController();
  const closing = new AbortController();
  const leaving = new AbortController();
  const states = new Map<string, ReceivedState>();
  const runModel = async (model: string, signal: AbortSignal): Promise<void> => {
    const followState = async (): Promise<void> => {
      for await (const state of bus.queueStates.follow(model, signal)) {
        states.set(model, { state, receivedMs: performance.now() });
      }
      states.delete(model);
    };
    await Promise.all([
      followState(),
      runDispatcher(
        { model, gatewayId, bus, groups, sessions, eraseAfterMs, metrics, log },
        signal,
        resigning.signal,
      ),
    ]);
  };
  const openGroups = (model: string): readonly Heartbeat[] => {
    const seen = states.get(model)?.state.groups ?? [];
    const draining = new Set(seen.filter((each) => each.draining).map(({ group }) => group));
    return groups.ready(model, performance.now()).filter(({ group }) => !draining.has(group));
  };
  const models = new ServedModels({ own, prompts, requests, openGroups, run: runModel, log });
  const completions = new Completions({
    gatewayId,
    models,
    groups,
    openGroups,
    requests,
    metrics,
    promptMaxBytes: config.promptMaxBytes,
    maxRequests: config.maxRequests,
    stopping: stopping.signal,
  });
  const server = await startGrpcServer({
    listenAddress: config.listenAddress,
    maxReceiveBytes: config.maxReceiveBytes,
    gate: {
      limits: config,
      admit: ({ authorization }) => void authenticate(authorization),
      onRefused: (path, code) => metrics.requests({ method: methodOf(path), code }),
    },
    services: [createInferenceService({ completions, authenticate, metrics })],
  }).catch(async (error: unknown) => {
    await models.close();
    await rm(modelsDirectory, { recursive: true, force: true });
    return leave(error);
  });
  const served = [
    bus.signals.serveAssignments(gatewayId, (assignment) => requests.assign(assignment)),
    bus.signals.serveCancellations(gatewayId, (cancellation) => requests.cancelHeld(cancellation)),
  ];
  const followGroups = async (): Promise<void> => {
    for await (const heartbeat of bus.heartbeats.follow(closing.signal)) {
      groups.observe(heartbeat, performance.now());
    }
  };
  const background = [
    followGroups(),
    requests.keepRecorded(closing.signal),
    ...config.workers.map((address) => pollHeartbeats(address, bus.heartbeats, closing.signal)),
  ];
  if (keys !== undefined) {
    background.push(keys.follow(closing.signal));
  }
  if (catalogue !== undefined) {
    background.push(models.follow(catalogue.catalog, modelsDirectory, closing.signal));
  }
  meters.gauge('gateway_running_requests', 'Requests accepted and not ended', () => [
    [requests.counts().requests, {}],
  ]);
  meters.gauge('gateway_queue_connected', '1 while the queue can store requests, tested every second', () => [
    [bus.records.fault === undefined ? 1 : 0, {}],
  ]);
  meters.gauge('gateway_connections', 'Open connections, and whether a call was admitted on them', () => {
    const { provenConnections = 0, unprovenConnections = 0 } = server.gateCounts() ?? {};
    return [
      [provenConnections, { state: 'proven' }],
      [unprovenConnections, { state: 'unproven' }],
    ];
  });
  meters.gauge('gateway_unanswered_bytes', 'Bytes of requests that are arriving or not answered yet', () => [
    [server.gateCounts()?.unansweredBytes ?? 0, {}],
  ]);
  observeQueues(meters, () => states.values());
  meters.gauge(
    'gateway_models',
    'Models of this gateway: served, and in the catalogue but not served yet',
    () => [
      [models.all().length, { state: 'served' }],
      [models.pending.length, { state: 'pending' }],
    ],
  );
  const isOpen = await bus.opened(AbortSignal.timeout(openQueueMs)).then(
    () => true,
    () => false,
  );
  if (!isOpen) {
    log.warn(
      { waitedMs: openQueueMs },
      'serving without the queue: requests are rejected until it is reachable',
    );
  } else if (catalogue !== undefined) {
    await models.caughtUp(AbortSignal.timeout(catchUpMs)).catch(() => {
      log.warn({ waitedMs: catchUpMs }, 'serving before the model catalogue was read');
    });
  }
  server.health.set(processName, true);
  const followReadiness = async (): Promise<void> => {
    const until = AbortSignal.any([closing.signal, leaving.signal]);
    let ready: boolean | undefined;
    while (!until.aborted) {
      // A full queue refuses requests with a delay to try again after, which is an answer.
      const now = bus.records.fault === undefined || bus.records.fault.reason === 'full';
      if (now !== ready) {
        ready = now;
        server.health.set(serviceName, ready);
      }
      await pause(readinessMs, until);
    }
  };
  background.push(followReadiness());
  const names = models.all().map(({ name }) => name);
  log.info({ address: server.address, models: names, queue: bus.kind }, 'gateway ready');

  return {
    gatewayId,
    address: server.address,
    metricsAddress: meters.address,
    queueKind: bus.kind,
    counts: () => ({
      ...requests.counts(),
      sessions: sessions.sessionCount,
      sequences: sessions.sequenceCount,
    }),
    drain: async (signal) => {
      leaving.abort();
      for (const name of [processName, serviceName]) {
        server.health.set(name, false);
      }
      resigning.abort();
      server.goAway();
      // A call that was on its way when its connection was asked to go is still taken.
      await pause(onTheirWayMs, signal);
      stopping.abort();
      await requests.settled(signal);
    },
    close: async () => {
      const stopped = new ClusterError('unavailable', 'this gateway has stopped', {
        detail: { retryAfterMs: 500 },
      });
      stopping.abort();
      requests.failAll(stopped);
      await requests.settled(AbortSignal.timeout(closeGraceMs));
      closing.abort(stopped);
      const modelsClosed = models.close();
      await server.close(AbortSignal.timeout(closeGraceMs));
      sessions.close();
      await Promise.all(served.map((each) => each.close()));
      await catalogue?.link.close();
      await bus.close();
      await Promise.all([...background, modelsClosed]);
      await rm(modelsDirectory, { recursive: true, force: true });
      await meters.close();
    },
  };
}

/** The label of a method in the metrics: `countTokens` for `/mimo.inference.v1.InferenceService/CountTokens`. */
function methodOf(path: string): string {
  const name = path.slice(path.lastIndexOf('/') + 1);
  return `${name.slice(0, 1).toLowerCase()}${name.slice(1)}`;
}

/** This gateway's private directory for the files of the catalogue's models. */
async function createModelsDirectory(parent: string): Promise<string> {
  try {
    return await mkdtemp(join(parent, 'mimo-gateway-models-'));
  } catch (error) {
    const text = `MIMO_GATEWAY_MODELS_DIRECTORY: cannot create a directory in ${parent}`;
    throw new ClusterError('failed_precondition', text, { cause: error });
  }
}

interface Catalogue {
  readonly link: NatsLink;
  readonly catalog: ModelCatalog;
}

/**
 * The catalogue lies beside the queue: a bus in memory has none. It has a link of its own, since a model's files may
 * be on their way for seconds, and the queue is taken for broken where its trials take two.
 */
function openCatalog(config: GatewayConfig, gatewayId: string, log: Log): Catalogue | undefined {
  if (config.natsUrls.length === 0) {
    return undefined;
  }
  const link = new NatsLink({
    servers: config.natsUrls,
    credentialsFile: config.natsCredentialsFile,
    clientName: `mimo-gateway ${gatewayId} models`,
    log,
  });
  const catalog = createModelCatalog(link, {
    replicas: config.natsReplicas,
    maxBytes: Math.max(minCatalogBytes, Math.floor(config.queueMaxBytes * catalogShare)),
    log,
  });
  return { link, catalog };
}

function openBus(config: GatewayConfig, gatewayId: string, log: Log): Bus {
  if (config.natsUrls.length === 0) {
    log.warn(
      'no NATS server is configured: the queue is in memory, and requests do not survive this process',
    );
    return createMemoryBus();
  }
  return createNatsBus({
    servers: config.natsUrls,
    credentialsFile: config.natsCredentialsFile,
    clientName: `mimo-gateway ${gatewayId}`,
    replicas: config.natsReplicas,
    recordMaxAgeMs: config.recordMaxAgeMs,
    limits: { maxBytes: config.queueMaxBytes, maxRecords: config.queueMaxRequests },
    log,
  });
}
