// Rank 0 of a replica group: the engine that schedules and samples, the WorkerService in front of it, and the
// heartbeats. Owns the group's public state and the order of its shutdown; knows no model and no tensors.
//
// starting -> ready -> draining -> gone; from any of them -> failed: every sequence ends with `aborted`, a last
// heartbeat reports FAILED, and the process exits, because a group lives and dies as a whole. While draining, running
// sequences may finish for a while; the remaining ones are then handed over, so that their gateways can continue them
// elsewhere.

import { randomUUID } from 'node:crypto';

import { ClusterError } from '@mimo/core/process/errors';
import { NatsLink } from '@mimo/core/bus/nats/link';
import { startGrpcServer, type GrpcServer } from '@mimo/core/grpc/server';
import { startMetrics } from '@mimo/core/process/metrics';
import type { ProcessParts } from '@mimo/core/process/run-process';
import { GroupState, type Heartbeat, type StatsResponse } from '@mimo/proto/worker';

import type { WorkerConfig } from './config.ts';
import { idleStats, type EngineHost } from './engines/mimo/engine-api.ts';
import { startHeartbeats, Throughput, type HeartbeatSender } from './heartbeats.ts';
import { identityOf } from './identity.ts';
import { createEngineMetrics } from './metrics.ts';
import { Sessions } from './sessions.ts';
import { createWorkerService } from './worker-service.ts';

/** A submit holds a prompt of at most some hundred thousand token ids of up to five bytes each. */
const maxReceiveBytes = 16 * 2 ** 20;
/** Time for the sessions' last messages to be sent. */
const closeSessionsMs = 1_000;

/** The state shared by the leader's steps. */
interface Leading extends ProcessParts<WorkerConfig> {
  readonly view: GroupView;
  /** Undefined without a NATS server: gateways then poll Stats. */
  readonly heartbeats: HeartbeatSender | undefined;
  readonly engine: EngineHost;
  readonly sessions: Sessions;
}

/**
 * Starts the leader; resolves when the group serves. `openEngine` loads the shards and joins the group. The lifecycle
 * ends with a failure when the group is lost, and in order when another rank was asked to end.
 */
export async function startLeader(
  parts: ProcessParts<WorkerConfig>,
  openEngine: () => Promise<EngineHost>,
): Promise<void> {
  const { config, log, lifecycle } = parts;
  const view = new GroupView(config);
  const heartbeats = openHeartbeats(parts, view);
  const identity = await identityOf(config, lifecycle.draining);
  const engine = await openEngine();
  const { maxContextTokens, draftTokens } = engine.info;
  const welcome = { group: config.group, model: config.model, maxContextTokens, draftTokens, identity };
  const sessions = new Sessions(engine, welcome, log);
  const leading = { ...parts, view, heartbeats, engine, sessions };
  await openMetrics(leading);
  const server = await openServer(leading);
  followEnd(leading, server);
  view.serve({ engine, sessions, boundAddress: server.address, identity });
  server.health.set('', true);
  heartbeats?.beat();
  log.info({ address: server.address, engine: summaryOf(engine) }, 'serving');
}

function openHeartbeats(
  { config, log, lifecycle }: ProcessParts<WorkerConfig>,
  view: GroupView,
): HeartbeatSender | undefined {
  if (config.natsUrls.length === 0) {
    return undefined;
  }
  const link = new NatsLink({
    servers: config.natsUrls,
    credentialsFile: config.natsCredentialsFile,
    clientName: `worker ${config.model} ${config.group}`,
    log,
  });
  lifecycle.opened('NATS', link);
  const { heartbeatIntervalMs: intervalMs } = config;
  const heartbeats = startHeartbeats({ link, intervalMs, read: () => view.heartbeat(), log });
  return lifecycle.opened('heartbeats', heartbeats);
}

/** The metrics page, updated by each of the engine's frames. */
async function openMetrics({ config, lifecycle, engine, sessions }: Leading): Promise<void> {
  const listenAddress = config.metricsListen === '' ? undefined : config.metricsListen;
  const meters = lifecycle.opened('metrics', await startMetrics({ process: 'worker', listenAddress }));
  const measure = createEngineMetrics(meters, () => engine.stats());
  engine.onFrame((frame) => {
    sessions.sequences.onFrame(frame);
    measure(frame);
  });
}

async function openServer(leading: Leading): Promise<GrpcServer> {
  const { config, lifecycle, sessions, view } = leading;
  const drain = async (signal: AbortSignal): Promise<number> => drainSequences(leading, signal);
  const server = await startGrpcServer({
    listenAddress: config.listen,
    services: [createWorkerService({ sessions, drain, stats: () => view.stats() })],
    maxReceiveBytes,
  });
  lifecycle.onClose('gRPC server', () => server.close(AbortSignal.timeout(closeSessionsMs)));
  lifecycle.onClose('sessions', () =>
    sessions.fail(new ClusterError('unavailable', `group ${config.group} has ended`)),
  );
  lifecycle.onDrain('sequences', async (signal) => {
    server.health.set('', false);
    await drain(signal);
  });
  return server;
}

