// The yes or no at the door, and what a yes is complete with. Pure: the same request, facts and chance give the same
// record. Every door goes through here, so that none skips a check: `checkPrompt`, then the tokenizer if the prompt is
// sound, then `admitRequest`. All problems of a request are reported at once, each with its field, the limit and the
// value; prompts themselves are never quoted.

import { ClusterError, type FieldViolation } from '@mimo/core/process/errors';
import { Role, type Message } from '@mimo/proto/inference';
import {
  numberProblem,
  repeatedLimits,
  samplingLimits,
  stopTextMaxCharacters,
  type NumberLimit,
} from '@mimo/proto/limits';
import type { RequestRecord } from '@mimo/proto/queue';
import type { SamplingParams } from '@mimo/proto/sampling';
import type { ChatMessage } from '@mimo/tokenizer';

/** What admission knows of a model. */
export interface ModelFacts {
  readonly name: string;
  readonly vocabularySize: number;
  /** By their texts. */
  readonly specialTokens: ReadonlyMap<string, number>;
  /** Prompt and completion together. */
  readonly maxContextTokens: number;
  readonly draftTokens: number;
}

/** What the model is to read. */
export type PromptInput =
  | { readonly kind: 'chat'; readonly messages: readonly Message[] }
  | { readonly kind: 'text'; readonly text: string }
  | { readonly kind: 'tokens'; readonly tokenIds: readonly number[] }
  | { readonly kind: 'none' };

/** A prompt that was checked and, where it is sound, tokenised. */
export interface ReadPrompt {
  readonly kind: PromptInput['kind'];
  /** Empty where there are problems. */
  readonly tokenIds: readonly number[];
  /** What of the completion's text the prompt already holds: an opened tag, or a message that is continued. */
  readonly begun: string;
  readonly problems: readonly FieldViolation[];
}

/** Everything else that a record holds. `seed` is the one drawn in case the caller gave none. */
export interface AdmissionContext {
  readonly facts: ModelFacts;
  readonly requestId: string;
  readonly tenant: string;
  readonly gatewayId: string;
  /** What is to compute the text: version-choice.ts. */
  readonly identity: string;
  readonly seed: number;
  /** Until the caller's deadline; undefined: none. */
  readonly timeLeftMs: number | undefined;
}

/** Temperature and top_p are MiMo's recommendation; the others leave the distribution as it is. */
const defaults = {
  temperature: 0.6,
  topP: 0.95,
  topK: 0,
  minP: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  ignoreEos: false,
  minTokens: 0,
} as const;

/**
 * Turns a request into its record: every default filled in, `max_tokens` within what is left of the context. Fails with
 * `invalid_argument` and a violation for each problem, the prompt's included.
 */
export function admitRequest(
  prompt: ReadPrompt,
  sampling: SamplingParams | undefined,
  context: AdmissionContext,
): RequestRecord {
  const { facts } = context;
  const stopTokenIds = stopIdsOf(sampling, facts);
  const promptTokenIds = [...prompt.tokenIds];
  const violations = [...checkSampling(sampling, facts), ...prompt.problems];
  if (promptTokenIds.length === 0 && prompt.problems.length === 0) {
    violations.push({ field: promptFields[prompt.kind], description: 'gives no tokens' });
  }
  if (promptTokenIds.length >= facts.maxContextTokens) {
    violations.push(tooManyTokens(prompt, promptTokenIds.length, facts));
  }
  const leftTokens = facts.maxContextTokens - promptTokenIds.length;
  const minTokens = sampling?.minTokens ?? 0;
  if (leftTokens > 0 && minTokens > leftTokens && minTokens <= (sampling?.maxTokens ?? Infinity)) {
    const description = `must be at most the ${leftTokens} tokens that are left of the context, not ${minTokens}`;
    violations.push({ field: 'sampling.min_tokens', description });
  }
  assertNone(violations);
  return {
    requestId: context.requestId,
    model: facts.name,
    tenant: context.tenant,
    gatewayId: context.gatewayId,
    identity: context.identity,
    timeLeftMs: context.timeLeftMs,
    storesOutlived: 0,
    firstSequence: 0,
    heldMs: 0,
    promptTokenIds,
    sampling: {
      ...defaults,
      draftTokens: facts.draftTokens,
      seed: context.seed,
      stop: [],
      stopInReasoning: false,
      ...withoutUndefined(sampling),
      stopTokenIds,
      maxTokens: Math.min(sampling?.maxTokens ?? leftTokens, leftTokens),
    },
  };
}

