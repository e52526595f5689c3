// A whole cluster of real processes for a test: nats-server, gateway and groups of ranks on the demonstration model, on
// free ports and in a separate directory. Owns its start, its end, and the counters that show a leak. Asserts
// nothing.

import { mkdtemp, readFile, readdir, readlink, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import * as grpc from '@grpc/grpc-js';

import { callServerStream, callUnary, channelOptions } from '@mimo/core/grpc/client';
import { createLog } from '@mimo/core/process/log';
import type { Bus } from '@mimo/core/bus/bus';
import { createNatsBus } from '@mimo/core/bus/nats/bus';
import {
  InferenceServiceClient,
  InferenceServiceService,
  Role,
  type ChatRequest,
  type ChatResponse,
  type Finish,
  type Started,
} from '@mimo/proto/inference';
import { SamplingParams, type TokenLogprob } from '@mimo/proto/sampling';
import { WorkerServiceClient, WorkerServiceService, type StatsResponse } from '@mimo/proto/worker';
import { compile } from '@mimo/worker/compiler/compile';
import type { Precision } from '@mimo/worker/shards/target-profile';
import { shardDirectoryIn } from '@mimo/worker/shard-cache';

import { startLocalCluster, type LocalCluster } from '../../cli/src/local/local-cluster.ts';
import { cacheDirectoryFrom, findNatsServer } from '../../cli/src/local/nats-server.ts';
import { waitFor } from './wait-for.ts';

const demoModel = join(import.meta.dirname, '../../models/mimo-demo');
const maxReceiveBytes = 16 * 2 ** 20;

/** What may differ from one group of two int8 ranks of models/mimo-demo. */
export interface TestClusterOptions {
  readonly modelDirectory?: string;
  readonly precision?: Precision;
  readonly tensorParallel?: number;
  readonly groups?: number;
  /** False: no nats-server, the queue is in the gateway's memory. */
  readonly nats?: boolean;
  readonly workerEnv?: NodeJS.ProcessEnv;
  readonly gatewayEnv?: NodeJS.ProcessEnv;
  /** With which the harness itself asks, where `gatewayEnv` names a keys file. */
  readonly apiKey?: string;
}

/** What is held for requests, all parts together; all zero when none lives. */
interface HeldCounts {
  readonly records: number;
  readonly sequences: number;
  readonly runningRequests: number;
  readonly kvBlocks: number;
}

/** A running cluster. Close it. */
export interface TestCluster {
  readonly parts: LocalCluster;
  readonly modelName: string;
  readonly client: InferenceServiceClient;
  /** Streams and log files of the processes. */
  readonly dataDirectory: string;
  /** What the local supervisor said, line by line. */
  readonly events: readonly string[];
  /** A connection to the cluster's queue; throws if that is in the gateway's memory. */
  readonly queue: Bus;
  stats(group: number): Promise<StatsResponse>;
  held(): Promise<HeldCounts>;
  /** Waits until every group takes requests, as the gateway says. */
  ready(): Promise<void>;
  close(): Promise<void>;
}

/** Starts a cluster and waits until it takes requests. */
export async function startTestCluster(options: TestClusterOptions = {}): Promise<TestCluster> {
  const signal = new AbortController().signal;
  const cacheDirectory = cacheDirectoryFrom(process.env);
  const {
    modelDirectory = demoModel,
    precision = 'int8',
    tensorParallel = 2,
    groups = 1,
    nats = true,
  } = options;
  const natsServerBinary = nats
    ? await findNatsServer({ cacheDirectory, signal, onProgress: (line) => console.error(line) })
    : null;
  if (nats && natsServerBinary === null) {
    throw new Error('this test needs a nats-server: on the PATH, or Go to build it');
  }
  const set = { cacheDirectory, checkpointDirectory: modelDirectory, precision, tensorParallel };
  const shardDirectory = await shardDirectoryIn(set);
  await compile({ modelDirectory, outDirectory: shardDirectory, tensorParallel, precision }, signal);
  const dataDirectory = await mkdtemp(join(tmpdir(), 'mimo-cluster-'));
  const modelName = 'mimo-demo';
  const events: string[] = [];
  const parts = await startLocalCluster({
    modelName,
    modelDirectory,
    shardDirectory,
    precision,
    tensorParallel,
    groups,
    gatewayPort: 0,
    natsServerBinary,
    dataDirectory,
    workerEnv: options.workerEnv ?? {},
    gatewayEnv: options.gatewayEnv ?? {},
    onEvent: (line) => events.push(line),
  });
  const cluster = new RunningCluster({ parts, modelName, events, dataDirectory, apiKey: options.apiKey });
  try {
    await Promise.race([cluster.ready(), parts.givenUp]);
  } catch (error) {
    await cluster.close();
    throw error;
  }
  return cluster;
}

class RunningCluster implements TestCluster {
  readonly parts: LocalCluster;
  readonly modelName: string;
  readonly client: InferenceServiceClient;
  readonly events: readonly string[];
  readonly #leaders: readonly WorkerServiceClient[];
  readonly #queue: Bus | undefined;
  readonly dataDirectory: string;
  readonly #metadata = new grpc.Metadata();

  constructor(options: {
    readonly parts: LocalCluster;
    readonly modelName: string;
    readonly events: readonly string[];
    readonly dataDirectory: string;
    readonly apiKey: string | undefined;
  }) {
    const { parts } = options;
    this.parts = parts;
    this.modelName = options.modelName;
    this.events = options.events;
    this.dataDirectory = options.dataDirectory;
    if (options.apiKey !== undefined) {
      this.#metadata.set('authorization', `Bearer ${options.apiKey}`);
    }
    this.client = createClient(parts.gatewayAddress);
    this.#leaders = parts.leaderAddresses.map(
      (address) =>
        new WorkerServiceClient(address, grpc.credentials.createInsecure(), channelOptions(maxReceiveBytes)),
    );
    this.#queue =
      parts.natsUrl === undefined
        ? undefined
        : createNatsBus({
            servers: [parts.natsUrl],
            clientName: 'test',
            replicas: 1,
            recordMaxAgeMs: 86_400_000,
            log: createLog({ process: 'test', level: 'silent' }),
          });
  }

  get queue(): Bus {
    if (this.#queue === undefined) {
      throw new Error('this cluster has no nats-server');
    }
    return this.#queue;
  }

  async stats(group: number): Promise<StatsResponse> {
    const leader = this.#leaders[group];
    if (leader === undefined) {
      throw new RangeError(`there is no group ${group}`);
    }
    return callUnary(leader, WorkerServiceService.stats, {
      request: {},
      timeoutMs: 30_000,
    });
  }

  async held(): Promise<HeldCounts> {
    const stats = await Promise.all(this.#leaders.map((_, group) => this.stats(group)));
    const sum = (count: (heartbeat: NonNullable<StatsResponse['heartbeat']>) => number): number =>
      stats.reduce(
        (total, { heartbeat }) => total + (heartbeat === undefined ? Number.NaN : count(heartbeat)),
        0,
      );
    return {
      records: (await this.#queue?.records.count()) ?? 0,
      sequences: sum((heartbeat) => heartbeat.runningSequences + heartbeat.waitingSequences),
      runningRequests: sum((heartbeat) => heartbeat.running.length),
      kvBlocks: sum((heartbeat) => heartbeat.kvBlocksUsed),
    };
  }

  async ready(): Promise<void> {
    await waitFor('every group to take requests', async () => {
      const { models } = await callUnary(this.client, InferenceServiceService.listModels, {
        request: {},
        timeoutMs: 5_000,
        metadata: this.#metadata,
      });
      return models.some(
        ({ name, readyGroups }) => name === this.modelName && readyGroups === this.parts.groups.length,
      );
    });
  }

  async close(): Promise<void> {
    this.client.close();
    for (const leader of this.#leaders) {
      leader.close();
    }
    await this.#queue?.close();
    await this.parts.close();
    await rm(this.dataDirectory, { recursive: true, force: true });
  }
}

/** A client with a connection of its own. The caller closes it. */
export function createClient(address: string): InferenceServiceClient {
  return new InferenceServiceClient(address, grpc.credentials.createInsecure(), {
    ...channelOptions(maxReceiveBytes),
    'grpc.use_local_subchannel_pool': 1,
  });
}

/** A chat request with one question, greedy unless said otherwise. */
export function chatRequest(question: string, sampling: Partial<SamplingParams> = {}): ChatRequest {
  return {
    model: 'mimo-demo',
    messages: [{ role: Role.USER, content: question }],
    sampling: SamplingParams.fromPartial({ temperature: 0, ...sampling }),
  };
}

/** A whole answer, put together from its stream. */
export interface Answer {
  readonly started: Started | undefined;
  readonly tokenIds: readonly number[];
  readonly text: string;
  readonly reasoning: string;
  readonly logprobs: readonly TokenLogprob[];
  readonly finish: Finish | undefined;
  readonly messages: number;
}

export interface AskOptions {
  readonly request: ChatRequest;
  readonly signal?: AbortSignal;
  readonly timeoutMs?: number;
  /** Holds the API key where one is needed. */
  readonly metadata?: grpc.Metadata;
  /** Hears of each message as it comes. */
  readonly onMessage?: (message: ChatResponse) => void;
}

/** Asks and reads to the end. Fails with the stream's error, and on a gap or a repetition among the indices. */
export async function ask(client: InferenceServiceClient, options: AskOptions): Promise<Answer> {
  const answer = { text: '', reasoning: '', messages: 0 };
  const tokenIds: number[] = [];
  const logprobs: TokenLogprob[] = [];
  let started: Started | undefined;
  let finish: Finish | undefined;
  const { request, signal, timeoutMs, metadata } = options;
  for await (const message of callServerStream(client, InferenceServiceService.chat, {
    request,
    signal,
    timeoutMs,
    metadata,
  })) {
    options.onMessage?.(message);
    answer.messages += 1;
    const { event } = message;
    if (finish !== undefined || (started === undefined) !== (event?.$case === 'started')) {
      throw new Error(`message ${answer.messages} is ${event?.$case}, out of order`);
    }
    if (event?.$case === 'started') {
      started = event.value;
    } else if (event?.$case === 'finish') {
      finish = event.value;
    } else if (event?.$case === 'delta') {
      if (event.value.tokenIds.length > 0 && event.value.index !== tokenIds.length) {
        throw new Error(`index ${event.value.index} came where ${tokenIds.length} is next`);
      }
      tokenIds.push(...event.value.tokenIds);
      logprobs.push(...event.value.logprobs);
      answer.text += event.value.text;
      answer.reasoning += event.value.reasoning;
    }
  }
  return { ...answer, started, tokenIds, logprobs, finish };
}

/**
 * Sockets that a process holds open, besides its channel to each process that it started when there was work for it.
 */
export async function socketCount(pid: number): Promise<number> {
  const directory = `/proc/${pid}/fd`;
  const targets = await Promise.all(
    (await readdir(directory)).map((name) => readlink(join(directory, name)).catch(() => '')),
  );
  return targets.filter((target) => target.startsWith('socket:')).length - (await childCount(pid));
}

/** Processes that a process has started and that live. */
export async function childCount(pid: number): Promise<number> {
  const children = await readFile(`/proc/${pid}/task/${pid}/children`, 'utf8');
  return children.split(' ').filter((child) => child.trim() !== '').length;
}
