// Checks a request's content: its prompt, before tokenising, and its sampling. Pure. Reports all problems of a request
// at once, each with its field, the limit and the value; never quotes prompts.

import { ClusterError, type FieldViolation } from '@mimo/core/process/errors';
import { Role, type Message } from '@mimo/proto/inference';
import {
  numberProblem,
  repeatedLimits,
  samplingLimits,
  stopTextMaxCharacters,
  type NumberLimit,
} from '@mimo/proto/limits';
import type { SamplingParams } from '@mimo/proto/sampling';

import { roleNames, textsOf, type PromptInput } from './prompt-input.ts';

/** The facts about a model that admission needs. */
export interface ModelFacts {
  readonly name: string;
  readonly vocabularySize: number;
  /** Token ids by their texts. */
  readonly specialTokens: ReadonlyMap<string, number>;
  /** Prompt and completion together. */
  readonly maxContextTokens: number;
  readonly draftTokens: number;
}

/** Most violations named in an error's text; its details hold as many as a status has room for. */
const maxNamedViolations = 16;

/** Fails with `invalid_argument` if there are violations. */
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

/** The field that holds a prompt of each kind. */
export const promptFields = { chat: 'messages', text: 'prompt', tokens: 'token_ids', none: 'input' } as const;

/** The problems of a prompt, before it is tokenised. */
export function checkPrompt(
  input: PromptInput,
  { facts, promptMaxBytes }: { readonly facts: ModelFacts; readonly promptMaxBytes: number },
): FieldViolation[] {
  const problems: FieldViolation[] = [];
  if (input.kind === 'none') {
    problems.push({ field: 'input', description: 'must contain prompt or token_ids' });
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

/** The violation of a prompt that cannot fit. Its tokens are not counted to the end. */
export function tooManyTokens(
  { kind }: Pick<PromptInput, 'kind'>,
  leastTokens: number,
  { maxContextTokens }: ModelFacts,
): FieldViolation {
  const limit = `the limit is ${maxContextTokens - 1}, one less than the context of ${maxContextTokens}`;
  return { field: promptFields[kind], description: `has at least ${leastTokens} tokens; ${limit}` };
}

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

/** One violation for the first invalid id, so that a garbled prompt does not fill the answer. */
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

/** The problems of the requested sampling. */
export function checkSampling(sampling: SamplingParams | undefined, facts: ModelFacts): FieldViolation[] {
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

/**
 * The token ids that end the completion. They include the special tokens that the stop texts name: these tokens have no
 * text to search.
 */
export function stopIdsOf(
  sampling: SamplingParams | undefined,
  { specialTokens, vocabularySize }: ModelFacts,
): number[] {
  const { stop = [], stopTokenIds = [] } = sampling ?? {};
  const special = stop.map((text) => specialTokens.get(text) ?? Infinity).filter((id) => id < vocabularySize);
  return [...new Set([...stopTokenIds, ...special])];
}

/** A field's name as the protos spell it. */
function toSnakeCase(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}
