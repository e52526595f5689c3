// A whole gateway, in a pod, in `mimo up` or inside a test: opens everything in order, and drains and closes it in
// reverse. Knows neither the environment nor signals: main.ts does.

import { randomUUID } from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import { hostname, tmpdir } from 'node:os';
import { join } from 'node:path';

import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import { startMetrics, type Metrics } from '@mimo/core/process/metrics';
import type { ProcessParts } from '@mimo/core/process/run-process';
import { startGrpcServer, type GrpcServer } from '@mimo/core/grpc/server';
import type { Bus } from '@mimo/core/bus/bus';
import type { Heartbeat } from '@mimo/proto/worker';

import { authenticateNobody, type Authenticate } from './admission/auth.ts';
import { openKeysFile, type KeysFile } from './admission/keys-file.ts';
import { openBus, openCatalog } from './bus.ts';
import { Completions } from './completions.ts';
import type { GatewayConfig } from './config.ts';
import { runDispatcher } from './dispatcher/dispatcher.ts';
import { Groups } from './dispatcher/groups.ts';
import { createInferenceService } from './doors/grpc.ts';
import { createGatewayMetrics, observeGateway, type GatewayMetrics, type ReceivedState } from './metrics.ts';
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

/** A running gateway. Its lifecycle drains and closes it. */
export interface Gateway {
  readonly gatewayId: string;
  /** host:port of the gRPC door. */
  readonly address: string;
  readonly metricsAddress: string | undefined;
  readonly queueKind: Bus['kind'];
  counts(): GatewayCounts;
}

/** In health checks: the process, which is alive, and the service, which can take requests. */
const processName = '';
const serviceName = 'mimo.inference.v1.InferenceService';
const readinessMs = 250;
/** A reachable queue answers much sooner; without one, the gateway should start and report that it is not ready. */
const openQueueMs = 5_000;
/**
 * Time to fetch and read the catalogue's models: a gateway that became ready without them would reject requests for
 * models that other gateways serve.
 */
const catchUpMs = 30_000;
/** A call takes at most this long from its client to here; on most networks a tenth of it. */
const onTheirWayMs = 250;
/** Time for the last statuses to reach their clients. */
const closeGraceMs = 1_000;

/** Shared by the steps of starting. */
interface Parts extends ProcessParts<GatewayConfig> {
  readonly gatewayId: string;
  readonly metrics: GatewayMetrics;
}

/** The parts that serve requests, for every door. */
interface Serving {
  readonly groups: Groups;
  /** The groups of a model that accept requests. */
  readonly openGroups: (model: string) => readonly Heartbeat[];
  readonly sessions: Sessions;
  readonly requests: Requests;
  readonly models: ServedModels;
  /** The state that each dispatcher published last, by model. */
  readonly states: ReadonlyMap<string, ReceivedState>;
}

/**
 * Starts a gateway; resolves when it serves, with or without its queue. Fails with `failed_precondition` for an
 * unusable directory, `invalid_argument` for an invalid keys file, `unavailable` if an address is in use.
 *
 * When it drains it hands dispatching over to other gateways, sends clients a GOAWAY so that they make their next calls
 * elsewhere, then rejects new requests and waits for the running ones. Closing ends running requests with
 * `unavailable`.
 */
export async function startGateway(started: ProcessParts<GatewayConfig>): Promise<Gateway> {
  const { config, log, lifecycle } = started;
  const gatewayId = `${hostname()}-${randomUUID().slice(0, 8)}`;
  const meters = await openMetrics(started);
  const parts: Parts = { ...started, gatewayId, metrics: createGatewayMetrics(meters) };
  const keys = await openKeys(parts);
  const modelsDirectory = await openModelsDirectory(parts);
  const loops = lifecycle.opened('loops', new Loops());
  const bus = openBus(parts, gatewayId);
  const catalog = openCatalog(parts, gatewayId);
  const serving = await openServing(parts, bus, loops);
  const { models, requests, sessions } = serving;
  const stopping = new AbortController();
  const completions = new Completions({
    ...serving,
    gatewayId,
    metrics: parts.metrics,
    promptMaxBytes: config.promptMaxBytes,
    maxRequests: config.maxRequests,
    stopping: stopping.signal,
  });
  const { authenticate } = keys;
  const server = await openServer(parts, bus, { completions, requests, authenticate });
  lifecycle.onDrain('requests', async (signal) => drain({ server, stopping, requests }, signal));
  lifecycle.onClose('requests', () => endRequests(stopping, requests));
  loops.run(keys.follow(lifecycle.closing), followGroups(parts, bus, serving.groups));
  loops.run(requests.keepRecorded(lifecycle.closing));
  if (catalog !== undefined) {
    loops.run(models.follow(catalog, modelsDirectory, lifecycle.closing));
  }
  observeGateway(meters, { ...serving, records: bus.records, gateCounts: () => server.gateCounts() });
  await waitForBus(parts, bus, catalog === undefined ? undefined : models);
  server.health.set(processName, true);
  loops.run(followReadiness(server, bus, lifecycle.draining));
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
  };
}

