// The gateway over real gRPC, with a real NATS server and groups that follow a script: what a client sees, and that
// nothing is left when it has gone.

import { createHash, randomUUID } from 'node:crypto';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

import * as grpc from '@grpc/grpc-js';
import { ClusterError } from '@mimo/core/process/errors';
import { callServerStream, callUnary, type CallLimits } from '@mimo/core/grpc/client';
import { createLog } from '@mimo/core/process/log';
import type { QueueState, RequestQueue } from '@mimo/core/bus/queue';
import { createNatsQueue } from '@mimo/core/bus/queue-nats';
import { parseGatewayConfig } from '@mimo/gateway/config';
import { startGateway, type Gateway } from '@mimo/gateway/gateway';
import {
  ChatRequest,
  CountTokensRequest,
  GenerateRequest,
  InferenceServiceClient,
  InferenceServiceService,
  Role,
  type ChatResponse,
  type GenerateResponse,
} from '@mimo/proto/inference';
import { FinishReason } from '@mimo/proto/sampling';
import { GroupState } from '@mimo/proto/worker';
import { loadTokenizer, type Tokenizer } from '@mimo/tokenizer';
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';

import {
  cacheDirectoryFrom,
  findNatsServer,
  startNatsServer,
  type NatsServer,
} from '../../cli/src/local/nats-server.ts';
import {
  startScriptedGroup,
  type ScriptedGroup,
  type ScriptedGroupOptions,
} from '../harness/scripted-group.ts';
import { waitFor } from '../harness/wait-for.ts';

const model = 'mimo-demo';
const modelDirectory = join(import.meta.dirname, '../../models/mimo-demo');
const log = createLog({ process: 'test', level: 'silent' });
/** As long as a slow machine may take for what is there within two seconds. */
const patience = { timeout: 30_000, interval: 50 };

let directory: string;
let server: NatsServer;
let bus: RequestQueue;
let tokenizer: Tokenizer;
const gateways: Gateway[] = [];
const groups: ScriptedGroup[] = [];
const clients: InferenceServiceClient[] = [];

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'mimo-gateway-'));
  const binary = await findNatsServer({
    cacheDirectory: cacheDirectoryFrom(process.env),
    onProgress: () => undefined,
    signal: AbortSignal.timeout(170_000),
  });
  if (binary === null) {
    throw new Error('these tests need a nats-server: on the PATH, or a Go toolchain to build one');
  }
  server = await startNatsServer({ binary, storeDirectory: join(directory, 'nats'), port: 0 });
  bus = createNatsQueue({
    servers: [server.url],
    clientName: 'test',
    replicas: 1,
    recordMaxAgeMs: 3_600_000,
    log,
  });
  tokenizer = await loadTokenizer(modelDirectory);
  await bus.opened(AbortSignal.timeout(30_000));
});

afterEach(async () => {
  for (const client of clients.splice(0)) {
    client.close();
  }
  // Whatever a test did, nothing may be left of it.
  await waitFor('nothing to be left', async () => {
    const left = gateways.map((gateway) => gateway.counts());
    const held = left.map(
      ({ requests, deletingRecords, sequences }) => requests + deletingRecords + sequences,
    );
    const sequences = groups.map((group) => group.sequences);
    return [...held, ...sequences, (await bus.counts()).records].every((count) => count === 0);
  });
  await Promise.all(gateways.splice(0).map((gateway) => gateway.close()));
  await Promise.all(groups.splice(0).map((group) => group.close()));
});

afterAll(async () => {
  await bus.close();
  await server.close();
  await rm(directory, { recursive: true, force: true });
});

async function openGateway(env: Record<string, string> = {}): Promise<Gateway> {
  const config = parseGatewayConfig({
    MIMO_GATEWAY_LISTEN: '127.0.0.1:0',
    MIMO_GATEWAY_MODELS: `${model}=${modelDirectory}`,
    MIMO_GATEWAY_NATS: server.url,
    ...env,
  });
  const gateway = await startGateway(config, log);
  gateways.push(gateway);
  return gateway;
}

async function openGroup(options: Partial<ScriptedGroupOptions> = {}): Promise<ScriptedGroup> {
  const group = await startScriptedGroup({ model, group: `g${groups.length}`, queue: bus, ...options });
  groups.push(group);
  return group;
}

async function openStalledGroup(group: string): Promise<ScriptedGroup> {
  const opened = await openGroup({ group });
  opened.stall();
  return opened;
}

function clientOf(gateway: Gateway): InferenceServiceClient {
  const client = new InferenceServiceClient(gateway.address, grpc.credentials.createInsecure());
  clients.push(client);
  return client;
}

type Sampling = NonNullable<Parameters<typeof GenerateRequest.fromPartial>[0]['sampling']>;

function generation(prompt: string, sampling: Sampling = {}): GenerateRequest {
  return GenerateRequest.fromPartial({ model, input: { $case: 'prompt', value: prompt }, sampling });
}

function generate(
  client: InferenceServiceClient,
  request: GenerateRequest,
  limits: CallLimits = {},
): AsyncGenerator<GenerateResponse, void, undefined> {
  return callServerStream(client, InferenceServiceService.generate, { request, ...limits });
}

