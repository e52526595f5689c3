// A leader's metrics: the engine's counters for Prometheus. Knows the engine only by its statistics.

import type { Metrics } from '@mimo/core/process/metrics';

import type { EngineFrame, EngineStats } from './engines/mimo/engine-api.ts';

const counters = {
  engine_steps_total: ['steps', 'Forward passes over the group'],
  engine_prompt_tokens_total: ['promptTokens', 'Prompt tokens read'],
  engine_completion_tokens_total: ['completionTokens', 'Completion tokens produced'],
  engine_draft_tokens_total: ['draftedTokens', 'Tokens that the MTP layer drafted'],
  engine_accepted_tokens_total: ['acceptedTokens', 'Drafted tokens that were accepted'],
  engine_parked_sequences_total: ['parkedSequences', 'Sequences parked because their client was slow'],
} as const;

/** Creates the instruments; feed it each frame. A request for the page calls `read`. */
export function createEngineMetrics(metrics: Metrics, read: () => EngineStats): (frame: EngineFrame) => void {
  metrics.gauge('engine_running_sequences', 'Sequences that hold KV cache', () => [
    [read().runningSequences, {}],
  ]);
  metrics.gauge('engine_waiting_sequences', 'Sequences that wait for KV cache', () => [
    [read().waitingSequences, {}],
  ]);
  metrics.gauge(
    'engine_parkable_sequences',
    'Running sequences whose client has not read for a while',
    () => [[read().parkableSequences, {}]],
  );
  metrics.gauge('engine_kv_cache_used_ratio', 'KV blocks in use, 0 to 1', () => {
    const { kvBlocks, kvBlocksUsed } = read();
    return kvBlocks === 0 ? [] : [[kvBlocksUsed / kvBlocks, {}]];
  });
  const instruments = Object.entries(counters).map(([name, [field, description]]) => ({
    add: metrics.counter(name, description),
    field,
    counted: 0,
  }));
  const step = metrics.duration(
    'engine_step_seconds',
    'Wall time of a step; phase prefill if it read prompt tokens',
  );
  let promptTokens = 0;
  return ({ stats, stepMs }) => {
    if (stepMs !== undefined) {
      step(stepMs, { phase: stats.promptTokens > promptTokens ? 'prefill' : 'decode' });
    }
    promptTokens = stats.promptTokens;
    for (const instrument of instruments) {
      instrument.add({}, stats[instrument.field] - instrument.counted);
      instrument.counted = stats[instrument.field];
    }
  };
}
