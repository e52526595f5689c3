// One sequence inside the engine: its tokens, how far they are computed, its credit and its draft. Owns the end of a
// sequence and the validation of its request; knows no KV slot, no batch and no logits.

import { ClusterError } from '@mimo/core/process/errors';
import { numberProblem, repeatedLimits, samplingLimits } from '@mimo/proto/limits';
import type {
  SequenceDelta,
  SequenceEnd,
  SequenceRequest,
  SequenceSampling,
  TokenLogprob,
} from './engine-api.ts';
import type { HeadRequest } from './head-rows.ts';
import { hasPenalties, type DrawnToken } from './sampler.ts';
import { SeenTokens } from './seen-tokens.ts';

/** The limits of a request. */
export interface SequenceLimits {
  readonly vocabSize: number;
  readonly maxContextTokens: number;
  readonly eosTokenIds: readonly number[];
}

/** Throws `invalid_argument` listing every problem with its field, limit and value. */
export function validateRequest(request: SequenceRequest, limits: SequenceLimits): void {
  const problems: string[] = [];
  const check = (holds: boolean, problem: string): void => {
    if (!holds) {
      problems.push(problem);
    }
  };
  const { tokenIds, resumedTokens, sampling } = request;
  const promptTokens = tokenIds.length - resumedTokens;
  check(atLeast(resumedTokens, 0), `resumedTokens: must be an integer from 0, is ${resumedTokens}`);
  check(promptTokens >= 1, `tokenIds: the prompt must have at least 1 token, has ${promptTokens}`);
  check(
    tokenIds.length < limits.maxContextTokens,
    `tokenIds: prompt and resumed tokens must be fewer than the context of ${limits.maxContextTokens} tokens, are ${tokenIds.length}`,
  );
  const strange = tokenIds.findIndex((id) => !Number.isInteger(id) || id < 0 || id >= limits.vocabSize);
  check(strange < 0, `tokenIds[${strange}]: must be in [0, ${limits.vocabSize}), is ${tokenIds[strange]}`);
  check(request.creditTokens >= 0, `creditTokens: must be at least 0, is ${request.creditTokens}`);

  for (const name of Object.keys(samplingLimits) as (keyof typeof samplingLimits)[]) {
    // In the engine, -1 means no log-probabilities.
    const isNone = name === 'logprobs' && sampling.logprobs === -1;
    const problem = isNone ? undefined : numberProblem(sampling[name], samplingLimits[name]);
    check(problem === undefined, `sampling.${name}: ${problem}`);
  }
  const stopIds = sampling.stopTokenIds.length;
  check(
    stopIds <= repeatedLimits.stopTokenIds,
    `sampling.stopTokenIds: has ${stopIds} ids; the limit is ${repeatedLimits.stopTokenIds}`,
  );
  if (problems.length > 0) {
    throw new ClusterError('invalid_argument', problems.join('; '));
  }
}

function atLeast(value: number, limit: number): boolean {
  return Number.isInteger(value) && value >= limit;
}

/** Lives from submit to its last delta. */
export class Sequence {
  readonly id: number;
  readonly sampling: SequenceSampling;
  readonly promptTokens: number;
  readonly maxContextTokens: number;
  /** Prompt, then completion. */
  readonly tokenIds: number[];
  /** Tokens whose keys and values are in the cache; MTP's cache holds as many if the sequence drafts. */
  kvTokens = 0;
  creditTokens: number;
  /** The number of steps in which later sequences were admitted while there was no room for it. */
  overtakes = 0;
  /** When it was given its slot; undefined while it waits. */
  admittedMs: number | undefined;
  /** The guess for the token after the last, or -1. */
  draft = -1;
  draftedTokens = 0;
  acceptedTokens = 0;
  end: SequenceEnd | undefined;
  /** Completion occurrences by id, prompt tokens with 0; empty if no penalty needs it. */
  readonly #seen: SeenTokens;
  readonly #stopIds: ReadonlySet<number>;
  #stalledSinceMs: number | undefined;
  #undelivered: { tokenId: number; logprob: TokenLogprob | undefined }[] = [];