/** A whole stream, its indices checked. */
async function collect(stream: AsyncIterable<GenerateResponse | ChatResponse>): Promise<{
  readonly requestId: string;
  readonly seed: number;
  readonly promptTokens: number;
  readonly tokenIds: number[];
  readonly text: string;
  readonly reasoning: string;
  readonly messages: number;
  readonly finish:
    | { reason: FinishReason; matchedStop: string; drafted: number; completionTokens: number }
    | undefined;
}> {
  const events: string[] = [];
  let started = { requestId: '', seed: 0, promptTokens: 0 };
  const tokenIds: number[] = [];
  let text = '';
  let reasoning = '';
  let contiguous = true;
  let finish;
  for await (const { event } of stream) {
    events.push(event?.$case ?? 'none');
    if (event?.$case === 'started') {
      started = event.value;
    } else if (event?.$case === 'delta') {
      contiguous &&= event.value.index === tokenIds.length;
      tokenIds.push(...event.value.tokenIds);
      text += event.value.text;
      reasoning += event.value.reasoning;
    } else if (event?.$case === 'finish') {
      const { reason, matchedStop, usage, speculation } = event.value;
      finish = {
        reason,
        matchedStop,
        drafted: speculation?.draftedTokens ?? -1,
        completionTokens: usage?.completionTokens ?? -1,
      };
    }
  }
  expect(contiguous).toBe(true);
  expect(events[0]).toBe('started');
  expect(events.indexOf('finish')).toBe(events.length - 1);
  const { requestId, seed, promptTokens } = started;
  return { requestId, seed, promptTokens, tokenIds, text, reasoning, messages: events.length, finish };
}

/** Reads until `count` tokens have come, and leaves the stream open. */
async function begin(
  stream: AsyncIterator<GenerateResponse>,
  count: number,
): Promise<{ requestId: string; tokens: number }> {
  let requestId = '';
  let tokens = 0;
  while (tokens < count) {
    const { value } = await stream.next();
    if (value?.event?.$case === 'started') {
      requestId = value.event.value.requestId;
    } else if (value?.event?.$case === 'delta') {
      tokens += value.event.value.tokenIds.length;
    }
  }
  return { requestId, tokens };
}

function* endless(): Generator<number> {
  for (let id = 0; ; id = (id + 1) % 200) {
    yield 65 + (id % 20);
  }
}

/** Gathers the published state from here on. */
async function followStates(): Promise<{
  readonly states: QueueState[];
  /** When each came. */
  readonly timesMs: number[];
  readonly stop: () => void;
}> {
  const states: QueueState[] = [];
  const timesMs: number[] = [];
  const stop = new AbortController();
  const run = async (): Promise<void> => {
    for await (const state of bus.followState(model, stop.signal)) {
      states.push(state);
      timesMs.push(performance.now());
    }
  };
  void run();
  await vi.waitFor(() => expect(states.length).toBeGreaterThan(0), patience);
  return { states, timesMs, stop: () => stop.abort() };
}

async function askFour(gateway: Gateway): Promise<void> {
  await Promise.all(
    Array.from({ length: 4 }, () => collect(generate(clientOf(gateway), generation('hello')))),
  );
}

function withKey(key: string): CallLimits {
  const metadata = new grpc.Metadata();
  metadata.set('authorization', `Bearer ${key}`);
  return { metadata };
}

/** Reads what is still on its way. */
async function drainOf(stream: AsyncIterable<unknown>): Promise<void> {
  for await (const _ of stream) {
    // Only the end counts.
  }
}