/** In the text of an error; its details hold as many as a status has room for. */
const maxNamedViolations = 16;

/** Fails with `invalid_argument` where there are violations. */
export function assertNone(violations: readonly FieldViolation[]): void {
  if (violations.length > 0) {
    const named = violations
      .slice(0, maxNamedViolations)
      .map(({ field, description }) => `${field} ${description}`);
    const more = violations.length - named.length;
    const message = [...named, ...(more > 0 ? [`and ${more} more problems`] : [])].join('; ');
    throw new ClusterError('invalid_argument', message, { detail: { fieldViolations: violations } });
  }
}

/**
 * The token ids that end the completion. A stop text that is a special token's joins them, since no text comes of such a token
 * that could be searched.
 */
function stopIdsOf(
  sampling: SamplingParams | undefined,
  { specialTokens, vocabularySize }: ModelFacts,
): number[] {
  const { stop = [], stopTokenIds = [] } = sampling ?? {};
  const special = stop.map((text) => specialTokens.get(text) ?? Infinity).filter((id) => id < vocabularySize);
  return [...new Set([...stopTokenIds, ...special])];
}

function withoutUndefined(sampling: SamplingParams | undefined): Partial<SamplingParams> {
  return Object.fromEntries(Object.entries(sampling ?? {}).filter(([, value]) => value !== undefined));
}

const promptFields = { chat: 'messages', text: 'prompt', tokens: 'token_ids', none: 'input' } as const;

/** What the template adds to a message, and what rendering one costs, in letters. */
const messageCharacters = 128;

/** What a prompt costs to render and tokenise, in letters: an empty message is not free. */
export function promptCost(input: PromptInput): number {
  const characters = textsOf(input).reduce((sum, text) => sum + text.length, 0);
  return input.kind === 'chat' ? characters + messageCharacters * input.messages.length : characters;
}

/** The violation of a prompt that cannot fit; how far it goes beyond the context is not counted to the end. */
export function tooManyTokens(
  { kind }: Pick<PromptInput, 'kind'>,
  leastTokens: number,
  { maxContextTokens }: ModelFacts,
): FieldViolation {
  const limit = `the limit is ${maxContextTokens - 1}, the context of ${maxContextTokens} less one`;
  return { field: promptFields[kind], description: `has at least ${leastTokens} tokens; ${limit}` };
}

/** The texts that are tokenised. */
export function textsOf(input: PromptInput): string[] {
  if (input.kind === 'chat') {
    return input.messages.map(({ content }) => content);
  }
  return input.kind === 'text' ? [input.text] : [];
}

/** What is wrong with a prompt, before it is tokenised. */
export function checkPrompt(
  input: PromptInput,
  { facts, promptMaxBytes }: { readonly facts: ModelFacts; readonly promptMaxBytes: number },
): FieldViolation[] {
  const problems: FieldViolation[] = [];
  if (input.kind === 'none') {
    problems.push({ field: 'input', description: 'must hold prompt or token_ids' });
  } else if (input.kind === 'chat') {
    checkMessages(input.messages, problems);
  } else if (input.kind === 'tokens') {
    checkTokenIds('token_ids', input.tokenIds, { facts, violations: problems });
    checkNotEmpty('token_ids', input.tokenIds.length, problems);
  } else {
    checkNotEmpty('prompt', input.text.length, problems);
    checkWellFormed('prompt', input.text, problems);
  }
  const bytes = textsOf(input).reduce((sum, text) => sum + Buffer.byteLength(text), 0);
  if (bytes > promptMaxBytes) {
    const description = `has ${bytes} bytes of text; the limit is ${promptMaxBytes}`;
    problems.push({ field: promptFields[input.kind], description });
  }
  return problems;
}

function checkNotEmpty(field: string, length: number, violations: FieldViolation[]): void {
  if (length === 0) {
    violations.push({ field, description: 'must not be empty' });
  }
}

function checkWellFormed(field: string, text: string, violations: FieldViolation[]): void {
  if (!text.isWellFormed()) {
    violations.push({ field, description: 'must be well-formed Unicode, without lone surrogates' });
  }
}

