// The engine's deltas -> the wire's. Pure. Owns the report of an end: an abort that the gateway requested is a finish
// reason, any other is an error with its code.

import type { ClusterError } from '@mimo/core/process/errors';
import type { TokenLogprob as WireLogprob } from '@mimo/proto/sampling';
import {
  FinishKind,
  ParkReason,
  type SequenceDelta as WireDelta,
  type SequenceFinish,
} from '@mimo/proto/worker';

import type { SequenceDelta, SequenceEnd, TokenLogprob } from './engines/mimo/engine-api.ts';

/** A sequence as its session identifies it. */
export interface SequenceOnWire {
  readonly slot: number;
  readonly epoch: number;
  /** Why this side aborted it. The engine's `aborted` without a reason from this side means that the group was lost. */
  abortedFor: 'gateway' | 'deadline' | 'handOver' | undefined;
}

const finishKinds = {
  stop: FinishKind.STOP,
  length: FinishKind.LENGTH,
  aborted: FinishKind.ABORTED,
  parked: FinishKind.PARKED,
  error: FinishKind.ERROR,
} as const;

const parkReasons = { 'no credit': ParkReason.NO_CREDIT } as const;

/** A step's result for a sequence. */
export function deltaToWire(sequence: SequenceOnWire, delta: SequenceDelta): WireDelta {
  return {
    slot: sequence.slot,
    epoch: sequence.epoch,
    index: delta.index,
    tokenIds: [...delta.tokenIds],
    logprobs: delta.logprobs === undefined ? [] : logprobsToWire(delta.logprobs),
    finish: delta.finish === undefined ? undefined : finishToWire(sequence, delta.finish),
    draftedTokens: delta.speculation?.draftedTokens ?? 0,
    acceptedTokens: delta.speculation?.acceptedTokens ?? 0,
  };
}

function finishToWire(
  sequence: SequenceOnWire,
  finish: NonNullable<SequenceDelta['finish']>,
): SequenceFinish {
  const error = errorOf(sequence, finish);
  return {
    kind: error === undefined ? finishKinds[finish.kind] : FinishKind.ERROR,
    stopTokenId: finish.kind === 'stop' ? finish.stopTokenId : 0,
    errorCode: error?.code ?? '',
    errorMessage: error?.message ?? '',
    completionTokens: finish.completionTokens,
    draftedTokens: finish.draftedTokens,
    acceptedTokens: finish.acceptedTokens,
    parkReason: finish.kind === 'parked' ? parkReasons[finish.reason] : ParkReason.UNSPECIFIED,
  };
}

function errorOf(
  sequence: SequenceOnWire,
  finish: SequenceEnd,
): Pick<ClusterError, 'code' | 'message'> | undefined {
  if (finish.kind === 'error') {
    return finish;
  }
  if (finish.kind !== 'aborted' || sequence.abortedFor === 'gateway') {
    return undefined;
  }
  if (sequence.abortedFor === 'handOver') {
    return { code: 'unavailable', message: 'the group ends, and hands over its sequences' };
  }
  return sequence.abortedFor === 'deadline'
    ? { code: 'deadline_exceeded', message: 'the deadline passed while the sequence ran' }
    : { code: 'aborted', message: 'the group ended while the sequence ran' };
}

/** Merges a later delta of the same sequence into an unsent one. */
export function mergeDelta(waiting: WireDelta, later: WireDelta): void {
  waiting.tokenIds.push(...later.tokenIds);
  waiting.logprobs.push(...later.logprobs);
  waiting.finish = later.finish;
  waiting.draftedTokens = Math.max(waiting.draftedTokens, later.draftedTokens);
  waiting.acceptedTokens = Math.max(waiting.acceptedTokens, later.acceptedTokens);
}

function logprobsToWire(logprobs: readonly TokenLogprob[]): WireLogprob[] {
  return logprobs.map(({ tokenId, logprob, top }) => ({ tokenId, logprob, top: [...top] }));
}