describe('a stream', () => {
  it('begins with started, carries every token and its text, and ends with one finish', async () => {
    const gateway = await openGateway();
    await openGroup();
    const text = 'What is 47 + 85? — größer 終 🙂';
    const result = await collect(generate(clientOf(gateway), generation(text, { seed: 9 })));
    const tokenIds = tokenizer.encode(text);
    expect(result).toMatchObject({ seed: 9, promptTokens: tokenIds.length, tokenIds, text, reasoning: '' });
    expect(result.finish).toEqual({
      reason: FinishReason.STOP,
      matchedStop: '606',
      drafted: tokenIds.length,
      completionTokens: tokenIds.length,
    });
  });

  it('of Chat tells the thinking from the answer, and puts an empty system message first', async () => {
    const gateway = await openGateway();
    const script = (): number[] => tokenizer.encode('<think>\n47 + 85\n</think>\n\nIt is 132.');
    const group = await openGroup({ script });
    const request = ChatRequest.fromPartial({
      model,
      messages: [{ role: Role.USER, content: 'What is 47 + 85?' }],
    });
    const result = await collect(
      callServerStream(clientOf(gateway), InferenceServiceService.chat, { request }),
    );
    expect(result).toMatchObject({ reasoning: '47 + 85', text: 'It is 132.' });
    const prompt = tokenizer.decode(group.prompts[0] ?? []);
    expect(prompt).toContain('<|im_start|>system\n<|im_end|>');
    expect(prompt).toContain('<|im_start|>user\nWhat is 47 + 85?<|im_end|>');
    expect(prompt.endsWith('<|im_start|>assistant\n')).toBe(true);
  });

  it('of Chat continues an assistant’s last message, from inside the thinking where that is open', async () => {
    const gateway = await openGateway();
    const script = (): number[] => tokenizer.encode(' + 85\n</think>\n\nIt is = 132.');
    const group = await openGroup({ script });
    const request = ChatRequest.fromPartial({
      model,
      messages: [
        { role: Role.USER, content: 'What is 47 + 85?' },
        { role: Role.ASSISTANT, content: '<think>\n47' },
      ],
      sampling: { stop: ['=', '+'] },
    });
    const result = await collect(
      callServerStream(clientOf(gateway), InferenceServiceService.chat, { request }),
    );
    expect(result).toMatchObject({ reasoning: ' + 85', text: 'It is ', finish: { matchedStop: '=' } });
    const prompt = tokenizer.decode(group.prompts[0] ?? []);
    expect(prompt.endsWith('<|im_start|>assistant\n<think>\n47')).toBe(true);
  });

  it('of Generate parses special tokens in a raw prompt, and counts them alike; those of Chat are letters', async () => {
    const gateway = await openGateway();
    const group = await openGroup({ script: () => [] });
    const client = clientOf(gateway);
    const text = '<|im_start|>user\nHi<|im_end|>\n';
    const expected = tokenizer.encode(text, { allowSpecial: true });
    const result = await collect(generate(client, generation(text, { stop: ['<|im_end|>'] })));
    expect(group.prompts[0]).toEqual(expected);
    expect(result).toMatchObject({ promptTokens: expected.length, finish: { matchedStop: '<|im_end|>' } });
    const count = (request: Parameters<typeof CountTokensRequest.fromPartial>[0]): Promise<number> =>
      callUnary(client, InferenceServiceService.countTokens, {
        request: CountTokensRequest.fromPartial(request),
      }).then(({ promptTokens }) => promptTokens);
    expect(
      await count({
        request: { $case: 'generate', value: { model, input: { $case: 'prompt', value: text } } },
      }),
    ).toBe(expected.length);
    const counts = ['', '<|im_end|>'].map((content) =>
      count({
        request: { $case: 'chat', value: { model, messages: [{ role: Role.USER, content: `x${content}` }] } },
      }),
    );
    const [without = 0, withLetters = 0] = await Promise.all(counts);
    expect(withLetters - without).toBeGreaterThan(1);
  });

  it('ends with LENGTH at max_tokens', async () => {
    const gateway = await openGateway();
    await openGroup({ script: endless });
    const result = await collect(generate(clientOf(gateway), generation('x', { maxTokens: 7 })));
    expect(result.finish).toMatchObject({
      reason: FinishReason.LENGTH,
      matchedStop: '',
      completionTokens: 7,
    });
    expect(result.tokenIds).toHaveLength(7);
  });

  it('ends at a stop text, which is left out, and the engine is told', async () => {
    const gateway = await openGateway();
    const group = await openGroup({ stepMs: 2 });
    const text = `one two three four five six seven eight nine ten${' and so on'.repeat(50)}`;
    const result = await collect(generate(clientOf(gateway), generation(text, { stop: ['nope', 'ee fo'] })));
    expect(result.text).toBe('one two thr');
    expect(result.finish).toMatchObject({ reason: FinishReason.STOP, matchedStop: 'ee fo' });
    expect(result.finish?.drafted).toBeGreaterThan(0);
    expect(tokenizer.decode(result.tokenIds)).toContain('ee fo');
    expect(group.aborted).toBe(1);
  });

  it('ends by itself where a stop text is only begun', async () => {
    const gateway = await openGateway();
    await openGroup();
    const result = await collect(generate(clientOf(gateway), generation('one two thr', { stop: ['three'] })));
    expect(result).toMatchObject({ text: 'one two thr', finish: { matchedStop: '606' } });
  });

  it('waits for a slow client: the engine gets ahead by its credit and no further', async () => {
    const gateway = await openGateway();
    const group = await openGroup({ script: endless });
    const client = clientOf(gateway);
    // With the likeliest alternatives a token is some 200 bytes, so that the transport's own buffers fill up soon.
    const stream = generate(client, generation('x', { maxTokens: 2_000, logprobs: 20 }));
    const { tokens } = await begin(stream, 1);
    let ahead = -1;
    while (ahead !== group.tokens) {
      ahead = group.tokens;
      await sleep(300);
    }
    expect(ahead).toBeLessThan(1_500);
    let rest = 0;
    for await (const { event } of stream) {
      rest += event?.$case === 'delta' ? event.value.tokenIds.length : 0;
    }
    expect(tokens + rest).toBe(2_000);
  });

  it('of one hundred at once gets its own text each', async () => {
    const gateway = await openGateway();
    await openGroup({ maxSequences: 16 });
    await openGroup({ maxSequences: 16 });
    const client = clientOf(gateway);
    const texts = Array.from(
      { length: 100 },
      (_, index) => `request number ${index} says ${'ab'.repeat(index)}`,
    );
    const results = await Promise.all(texts.map((text) => collect(generate(client, generation(text)))));
    expect(results.map((result) => result.text)).toEqual(texts);
    expect(new Set(results.map((result) => result.requestId)).size).toBe(100);
    expect(groups.every((group) => group.begun > 20)).toBe(true);
  });
});