/**
 * Accepts no new sequences, waits a while for the running ones to finish, hands over the rest. Returns their number.
 */
async function drainSequences(leading: Leading, signal: AbortSignal): Promise<number> {
  const { config, log, view, heartbeats } = leading;
  const { sequences } = leading.sessions;
  const before = sequences.count;
  sequences.refuse(new ClusterError('unavailable', `group ${config.group} is draining`));
  view.become(GroupState.DRAINING);
  heartbeats?.beat();
  const finishing = AbortSignal.any([signal, AbortSignal.timeout(config.drainFinishMs)]);
  try {
    await sequences.drained(finishing);
  } catch (error) {
    if (signal.aborted) {
      throw error;
    }
    log.info({ sequences: sequences.count }, 'handing over');
    sequences.handOver();
    await sequences.drained(signal);
  }
  return before;
}

/** Ends the process with the group: as a failure if a rank was lost, in order if a rank was asked to end. */
function followEnd(
  { config, lifecycle, view, heartbeats, engine, sessions }: Leading,
  server: GrpcServer,
): void {
  const fail = async (): Promise<void> => {
    const error = await engine.failed;
    view.become(GroupState.FAILED);
    server.health.set('', false);
    const lost = `group ${config.group} was lost: ${error.message}`;
    sessions.fail(new ClusterError('aborted', lost, { cause: error }));
    heartbeats?.beat();
    lifecycle.end(error);
  };
  const leave = async (): Promise<void> => {
    await engine.leaving;
    lifecycle.end(new ClusterError('canceled', 'another rank of the group was asked to end'));
  };
  void fail();
  void leave();
}

function summaryOf({ info }: EngineHost): Readonly<Record<string, unknown>> {
  const { config, ...rest } = info;
  return { ...rest, layers: config.layers, hiddenSize: config.hiddenSize };
}

/** The group's report about itself. */
class GroupView {
  readonly #config: WorkerConfig;
  readonly #incarnation = randomUUID();
  readonly #throughput = new Throughput();
  #state: GroupState = GroupState.STARTING;
  #sequenceNumber = 0;
  #serving:
    | {
        readonly engine: EngineHost;
        readonly sessions: Sessions;
        readonly boundAddress: string;
        readonly identity: string;
      }
    | undefined;

  constructor(config: WorkerConfig) {
    this.#config = config;
  }

  /** A failed group stays failed. */
  become(state: GroupState): void {
    if (this.#state !== GroupState.FAILED) {
      this.#state = state;
    }
  }

  serve(serving: {
    readonly engine: EngineHost;
    readonly sessions: Sessions;
    readonly boundAddress: string;
    readonly identity: string;
  }): void {
    this.#serving = serving;
    this.become(GroupState.READY);
  }

  heartbeat(): Heartbeat {
    const config = this.#config;
    const info = this.#serving?.engine.info;
    const stats = this.#serving?.engine.stats() ?? idleStats(0);
    this.#sequenceNumber += 1;
    this.#throughput.observe(stats, performance.now());
    return {
      model: config.model,
      group: config.group,
      address: config.advertise || (this.#serving?.boundAddress ?? config.listen),
      revision: config.revision,
      state: this.#isStalled() ? GroupState.STALLED : this.#state,
      sequenceNumber: this.#sequenceNumber,
      incarnation: this.#incarnation,
      worldSize: config.tensorParallel,
      maxSequences: info?.maxSequences ?? 0,
      runningSequences: stats.runningSequences,
      waitingSequences: stats.waitingSequences,
      blockedSequences: stats.blockedSequences,
      parkableSequences: stats.parkableSequences,
      kvBlocks: info?.kvBlocks ?? 0,
      kvBlocksUsed: stats.kvBlocksUsed,
      maxContextTokens: info?.maxContextTokens ?? 0,
      draftTokens: info?.draftTokens ?? 0,
      completionTokensPerSecond: this.#throughput.completionTokensPerSecond,
      running: this.#serving?.sessions.sequences.running() ?? [],
      precision: config.precision,
      identity: this.#serving?.identity ?? '',
    };
  }

  #isStalled(): boolean {
    return this.#state === GroupState.READY && this.#serving?.engine.isStalled === true;
  }

  stats(): StatsResponse {
    const stats = this.#serving?.engine.stats() ?? idleStats(0);
    return {
      heartbeat: this.heartbeat(),
      sessions: this.#serving?.sessions.count ?? 0,
      steps: stats.steps,
      promptTokens: stats.promptTokens,
      completionTokens: stats.completionTokens,
      draftedTokens: stats.draftedTokens,
      acceptedTokens: stats.acceptedTokens,
    };
  }
}
