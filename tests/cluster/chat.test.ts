import { join } from 'node:path';

import * as grpc from '@grpc/grpc-js';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { callServerStream, callUnary } from '@mimo/core/grpc/client';
import { InferenceServiceService, Role, type GenerateRequest } from '@mimo/proto/inference';
import { FinishReason, SamplingParams } from '@mimo/proto/sampling';
import { loadTokenizer } from '@mimo/tokenizer';

import {
  ask,
  chatRequest,
  createClient,
  startTestCluster,
  type Answer,
  type TestCluster,
} from '../harness/cluster.ts';
import { waitFor } from '../harness/wait-for.ts';

const nothingHeld = { records: 0, sequences: 0, runningRequests: 0, kvBlocks: 0 };

/** Runs until it is stopped or the context is full: the model's own end is ignored. */
function endless(sampling: Partial<SamplingParams> = {}) {
  return chatRequest('What is 47 + 85?', { ignoreEos: true, ...sampling });
}

describe('chat through gateway, queue and a group of two ranks', () => {
  let cluster: TestCluster;
  beforeAll(async () => {
    cluster = await startTestCluster();
  });
  afterAll(async () => {
    await cluster.close();
  });
  async function expectNothingHeld(): Promise<void> {
    await waitFor('everything to be let go of', async () => {
      const held = await cluster.held();
      return Object.values(held).every((count) => count === 0);
    });
    expect(await cluster.held()).toEqual(nothingHeld);
  }

  it('streams the thinking, the right answer and then the figures', async () => {
    const answer = await ask(cluster.client, { request: chatRequest('What is 47 + 85?') });
    expect(answer.text.trim()).toBe('132');
    expect(answer.reasoning).toContain('47+85');
    expect(answer.started).toMatchObject({ model: 'mimo-demo' });
    expect(answer.finish?.reason).toBe(FinishReason.STOP);
    expect(answer.finish?.usage).toEqual({
      promptTokens: answer.started?.promptTokens,
      completionTokens: answer.tokenIds.length,
    });
    const { draftedTokens = 0, acceptedTokens = 0 } = answer.finish?.speculation ?? {};
    expect(draftedTokens).toBeGreaterThan(5);
    expect(acceptedTokens / draftedTokens).toBeGreaterThan(0.5);
    expect(answer.messages).toBeGreaterThan(answer.tokenIds.length / 4);
    await expectNothingHeld();
  });

  it('returns the same tokens with and without speculation, alone and among others', async () => {
    const questions = [
      'What is 47 + 85?',
      'What is 90 - 17?',
      'What is 6 * 7?',
      'Which is larger, 41 or 14?',
    ];
    const alone: Answer[] = [];
    for (const question of questions) {
      alone.push(await ask(cluster.client, { request: chatRequest(question) }));
    }
    const together = await Promise.all(
      [...questions, ...questions, ...questions].map(async (question, index) =>
        ask(cluster.client, { request: chatRequest(question, { draftTokens: index % 2 }) }),
      ),
    );
    together.forEach(({ tokenIds, text }, index) => {
      expect(tokenIds).toEqual(alone[index % questions.length]?.tokenIds);
      expect(text).toBe(alone[index % questions.length]?.text);
    });
    expect(together[0]?.finish?.speculation?.draftedTokens).toBe(0);
    await expectNothingHeld();
  });

  it('returns the same sampled text for the same seed, and another text for another seed', async () => {
    const sampled = { temperature: 1.5, topP: 1, maxTokens: 60, ignoreEos: true };
    const first = await ask(cluster.client, { request: chatRequest('Sort 5, 3, 9.', sampled) });
    const seed = first.started?.seed ?? -1;
    const again = await ask(cluster.client, { request: chatRequest('Sort 5, 3, 9.', { ...sampled, seed }) });
    const other = await ask(cluster.client, {
      request: chatRequest('Sort 5, 3, 9.', { ...sampled, seed: (seed + 1) % 2 ** 32 }),
    });
    const plain = await ask(cluster.client, {
      request: chatRequest('Sort 5, 3, 9.', { ...sampled, seed, draftTokens: 0 }),
    });
    expect(again.tokenIds).toEqual(first.tokenIds);
    expect(plain.tokenIds).toEqual(first.tokenIds);
    expect(other.tokenIds).not.toEqual(first.tokenIds);
    expect(first.tokenIds).toHaveLength(60);
    expect(first.finish?.reason).toBe(FinishReason.LENGTH);
  });

  it('stops at a stop text, leaves it out, and frees the sequence', async () => {
    const whole = await ask(cluster.client, { request: chatRequest('What is 47 + 85?') });
    const stopped = await ask(cluster.client, {
      request: chatRequest('What is 47 + 85?', { stop: ['+8+1'], stopInReasoning: true }),
    });
    expect(stopped.finish).toMatchObject({ reason: FinishReason.STOP, matchedStop: '+8+1' });
    expect(whole.reasoning).toContain(stopped.reasoning);
    expect(stopped.reasoning).not.toContain('+8+1');
    expect(stopped.text).toBe('');
    await expectNothingHeld();
  });

  it('matches stop texts in the answer, not in the thinking', async () => {
    const whole = await ask(cluster.client, { request: chatRequest('What is 47 + 85?') });
    for (const stop of ['=', '132', '\n']) {
      const { text, reasoning, finish } = await ask(cluster.client, {
        request: chatRequest('What is 47 + 85?', { stop: [stop] }),
      });
      expect(reasoning).toBe(whole.reasoning);
      expect(text).toBe(whole.text.split(stop)[0]);
      expect(finish?.matchedStop).toBe(whole.text.includes(stop) ? stop : '606');
    }
  });

  it('ends at a special token that a stop text names, even when the end of text is ignored', async () => {
    const whole = await ask(cluster.client, { request: chatRequest('What is 47 + 85?') });
    for (const stop of [['<|im_end|>'], ['<|endoftext|>', 'never', '<|im_end|>']]) {
      const { text, finish } = await ask(cluster.client, {
        request: chatRequest('What is 47 + 85?', { stop, ignoreEos: true, maxTokens: 400 }),
      });
      expect(text).toBe(whole.text);
      expect(finish).toMatchObject({ reason: FinishReason.STOP, matchedStop: '<|im_end|>' });
    }
  });

  it('continues an assistant’s message to the same text, wherever it is cut', async () => {
    const request = chatRequest('What is 47 + 85?');
    const whole = await ask(cluster.client, { request });
    const tokenizer = await loadTokenizer(join(import.meta.dirname, '../../models/mimo-demo'));
    const decode = (tokenIds: readonly number[]): string =>
      tokenizer.decode(tokenIds, { skipSpecialTokens: true });
    for (const kept of [1, 5, whole.tokenIds.length - 4, whole.tokenIds.length - 2]) {
      const content = decode(whole.tokenIds.slice(0, kept));
      const continued = await ask(cluster.client, {
        request: { ...request, messages: [...request.messages, { role: Role.ASSISTANT, content }] },
      });
      expect(continued.tokenIds).toEqual(whole.tokenIds.slice(kept));
      expect(whole.text.endsWith(continued.text)).toBe(true);
      expect(whole.reasoning.endsWith(continued.reasoning)).toBe(true);
    }
  });

  it('returns log-probabilities that fit the tokens', async () => {
    const { tokenIds, logprobs } = await ask(cluster.client, {
      request: chatRequest('What is 6 * 7?', { logprobs: 3 }),
    });
    expect(logprobs.map(({ tokenId }) => tokenId)).toEqual(tokenIds);
    for (const { tokenId, logprob, top } of logprobs) {
      expect(logprob).toBeLessThanOrEqual(0);
      expect(top).toHaveLength(3);
      expect(top[0]).toEqual({ tokenId, logprob });
      expect(top[1]?.logprob).toBeLessThanOrEqual(logprob);
    }
  });

  it('frees everything when a client cancels', async () => {
    const leaving = new AbortController();
    let tokens = 0;
    const running = ask(cluster.client, {
      request: endless(),
      signal: leaving.signal,
      onMessage: ({ event }) => {
        tokens += event?.$case === 'delta' ? event.value.tokenIds.length : 0;
        if (tokens > 20) {
          leaving.abort();
        }
      },
    });
    await expect(running).rejects.toMatchObject({ code: 'canceled' });
    await expectNothingHeld();
    const { completionTokens } = await cluster.stats(0);
    await new Promise((resolve) => setImmediate(resolve));
    expect((await cluster.stats(0)).completionTokens).toBe(completionTokens);
  });

  it('cancels by request id', async () => {
    let cancelled: Promise<unknown> | undefined;
    const running = ask(cluster.client, {
      request: endless(),
      onMessage: ({ event }) => {
        if (event?.$case === 'started') {
          const { requestId } = event.value;
          cancelled = callUnary(cluster.client, InferenceServiceService.cancel, { request: { requestId } });
        }
      },
    });
    await expect(running).rejects.toMatchObject({ code: 'canceled' });
    expect(await cancelled).toEqual({ cancelled: true });
    await expectNothingHeld();
  });

  it('ends at the deadline', async () => {
    const running = ask(cluster.client, {
      request: endless({ temperature: 1 }),
      timeoutMs: 400,
    });
    await expect(running).rejects.toMatchObject({ code: 'deadline_exceeded' });
    await expectNothingHeld();
  });

  it('ends with LENGTH when the context is full', async () => {
    const answer = await ask(cluster.client, { request: endless({ temperature: 1, seed: 3 }) });
    expect(answer.finish?.reason).toBe(FinishReason.LENGTH);
    expect((answer.started?.promptTokens ?? 0) + answer.tokenIds.length).toBe(2048);
    await expectNothingHeld();
  });

  it('serves more requests at once than the group holds sequences', async () => {
    const answers = await Promise.all(
      Array.from({ length: 60 }, async (_, index) =>
        ask(cluster.client, { request: chatRequest(`What is ${index} + 85?`) }),
      ),
    );
    const right = answers.filter(({ text }, index) => Number(text) === index + 85).length;
    expect(right).toBeGreaterThan(48);
    await expectNothingHeld();
  });

  it('applies back-pressure to a client that does not read, without slowing down others', async () => {
    const slow = createClient(cluster.parts.gatewayAddress);
    const call = slow.chat(endless({ temperature: 1 }));
    call.pause();
    const quick = await ask(cluster.client, { request: chatRequest('What is 47 + 85?') });
    expect(quick.text.trim()).toBe('132');
    call.on('error', () => undefined);
    call.cancel();
    slow.close();
    await expectNothingHeld();
  });

  it('continues a raw prompt', async () => {
    const request: GenerateRequest = {
      model: 'mimo-demo',
      input: { $case: 'prompt', value: '12+' },
      sampling: SamplingParams.fromPartial({ temperature: 0, maxTokens: 5, ignoreEos: true }),
    };
    let tokens = 0;
    for await (const { event } of callServerStream(cluster.client, InferenceServiceService.generate, {
      request,
    })) {
      tokens += event?.$case === 'delta' ? event.value.tokenIds.length : 0;
    }
    expect(tokens).toBe(5);
  });

  it.each([
    ['an unknown model', { ...chatRequest('hi'), model: 'gpt' }, 'not_found'],
    ['a negative temperature', chatRequest('hi', { temperature: -1 }), 'invalid_argument'],
    ['a prompt beyond the context', chatRequest('1 + '.repeat(4_000)), 'invalid_argument'],
  ])('refuses %s and holds nothing for it', async (_, request, code) => {
    await expect(ask(cluster.client, { request })).rejects.toMatchObject({ code });
    await expectNothingHeld();
  });

  it('distinguishes a missing gateway from a gateway that is not ready', async () => {
    const nowhere = createClient('127.0.0.1:1');
    const call = callUnary(nowhere, InferenceServiceService.listModels, { request: {} });
    await expect(call).rejects.toMatchObject({ code: 'unavailable' });
    expect(nowhere.getChannel().getConnectivityState(false)).not.toBe(grpc.connectivityState.READY);
    nowhere.close();
  });
});