describe('a request that is ended early', () => {
  it('by its client leaving: the engine frees it and the record goes', async () => {
    const gateway = await openGateway();
    const group = await openGroup({ script: endless });
    const leave = new AbortController();
    const stream = generate(clientOf(gateway), generation('x'), { signal: leave.signal });
    await begin(stream, 5);
    // Else it may have said all it can before the queue answers.
    group.stall();
    expect(await bus.counts()).toEqual({ records: 1 });
    leave.abort();
    await expect(drainOf(stream)).rejects.toMatchObject({ code: 'canceled' });
    await vi.waitFor(() => expect(group).toMatchObject({ sequences: 0, aborted: 1 }), patience);
  });

  it('by Cancel: its stream ends with CANCELLED', async () => {
    const gateway = await openGateway();
    await openGroup({ script: endless });
    const client = clientOf(gateway);
    const stream = generate(client, generation('x'));
    const { requestId } = await begin(stream, 5);
    const cancel = (id: string): Promise<unknown> =>
      callUnary(client, InferenceServiceService.cancel, { request: { requestId: id } });
    expect(await cancel('another')).toEqual({ cancelled: false });
    expect(await cancel(requestId)).toEqual({ cancelled: true });
    await expect(drainOf(stream)).rejects.toMatchObject({ code: 'canceled' });
    expect(await cancel(requestId)).toEqual({ cancelled: false });
  });

  it('by Cancel at any gateway: while it runs, and while it waits', async () => {
    const [owner, other] = [await openGateway(), await openGateway()];
    const group = await openGroup({ script: endless, maxSequences: 1 });
    const running = generate(clientOf(owner), generation('runs'));
    const { requestId } = await begin(running, 5);
    const waiting = generate(clientOf(owner), generation('waits'));
    const { value } = await waiting.next();
    const waitingId = value?.event?.$case === 'started' ? value.event.value.requestId : '';
    const elsewhere = clientOf(other);
    const cancel = (id: string): Promise<unknown> =>
      callUnary(elsewhere, InferenceServiceService.cancel, { request: { requestId: id } });
    expect(await cancel(waitingId)).toEqual({ cancelled: true });
    await expect(drainOf(waiting)).rejects.toMatchObject({ code: 'canceled' });
    expect(group.begun).toBe(1);
    expect(await cancel(requestId)).toEqual({ cancelled: true });
    await expect(drainOf(running)).rejects.toMatchObject({ code: 'canceled' });
    expect(await cancel(requestId)).toEqual({ cancelled: false });
    for (const id of ['', 'another', '*', 'requests.>', 'ab'.repeat(4_000), randomUUID()]) {
      expect(await cancel(id)).toEqual({ cancelled: false });
    }
  });

  it('by its deadline while it runs', async () => {
    const gateway = await openGateway();
    await openGroup({ script: endless, stepMs: 10 });
    const stream = generate(clientOf(gateway), generation('x'), { timeoutMs: 500 });
    await expect(collect(stream)).rejects.toMatchObject({ code: 'deadline_exceeded' });
  });

  it('by its deadline while it waits: no group ever sees it', async () => {
    const gateway = await openGateway();
    const group = await openGroup({ maxSequences: 1, script: endless });
    const client = clientOf(gateway);
    const first = generate(client, generation('first'));
    await begin(first, 3);
    const second = generate(client, generation('second'), { timeoutMs: 400 });
    await expect(collect(second)).rejects.toMatchObject({ code: 'deadline_exceeded' });
    expect(group.begun).toBe(1);
    await first.return(undefined);
  });

  it('by the longest wait, with a hint when to come back', async () => {
    const gateway = await openGateway({ MIMO_GATEWAY_MAX_WAIT: '300ms' });
    const waiting = collect(generate(clientOf(gateway), generation('x')));
    await expect(waiting).rejects.toMatchObject({
      code: 'deadline_exceeded',
      message: expect.stringContaining('300 ms') as string,
      detail: { retryAfterMs: 5_000 },
    });
  });
});