const roleNames = new Map<Role, ChatMessage['role']>([
  [Role.SYSTEM, 'system'],
  [Role.USER, 'user'],
  [Role.ASSISTANT, 'assistant'],
]);

function checkMessages(messages: readonly Message[], violations: FieldViolation[]): void {
  checkNotEmpty('messages', messages.length, violations);
  for (const [index, { role, content }] of messages.entries()) {
    const isLast = index === messages.length - 1;
    const at = `messages[${index}]`;
    if (!roleNames.has(role)) {
      violations.push({ field: `${at}.role`, description: `must be system, user or assistant, not ${role}` });
    } else if (isLast && role === Role.SYSTEM) {
      violations.push({ field: `${at}.role`, description: 'must be user or assistant in the last message' });
    } else if (index > 0 && role === Role.SYSTEM) {
      violations.push({ field: `${at}.role`, description: 'may be system only in the first message' });
    }
    if (role === Role.USER) {
      checkNotEmpty(`${at}.content`, content.length, violations);
    }
    checkWellFormed(`${at}.content`, content, violations);
  }
}

/** Whether the completion goes on with the conversation's last message, and does not answer it. */
export function continuesLast(messages: readonly Message[]): boolean {
  return messages.at(-1)?.role === Role.ASSISTANT;
}

/** The conversation as the template takes it: an empty system message is put first where none is, as MiMo recommends. */
export function conversationOf(messages: readonly Message[]): ChatMessage[] {
  const conversation = messages.map(({ role, content }) => ({
    role: roleNames.get(role) ?? 'user',
    content,
  }));
  return conversation[0]?.role === 'system'
    ? conversation
    : [{ role: 'system', content: '' }, ...conversation];
}

/** One violation for the first id that is none, so that a garbled prompt does not fill the answer. */
function checkTokenIds(
  field: string,
  tokenIds: readonly number[],
  { facts, violations }: { facts: ModelFacts; violations: FieldViolation[] },
): void {
  const index = tokenIds.findIndex((id) => !Number.isInteger(id) || id < 0 || id >= facts.vocabularySize);
  if (index >= 0) {
    violations.push({
      field: `${field}[${index}]`,
      description: `must be a token id from 0 to ${facts.vocabularySize - 1}, not ${tokenIds[index]}`,
    });
  }
}

function checkSampling(sampling: SamplingParams | undefined, facts: ModelFacts): FieldViolation[] {
  if (sampling === undefined) {
    return [];
  }
  const violations: FieldViolation[] = [];
  const limits: Readonly<Record<keyof typeof samplingLimits, NumberLimit>> = {
    ...samplingLimits,
    draftTokens: { ...samplingLimits.draftTokens, max: facts.draftTokens },
  };
  for (const name of Object.keys(limits) as (keyof typeof limits)[]) {
    const value = sampling[name];
    const description = value === undefined ? undefined : numberProblem(value, limits[name]);
    if (description !== undefined) {
      violations.push({ field: `sampling.${toSnakeCase(name)}`, description });
    }
  }
  if ((sampling.minTokens ?? 0) > (sampling.maxTokens ?? Infinity)) {
    violations.push({
      field: 'sampling.min_tokens',
      description: `must be at most max_tokens, ${sampling.maxTokens}, not ${sampling.minTokens}`,
    });
  }
  if (sampling.stop.length > repeatedLimits.stop) {
    violations.push({
      field: 'sampling.stop',
      description: `has ${sampling.stop.length} texts; the limit is ${repeatedLimits.stop}`,
    });
  }
  for (const [index, stop] of sampling.stop.entries()) {
    if (stop === '' || stop.length > stopTextMaxCharacters || !stop.isWellFormed()) {
      violations.push({
        field: `sampling.stop[${index}]`,
        description: `must be well-formed text of 1 to ${stopTextMaxCharacters} characters; it has ${stop.length}`,
      });
    }
  }
  const stopIds = Math.max(sampling.stopTokenIds.length, stopIdsOf(sampling, facts).length);
  if (stopIds > repeatedLimits.stopTokenIds) {
    violations.push({
      field: 'sampling.stop_token_ids',
      description: `has ${stopIds} ids, with those of special tokens in stop; the limit is ${repeatedLimits.stopTokenIds}`,
    });
  }
  checkTokenIds('sampling.stop_token_ids', sampling.stopTokenIds, { facts, violations });
  return violations;
}

/** As the protos spell it. */
function toSnakeCase(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}
