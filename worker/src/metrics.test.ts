import { describe, expect, it } from 'vitest';

import { startMetrics } from '@mimo/core/process/metrics';

import { idleStats } from './engines/mimo/engine-api.ts';
import { createEngineMetrics } from './metrics.ts';

describe('createEngineMetrics', () => {
  it('adds each frame to the counters, and times steps by their kind', async () => {
    const metrics = await startMetrics({ process: 'worker', listenAddress: '127.0.0.1:0' });
    try {
      const stats = { ...idleStats(8), kvBlocksUsed: 2 };
      const measure = createEngineMetrics(metrics, () => stats);
      for (const change of [{ promptTokens: 5 }, { completionTokens: 1 }, { completionTokens: 3 }]) {
        Object.assign(stats, change, { steps: stats.steps + 1 });
        measure({ step: stats.steps, deltas: [], stats, stepMs: 2_000 });
      }
      const page = await (await fetch(`http://${metrics.address}/metrics`)).text();
      expect(page).toMatch(/^engine_steps_total(\{[^}]*\})? 3$/m);
      expect(page).toMatch(/^engine_prompt_tokens_total(\{[^}]*\})? 5$/m);
      expect(page).toMatch(/^engine_completion_tokens_total(\{[^}]*\})? 3$/m);
      expect(page).toMatch(/^engine_kv_cache_used_ratio(\{[^}]*\})? 0\.25$/m);
      expect(page).toMatch(/^engine_step_seconds_count\{phase="prefill"[^}]*\} 1$/m);
      expect(page).toMatch(/^engine_step_seconds_sum\{phase="decode"[^}]*\} 4$/m);
    } finally {
      await metrics.close();
    }
  });
});