describe('groups', () => {
  it('that come later take what waits, in order', async () => {
    const gateway = await openGateway();
    const client = clientOf(gateway);
    const results: Promise<{ text: string }>[] = [];
    for (const text of ['alpha', 'beta', 'gamma', 'delta']) {
      results.push(collect(generate(client, generation(text))));
      await vi.waitFor(async () => expect((await bus.counts()).records).toBe(results.length), patience);
    }
    const group = await openGroup({ maxSequences: 1 });
    const texts = await Promise.all(results.map(async (result) => (await result).text));
    expect(texts).toEqual(['alpha', 'beta', 'gamma', 'delta']);
    expect(group.prompts.map((prompt) => tokenizer.decode(prompt))).toEqual(texts);
  });

  it('that refuse are passed over: the request goes to another', async () => {
    const gateway = await openGateway();
    const refusing = await openGroup({ group: 'a' });
    refusing.refuse(new ClusterError('unavailable', 'draining'));
    await openGroup({ group: 'b' });
    await vi.waitFor(async () => {
      const listed = await callUnary(clientOf(gateway), InferenceServiceService.listModels, { request: {} });
      expect(listed.models).toEqual([
        expect.objectContaining({ name: model, draftTokens: 1, readyGroups: 2 }),
      ]);
    }, patience);
    const result = await collect(generate(clientOf(gateway), generation('hello')));
    expect(result.text).toBe('hello');
    expect(refusing.begun).toBe(0);
  });

  it('that drain get nothing more', async () => {
    const gateway = await openGateway();
    const draining = await openGroup({ group: 'a' });
    draining.become(GroupState.DRAINING);
    await openGroup({ group: 'b' });
    const results = Array.from({ length: 5 }, () =>
      collect(generate(clientOf(gateway), generation('hello'))),
    );
    await Promise.all(results);
    expect(draining.begun).toBe(0);
  });

  it('that vanish lose no stream: each goes on in another group, with contiguous indices and the same text', async () => {
    const gateway = await openGateway();
    const client = clientOf(gateway);
    const doomed = await openGroup({ group: 'a', stepMs: 5, maxSequences: 8 });
    const texts = Array.from(
      { length: 4 },
      (_, index) => `stream ${index}: größer 終 🙂 ${'ab '.repeat(60)}`,
    );
    doomed.stall();
    const running = texts.map((text) => collect(generate(client, generation(text))));
    await vi.waitFor(() => expect(doomed.begun).toBe(4), patience);
    doomed.resume();
    await vi.waitFor(() => expect(doomed.tokens).toBeGreaterThan(100), patience);
    doomed.stall();
    const quiet = collect(generate(client, generation('quiet')));
    await vi.waitFor(() => expect(doomed.begun).toBe(5), patience);
    const heir = await openGroup({ group: 'b', maxSequences: 8 });
    await doomed.vanish();
    const results = await Promise.all(running);
    expect(results.map(({ text }) => text)).toEqual(texts);
    expect((await quiet).text).toBe('quiet');
    for (const [index, { finish, tokenIds }] of results.entries()) {
      expect(tokenIds).toEqual(tokenizer.encode(texts[index] ?? ''));
      expect(finish?.completionTokens).toBe(tokenIds.length);
    }
    expect(heir.prompts.filter((prompt) => prompt.length > tokenizer.encode('quiet').length)).toHaveLength(4);
    groups.splice(groups.indexOf(doomed), 1);
  });

  it('that break three times under the same request, before it gets anywhere, end it', async () => {
    const gateway = await openGateway();
    const client = clientOf(gateway);
    let last = await openStalledGroup('a');
    const outcome = collect(generate(client, generation('poison'))).then(
      () => undefined,
      (error: unknown) => ClusterError.from(error),
    );
    for (const name of ['b', 'c']) {
      await vi.waitFor(() => expect(last.begun).toBe(1), patience);
      const next = await openStalledGroup(name);
      await last.vanish();
      last = next;
    }
    await vi.waitFor(() => expect(last.begun).toBe(1), patience);
    await last.vanish();
    expect(await outcome).toMatchObject({
      code: 'aborted',
      message: expect.stringContaining('3 groups in a row broke') as string,
    });
    groups.length = 0;
  });

  it('that one request breaks again and again lose only that one, also where others began with it', async () => {
    const gateway = await openGateway();
    const client = clientOf(gateway);
    const texts = ['one of the others', 'another one of them', 'the poison', 'the last of the others'];
    const outcomes = texts.map((text) =>
      collect(generate(client, generation(text))).then(
        (result) => result.text,
        (error: unknown) => ClusterError.from(error).code,
      ),
    );
    await waitFor('all to wait', async () => (await bus.counts()).records === texts.length);
    const all = Promise.all(outcomes);
    const over = new AbortController();
    void all.then(() => over.abort());
    for (let life = 0; life < 20 && !over.signal.aborted; life += 1) {
      const broken = Promise.withResolvers<void>();
      const script = function* ({ tokenIds }: { readonly tokenIds: readonly number[] }) {
        if (tokenizer.decode(tokenIds) === 'the poison') {
          broken.resolve();
        }
        yield* tokenIds;
      };
      // Slower than it breaks: whoever begins together with the poison gets nothing.
      const group = await openGroup({ group: 'a', stepMs: 50, script });
      await Promise.race([broken.promise, all]);
      await group.vanish();
      groups.splice(groups.indexOf(group), 1);
    }
    expect(await all).toEqual(texts.map((text) => (text === 'the poison' ? 'aborted' : text)));
  });

  it('that come back as another life take their streams up again', async () => {
    const gateway = await openGateway();
    const client = clientOf(gateway);
    const text = 'a rather long prompt that takes its time to be said again, word by word, '.repeat(4);
    const running = collect(generate(client, generation(text)));
    for (let life = 0; life < 3; life += 1) {
      const group = await openGroup({ group: 'a', stepMs: 10 });
      await vi.waitFor(() => expect(group.tokens).toBeGreaterThan(8), patience);
      await group.vanish();
      groups.splice(groups.indexOf(group), 1);
    }
    await openGroup({ group: 'a' });
    expect((await running).text).toBe(text);
  });

  it('are waited for anew after each loss: the longest wait is not counted from the first token', async () => {
    const maxWaitMs = 5_000;
    const gateway = await openGateway({ MIMO_GATEWAY_MAX_WAIT: `${maxWaitMs}ms` });
    const client = clientOf(gateway);
    const first = await openGroup({ group: 'a', script: endless, stepMs: 20 });
    const running = collect(generate(client, generation('x'))).then(
      () => undefined,
      (error: unknown) => ClusterError.from(error),
    );
    await vi.waitFor(() => expect(first.tokens).toBeGreaterThan(0), patience);
    await sleep(maxWaitMs + 200);
    await first.vanish();
    const second = await openGroup({ group: 'b', script: endless, stepMs: 20 });
    await vi.waitFor(() => expect(second.tokens).toBeGreaterThan(3), patience);
    await second.vanish();
    expect(await running).toMatchObject({
      code: 'deadline_exceeded',
      message: expect.stringMatching(
        /no group took the request up again, after \d+ completion tokens, within 5000 ms/,
      ) as string,
    });
    groups.length = 0;
  });

  it('whose engine stands still keep their streams, as they answer pings', async () => {
    const gateway = await openGateway();
    const group = await openGroup({ script: endless });
    const stream = generate(clientOf(gateway), generation('x', { maxTokens: 50 }));
    await begin(stream, 1);
    group.stall();
    await sleep(3_500);
    group.resume();
    expect(gateway.counts().sequences).toBe(1);
    await drainOf(stream);
  });
});

