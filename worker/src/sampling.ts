// The wire's sampling parameters -> the engine's. Pure. Knows no defaults: the gateway has filled them in, so an absent
// field is a fault of the gateway.

import { ClusterError } from '@mimo/core/process/errors';
import type { SamplingParams } from '@mimo/proto/sampling';

import type { SequenceSampling } from './engines/mimo/engine-api.ts';

/** Reads complete parameters; throws `invalid_argument` naming the first absent field. */
export function samplingFromWire(params: SamplingParams | undefined): SequenceSampling {
  if (params === undefined) {
    throw new ClusterError('invalid_argument', 'sampling is missing');
  }
  const required = (field: RequiredField): number => {
    const value = params[field];
    if (value === undefined) {
      throw new ClusterError(
        'invalid_argument',
        `sampling.${field} is missing: the gateway fills in every default`,
      );
    }
    return value;
  };
  return {
    temperature: required('temperature'),
    topP: required('topP'),
    topK: required('topK'),
    minP: required('minP'),
    repetitionPenalty: required('repetitionPenalty'),
    presencePenalty: required('presencePenalty'),
    frequencyPenalty: required('frequencyPenalty'),
    seed: required('seed'),
    stopTokenIds: params.stopTokenIds,
    maxTokens: required('maxTokens'),
    minTokens: params.minTokens ?? 0,
    ignoreEos: params.ignoreEos ?? false,
    logprobs: params.logprobs ?? -1,
    draftTokens: required('draftTokens'),
  };
}

type RequiredField =
  | 'temperature'
  | 'topP'
  | 'topK'
  | 'minP'
  | 'repetitionPenalty'
  | 'presencePenalty'
  | 'frequencyPenalty'
  | 'seed'
  | 'maxTokens'
  | 'draftTokens';
