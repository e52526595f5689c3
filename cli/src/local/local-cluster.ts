// A whole cluster on loopback, every part a real process: nats-server, gateway, and groups of worker ranks.
// Owns their settings, ports, log files and the order of start and end. The caller compiles the model first, and asks
// the gateway when it is ready.

import { randomUUID } from 'node:crypto';
import { mkdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import { startChild } from './child-process.ts';
import { assertPortFree, freeAddresses, freePorts } from './free-ports.ts';
import { startNatsServer } from './nats-server.ts';
import { Supervisor } from './supervisor.ts';

const stopGraceMs = 8_000;

/** What to run, and where it keeps its files. */
export interface LocalClusterOptions {
  /** The name under which the model is served. */
  readonly modelName: string;
  /** The checkpoint, for its tokenizer. */
  readonly modelDirectory: string;
  /** What `compile` wrote: the folder of `rank-0`, `rank-1`, ... */
  readonly shardDirectory: string;
  readonly precision: 'fp32' | 'fp16' | 'bf16' | 'int8' | 'int4';
  readonly tensorParallel: number;
  readonly groups: number;
  /** On 127.0.0.1; 0: any free one. */
  readonly gatewayPort: number;
  /**
   * From `findNatsServer`; null: the queue is in the gateway's memory, and the gateway asks the groups for
   * heartbeats.
   */
  readonly natsServerBinary: string | null;
  /** Streams and log files. */
  readonly dataDirectory: string;
  /** Further settings of the processes, over this one's own environment. */
  readonly workerEnv?: NodeJS.ProcessEnv;
  readonly gatewayEnv?: NodeJS.ProcessEnv;
  /** A line for the user about each process lost and restarted. */
  readonly onEvent: (line: string) => void;
}

/** The addresses of a cluster's parts. */
interface LocalAddresses {
  /** host:port of the public gRPC door. */
  readonly gatewayAddress: string;
  /** Undefined: the queue is in the gateway's memory. */
  readonly natsUrl: string | undefined;
  /** host:port of each group's WorkerService; the same in every life of the group. */
  readonly leaderAddresses: readonly string[];
}

/** A running cluster. Close it. */
export interface LocalCluster extends LocalAddresses {
  readonly nats: Supervisor | undefined;
  readonly gateway: Supervisor;
  /** By group; a group's children are its ranks in order. */
  readonly groups: readonly Supervisor[];
  /** Rejects when a part fails for good: the cluster is then useless. */
  readonly givenUp: Promise<never>;
  /** Stops everything, the door first. Idempotent. */
  close(): Promise<void>;
}

/** Starts everything; returns when the processes are started, before the model is loaded. */
export async function startLocalCluster(options: LocalClusterOptions): Promise<LocalCluster> {
  if (options.gatewayPort !== 0) {
    await assertPortFree(options.gatewayPort);
  }
  const logs = join(options.dataDirectory, 'logs');
  await rm(logs, { recursive: true, force: true });
  await mkdir(logs, { recursive: true });
  const [natsPort = 0] = await freePorts(1);
  const [freeAddress = '', ...leaderAddresses] = await freeAddresses(options.groups + 1);
  const shared: SharedParts = {
    options,
    logs,
    natsUrl: options.natsServerBinary === null ? undefined : `nats://127.0.0.1:${natsPort}`,
    gatewayAddress: options.gatewayPort === 0 ? freeAddress : `127.0.0.1:${options.gatewayPort}`,
    leaderAddresses,
  };
  // In the order of starting; stopping goes the other way round.
  const stages: Supervisor[][] = [];
  const close = async (): Promise<void> => {
    for (const stage of stages.toReversed()) {
      await Promise.all(stage.map((part) => part.stop()));
    }
  };
  try {
    const nats =
      options.natsServerBinary === null
        ? undefined
        : await startNats(shared, { binary: options.natsServerBinary, port: natsPort });
    stages.push(nats === undefined ? [] : [nats]);
    const groups = await Promise.all(leaderAddresses.map(async (_, index) => startGroup(shared, index)));
    stages.push(groups);
    const gateway = await startGateway(shared);
    stages.push([gateway]);
    const givenUp = Promise.race(stages.flat().map((part) => part.givenUp));
    givenUp.catch(() => undefined);
    return { ...shared, nats, gateway, groups, givenUp, close };
  } catch (error) {
    await close();
    throw error;
  }
}

interface SharedParts extends LocalAddresses {
  readonly options: LocalClusterOptions;
  readonly logs: string;
}

async function startNats(
  { options }: SharedParts,
  server: { readonly binary: string; readonly port: number },
): Promise<Supervisor> {
  const storeDirectory = join(options.dataDirectory, 'nats');
  return Supervisor.start({
    name: 'the queue',
    onEvent: options.onEvent,
    stopGraceMs,
    start: async () => [(await startNatsServer({ ...server, storeDirectory })).child],
  });
}

async function startGroup(shared: SharedParts, index: number): Promise<Supervisor> {
  const { options, natsUrl, logs, leaderAddresses } = shared;
  const name = `group-${index}`;
  const ranks = Array.from({ length: options.tensorParallel }, (_, rank) => rank);
  return Supervisor.start({
    name,
    onEvent: options.onEvent,
    stopGraceMs,
    start: async () => {
      const addresses = await freeAddresses(2 * ranks.length);
      const peers = addresses.slice(ranks.length).join(',');
      const groupToken = randomUUID();
      return Promise.all(
        ranks.map((rank) =>
          startChild({
            name: `rank ${rank}`,
            command: [process.execPath, fileURLToPath(import.meta.resolve('@mimo/worker/main'))],
            logFile: join(logs, `${name}-rank-${rank}.log`),
            env: {
              ...process.env,
              MIMO_WORKER_MODEL: options.modelName,
              MIMO_WORKER_GROUP: name,
              MIMO_WORKER_SHARD_DIRECTORY: options.shardDirectory,
              MIMO_WORKER_PRECISION: options.precision,
              MIMO_WORKER_TENSOR_PARALLEL: String(options.tensorParallel),
              MIMO_WORKER_RANK: String(rank),
              MIMO_WORKER_PEERS: peers,
              MIMO_WORKER_GROUP_TOKEN: groupToken,
              MIMO_WORKER_LISTEN: rank === 0 ? leaderAddresses[index] : addresses[rank],
              MIMO_WORKER_DRAIN_GRACE: '5s',
              MIMO_WORKER_DRAIN_FINISH: '2s',
              ...(natsUrl === undefined ? {} : { MIMO_WORKER_NATS_URL: natsUrl }),
              ...options.workerEnv,
            },
          }),
        ),
      );
    },
  });
}

async function startGateway(shared: SharedParts): Promise<Supervisor> {
  const { options, natsUrl, logs, gatewayAddress, leaderAddresses } = shared;
  return Supervisor.start({
    name: 'gateway',
    onEvent: options.onEvent,
    stopGraceMs,
    start: async () => [
      await startChild({
        name: 'gateway',
        command: [process.execPath, fileURLToPath(import.meta.resolve('@mimo/gateway/main'))],
        logFile: join(logs, 'gateway.log'),
        env: {
          ...process.env,
          MIMO_GATEWAY_LISTEN: gatewayAddress,
          MIMO_GATEWAY_MODELS: JSON.stringify({ [options.modelName]: options.modelDirectory }),
          MIMO_GATEWAY_GRACE: '2s',
          ...(natsUrl === undefined
            ? { MIMO_GATEWAY_WORKERS: leaderAddresses.join(',') }
            : // Its store is in plain text, where each deletion overwrites.
              { MIMO_GATEWAY_NATS: natsUrl, MIMO_GATEWAY_ERASE_AFTER: '0s' }),
          ...options.gatewayEnv,
        },
      }),
    ],
  });
}
