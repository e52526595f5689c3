import { describe, expect, it } from 'vitest';

import { Throughput } from './heartbeats.ts';

describe('Throughput', () => {
  it('is 0 (unknown) before any work', () => {
    const throughput = new Throughput();
    throughput.observe({ completionTokens: 0 }, 1_000);
    throughput.observe({ completionTokens: 0 }, 2_000);
    expect(throughput.completionTokensPerSecond).toBe(0);
  });

  it('counts the time with work, not the idle time', () => {
    const throughput = new Throughput();
    throughput.observe({ completionTokens: 0 }, 0);
    throughput.observe({ completionTokens: 25 }, 250);
    throughput.observe({ completionTokens: 25 }, 60_000);
    throughput.observe({ completionTokens: 50 }, 60_250);
    expect(throughput.completionTokensPerSecond).toBe(100);
  });

  it('forgets values older than the window', () => {
    const throughput = new Throughput();
    let completionTokens = 0;
    for (let second = 0; second < 100; second++) {
      throughput.observe({ completionTokens }, second * 1_000);
      completionTokens += second < 50 ? 1_000 : 10;
    }
    expect(throughput.completionTokensPerSecond).toBe(10);
  });
});