async function openMetrics({ config, lifecycle }: ProcessParts<GatewayConfig>): Promise<Metrics> {
  const listenAddress = config.metricsListenAddress === '' ? undefined : config.metricsListenAddress;
  return lifecycle.opened('metrics', await startMetrics({ process: 'gateway', listenAddress }));
}

/** Without a keys file every caller is the tenant `anonymous`. */
async function openKeys({ config, log }: Parts): Promise<KeysFile> {
  if (config.keysFile === '') {
    log.warn('no keys file: every caller is accepted as tenant anonymous');
    return { authenticate: authenticateNobody, follow: () => Promise.resolve() };
  }
  return openKeysFile({ path: config.keysFile, optional: config.keysFileOptional, log });
}

/** This gateway's private directory for the files of the catalogue's models. */
async function openModelsDirectory({ config, lifecycle }: Parts): Promise<string> {
  const parent = config.modelsDirectory || tmpdir();
  const directory = await mkdtemp(join(parent, 'mimo-gateway-models-')).catch((error: unknown) => {
    const text = `MIMO_GATEWAY_MODELS_DIRECTORY: cannot create a directory in ${parent}`;
    throw new ClusterError('failed_precondition', text, { cause: error });
  });
  lifecycle.onClose('models directory', () => rm(directory, { recursive: true, force: true }));
  return directory;
}

/** Background work. It ends when its signal fires or the queue is closed, so it is awaited after the queue's close. */
class Loops {
  readonly #running: Promise<unknown>[] = [];

  run(...loops: readonly Promise<unknown>[]): void {
    this.#running.push(...loops);
  }

