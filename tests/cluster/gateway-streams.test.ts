// The streams of one gateway over real gRPC, with a real NATS server and groups that follow a script: their order,
// text, ends and pace.

import { setTimeout as sleep } from 'node:timers/promises';

import { callServerStream, callUnary } from '@mimo/core/grpc/client';
import { ChatRequest, CountTokensRequest, InferenceServiceService, Role } from '@mimo/proto/inference';
import { FinishReason } from '@mimo/proto/sampling';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';

import { begin, collect, generate, generation } from '../harness/client-streams.ts';
import { GatewayStage } from '../harness/gateway-stage.ts';
import { endless } from '../harness/scripted-group.ts';

const { model } = GatewayStage;

let stage: GatewayStage;
beforeAll(async () => {
  stage = await GatewayStage.open();
});
afterEach(async () => {
  await stage.clear();
});
afterAll(async () => {
  await stage.close();
});

describe('a stream', () => {
  it('begins with started, carries every token and its text, and ends with one finish', async () => {
    const gateway = await stage.openGateway();
    await stage.openGroup();
    const text = 'What is 47 + 85? — größer 終 🙂';
    const result = await collect(generate(stage.clientOf(gateway), generation(text, { seed: 9 })));
    const tokenIds = stage.tokenizer.encode(text);
    expect(result).toMatchObject({ seed: 9, promptTokens: tokenIds.length, tokenIds, text, reasoning: '' });
    expect(result.finish).toEqual({
      reason: FinishReason.STOP,
      matchedStop: '606',
      drafted: tokenIds.length,
      completionTokens: tokenIds.length,
    });
  });

  it('ends with LENGTH at max_tokens', async () => {
    const gateway = await stage.openGateway();
    await stage.openGroup({ script: endless });
    const result = await collect(generate(stage.clientOf(gateway), generation('x', { maxTokens: 7 })));
    expect(result.finish).toMatchObject({
      reason: FinishReason.LENGTH,
      matchedStop: '',
      completionTokens: 7,
    });
    expect(result.tokenIds).toHaveLength(7);
  });

  it('ends at a stop text, leaves it out, and aborts the sequence in the engine', async () => {
    const gateway = await stage.openGateway();
    const group = await stage.openGroup({ stepMs: 2 });
    const text = `one two three four five six seven eight nine ten${' and so on'.repeat(50)}`;
    const result = await collect(
      generate(stage.clientOf(gateway), generation(text, { stop: ['nope', 'ee fo'] })),
    );
    expect(result.text).toBe('one two thr');
    expect(result.finish).toMatchObject({ reason: FinishReason.STOP, matchedStop: 'ee fo' });
    expect(result.finish?.drafted).toBeGreaterThan(0);
    expect(stage.tokenizer.decode(result.tokenIds)).toContain('ee fo');
    expect(group.aborted).toBe(1);
  });

  it('ends normally when only the beginning of a stop text has come', async () => {
    const gateway = await stage.openGateway();
    await stage.openGroup();
    const result = await collect(
      generate(stage.clientOf(gateway), generation('one two thr', { stop: ['three'] })),
    );
    expect(result).toMatchObject({ text: 'one two thr', finish: { matchedStop: '606' } });
  });

  it('waits for a slow client: the engine runs ahead only as far as its credit', async () => {
    const gateway = await stage.openGateway();
    const group = await stage.openGroup({ script: endless });
    const client = stage.clientOf(gateway);
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

  it('carries its own text when one hundred streams run at once', async () => {
    const gateway = await stage.openGateway();
    const groups = [await stage.openGroup({ maxSequences: 16 }), await stage.openGroup({ maxSequences: 16 })];
    const client = stage.clientOf(gateway);
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

describe('a prompt', () => {
  it('separates the reasoning from the answer, and puts an empty system message first', async () => {
    const gateway = await stage.openGateway();
    const script = (): number[] => stage.tokenizer.encode('<think>\n47 + 85\n</think>\n\nIt is 132.');
    const group = await stage.openGroup({ script });
    const request = ChatRequest.fromPartial({
      model,
      messages: [{ role: Role.USER, content: 'What is 47 + 85?' }],
    });
    const result = await collect(
      callServerStream(stage.clientOf(gateway), InferenceServiceService.chat, { request }),
    );
    expect(result).toMatchObject({ reasoning: '47 + 85', text: 'It is 132.' });
    const prompt = stage.tokenizer.decode(group.prompts[0] ?? []);
    expect(prompt).toContain('<|im_start|>system\n<|im_end|>');
    expect(prompt).toContain('<|im_start|>user\nWhat is 47 + 85?<|im_end|>');
    expect(prompt.endsWith('<|im_start|>assistant\n')).toBe(true);
  });

  it('continues the last message of the assistant, even inside unfinished reasoning', async () => {
    const gateway = await stage.openGateway();
    const script = (): number[] => stage.tokenizer.encode(' + 85\n</think>\n\nIt is = 132.');
    const group = await stage.openGroup({ script });
    const request = ChatRequest.fromPartial({
      model,
      messages: [
        { role: Role.USER, content: 'What is 47 + 85?' },
        { role: Role.ASSISTANT, content: '<think>\n47' },
      ],
      sampling: { stop: ['=', '+'] },
    });
    const result = await collect(
      callServerStream(stage.clientOf(gateway), InferenceServiceService.chat, { request }),
    );
    expect(result).toMatchObject({ reasoning: ' + 85', text: 'It is ', finish: { matchedStop: '=' } });
    const prompt = stage.tokenizer.decode(group.prompts[0] ?? []);
    expect(prompt.endsWith('<|im_start|>assistant\n<think>\n47')).toBe(true);
  });

  it('parses and counts special tokens in the prompt of Generate, but treats those in Chat as text', async () => {
    const gateway = await stage.openGateway();
    const group = await stage.openGroup({ script: () => [] });
    const client = stage.clientOf(gateway);
    const text = '<|im_start|>user\nHi<|im_end|>\n';
    const expected = stage.tokenizer.encode(text, { allowSpecial: true });
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
});
