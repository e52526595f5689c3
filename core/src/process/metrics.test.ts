import { describe, expect, it } from 'vitest';

import { startMetrics } from './metrics.ts';

describe('startMetrics', () => {
  it('serves counters, durations in seconds and gauges at /metrics', async () => {
    const metrics = await startMetrics({ process: 'test', listenAddress: '127.0.0.1:0' });
    try {
      metrics.counter('test_requests_total', 'Requests')({ code: 'ok' }, 2);
      metrics.duration('test_step_seconds', 'A step')(1_500);
      metrics.gauge('test_depth_requests', 'Depth', () => [[3, { model: 'm' }]]);
      const page = await (await fetch(`http://${metrics.address}/metrics`)).text();
      expect(page).toMatch(/test_requests_total\{code="ok".*\} 2/);
      expect(page).toMatch(/test_step_seconds_sum(\{.*\})? 1\.5/);
      expect(page).toMatch(/test_step_seconds_bucket\{.*le="2.5".*\} 1/);
      expect(page).toMatch(/test_depth_requests\{model="m".*\} 3/);
      expect(page).not.toMatch(/process_command|host_name/);
      expect((await fetch(`http://${metrics.address}/`)).status).toBe(404);
    } finally {
      await metrics.close();
    }
  });

  it('serves no page unless configured, and reports an address in use', async () => {
    const quiet = await startMetrics({ process: 'test', listenAddress: undefined });
    expect(quiet.address).toBeUndefined();
    const first = await startMetrics({ process: 'test', listenAddress: '127.0.0.1:0' });
    const second = startMetrics({ process: 'test', listenAddress: first.address });
    await expect(second).rejects.toMatchObject({ code: 'unavailable' });
    await Promise.all([quiet.close(), first.close()]);
  });
});
