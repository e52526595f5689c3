// A stage for tests of the gateway: a real NATS server, gateways in this process, and groups that follow a script. Owns
// their start and end, and the check that a test has left nothing behind.

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import * as grpc from '@grpc/grpc-js';
import { createLog } from '@mimo/core/process/log';
import type { Bus } from '@mimo/core/bus/bus';
import { createNatsBus } from '@mimo/core/bus/nats/bus';
import type { QueueState } from '@mimo/core/bus/signals';
import { parseGatewayConfig } from '@mimo/gateway/config';
import { InferenceServiceClient } from '@mimo/proto/inference';
import { loadTokenizer, type Tokenizer } from '@mimo/tokenizer';

import { openGateway, type TestGateway } from './in-process.ts';
import type { NatsServer } from '../../cli/src/local/nats-server.ts';
import { startTestNats } from './nats.ts';
import { startScriptedGroup, type ScriptedGroup, type ScriptedGroupOptions } from './scripted-group.ts';
import { waitFor } from './wait-for.ts';

const modelDirectory = join(import.meta.dirname, '../../models/mimo-demo');
const log = createLog({ process: 'test', level: 'silent' });

/** What the dispatchers publish, gathered since `followStates`. */
export interface FollowedStates {
  readonly states: readonly QueueState[];
  /** When each came. */
  readonly timesMs: readonly number[];
  readonly stop: () => void;
}

/** One for a file; `clear` after each test, `close` at the end. */
export class GatewayStage {
  /** The name of the one model, which all gateways serve and all groups hold. */
  static readonly model = 'mimo-demo';
  readonly directory: string;
  readonly nats: NatsServer;
  readonly bus: Bus;
  readonly tokenizer: Tokenizer;
  readonly #gateways = new Set<TestGateway>();
  readonly #groups = new Set<ScriptedGroup>();
  readonly #clients: InferenceServiceClient[] = [];

  private constructor(directory: string, nats: NatsServer, tokenizer: Tokenizer) {
    this.directory = directory;
    this.nats = nats;
    this.tokenizer = tokenizer;
    this.bus = this.openQueue(nats);
  }

  static async open(): Promise<GatewayStage> {
    const directory = await mkdtemp(join(tmpdir(), 'mimo-gateway-'));
    const nats = await startTestNats({ storeDirectory: join(directory, 'nats'), port: 0 });
    const stage = new GatewayStage(directory, nats, await loadTokenizer(modelDirectory));
    await stage.bus.opened(AbortSignal.timeout(30_000));
    return stage;
  }

  /** A connection of the test's own. The test closes it. */
  openQueue(server: NatsServer): Bus {
    return createNatsBus({
      servers: [server.url],
      clientName: 'test',
      replicas: 1,
      recordMaxAgeMs: 3_600_000,
      log,
    });
  }

  async openGateway(env: Readonly<Record<string, string>> = {}): Promise<TestGateway> {
    const config = parseGatewayConfig({
      MIMO_GATEWAY_LISTEN: '127.0.0.1:0',
      MIMO_GATEWAY_MODELS: `${GatewayStage.model}=${modelDirectory}`,
      MIMO_GATEWAY_NATS: this.nats.url,
      ...env,
    });
    const gateway = await openGateway(config, log);
    this.#gateways.add(gateway);
    return gateway;
  }

  /** Ends a gateway before the test ends. */
  async closeGateway(gateway: TestGateway): Promise<void> {
    this.#gateways.delete(gateway);
    await gateway.close();
  }

  async openGroup(options: Partial<ScriptedGroupOptions> = {}): Promise<ScriptedGroup> {
    const name = `g${this.#groups.size}`;
    const group = await startScriptedGroup({
      model: GatewayStage.model,
      group: name,
      queue: this.bus,
      ...options,
    });
    this.#groups.add(group);
    return group;
  }

  /** Ends a group without a word, as `kill -9` would. */
  async loseGroup(group: ScriptedGroup): Promise<void> {
    this.#groups.delete(group);
    await group.vanish();
  }

  clientOf(gateway: TestGateway): InferenceServiceClient {
    const client = new InferenceServiceClient(gateway.address, grpc.credentials.createInsecure());
    this.#clients.push(client);
    return client;
  }

  /** Gathers the published state from the first that comes on. */
  async followStates(): Promise<FollowedStates> {
    const states: QueueState[] = [];
    const timesMs: number[] = [];
    const stop = new AbortController();
    const run = async (): Promise<void> => {
      for await (const state of this.bus.queueStates.follow(GatewayStage.model, stop.signal)) {
        states.push(state);
        timesMs.push(performance.now());
      }
    };
    void run();
    await waitFor('a published state', () => states.length > 0);
    return { states, timesMs, stop: () => stop.abort() };
  }

  /** Waits until nothing of the test is left, and ends its clients, gateways and groups. */
  async clear(): Promise<void> {
    for (const client of this.#clients.splice(0)) {
      client.close();
    }
    await waitFor('nothing to be left', async () => {
      const held = [...this.#gateways].map((gateway) => {
        const { requests, deletingRecords, sequences } = gateway.counts();
        return requests + deletingRecords + sequences;
      });
      const sequences = [...this.#groups].map((group) => group.sequences);
      return [...held, ...sequences, await this.bus.records.count()].every((count) => count === 0);
    });
    await Promise.all([...this.#gateways].map((gateway) => gateway.close()));
    await Promise.all([...this.#groups].map((group) => group.close()));
    this.#gateways.clear();
    this.#groups.clear();
  }

  async close(): Promise<void> {
    await this.bus.close();
    await this.nats.close();
    await rm(this.directory, { recursive: true, force: true });
  }
}
