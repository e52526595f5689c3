// The engine's interface to its process: requests, frames and figures (plain data that crosses threads), and the host
// that handles them. Knows no text, no session of a gateway and no tensor.

import type { ChosenSize, Size } from './default-sizes.ts';
import type { ClusterError, ErrorCode } from '@mimo/core/process/errors';
import type { ModelConfig } from '../../shards/model-config.ts';
import type { Precision } from '../../shards/target-profile.ts';

/**
 * How the next token of a sequence is chosen; complete, every default filled in. Sampling is keyed by (seed,
 * position).
 */
export interface SequenceSampling {
  readonly temperature: number;
  readonly topP: number;
  /** 0: all. */
  readonly topK: number;
  readonly minP: number;
  readonly repetitionPenalty: number;
  readonly presencePenalty: number;
  readonly frequencyPenalty: number;
  readonly seed: number;
  readonly stopTokenIds: readonly number[];
  readonly maxTokens: number;
  readonly minTokens: number;
  readonly ignoreEos: boolean;
  /** -1: none; else the number of alternatives beside the chosen token. */
  readonly logprobs: number;
  /** 0 or 1. */
  readonly draftTokens: number;
}

export interface SequenceRequest {
  /** The caller's id for the sequence, unique among live sequences. */
  readonly sequenceId: number;
  /** Prompt, then `resumedTokens` completion tokens. */
  readonly tokenIds: readonly number[];
  readonly resumedTokens: number;
  readonly sampling: SequenceSampling;
  /** Tokens that may be produced before more credit comes; Infinity: no limit. */
  readonly creditTokens: number;
}

export interface TokenLogprob {
  readonly tokenId: number;
  readonly logprob: number;
  readonly top: readonly { readonly tokenId: number; readonly logprob: number }[];
}

/** The reason why a sequence gave up its slot and KV blocks: it had no credit for a while. */
export type ParkReason = 'no credit';

/** `parked` does not end the text: submitted again with its tokens, the sequence continues. */
export type SequenceEnd =
  | { readonly kind: 'stop'; readonly stopTokenId: number }
  | { readonly kind: 'length' }
  | { readonly kind: 'aborted' }
  | { readonly kind: 'parked'; readonly reason: ParkReason }
  | { readonly kind: 'error'; readonly code: ErrorCode; readonly message: string };

export interface SequenceDelta {
  readonly sequenceId: number;
  /** Completion index of the first token here, resumed tokens counted. */
  readonly index: number;
  /** Without the token that ended it. */
  readonly tokenIds: readonly number[];
  readonly logprobs?: readonly TokenLogprob[];
  /** Drafts made and accepted so far; absent if there were none. */
  readonly speculation?: { readonly draftedTokens: number; readonly acceptedTokens: number };
  readonly finish?: SequenceEnd & {
    readonly completionTokens: number;
    readonly draftedTokens: number;
    readonly acceptedTokens: number;
  };
}

/** The output of one engine step. */
export interface EngineFrame {
  readonly step: number;
  readonly deltas: readonly SequenceDelta[];
  readonly stats: EngineStats;
  /** Wall time of the step; absent if the engine ran in no step thread. */
  readonly stepMs?: number;
}

export interface EngineStats {
  readonly steps: number;
  readonly promptTokens: number;
  readonly completionTokens: number;
  readonly draftedTokens: number;
  readonly acceptedTokens: number;
  /** Parked since the start. */
  readonly parkedSequences: number;
  readonly runningSequences: number;
  readonly waitingSequences: number;
  /** Waiting sequences that lack a slot or enough KV blocks. */
  readonly blockedSequences: number;
  /** Running sequences that may be parked to make room. */
  readonly parkableSequences: number;
  readonly kvBlocks: number;
  readonly kvBlocksUsed: number;
}

/** Fixed facts of the loaded model and the engine's limits. */
export interface EngineInfo {
  readonly rank: number;
  readonly worldSize: number;
  readonly runtime: 'ort-capi' | 'ort-node';
  readonly shardKey: string;
  readonly precision: Precision;
  readonly config: ModelConfig;
  /** Prompt and completion together. */
  readonly maxContextTokens: number;
  /** 1 where the model has an MTP layer, else 0. */
  readonly draftTokens: number;
  readonly maxSequences: number;
  readonly kvBlocks: number;
  /** Positions of one block. */
  readonly kvBlockTokens: number;
  /** Sequences at a time, rows of a step and of a chunk, each with the reason. */
  readonly sizes: Readonly<Record<Size, ChosenSize>>;
}

/**
 * The running engine as its process sees it. A follower uses only `info`, `failed`, `leave` and `close`; its `submit`
 * throws `failed_precondition`.
 */
export interface EngineHost {
  readonly info: EngineInfo;
  /**
   * Resolves (never rejects) with the reason when the group ends: no more frames follow, and unfinished sequences are
   * lost. The code is `canceled` on a follower whose leader has shut the group down in order.
   */
  readonly failed: Promise<ClusterError>;
  /**
   * On the leader: resolves when another rank has been asked to end. Only the leader can then shut the group down in
   * order.
   */
  readonly leaving: Promise<void>;
  /** The current step has taken so long that the caller should submit nothing until it ends. */
  readonly isStalled: boolean;
  /** On a follower: notifies the leader that this rank has been asked to end. Idempotent. */
  leave(): void;
  /** Throws `unavailable` once lost or closed. A request that cannot run ends with an `error` delta instead. */
  submit(request: SequenceRequest): void;
  /** Ends the sequence within one step, with an `aborted` delta. Unknown or ended ids are ignored. */
  abort(sequenceId: number): void;
  /** Unknown or ended ids are ignored. */
  addCredit(sequenceId: number, tokens: number): void;
  /** Calls the listener once per step with every sequence's new tokens. Returns a function that removes it. */
  onFrame(listener: (frame: EngineFrame) => void): () => void;
  /** As of the last frame. */
  stats(): EngineStats;
  /**
   * Stops the threads and frees the model; no more frames follow. Idempotent. The thread of a hung step remains until
   * the process exits.
   */
  close(): Promise<void>;
}

/**
 * The last delta of a sequence that the engine cannot report itself: the engine rejected it, or its group was lost.
 */
export function lastDelta(sequenceId: number, completionTokens: number, end: SequenceEnd): SequenceDelta {
  return {
    sequenceId,
    index: completionTokens,
    tokenIds: [],
    finish: { ...end, completionTokens, draftedTokens: 0, acceptedTokens: 0 },
  };
}

/** The figures of an idle engine; all its `kvBlocks` are free. */
export function idleStats(kvBlocks: number): EngineStats {
  return {
    steps: 0,
    promptTokens: 0,
    completionTokens: 0,
    draftedTokens: 0,
    acceptedTokens: 0,
    parkedSequences: 0,
    runningSequences: 0,
    waitingSequences: 0,
    blockedSequences: 0,
    parkableSequences: 0,
    kvBlocks,
    kvBlocksUsed: 0,
  };
}
