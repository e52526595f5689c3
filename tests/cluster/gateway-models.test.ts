// Models that come, change and go while a gateway runs: a real gateway process, a real nats-server with the
// catalogue, and a group that answers every request with its prompt.

import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import * as grpc from '@grpc/grpc-js';
import { ClusterError } from '@mimo/core/process/errors';
import { callServerStream, callUnary } from '@mimo/core/grpc/client';
import { createLog } from '@mimo/core/process/log';
import type { CatalogModel, ModelCatalog } from '@mimo/core/bus/model-catalog';
import { createNatsBus, type NatsBus } from '@mimo/core/bus/nats/bus';
import { createModelCatalog } from '@mimo/core/bus/nats/model-catalog';
import { modelBucket } from '@mimo/core/bus/nats/subjects';
import { modelIdentity, textDigestOf } from '@mimo/core/bus/model-identity';
import {
  CountTokensRequest,
  GenerateRequest,
  InferenceServiceClient,
  InferenceServiceService,
  type ListModelsResponse,
} from '@mimo/proto/inference';
import { GroupState } from '@mimo/proto/worker';
import { jetstreamManager } from '@nats-io/jetstream';
import { connect } from '@nats-io/transport-node';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';

import type { NatsServer } from '../../cli/src/local/nats-server.ts';
import { startGatewayProcess, type GatewayProcess } from '../harness/gateway-process.ts';
import { startTestNats } from '../harness/nats.ts';
import { startScriptedGroup, type ScriptedGroup } from '../harness/scripted-group.ts';
import { waitFor } from '../harness/wait-for.ts';

const model = 'org/mimo-demo.v1';
const prompt = 'a prompt that is said again, token by token, '.repeat(6);
const demo = join(import.meta.dirname, '../../models/mimo-demo');
const log = createLog({ process: 'test', level: 'silent' });

let directory: string;
let server: NatsServer;
let catalog: ModelCatalog;
let bus: NatsBus;
let gateway: GatewayProcess;
let client: InferenceServiceClient;
let group: ScriptedGroup | undefined;

async function filesOf(changes: Record<string, string> = {}): Promise<Map<string, Uint8Array>> {
  const files = new Map<string, Uint8Array>();
  for (const file of ['config.json', 'tokenizer.json', 'tokenizer_config.json']) {
    files.set(file, Buffer.from(changes[file] ?? (await readFile(join(demo, file)))));
  }
  return files;
}

async function publish(changes: Record<string, string> = {}, name = model, identity = ''): Promise<void> {
  await catalog.publish({ name, files: await filesOf(changes), identity }, AbortSignal.timeout(20_000));
}

async function listed(): Promise<ListModelsResponse['models']> {
  return (await callUnary(client, InferenceServiceService.listModels, { request: {} })).models;
}

async function isListed(name = model): Promise<boolean> {
  return (await listed()).some((each) => each.name === name);
}

async function promptTokens(): Promise<number> {
  const request = CountTokensRequest.fromPartial({
    request: { $case: 'generate', value: { model, input: { $case: 'prompt', value: prompt } } },
  });
  return (await callUnary(client, InferenceServiceService.countTokens, { request })).promptTokens;
}

/** The whole text of a completion, with a call at its first piece, during which the group stands still. */
async function generate(onFirst?: () => Promise<void>): Promise<string> {
  const request = GenerateRequest.fromPartial({ model, input: { $case: 'prompt', value: prompt } });
  let text = '';
  for await (const { event } of callServerStream(client, InferenceServiceService.generate, { request })) {
    if (event?.$case === 'delta') {
      if (text === '' && onFirst !== undefined) {
        group?.stall();
        await onFirst();
        group?.resume();
      }
      text += event.value.text;
    }
  }
  return text;
}

function refusal(call: Promise<unknown>): Promise<ClusterError> {
  return call.then(
    () => {
      throw new Error('it was served');
    },
    (error: unknown) => ClusterError.from(error),
  );
}

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'mimo-models-test-'));
  server = await startTestNats({ storeDirectory: join(directory, 'nats'), port: 0 });
  const servers = [server.url];
  bus = createNatsBus({ servers, clientName: 'test', replicas: 1, recordMaxAgeMs: 3_600_000, log });
  catalog = createModelCatalog(bus.link, { replicas: 1, log });
  await bus.opened(AbortSignal.timeout(20_000));
});

