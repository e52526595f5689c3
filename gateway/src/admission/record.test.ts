import { Message, Role } from '@mimo/proto/inference';
import type { RequestRecord } from '@mimo/proto/queue';
import { SamplingParams } from '@mimo/proto/sampling';
import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { ClusterError } from '@mimo/core/process/errors';

import { checkPrompt, type ModelFacts } from './check.ts';
import { continuesLast, conversationOf, textsOf, type PromptInput } from './prompt-input.ts';
import { admitRequest, type AdmissionContext } from './record.ts';

const specialTokens = new Map([
  ['<|end|>', 7],
  ['<|eot|>', 8],
  ['<|beyond|>', 1_000],
]);
const facts: ModelFacts = {
  name: 'm',
  vocabularySize: 1_000,
  specialTokens,
  maxContextTokens: 100,
  draftTokens: 1,
};
const promptMaxBytes = 400;

const context: AdmissionContext = {
  facts,
  requestId: 'r',
  tenant: 't',
  gatewayId: 'g',
  identity: 'i',
  seed: 42,
  timeLeftMs: undefined,
};

/** A tokenizer for counting: one token per character, and one before each message. */
function encode(input: PromptInput): number[] {
  if (input.kind === 'tokens') {
    return [...input.tokenIds];
  }
  const texts =
    input.kind === 'chat'
      ? conversationOf(input.messages).map(({ content }) => `>${content}`)
      : textsOf(input);
  return Array.from(texts.join(''), (character) => character.charCodeAt(0) % 1_000);
}

/** Admits a request as a door does. */
function admit(input: PromptInput, sampling?: Partial<SamplingParams>, timeLeftMs?: number): RequestRecord {
  const problems = checkPrompt(input, { facts, promptMaxBytes });
  const tokenIds = problems.length === 0 ? encode(input) : [];
  return admitRequest(
    { kind: input.kind, tokenIds, begun: '', problems },
    sampling === undefined ? undefined : SamplingParams.fromPartial(sampling),
    { ...context, timeLeftMs },
  );
}

const prompt: PromptInput = { kind: 'text', text: 'hello' };
const user = { role: Role.USER, content: 'hello' };
const chat = (...messages: readonly Partial<Message>[]): PromptInput => ({
  kind: 'chat',
  messages: messages.map((message) => Message.fromPartial(message)),
});
const ids = (...tokenIds: readonly number[]): PromptInput => ({ kind: 'tokens', tokenIds });

/** The fields and descriptions of the violations; rethrows an error of another kind or without violations. */
function violationsOf(input: PromptInput, sampling: Partial<SamplingParams> = {}): Record<string, string> {
  try {
    admit(input, sampling);
    return {};
  } catch (error) {
    const { code, detail } = ClusterError.from(error);
    if (code !== 'invalid_argument' || (detail.fieldViolations ?? []).length === 0) {
      throw error;
    }
    return Object.fromEntries(
      (detail.fieldViolations ?? []).map(({ field, description }) => [field, description]),
    );
  }
}

const many = (count: number): string[] => Array.from({ length: count }, (_, index) => `s${index}`);