  async close(): Promise<void> {
    await Promise.all(this.#running);
  }
}

async function openServing(parts: Parts, bus: Bus, loops: Loops): Promise<Serving> {
  const { config, lifecycle, gatewayId, metrics, log } = parts;
  const prompts = { maxReaders: config.promptReaders, timeoutMs: config.promptTimeoutMs, metrics, log };
  const own = await loadModels(config.models, prompts);
  const groups = new Groups();
  const sessions = lifecycle.opened('sessions', new Sessions(gatewayId, log));
  const { maxWaitMs, clientStallMs } = config;
  const eraseAfterMs = config.eraseAfterMs === 0 ? Number.POSITIVE_INFINITY : config.eraseAfterMs;
  const limits = { maxWaitMs, eraseAfterMs, clientStallMs };
  const requests = new Requests({ bus, sessions, groups, ...limits, metrics, log });
  const states = new Map<string, ReceivedState>();
  const followState = async (model: string, signal: AbortSignal): Promise<void> => {
    for await (const state of bus.queueStates.follow(model, signal)) {
      states.set(model, { state, receivedMs: performance.now() });
    }
    states.delete(model);
  };
  const run = async (model: string, signal: AbortSignal): Promise<void> => {
    const dispatcher = { model, gatewayId, bus, groups, sessions, eraseAfterMs, metrics, log };
    await Promise.all([followState(model, signal), runDispatcher(dispatcher, signal, lifecycle.draining)]);
  };
  const openGroups = (model: string): readonly Heartbeat[] => {
    const seen = states.get(model)?.state.groups ?? [];
    const draining = new Set(seen.filter((each) => each.draining).map(({ group }) => group));
    return groups.ready(model, performance.now()).filter(({ group }) => !draining.has(group));
  };
  const models = new ServedModels({ own, prompts, requests, openGroups, run, log });
  lifecycle.onClose('models', () => loops.run(models.close()));
  return { groups, openGroups, sessions, requests, models, states };
}

/** Serves the door, and the two calls that dispatchers make to the gateway that owns a request. */
async function openServer(
  { config, lifecycle, gatewayId, metrics }: Parts,
  { signals }: Bus,
  door: {
    readonly completions: Completions;
    readonly requests: Requests;
    readonly authenticate: Authenticate;
  },
): Promise<GrpcServer> {
  const { completions, requests, authenticate } = door;
  const server = await startGrpcServer({
    listenAddress: config.listenAddress,
    maxReceiveBytes: config.maxReceiveBytes,
    gate: {
      limits: config,
      admit: ({ authorization }) => void authenticate(authorization),
      onRefused: (path, code) => metrics.requests({ method: methodOf(path), code }),
    },
    services: [createInferenceService({ completions, authenticate, metrics })],
  });
  const assignments = signals.serveAssignments(gatewayId, (assignment) => requests.assign(assignment));
  const cancellations = signals.serveCancellations(gatewayId, (one) => requests.cancelHeld(one));
  lifecycle.opened('assignments', assignments);
  lifecycle.opened('cancellations', cancellations);
  lifecycle.onClose('gRPC server', () => server.close(AbortSignal.timeout(closeGraceMs)));
  return server;
}

/** Follows the groups' heartbeats on the bus; without a NATS server the gateway polls the groups for them. */
async function followGroups(
  { config, lifecycle }: Parts,
  { heartbeats }: Bus,
  groups: Groups,
): Promise<void> {
  const { closing } = lifecycle;
  const observe = async (): Promise<void> => {
    for await (const heartbeat of heartbeats.follow(closing)) {
      groups.observe(heartbeat, performance.now());
    }
  };
  await Promise.all([
    observe(),
    ...config.workers.map((address) => pollHeartbeats(address, heartbeats, closing)),
  ]);
}

/** Waits for the queue and the catalogue's models, up to a limit: the gateway starts without them too. */
async function waitForBus({ log }: Parts, bus: Bus, models: ServedModels | undefined): Promise<void> {
  const isOpen = await bus.opened(AbortSignal.timeout(openQueueMs)).then(
    () => true,
    () => false,
  );
  if (!isOpen) {
    log.warn(
      { waitedMs: openQueueMs },
      'serving without the queue: requests are rejected until it is reachable',
    );
  } else if (models !== undefined) {
    await models.caughtUp(AbortSignal.timeout(catchUpMs)).catch(() => {
      log.warn({ waitedMs: catchUpMs }, 'serving before the model catalogue was read');
    });
  }
}

/** The health of the service is the queue's, until the signal fires. */
async function followReadiness({ health }: GrpcServer, { records }: Bus, signal: AbortSignal): Promise<void> {
  let ready: boolean | undefined;
  while (!signal.aborted) {
    // A full queue still answers: it rejects requests with a retry delay.
    const now = records.fault === undefined || records.fault.reason === 'full';
    if (now !== ready) {
      ready = now;
      health.set(serviceName, ready);
    }
    await pause(readinessMs, signal);
  }
}

/** Ends the running requests, and waits a moment for their clients to receive the statuses. */
async function endRequests(stopping: AbortController, requests: Requests): Promise<void> {
  stopping.abort();
  requests.failAll(
    new ClusterError('unavailable', 'this gateway has stopped', { detail: { retryAfterMs: 500 } }),
  );
  await requests.settled(AbortSignal.timeout(closeGraceMs));
}

/** Rejects new requests, and waits for the running ones until the signal fires. */
async function drain(
  {
    server,
    stopping,
    requests,
  }: {
    readonly server: GrpcServer;
    readonly stopping: AbortController;
    readonly requests: Requests;
  },
  signal: AbortSignal,
): Promise<void> {
  for (const name of [processName, serviceName]) {
    server.health.set(name, false);
  }
  server.goAway();
  // Calls already on their way when their connection got the GOAWAY are still accepted.
  await pause(onTheirWayMs, signal);
  stopping.abort();
  await requests.settled(signal);
}

/** The label of a method in the metrics: `countTokens` for `/mimo.inference.v1.InferenceService/CountTokens`. */
function methodOf(path: string): string {
  const name = path.slice(path.lastIndexOf('/') + 1);
  return `${name.slice(0, 1).toLowerCase()}${name.slice(1)}`;
}