beforeEach(async () => {
  gateway = startGatewayProcess({
    MIMO_GATEWAY_LISTEN: '127.0.0.1:0',
    MIMO_GATEWAY_NATS: server.url,
    MIMO_GATEWAY_MODELS_DIRECTORY: directory,
  });
  client = new InferenceServiceClient(await gateway.address(), grpc.credentials.createInsecure());
});

afterEach(async () => {
  client.close();
  gateway.child.kill('SIGTERM');
  // Whatever happened to its models, it leaves as it should, and no files behind.
  const [code] = await gateway.exited;
  const left = await readdir(directory);
  if (code !== 0 || left.join() !== 'nats') {
    throw new Error(`the gateway exited with ${String(code)} and left ${left.join()}`);
  }
  await catalog.remove(model, AbortSignal.timeout(20_000));
  await group?.close();
  group = undefined;
});

afterAll(async () => {
  await bus.close();
  await server.close();
  await rm(directory, { recursive: true, force: true });
});

describe('a gateway that was started without models', () => {
  it('says what to do about a missing model, and serves the model once it is published', async () => {
    expect(await listed()).toEqual([]);
    expect(await refusal(generate())).toMatchObject({
      code: 'not_found',
      message: expect.stringMatching(
        /model "org\/mimo-demo\.v1" is not served here; no model exists yet: create a ModelService/,
      ) as string,
    });
    group = await startScriptedGroup({ model, group: 'g', queue: bus, stepMs: 1 });
    await publish();
    await waitFor('the model and its group', async () => (await listed())[0]?.readyGroups === 1);
    expect(await generate()).toBe(prompt);
  });

  it('uses the new files of a model for new requests, while running requests keep the old files', async () => {
    group = await startScriptedGroup({ model, group: 'g', queue: bus, stepMs: 10 });
    await publish();
    await waitFor('the model', isListed);
    const before = await promptTokens();
    const tokenizer = JSON.parse(await readFile(join(demo, 'tokenizer.json'), 'utf8')) as {
      model: { merges: unknown[] };
    };
    tokenizer.model.merges = [];
    const config = JSON.parse(await readFile(join(demo, 'config.json'), 'utf8')) as Record<string, unknown>;
    config['max_position_embeddings'] = 1_000;
    const text = await generate(async () => {
      await publish({ 'tokenizer.json': JSON.stringify(tokenizer), 'config.json': JSON.stringify(config) });
      await waitFor('the new files', async () => (await listed())[0]?.maxContextTokens === 1_000);
      expect(await promptTokens()).toBe(Buffer.byteLength(prompt));
    });
    expect(before).toBeLessThan(Buffer.byteLength(prompt));
    expect(text).toBe(prompt);
    expect(await generate()).toBe(prompt);
    await waitFor('the former files to be gone', async () => (await fetched()).length === 1);
  });

  it('serves a replaced model by its old groups and tokenizer until a group of the new one is routable', async () => {
    const tokenizer = JSON.parse(await readFile(join(demo, 'tokenizer.json'), 'utf8')) as {
      model: { merges: unknown[] };
    };
    tokenizer.model.merges = [];
    const changes = { 'tokenizer.json': JSON.stringify(tokenizer) };
    const oldIdentity = modelIdentity(textDigestOf(await filesOf()), 'old');
    const newIdentity = modelIdentity(textDigestOf(await filesOf(changes)), 'new');
    group = await startScriptedGroup({ model, group: 'old', queue: bus, identity: oldIdentity });
    await publish({}, model, oldIdentity);
    await waitFor('the model and its group', async () => (await listed())[0]?.readyGroups === 1);
    const oldTokens = await promptTokens();
    await publish(changes, model, newIdentity);
    await waitFor('the new files', async () => (await fetched()).length === 2);
    // The gateway's tick is over by then: what it has fetched it serves.
    expect(await generate()).toBe(prompt);
    expect(await promptTokens()).toBe(oldTokens);
    const other = await startScriptedGroup({ model, group: 'new', queue: bus, identity: newIdentity });
    try {
      await waitFor('some of what comes to be the new one’s', async () => {
        expect(await generate()).toBe(prompt);
        return other.begun > 0;
      });
      expect(other.prompts.every(({ length }) => length === Buffer.byteLength(prompt))).toBe(true);
      expect(group.prompts.every(({ length }) => length === oldTokens)).toBe(true);
      group.become(GroupState.DRAINING);
      await waitFor('the former files to be gone', async () => (await fetched()).length === 1);
      expect(await generate()).toBe(prompt);
      expect(await promptTokens()).toBe(Buffer.byteLength(prompt));
    } finally {
      await other.close();
    }
  });

  it('finishes running requests when a model is removed, and rejects waiting and new ones', async () => {
    group = await startScriptedGroup({ model, group: 'g', queue: bus, stepMs: 20, maxSequences: 1 });
    await publish();
    await waitFor('the model and its group', async () => (await listed())[0]?.readyGroups === 1);
    let waiting: Promise<ClusterError> | undefined;
    const text = await generate(async () => {
      waiting = refusal(generate());
      await waitFor('both records', async () => (await bus.records.count()) === 2);
      await catalog.remove(model, AbortSignal.timeout(20_000));
      await waitFor('the model to be gone', async () => !(await isListed()));
      expect(await refusal(generate())).toMatchObject({ code: 'not_found' });
    });
    expect(text).toBe(prompt);
    expect(await waiting).toMatchObject({
      code: 'not_found',
      message: expect.stringContaining('was removed while the request waited') as string,
    });
    await waitFor('nothing to be left', async () => (await bus.records.count()) === 0);
    await waitFor('its files to be gone', async () => (await fetched()).length === 0);
    await waitFor('its dispatcher to be gone', () =>
      gateway.lines.some((line) => line.includes('"dispatching ended"')),
    );
  });

  it('serves all other models beside an unreadable one, and that one once it is corrected', async () => {
    const broken = 'broken';
    await publish({ 'tokenizer.json': '{' }, broken);
    await publish();
    await waitFor('the good model', isListed);
    const request = GenerateRequest.fromPartial({ model: broken, input: { $case: 'prompt', value: 'a' } });
    const count = { request: { $case: 'generate' as const, value: request } };
    const counting = (): Promise<unknown> =>
      callUnary(client, InferenceServiceService.countTokens, { request: count });
    expect(await refusal(counting())).toMatchObject({ code: 'unavailable' });
    expect(await isListed(broken)).toBe(false);
    const said = gateway.lines.find((line) => line.includes('"cannot serve a model"'));
    expect(said).toContain('tokenizer.json is not JSON');
    await publish({}, broken);
    await waitFor('the mended model', () => isListed(broken));
    expect(await counting()).toMatchObject({ promptTokens: 1 });
    await catalog.remove(broken, AbortSignal.timeout(20_000));
  });

  it.each([
    [
      'server comes back empty',
      async (): Promise<void> => {
        const { port } = server;
        server.child.kill();
        await server.child.exited;
        await rm(join(directory, 'nats'), { recursive: true });
        server = await startTestNats({ storeDirectory: join(directory, 'nats'), port });
      },
    ],
    [
      'catalogue is deleted',
      async (): Promise<void> => {
        const connection = await connect({ servers: server.url });
        await (await jetstreamManager(connection)).streams.delete(`OBJ_${modelBucket}`);
        await connection.close();
      },
    ],
  ])(
    'keeps serving its models when the %s, and restores them for gateways that start later',
    async (_what, lose) => {
      const identity = modelIdentity(textDigestOf(await filesOf()), 'weights');
      await publish({}, model, identity);
      const before = await catalogued();
      await waitFor('the model', isListed);
      await lose();
      group = await startScriptedGroup({ model, group: 'g', queue: bus, stepMs: 1, identity });
      await waitFor(
        'the queue',
        () =>
          generate().then(
            (text) => text === prompt,
            () => false,
          ),
        60_000,
      );
      expect(await isListed()).toBe(true);
      await waitFor('the model to be stored', async () => (await catalogued()).length === 1);
      expect(await catalogued()).toEqual(before);
      // The same in all: nobody loads it again.
      expect(gateway.lines.filter((line) => line.includes('"model added"'))).toHaveLength(1);
      expect(gateway.lines.some((line) => line.includes('"model changed"'))).toBe(false);
      await catalog.remove(model, AbortSignal.timeout(20_000));
      await waitFor('the model to be gone', async () => !(await isListed()));
      expect(await catalogued()).toEqual([]);
    },
  );
});

/** What a follower sees that begins now: what the catalogue holds, and nothing of what it has lost. */
async function catalogued(): Promise<readonly CatalogModel[]> {
  for await (const models of catalog.follow(AbortSignal.timeout(20_000))) {
    return models;
  }
  throw new Error('the catalogue does not answer');
}

/** The directories of the models that the gateway holds. */
async function fetched(): Promise<string[]> {
  const own = (await readdir(directory)).find((name) => name.startsWith('mimo-gateway-models-'));
  return own === undefined ? [] : readdir(join(directory, own));
}
