// Where tests and benchmarks of the engine begin: greedy, nothing penalised, nothing but the length ends a sequence.

import type { SequenceSampling } from '@mimo/worker/engines/mimo/engine-api';

/** Greedy sampling with drafts, 64 tokens and seed 1, but for what the caller changes. */
export function greedySampling(changes: Partial<SequenceSampling> = {}): SequenceSampling {
  return {
    temperature: 0,
    topP: 1,
    topK: 0,
    minP: 0,
    repetitionPenalty: 1,
    presencePenalty: 0,
    frequencyPenalty: 0,
    seed: 1,
    stopTokenIds: [],
    maxTokens: 64,
    minTokens: 0,
    ignoreEos: true,
    logprobs: -1,
    draftTokens: 1,
    ...changes,
  };
}
