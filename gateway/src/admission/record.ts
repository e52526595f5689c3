// The record of an admitted request: every default filled in. Pure: the same request, facts and chance give the same
// record. Every door goes through here, so that none skips a check: `checkPrompt`, then the tokenizer if the prompt is
// valid, then `admitRequest`.

import type { FieldViolation } from '@mimo/core/process/errors';
import type { RequestRecord } from '@mimo/proto/queue';
import type { SamplingParams } from '@mimo/proto/sampling';

import {
  assertNone,
  checkSampling,
  promptFields,
  stopIdsOf,
  tooManyTokens,
  type ModelFacts,
} from './check.ts';
import type { PromptInput } from './prompt-input.ts';

/** A checked prompt, tokenised if it is valid. */
export interface ReadPrompt {
  readonly kind: PromptInput['kind'];
  /** Empty if there are problems. */
  readonly tokenIds: readonly number[];
  /** The part of the completion's text that the prompt already has: an opened tag, or a message to continue. */
  readonly begun: string;
  readonly problems: readonly FieldViolation[];
}

/** The other fields of a record. `seed` is used if the caller gave none. */
export interface AdmissionContext {
  readonly facts: ModelFacts;
  readonly requestId: string;
  readonly tenant: string;
  readonly gatewayId: string;
  /** The model identity that must compute the completion: version-choice.ts. */
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
 * Turns a request into its record: fills in every default and keeps `max_tokens` within the remaining context. Fails
 * with `invalid_argument` and a violation for each problem, the prompt's included.
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
    violations.push({ field: promptFields[prompt.kind], description: 'produces no tokens' });
  }
  if (promptTokenIds.length >= facts.maxContextTokens) {
    violations.push(tooManyTokens(prompt, promptTokenIds.length, facts));
  }
  const leftTokens = facts.maxContextTokens - promptTokenIds.length;
  const minTokens = sampling?.minTokens ?? 0;
  if (leftTokens > 0 && minTokens > leftTokens && minTokens <= (sampling?.maxTokens ?? Infinity)) {
    const description = `must be at most ${leftTokens}, the remaining tokens of the context, not ${minTokens}`;
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

function withoutUndefined(sampling: SamplingParams | undefined): Partial<SamplingParams> {
  return Object.fromEntries(Object.entries(sampling ?? {}).filter(([, value]) => value !== undefined));
}
