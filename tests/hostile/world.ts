// The real processes that the hostile corpus is tried on: nats-server, a gateway with API keys and metrics, a group of
// one rank of models/mimo-demo. Owns their start and end, the calls of a case, and the processes' state and output.

import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import * as grpc from '@grpc/grpc-js';

import { callUnary } from '@mimo/core/grpc/client';
import { ClusterError } from '@mimo/core/process/errors';
import {
  CancelRequest,
  ChatRequest,
  CountTokensRequest,
  GenerateRequest,
  InferenceServiceService,
} from '@mimo/proto/inference';

import { freePorts } from '../../cli/src/local/free-ports.ts';
import {
  childCount,
  createClient,
  socketCount,
  startTestCluster,
  type TestCluster,
} from '../harness/cluster.ts';
import { heapEnv, openHeap, type Heap } from '../harness/heap.ts';
import { frame, rawCall, type CallEnd, type RawCall } from './raw-call.ts';

/** What the processes hold: all of it must be back where it was once the corpus has been tried. */
export interface Footprint {
  /** What is live after a collection, and what the process takes of the machine. */
  readonly gatewayLiveBytes: number;
  readonly gatewayBytes: number;
  readonly workerLiveBytes: number;
  readonly workerBytes: number;
  readonly gatewaySockets: number;
  /** Processes that read prompts. */
  readonly promptReaders: number;
  readonly held: Readonly<Record<string, number>>;
}

export interface HostileWorld {
  readonly cluster: TestCluster;
  /** How many models the gateway serves. */
  readonly models: number;
  /** host:port of the gateway's gRPC door. */
  readonly address: string;
  /** The key of the tenant that sends the corpus. */
  readonly apiKey: string;
  readonly bystanderKey: string;
  /** Where the gateway reads its keys, and again when it changes. */
  readonly keysFile: string;
  /** Sends any value as a ChatRequest: fields that are left out are absent on the wire. */
  chat(request: Parameters<typeof ChatRequest.fromPartial>[0], options?: CallOptions): Promise<CallEnd>;
  generate(
    request: Parameters<typeof GenerateRequest.fromPartial>[0],
    options?: CallOptions,
  ): Promise<CallEnd>;
  countTokens(request: Parameters<typeof CountTokensRequest.fromPartial>[0]): Promise<CallEnd>;
  cancel(request: Parameters<typeof CancelRequest.fromPartial>[0]): Promise<CallEnd>;
  /** Any bytes on any path, on a connection of its own; the tenant's key unless `headers` say otherwise. */
  raw(call: RawCall): Promise<CallEnd>;
  /** Every file that the processes keep, by its path: logs, the queue's store, temporary files. */
  readFiles(): Promise<ReadonlyMap<string, string>>;
  /** The text of everything that the processes logged, by file name. */
  readLogs(): Promise<ReadonlyMap<string, string>>;
  /** The gateway's metrics page. */
  readMetrics(): Promise<string>;
  footprint(): Promise<Footprint>;
  close(): Promise<void>;
}

/** What a subject adds to the world. */
export interface ModelWriter {
  /**
   * Writes checkpoints' front halves (config, tokenizer, template) below `directory`; gives their directories by name.
   */
  readonly writeModels?: (directory: string) => Promise<Readonly<Record<string, string>>>;
}

interface CallOptions {
  /** Sent as `grpc-timeout`. */
  readonly timeout?: string;
}

const demoModel = join(import.meta.dirname, '../../models/mimo-demo');
const service = '/mimo.inference.v1.InferenceService';
/** Where the processes make their temporary files. */
const temporaryName = 'temporary';
/** Recognisable, so that a search of the logs finds it wherever it goes. */
const keys = { hostile: 'hostile-key-0f3a9c57', bystander: 'bystander-key-7bd2e641' };

/** Starts the processes with the models of every subject. */
export async function openWorld(subjects: readonly ModelWriter[]): Promise<HostileWorld> {
  const directory = await mkdtemp(join(tmpdir(), 'mimo-hostile-'));
  const models: Record<string, string> = { 'mimo-demo': demoModel };
  for (const subject of subjects) {
    Object.assign(models, await subject.writeModels?.(directory));
  }
  const keysFile = join(directory, 'keys.json');
  const entries = Object.entries(keys).map(([tenant, key]) => ({ key, tenant }));
  await writeFile(keysFile, JSON.stringify({ keys: entries }), { mode: 0o600 });
  const temporary = join(directory, temporaryName);
  await mkdir(temporary);
  const [metricsPort = 0] = await freePorts(1);
  const cluster = await startTestCluster({
    tensorParallel: 1,
    apiKey: keys.bystander,
    workerEnv: { ...heapEnv, TMPDIR: temporary, MIMO_WORKER_LOG_LEVEL: 'debug' },
    gatewayEnv: {
      ...heapEnv,
      TMPDIR: temporary,
      MIMO_GATEWAY_LOG_LEVEL: 'debug',
      MIMO_GATEWAY_MODELS: Object.entries(models)
        .map(([name, path]) => `${name}=${path}`)
        .join(','),
      MIMO_GATEWAY_KEYS_FILE: keysFile,
      // Several inputs last as long as this.
      MIMO_GATEWAY_PROMPT_TIMEOUT: '4s',
      MIMO_GATEWAY_METRICS_LISTEN: `127.0.0.1:${metricsPort}`,
    },
  });
  return new RunningWorld({ cluster, directory, metricsPort, models: Object.keys(models).length });
}