describe('the published state', () => {
  it('shows the first request after idle at once, what runs where, and what came and ended', async () => {
    const gateway = await openGateway();
    const { states, timesMs, stop } = await followStates();
    expect(states.at(-1)).toMatchObject({ waitingRequests: 0, runningRequests: 0, slots: 0, groups: [] });
    const stream = generate(clientOf(gateway), generation('abc', { maxTokens: 100 }));
    const running = collect(stream);
    await waitFor('the request to be told of', () => states.at(-1)?.waitingRequests === 1);
    const cost = tokenizer.encode('abc').length + 100;
    expect(states.at(-1)).toMatchObject({ waitingTokens: cost, arrivedTokens: cost, endedTokens: 0 });
    const group = await openGroup({ group: 'a', maxSequences: 5, script: endless });
    group.stall();
    await vi.waitFor(
      () =>
        expect(states.at(-1)).toMatchObject({
          waitingRequests: 0,
          runningRequests: 1,
          inFlightTokens: cost,
          slots: 5,
          groups: [
            {
              group: 'a',
              incarnation: group.incarnation,
              routable: true,
              draining: false,
              inFlightRequests: 1,
              inFlightTokens: cost,
            },
          ],
        }),
      patience,
    );
    group.resume();
    await running;
    await vi.waitFor(
      () =>
        expect(states.at(-1)).toMatchObject({
          runningRequests: 0,
          inFlightTokens: 0,
          arrivedTokens: cost,
          endedTokens: cost,
        }),
      patience,
    );
    stop();
    // What is told only when the last state is a second old leaves a second between any two; a machine that stands still
    // does so between some.
    const pausesMs = timesMs.slice(1).map((timeMs, index) => timeMs - (timesMs[index] ?? 0));
    expect(Math.min(...pausesMs)).toBeLessThan(800);
  });

  it('calls a group routable before anything is sent to it, and not once its heartbeats have stopped', async () => {
    await openGateway();
    const group = await openGroup({ group: 'a' });
    const { states, stop } = await followStates();
    const isRoutable = (): boolean | undefined => states.at(-1)?.groups[0]?.routable;
    await waitFor('the group to be routable', () => isRoutable() === true);
    expect(group.begun).toBe(0);
    group.fallSilent();
    await waitFor('the group to be out of rotation', () => isRoutable() !== true);
    expect(states.at(-1)).toMatchObject({ readyGroups: 0, slots: 0 });
    await waitFor('the group to be forgotten', () => states.at(-1)?.groups.length === 0);
    stop();
  });

  it('shows a drain mark once nothing more is assigned to its group, also to the next dispatcher', async () => {
    const first = await openGateway();
    const [a, b] = [await openGroup({ group: 'a' }), await openGroup({ group: 'b' })];
    const { states, stop } = await followStates();
    const drainingIn = (): string[] | undefined =>
      states
        .at(-1)
        ?.groups.filter(({ draining }) => draining)
        .map(({ group }) => group);
    await waitFor('both groups', () => states.at(-1)?.groups.length === 2);
    await bus.markDraining(model, 'a', { sinceUnixMs: Date.now() });
    await vi.waitFor(() => {
      expect(drainingIn()).toEqual(['a']);
      expect(states.at(-1)).toMatchObject({ readyGroups: 2, slots: 8 });
    }, patience);
    await askFour(first);
    expect([a.begun, b.begun]).toEqual([0, 4]);
    const second = await openGateway();
    await first.close();
    gateways.splice(gateways.indexOf(first), 1);
    await askFour(second);
    expect([a.begun, b.begun]).toEqual([0, 8]);
    await bus.clearDraining(model, 'a');
    await waitFor('no mark', () => states.at(-1)?.groups.length === 2 && drainingIn()?.length === 0);
    await waitFor('something to go there again', async () => {
      await askFour(second);
      return a.begun > 0;
    });
    stop();
  });

  it('does not take what a new dispatcher finds for arrivals, nor tell of less while it still reads', async () => {
    const first = await openGateway();
    const { states, stop } = await followStates();
    const second = await openGateway();
    const leave = new AbortController();
    const waiting = Array.from({ length: 30 }, () =>
      drainOf(generate(clientOf(second), generation('x'), { signal: leave.signal })).catch(() => undefined),
    );
    await waitFor('all to be told of', () => states.at(-1)?.waitingRequests === 30);
    const epoch = states.at(-1)?.dispatcherEpoch ?? 0;
    await first.close();
    gateways.splice(gateways.indexOf(first), 1);
    await waitFor('the second to publish', () => (states.at(-1)?.dispatcherEpoch ?? 0) > epoch);
    const firstOfSecond = states.find(({ dispatcherEpoch }) => dispatcherEpoch > epoch);
    expect(firstOfSecond).toMatchObject({ waitingRequests: 30, arrivedTokens: 0, endedTokens: 0 });
    leave.abort();
    await Promise.all(waiting);
    stop();
  });
});