describe('admitRequest', () => {
  it('fills in every default: the model’s recommendation, the drawn seed, the rest of the context', () => {
    expect(admit(prompt, undefined, 9_000)).toEqual({
      requestId: 'r',
      model: 'm',
      tenant: 't',
      gatewayId: 'g',
      identity: 'i',
      timeLeftMs: 9_000,
      promptTokenIds: encode(prompt),
      storesOutlived: 0,
      firstSequence: 0,
      heldMs: 0,
      sampling: {
        temperature: 0.6,
        topP: 0.95,
        topK: 0,
        minP: 0,
        repetitionPenalty: 1,
        presencePenalty: 0,
        frequencyPenalty: 0,
        seed: 42,
        stop: [],
        stopTokenIds: [],
        stopInReasoning: false,
        maxTokens: 95,
        ignoreEos: false,
        draftTokens: 1,
        minTokens: 0,
      },
    });
  });

  it('keeps given values, zeros included', () => {
    const given: Partial<SamplingParams> = {
      temperature: 0,
      topP: 1,
      topK: 5,
      minP: 0.1,
      repetitionPenalty: 1.5,
      presencePenalty: -2,
      frequencyPenalty: 2,
      seed: 0,
      stop: ['\n'],
      stopTokenIds: [999],
      maxTokens: 1,
      ignoreEos: true,
      logprobs: 0,
      draftTokens: 0,
      minTokens: 1,
      stopInReasoning: true,
    };
    expect(admit(prompt, given).sampling).toEqual(given);
  });

  it('lowers max_tokens to the rest of the context', () => {
    const { sampling } = admit(prompt, { maxTokens: 5_000 });
    expect(sampling?.maxTokens).toBe(95);
  });

  it('puts an empty system message before a conversation without one, and keeps an existing one', () => {
    const system = { role: Role.SYSTEM, content: '' };
    const bare = admit(chat(user));
    expect(bare.promptTokenIds).toEqual(admit(chat(system, user)).promptTokenIds);
    expect(bare.promptTokenIds).toEqual(encode({ kind: 'text', text: '>>hello' }));
  });

  it('ends the completion at special tokens that stop texts name', () => {
    const stop = ['<|eot|>', 'x', '<|end|>', '<|end|>x', '<|beyond|>'];
    expect(admit(prompt, { stop, stopTokenIds: [9, 7] }).sampling).toMatchObject({
      stop,
      stopTokenIds: [9, 7, 8],
    });
    expect(
      admit(prompt, { stop: ['<|end|>'], stopTokenIds: Array<number>(64).fill(7) }).sampling,
    ).toMatchObject({
      stopTokenIds: [7],
    });
    const full = Array.from({ length: 64 }, (_, id) => id + 100);
    expect(violationsOf(prompt, { stop: ['<|end|>'], stopTokenIds: full })).toEqual({
      'sampling.stop_token_ids': 'has 65 ids, with those of special tokens in stop; the limit is 64',
    });
  });

  it('accepts a last message of the assistant, even an empty one, to be continued', () => {
    for (const content of ['so', '']) {
      const messages = [user, { role: Role.ASSISTANT, content }];
      expect(admit(chat(...messages)).promptTokenIds).toEqual(encode(chat(...messages)));
      expect(continuesLast(messages)).toBe(true);
    }
    expect(continuesLast([user])).toBe(false);
  });

  it('accepts a prompt that leaves room for one token, and rejects a longer one', () => {
    expect(admit({ kind: 'text', text: 'x'.repeat(99) }).sampling?.maxTokens).toBe(1);
    expect(violationsOf({ kind: 'text', text: 'x'.repeat(100) })).toEqual({
      prompt: 'has at least 100 tokens; the limit is 99, one less than the context of 100',
    });
  });

  const badSampling: readonly [string, Partial<SamplingParams>, string][] = [
    ['negative temperature', { temperature: -0.1 }, 'sampling.temperature'],
    ['temperature over 2', { temperature: 2.1 }, 'sampling.temperature'],
    ['temperature NaN', { temperature: Number.NaN }, 'sampling.temperature'],
    ['temperature infinite', { temperature: Number.POSITIVE_INFINITY }, 'sampling.temperature'],
    ['top_p zero', { topP: 0 }, 'sampling.top_p'],
    ['top_p negative', { topP: -1 }, 'sampling.top_p'],
    ['top_p over 1', { topP: 1.01 }, 'sampling.top_p'],
    ['top_p NaN', { topP: Number.NaN }, 'sampling.top_p'],
    ['top_k negative', { topK: -1 }, 'sampling.top_k'],
    ['top_k broken', { topK: 1.5 }, 'sampling.top_k'],
    ['min_p negative', { minP: -0.01 }, 'sampling.min_p'],
    ['min_p over 1', { minP: 1.5 }, 'sampling.min_p'],
    ['min_p NaN', { minP: Number.NaN }, 'sampling.min_p'],
    ['repetition_penalty zero', { repetitionPenalty: 0 }, 'sampling.repetition_penalty'],
    ['repetition_penalty over 2', { repetitionPenalty: 2.5 }, 'sampling.repetition_penalty'],
    ['repetition_penalty NaN', { repetitionPenalty: Number.NaN }, 'sampling.repetition_penalty'],
    ['presence_penalty under -2', { presencePenalty: -2.5 }, 'sampling.presence_penalty'],
    ['presence_penalty infinite', { presencePenalty: Number.NEGATIVE_INFINITY }, 'sampling.presence_penalty'],
    ['frequency_penalty over 2', { frequencyPenalty: 2.5 }, 'sampling.frequency_penalty'],
    ['frequency_penalty NaN', { frequencyPenalty: Number.NaN }, 'sampling.frequency_penalty'],
    ['seed negative', { seed: -1 }, 'sampling.seed'],
    ['seed over 32 bits', { seed: 2 ** 32 }, 'sampling.seed'],
    ['seed broken', { seed: 0.5 }, 'sampling.seed'],
    ['max_tokens zero', { maxTokens: 0 }, 'sampling.max_tokens'],
    ['max_tokens broken', { maxTokens: 1.5 }, 'sampling.max_tokens'],
    ['min_tokens over max_tokens', { minTokens: 11, maxTokens: 10 }, 'sampling.min_tokens'],
    ['min_tokens over what is left of the context', { minTokens: 96 }, 'sampling.min_tokens'],
    ['logprobs over 20', { logprobs: 21 }, 'sampling.logprobs'],
    ['logprobs negative', { logprobs: -1 }, 'sampling.logprobs'],
    ['draft_tokens over what the model supports', { draftTokens: 2 }, 'sampling.draft_tokens'],
    ['draft_tokens negative', { draftTokens: -1 }, 'sampling.draft_tokens'],
    ['a stop of zero length', { stop: ['a', ''] }, 'sampling.stop[1]'],
    ['a stop that is too long', { stop: ['x'.repeat(257)] }, 'sampling.stop[0]'],
    ['a stop that is not Unicode', { stop: ['\ud800'] }, 'sampling.stop[0]'],
    ['too many stops', { stop: many(17) }, 'sampling.stop'],
    ['a stop token id out of the vocabulary', { stopTokenIds: [1, 1_000] }, 'sampling.stop_token_ids[1]'],
    ['a negative stop token id', { stopTokenIds: [-1] }, 'sampling.stop_token_ids[0]'],
    ['too many stop token ids', { stopTokenIds: Array<number>(65).fill(1) }, 'sampling.stop_token_ids'],
  ];
  it.each(badSampling)('refuses %s', (_name, sampling, field) => {
    expect(Object.keys(violationsOf(prompt, sampling))).toEqual([field]);
  });

  const badPrompts: readonly [string, PromptInput, string][] = [
    ['no prompt', { kind: 'none' }, 'input'],
    ['an empty prompt', { kind: 'text', text: '' }, 'prompt'],
    ['a prompt with a lone surrogate', { kind: 'text', text: 'a\udfff' }, 'prompt'],
    ['a prompt with too much text', { kind: 'text', text: 'é'.repeat(201) }, 'prompt'],
    ['a prompt over the context', { kind: 'text', text: 'x'.repeat(150) }, 'prompt'],
    ['no token ids', ids(), 'token_ids'],
    ['a token id out of the vocabulary', ids(1, 2, 1_000), 'token_ids[2]'],
    ['a negative token id', ids(-1), 'token_ids[0]'],
    ['a broken token id', ids(1.5), 'token_ids[0]'],
    ['token ids over the context', ids(...Array<number>(100).fill(1)), 'token_ids'],
    ['no messages', chat(), 'messages'],
    ['a message without role', chat({ content: 'x' }, user), 'messages[0].role'],
    [
      'a message of an unknown role',
      chat(Message.fromPartial({ role: -1, content: 'x' }), user),
      'messages[0].role',
    ],
    [
      'a conversation of a system message only',
      chat({ role: Role.SYSTEM, content: 'x' }),
      'messages[0].role',
    ],
    [
      'a system message in the middle',
      chat(user, { role: Role.SYSTEM, content: 'x' }, user),
      'messages[1].role',
    ],
    ['an empty user message', chat({ role: Role.USER, content: '' }), 'messages[0].content'],
    ['a message with a lone surrogate', chat({ role: Role.USER, content: '\ud800' }), 'messages[0].content'],
    ['messages over the context', chat({ role: Role.USER, content: 'x'.repeat(120) }), 'messages'],
    [
      'messages with too much text',
      chat(user, { role: Role.ASSISTANT, content: 'x'.repeat(400) }, user),
      'messages',
    ],
  ];
  it.each(badPrompts)('refuses %s', (_name, input, field) => {
    expect(Object.keys(violationsOf(input))).toEqual([field]);
  });

  it('reports all problems at once with limit and value, and does not quote the prompt', () => {
    const input = chat({ role: Role.USER, content: 'top secret' }, { content: '' });
    expect(violationsOf(input, { temperature: 3, topP: 0, stop: [''], maxTokens: 0 })).toEqual({
      'sampling.temperature': 'must be 0 or a number from 0.000001 to 2, not 3',
      'sampling.top_p': 'must be a number above 0 and at most 1, not 0',
      'sampling.max_tokens': 'must be a whole number from 1 to 4294967295, not 0',
      'sampling.stop[0]': 'must be well-formed text of 1 to 256 characters; it has 0',
      'messages[1].role': 'must be system, user or assistant, not 0',
    });
    expect(() => admit(input)).not.toThrow(/secret/);
  });

  it('admits any request or refuses it with violations', () => {
    const number = fc.option(fc.double(), { nil: undefined });
    const sampling = fc.record({
      temperature: number,
      topP: number,
      minP: number,
      topK: fc.option(fc.nat(), { nil: undefined }),
      maxTokens: fc.option(fc.nat(), { nil: undefined }),
      minTokens: fc.option(fc.nat(), { nil: undefined }),
      stop: fc.array(fc.string()),
      stopTokenIds: fc.array(fc.integer()),
    });
    fc.assert(
      fc.property(fc.string(), sampling, (text, given) => {
        const input: PromptInput = { kind: 'text', text };
        if (Object.keys(violationsOf(input, given)).length > 0) {
          return;
        }
        const record = admit(input, given);
        const { maxTokens = 0, minTokens = 0 } = record.sampling ?? {};
        const holds =
          maxTokens > 0 && minTokens <= maxTokens && record.promptTokenIds.length + maxTokens <= 100;
        expect(holds).toBe(true);
      }),
    );
  });
});