class RunningWorld implements HostileWorld {
  readonly cluster: TestCluster;
  readonly models: number;
  readonly apiKey = keys.hostile;
  readonly bystanderKey = keys.bystander;
  readonly keysFile: string;
  readonly #directory: string;
  readonly #metricsPort: number;
  readonly #client: ReturnType<typeof createClient>;
  readonly #heaps = new Map<number, Promise<Heap>>();

  constructor({
    cluster,
    directory,
    metricsPort,
    models,
  }: {
    readonly cluster: TestCluster;
    readonly directory: string;
    readonly metricsPort: number;
    readonly models: number;
  }) {
    this.cluster = cluster;
    this.models = models;
    this.#directory = directory;
    this.keysFile = join(directory, 'keys.json');
    this.#metricsPort = metricsPort;
    this.#client = createClient(cluster.parts.gatewayAddress);
  }

  get address(): string {
    return this.cluster.parts.gatewayAddress;
  }

  async chat(
    request: Parameters<typeof ChatRequest.fromPartial>[0],
    options: CallOptions = {},
  ): Promise<CallEnd> {
    const body = ChatRequest.encode(ChatRequest.fromPartial({ model: 'mimo-demo', ...request })).finish();
    return this.#call('Chat', body, options);
  }

  async generate(
    request: Parameters<typeof GenerateRequest.fromPartial>[0],
    options: CallOptions = {},
  ): Promise<CallEnd> {
    const message = GenerateRequest.fromPartial({ model: 'mimo-demo', ...request });
    return this.#call('Generate', GenerateRequest.encode(message).finish(), options);
  }

  async countTokens(request: Parameters<typeof CountTokensRequest.fromPartial>[0]): Promise<CallEnd> {
    const message = CountTokensRequest.fromPartial(request);
    return this.#call('CountTokens', CountTokensRequest.encode(message).finish(), {});
  }

  async cancel(request: Parameters<typeof CancelRequest.fromPartial>[0]): Promise<CallEnd> {
    const metadata = new grpc.Metadata();
    metadata.set('authorization', `Bearer ${this.apiKey}`);
    try {
      const method = InferenceServiceService.cancel;
      const message = CancelRequest.fromPartial(request);
      const { cancelled } = await callUnary(this.#client, method, { request: message, metadata });
      return { code: 'ok', message: `cancelled ${cancelled}` };
    } catch (error) {
      const { code, message } = ClusterError.from(error);
      return { code, message };
    }
  }

  async raw(call: RawCall): Promise<CallEnd> {
    return rawCall(this.address, {
      ...call,
      headers: { authorization: `Bearer ${this.apiKey}`, ...call.headers },
    });
  }

  async #call(method: string, body: Uint8Array, { timeout }: CallOptions): Promise<CallEnd> {
    const headers = timeout === undefined ? {} : { 'grpc-timeout': timeout };
    return this.raw({ path: `${service}/${method}`, body: frame(body), headers });
  }

  async readLogs(): Promise<ReadonlyMap<string, string>> {
    const directory = join(this.cluster.dataDirectory, 'logs');
    const files = await readdir(directory);
    return new Map(
      await Promise.all(
        files.map(async (file) => [file, await readFile(join(directory, file), 'utf8')] as const),
      ),
    );
  }

  async readFiles(): Promise<ReadonlyMap<string, string>> {
    const directories = [this.cluster.dataDirectory, join(this.#directory, temporaryName)];
    const entries = await Promise.all(
      directories.map((directory) => readdir(directory, { recursive: true, withFileTypes: true })),
    );
    const paths = entries
      .flat()
      .filter((entry) => entry.isFile())
      .map((entry) => join(entry.parentPath, entry.name));
    const texts = await Promise.all(
      paths.map(async (path) => [path, await readFile(path, 'latin1').catch(() => '')] as const),
    );
    return new Map(texts);
  }

  async readMetrics(): Promise<string> {
    return (await fetch(`http://127.0.0.1:${this.#metricsPort}/metrics`)).text();
  }

  async footprint(): Promise<Footprint> {
    const { gateway, groups } = this.cluster.parts;
    const gatewayPid = gateway.children[0]?.pid ?? 0;
    const workerPid = groups[0]?.children[0]?.pid ?? 0;
    return {
      gatewayLiveBytes: await this.#liveBytes(gatewayPid, 'gateway.log'),
      gatewayBytes: await residentBytes(gatewayPid),
      workerLiveBytes: await this.#liveBytes(workerPid, 'group-0-rank-0.log'),
      workerBytes: await residentBytes(workerPid),
      gatewaySockets: await socketCount(gatewayPid),
      promptReaders: await childCount(gatewayPid),
      held: { ...(await this.cluster.held()) },
    };
  }

  async #liveBytes(pid: number, log: string): Promise<number> {
    const opening =
      this.#heaps.get(pid) ?? openHeap({ pid, logFile: join(this.cluster.dataDirectory, 'logs', log) });
    this.#heaps.set(pid, opening);
    return (await opening).liveBytes();
  }

  async close(): Promise<void> {
    this.#client.close();
    await this.cluster.close();
    await rm(this.#directory, { recursive: true, force: true });
  }
}

async function residentBytes(pid: number): Promise<number> {
  const status = await readFile(`/proc/${pid}/status`, 'utf8');
  return Number(/^VmRSS:\s+(\d+) kB$/m.exec(status)?.[1]) * 1024;
}