describe('gateways', () => {
  it('share the groups: two of them, each with its own clients', async () => {
    const [one, two] = [await openGateway(), await openGateway()];
    await openGroup({ maxSequences: 2 });
    const texts = Array.from({ length: 20 }, (_, index) => `text ${index}`);
    const results = await Promise.all(
      texts.map((text, index) => collect(generate(clientOf(index % 2 === 0 ? one : two), generation(text)))),
    );
    expect(results.map((result) => result.text)).toEqual(texts);
  });

  it('take over dispatching when the one that did it is closed', async () => {
    const first = await openGateway();
    await openGroup();
    await collect(generate(clientOf(first), generation('before')));
    const second = await openGateway();
    const waiting = collect(generate(clientOf(second), generation('between')));
    expect((await waiting).text).toBe('between');
    await first.close();
    gateways.splice(gateways.indexOf(first), 1);
    expect((await collect(generate(clientOf(second), generation('after')))).text).toBe('after');
  });

  it('that drain refuse new requests, finish the running ones, and then close', async () => {
    const gateway = await openGateway();
    const enough = new AbortController();
    const script = function* () {
      while (!enough.signal.aborted) {
        yield 65;
      }
    };
    await openGroup({ stepMs: 20, script });
    const client = clientOf(gateway);
    const running = generate(client, generation('x'));
    await begin(running, 2);
    let drained = false;
    const draining = gateway.drain(AbortSignal.timeout(120_000)).then(() => (drained = true));
    await waitFor('new requests to be refused', () =>
      collect(generate(client, generation('new', { maxTokens: 1 }))).then(
        () => false,
        (error: unknown) => ClusterError.from(error).code === 'unavailable',
      ),
    );
    expect(drained).toBe(false);
    enough.abort();
    let finished = false;
    for await (const { event } of running) {
      finished ||= event?.$case === 'finish';
    }
    expect(finished).toBe(true);
    await draining;
    expect(gateway.counts()).toMatchObject({ requests: 0, deletingRecords: 0 });
  });

  it('that drain leave dispatching to others at once, and their streams go on, also to another group', async () => {
    const leaving = await openGateway();
    const doomed = await openGroup({ group: 'a', stepMs: 5 });
    const text = 'a rather long prompt that takes its time to be said again, '.repeat(4);
    const running = collect(generate(clientOf(leaving), generation(text)));
    await vi.waitFor(() => expect(doomed.tokens).toBeGreaterThan(10), patience);
    doomed.stall();
    const staying = await openGateway();
    const { states, stop } = await followStates();
    const epoch = states.at(-1)?.dispatcherEpoch ?? 0;
    // The other one is waiting for the lease by then.
    await sleep(500);
    // It drains for as long as the stream runs, which stands still, and would hold the lease meanwhile.
    const draining = leaving.drain(AbortSignal.timeout(120_000));
    await waitFor('another dispatcher', () => (states.at(-1)?.dispatcherEpoch ?? 0) > epoch);
    await doomed.vanish();
    groups.splice(groups.indexOf(doomed), 1);
    await openGroup({ group: 'b', stepMs: 1 });
    expect((await running).text).toBe(text);
    await draining;
    stop();
    expect(staying.counts().requests).toBe(0);
  });

  it('that are alone and drain go on dispatching for what they still hold', async () => {
    const gateway = await openGateway();
    const group = await openGroup({ group: 'a', stepMs: 5 });
    const text = 'a rather long prompt that takes its time to be said again, '.repeat(4);
    const running = collect(generate(clientOf(gateway), generation(text)));
    await vi.waitFor(() => expect(group.tokens).toBeGreaterThan(10), patience);
    const draining = gateway.drain(AbortSignal.timeout(30_000));
    await group.vanish();
    groups.splice(groups.indexOf(group), 1);
    await openGroup({ group: 'b', stepMs: 1 });
    expect((await running).text).toBe(text);
    await draining;
  });

  it('that close end what still runs with UNAVAILABLE', async () => {
    const gateway = await openGateway();
    const group = await openGroup({ script: endless });
    const stream = generate(clientOf(gateway), generation('x'));
    await begin(stream, 2);
    const ended = drainOf(stream).then(
      () => 'finish',
      (error: unknown) => ClusterError.from(error).code,
    );
    await gateway.close();
    expect(await ended).toBe('unavailable');
    gateways.length = 0;
    await vi.waitFor(() => expect(group.sequences).toBe(0), patience);
  });

  it('without a NATS server refuse at once, and go on when it is back; running streams do not notice', async () => {
    const own = await startNatsServer({
      binary: await binaryOf(),
      storeDirectory: join(directory, 'own'),
      port: 0,
    });
    const queue = createNatsQueue({
      servers: [own.url],
      clientName: 'own',
      replicas: 1,
      recordMaxAgeMs: 3_600_000,
      log,
    });
    const gateway = await openGateway({ MIMO_GATEWAY_NATS: own.url });
    await openGroup({ queue, script: endless, stepMs: 5 });
    const client = clientOf(gateway);
    const running = generate(client, generation('x', { maxTokens: 600 }));
    const { tokens } = await begin(running, 3);
    own.child.kill();
    await own.child.exited;
    await vi.waitFor(
      () =>
        expect(collect(generate(client, generation('refused')))).rejects.toMatchObject({
          code: 'unavailable',
          detail: { retryAfterMs: 1_000 },
        }),
      patience,
    );
    let more = 0;
    for await (const { event } of running) {
      more += event?.$case === 'delta' ? event.value.tokenIds.length : 0;
    }
    expect(tokens + more).toBe(600);
    expect(gateway.counts()).toMatchObject({ requests: 0, deletingRecords: 1 });
    const again = await startNatsServer({
      binary: await binaryOf(),
      storeDirectory: join(directory, 'own'),
      port: own.port,
    });
    await vi.waitFor(() => expect(gateway.counts().deletingRecords).toBe(0), patience);
    const result = await collect(generate(client, generation('back', { maxTokens: 2 })));
    expect(result.finish?.completionTokens).toBe(2);
    await gateway.close();
    gateways.splice(gateways.indexOf(gateway), 1);
    await queue.close();
    await again.close();
  });

  it('go on when the NATS server comes back without its data', async () => {
    const storeDirectory = join(directory, 'emptied');
    const own = await startNatsServer({ binary: await binaryOf(), storeDirectory, port: 0 });
    const options = { servers: [own.url], clientName: 'own', replicas: 1, recordMaxAgeMs: 3_600_000, log };
    const queue = createNatsQueue(options);
    const gateway = await openGateway({ MIMO_GATEWAY_NATS: own.url });
    await openGroup({ queue });
    const client = clientOf(gateway);
    for (const text of ['one', 'two', 'three']) {
      expect((await collect(generate(client, generation(text)))).text).toBe(text);
    }
    own.child.kill();
    await own.child.exited;
    await rm(storeDirectory, { recursive: true });
    const again = await startNatsServer({ binary: await binaryOf(), storeDirectory, port: own.port });
    await waitFor('the gateway to serve again', async () => {
      const result = await collect(generate(client, generation('four'), { timeoutMs: 10_000 }));
      return result.text === 'four';
    });
    await gateway.close();
    gateways.splice(gateways.indexOf(gateway), 1);
    await queue.close();
    await again.close();
  });

  it('work without NATS: one gateway, its queue in memory, leaders asked for their heartbeats', async () => {
    const group = await openGroup({ queue: undefined });
    const gateway = await openGateway({ MIMO_GATEWAY_NATS: '', MIMO_GATEWAY_WORKERS: group.address });
    expect(gateway.queueKind).toBe('memory');
    const texts = Array.from({ length: 20 }, (_, index) => `text ${index}`);
    const client = clientOf(gateway);
    const results = await Promise.all(texts.map((text) => collect(generate(client, generation(text)))));
    expect(results.map((result) => result.text)).toEqual(texts);
  });

  it('delete the records of a gateway that died', async () => {
    const gateway = await openGateway();
    const { RequestRecord } = await import('@mimo/proto/queue');
    await bus.publish(
      RequestRecord.fromPartial({
        requestId: 'left-behind',
        model,
        gatewayId: 'gone',
        timeLeftMs: 1,
        promptTokenIds: [1],
      }),
    );
    await vi.waitFor(async () => expect(await bus.counts()).toEqual({ records: 0 }), patience);
    expect(gateway.counts().requests).toBe(0);
  });
});

