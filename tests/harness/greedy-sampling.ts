// The default sampling of the engine's tests and benchmarks: greedy, no penalties, and only the length ends a sequence.

import type { SequenceSampling } from '@mimo/worker/engines/mimo/engine-api';

/** Greedy sampling with drafts, 64 tokens and seed 1, except for the caller's changes. */
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