  constructor(request: SequenceRequest, limits: SequenceLimits) {
    const { sampling } = request;
    this.id = request.sequenceId;
    this.sampling = sampling;
    this.promptTokens = request.tokenIds.length - request.resumedTokens;
    this.maxContextTokens = limits.maxContextTokens;
    this.tokenIds = [...request.tokenIds];
    this.creditTokens = request.creditTokens;
    this.#seen = new SeenTokens(hasPenalties(sampling) ? this.tokenIds.length : 0);
    this.#stopIds = new Set([...(sampling.ignoreEos ? [] : limits.eosTokenIds), ...sampling.stopTokenIds]);
    this.tokenIds.forEach((tokenId, i) => this.#see(tokenId, i));
    if (request.resumedTokens >= sampling.maxTokens) {
      this.end = { kind: 'length' };
    }
  }

  get pendingTokens(): number {
    return this.tokenIds.length - this.kvTokens;
  }

  get completionTokens(): number {
    return this.tokenIds.length - this.promptTokens;
  }

  /** Completion tokens that it may still produce: by length, by context, by credit. */
  get allowance(): number {
    const byLength = this.sampling.maxTokens - this.completionTokens;
    const byContext = this.maxContextTokens - this.tokenIds.length;
    return Math.min(byLength, byContext, this.creditTokens);
  }

  /** Whether it keeps MTP keys and values. Once it has skipped them, it cannot keep them later. */
  get drafts(): boolean {
    return this.sampling.draftTokens > 0;
  }

  /** Its request to the head row of its next token or, with `draft`, of the token after that one. */
  nextHead(draft?: number): HeadRequest {
    const { sampling } = this;
    const ahead = draft === undefined ? 0 : 1;
    // Ids that would end it before `minTokens`.
    const forbidden = this.completionTokens + ahead < sampling.minTokens ? [...this.#stopIds] : [];
    const penalised = hasPenalties(sampling);
    if (sampling.temperature === 0 && sampling.logprobs < 0 && !penalised && forbidden.length === 0) {
      return { kind: 'best' };
    }
    const seen = draft === undefined || !penalised ? this.#seen : this.#seen.followedBy(draft);
    return { kind: 'sampled', draw: { sampling, position: this.tokenIds.length + ahead, seen, forbidden } };
  }

  /** How long it has been without credit. */
  stalledMs(nowMs: number): number {
    this.#stalledSinceMs = this.creditTokens > 0 ? undefined : (this.#stalledSinceMs ?? nowMs);
    return nowMs - (this.#stalledSinceMs ?? nowMs);
  }

  /** How long it ran before that, since its admission; 0 while it waits. */
  ranMs(nowMs: number): number {
    return this.admittedMs === undefined ? 0 : nowMs - this.stalledMs(nowMs) - this.admittedMs;
  }

  /** Accepts the next token: appends it, or ends at it. */
  append(drawn: DrawnToken): void {
    if (this.#stopIds.has(drawn.tokenId)) {
      this.end = { kind: 'stop', stopTokenId: drawn.tokenId };
      return;
    }
    this.tokenIds.push(drawn.tokenId);
    this.#see(drawn.tokenId, this.tokenIds.length - 1);
    this.#undelivered.push({ tokenId: drawn.tokenId, logprob: drawn.logprob });
    this.creditTokens -= 1;
    if (this.completionTokens >= this.sampling.maxTokens || this.tokenIds.length >= this.maxContextTokens) {
      this.end = { kind: 'length' };
    }
  }

  /** The tokens since the last call, in the shape of a delta, and the end if there is one; undefined if neither. */
  takeDelta(): SequenceDelta | undefined {
    const fresh = this.#undelivered;
    if (fresh.length === 0 && this.end === undefined) {
      return undefined;
    }
    this.#undelivered = [];
    const { completionTokens, draftedTokens, acceptedTokens, end } = this;
    return {
      sequenceId: this.id,
      index: completionTokens - fresh.length,
      tokenIds: fresh.map(({ tokenId }) => tokenId),
      ...(this.sampling.logprobs >= 0 && { logprobs: fresh.flatMap(({ logprob }) => logprob ?? []) }),
      ...(draftedTokens > 0 && { speculation: { draftedTokens, acceptedTokens } }),
      ...(end !== undefined && { finish: { ...end, completionTokens, draftedTokens, acceptedTokens } }),
    };
  }

  #see(tokenId: number, index: number): void {
    if (hasPenalties(this.sampling)) {
      this.#seen.add(tokenId, index >= this.promptTokens ? 1 : 0);
    }
  }
}
