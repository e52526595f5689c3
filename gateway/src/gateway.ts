// A whole gateway, in a pod, in `mimo up` or inside a test: opens everything in order, and drains and closes it in
// reverse. Knows neither the environment nor signals: main.ts does.

import { randomUUID } from 'node:crypto';
import { hostname } from 'node:os';

import { ClusterError } from '@mimo/core/errors';
import { startGrpcServer } from '@mimo/core/grpc-server';
import type { Log } from '@mimo/core/log';
import { startMetrics } from '@mimo/core/metrics';
import type { QueueState, RequestQueue } from '@mimo/core/queue';
import { createMemoryQueue } from '@mimo/core/queue-memory';
import { createNatsQueue } from '@mimo/core/queue-nats';

import { authenticateNobody, loadKeys } from './auth.ts';
import type { GatewayConfig } from './config.ts';
import { runDispatcher } from './dispatcher/dispatcher.ts';
import { Groups } from './groups.ts';
import { createInferenceService } from './inference-service.ts';
import { createGatewayMetrics, observeQueues } from './metrics.ts';
import { loadModels } from './models.ts';
import { pollHeartbeats } from './polled-heartbeats.ts';
import { Requests } from './requests.ts';
import { Sessions } from './session.ts';

/** What may be left behind: all zero when nothing runs. `sessions` stay open while their groups live. */
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
  readonly queueKind: RequestQueue['kind'];
  counts(): GatewayCounts;
  /** Stops taking requests and waits for the running ones, until the signal fires. */
  drain(signal: AbortSignal): Promise<void>;
  /** Ends what still runs with `unavailable`, and lets go of everything. */
  close(): Promise<void>;
}

const services = ['', 'mimo.inference.v1.InferenceService'];
/** A queue that is there answers much sooner; one that is not should not keep the gateway from saying so. */
const openQueueMs = 5_000;
/** For the last statuses to reach their clients. */
const closeGraceMs = 1_000;

/**
 * Starts a gateway. Fails with `failed_precondition` where a model directory is not usable, `invalid_argument` where the
 * keys file is not, `unavailable` where an address is taken; the queue may come later.
 */
export async function startGateway(config: GatewayConfig, log: Log): Promise<Gateway> {
  const gatewayId = `${hostname()}-${randomUUID().slice(0, 8)}`;
  const authenticate = config.keysFile === '' ? authenticateNobody : await loadKeys(config.keysFile);
  if (config.keysFile === '') {
    log.warn('no keys file: everybody is let in as tenant anonymous');
  }
  const models = await loadModels(config.models);
  const meters = await startMetrics({
    process: 'gateway',
    listenAddress: config.metricsListenAddress === '' ? undefined : config.metricsListenAddress,
  });
  const metrics = createGatewayMetrics(meters);
  const queue = openQueue(config, gatewayId, log);
  const groups = new Groups();
  const sessions = new Sessions(gatewayId, log);
  const requests = new Requests({ queue, sessions, maxWaitMs: config.maxWaitMs, metrics, log });
  const stopping = new AbortController();
  const closing = new AbortController();
  const states = new Map<string, QueueState>();
  const server = await startGrpcServer({
    listenAddress: config.listenAddress,
    maxReceiveBytes: config.maxReceiveBytes,
    services: [
      createInferenceService({
        gatewayId,
        models,
        groups,
        requests,
        authenticate,
        metrics,
        promptMaxBytes: config.promptMaxBytes,
        maxRequests: config.maxRequests,
        stopping: stopping.signal,
      }),
    ],
  }).catch(async (error: unknown) => {
    await queue.close();
    await meters.close();
    throw error;
  });
  const served = queue.serveAssignments(gatewayId, (assignment) => requests.assign(assignment));
  const followGroups = async (): Promise<void> => {
    for await (const heartbeat of queue.followHeartbeats(closing.signal)) {
      groups.observe(heartbeat, performance.now());
    }
  };
  const followState = async (model: string): Promise<void> => {
    for await (const state of queue.followState(model, closing.signal)) {
      states.set(model, state);
    }
  };
  const background = [
    followGroups(),
    ...config.workers.map((address) => pollHeartbeats(address, queue, closing.signal)),
    ...[...models.keys()].flatMap((model) => [
      followState(model),
      runDispatcher({ model, gatewayId, queue, groups, sessions, metrics, log }, closing.signal),
    ]),
  ];
  meters.gauge('gateway_running_requests', 'Requests accepted and not ended', () => [
    [requests.counts().requests, {}],
  ]);
  meters.gauge('gateway_queue_connected', '1 while requests can be recorded', () => [
    [queue.connected ? 1 : 0, {}],
  ]);
  observeQueues(meters, () => states.values());
  await queue.opened(AbortSignal.timeout(openQueueMs)).catch(() => {
    log.warn(
      { waitedMs: openQueueMs },
      'serving without the queue: requests are refused until it is reached',
    );
  });
  for (const service of services) {
    server.health.set(service, true);
  }
  log.info({ address: server.address, models: [...models.keys()], queue: queue.kind }, 'gateway ready');

  return {
    gatewayId,
    address: server.address,
    metricsAddress: meters.address,
    queueKind: queue.kind,
    counts: () => ({
      ...requests.counts(),
      sessions: sessions.sessionCount,
      sequences: sessions.sequenceCount,
    }),
    drain: async (signal) => {
      for (const service of services) {
        server.health.set(service, false);
      }
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
      await server.close(AbortSignal.timeout(closeGraceMs));
      sessions.close();
      await served.close();
      await queue.close();
      await Promise.all(background);
      await Promise.all([...models.values()].map(({ encoder }) => encoder.close()));
      await meters.close();
    },
  };
}

function openQueue(config: GatewayConfig, gatewayId: string, log: Log): RequestQueue {
  if (config.natsUrls.length === 0) {
    log.warn(
      'no NATS server is configured: the queue is in memory, and requests do not survive this process',
    );
    return createMemoryQueue();
  }
  return createNatsQueue({
    servers: config.natsUrls,
    clientName: `mimo-gateway ${gatewayId}`,
    replicas: config.natsReplicas,
    recordMaxAgeMs: config.recordMaxAgeMs,
    log,
  });
}