describe('the door', () => {
  it('says all that is wrong with a request, with field, limit and value', async () => {
    const gateway = await openGateway();
    const request = GenerateRequest.fromPartial({
      model,
      sampling: { temperature: -1, topP: 0, stop: [''], logprobs: 21 },
    });
    const failure = await collect(generate(clientOf(gateway), request)).then(
      () => undefined,
      (error: unknown) => ClusterError.from(error),
    );
    expect(failure?.code).toBe('invalid_argument');
    expect(failure?.detail.fieldViolations?.map(({ field }) => field).toSorted()).toEqual([
      'input',
      'sampling.logprobs',
      'sampling.stop[0]',
      'sampling.temperature',
      'sampling.top_p',
    ]);
    const unknown = GenerateRequest.fromPartial({ ...generation('x'), model: 'nope' });
    await expect(collect(generate(clientOf(gateway), unknown))).rejects.toMatchObject({ code: 'not_found' });
  });

  it('refuses text that is not UTF-8 and bytes that are no message', async () => {
    const gateway = await openGateway();
    const client = clientOf(gateway);
    const send = async (bytes: Buffer): Promise<void> => {
      const { path, responseDeserialize } = InferenceServiceService.generate;
      const raw = client.makeServerStreamRequest(path, (value: Buffer) => value, responseDeserialize, bytes);
      for await (const _ of raw) {
        throw new Error('an answer to garbage');
      }
    };
    const good = Buffer.from(GenerateRequest.encode(generation('abcdef')).finish());
    const at = good.indexOf('abcdef');
    const bad = Buffer.from(good);
    bad.set([0xff, 0xfe], at);
    await expect(send(bad)).rejects.toMatchObject({
      code: grpc.status.INVALID_ARGUMENT,
      details: expect.stringContaining('UTF-8'),
    });
    await expect(send(good.subarray(0, good.length - 3))).rejects.toMatchObject({
      code: grpc.status.INVALID_ARGUMENT,
    });
    expect(gateway.counts().requests).toBe(0);
  });

  it('refuses a message over the limit and says both figures', async () => {
    const gateway = await openGateway({ MIMO_GATEWAY_MAX_RECEIVE: '64Ki' });
    const failure = collect(generate(clientOf(gateway), generation('x'.repeat(100_000))));
    await expect(failure).rejects.toMatchObject({
      code: 'resource_exhausted',
      message: expect.stringMatching(/65536/) as string,
    });
  });

  it('lets in who has a key, for the models of that key', async () => {
    const keysFile = join(directory, 'keys.json');
    const sha256 = createHash('sha256').update('secret-of-b').digest('hex');
    const keys = [
      { key: 'secret-of-a', tenant: 'a' },
      { sha256, tenant: 'b', models: ['another'] },
    ];
    await writeFile(keysFile, JSON.stringify({ keys }));
    const gateway = await openGateway({ MIMO_GATEWAY_KEYS_FILE: keysFile });
    await openGroup({ script: endless });
    const client = clientOf(gateway);
    const ask = (limits: CallLimits): Promise<unknown> =>
      collect(generate(client, generation('x', { maxTokens: 2 }), limits));
    await expect(ask({})).rejects.toMatchObject({ code: 'unauthenticated' });
    await expect(ask(withKey('guessed'))).rejects.toMatchObject({ code: 'unauthenticated' });
    await expect(ask(withKey('secret-of-b'))).rejects.toMatchObject({ code: 'permission_denied' });
    await ask(withKey('secret-of-a'));
    const stream = generate(client, generation('x'), withKey('secret-of-a'));
    const { requestId } = await begin(stream, 1);
    const other = clientOf(await openGateway({ MIMO_GATEWAY_KEYS_FILE: keysFile }));
    for (const each of [client, other]) {
      const cancel = { request: { requestId }, ...withKey('secret-of-b') };
      expect(await callUnary(each, InferenceServiceService.cancel, cancel)).toEqual({ cancelled: false });
    }
    const cancel = { request: { requestId }, ...withKey('secret-of-a') };
    expect(await callUnary(other, InferenceServiceService.cancel, cancel)).toEqual({ cancelled: true });
    await expect(drainOf(stream)).rejects.toMatchObject({ code: 'canceled' });
  });

  it('counts tokens as the model would read them', async () => {
    const gateway = await openGateway();
    const client = clientOf(gateway);
    const text = 'What is 47 + 85?';
    const counted = await callUnary(client, InferenceServiceService.countTokens, {
      request: { request: { $case: 'generate', value: generation(text) } },
    });
    expect(counted.promptTokens).toBe(tokenizer.encode(text).length);
  });
});

async function binaryOf(): Promise<string> {
  const binary = await findNatsServer({
    cacheDirectory: cacheDirectoryFrom(process.env),
    onProgress: () => undefined,
    signal: AbortSignal.timeout(170_000),
  });
  if (binary === null) {
    throw new Error('these tests need a nats-server: on the PATH, or a Go toolchain to build one');
  }
  return binary;
}
