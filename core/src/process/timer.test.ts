import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';

import { startTimer } from './timer.ts';

const dayMs = 86_400_000;

describe('startTimer', () => {
  beforeEach(() => {
    vi.useFakeTimers();
  });
  afterEach(() => {
    vi.useRealTimers();
  });

  it.each([0, 1, 100, 1_000.5, 24 * dayMs, 2 ** 31 - 1, 2 ** 31, 25 * dayMs, 365 * dayMs, 3_653 * dayMs])(
    'fires once, %d ms later and no sooner',
    (delayMs) => {
      const act = vi.fn<() => void>();
      startTimer(delayMs, act);
      vi.advanceTimersByTime(Math.max(0, Math.ceil(delayMs) - 1));
      expect(act).toHaveBeenCalledTimes(delayMs === 0 ? 1 : 0);
      vi.advanceTimersByTime(1);
      expect(act).toHaveBeenCalledTimes(1);
      expect(vi.getTimerCount()).toBe(0);
    },
  );

  it('is unaffected when the wall clock is set', () => {
    const act = vi.fn<() => void>();
    startTimer(60_000, act);
    vi.setSystemTime(Date.now() + 300_000);
    vi.advanceTimersByTime(59_999);
    expect(act).not.toHaveBeenCalled();
    vi.setSystemTime(Date.now() - 600_000);
    vi.advanceTimersByTime(1);
    expect(act).toHaveBeenCalledTimes(1);
  });

  it('never fires once it is cleared, even between its parts', () => {
    const act = vi.fn<() => void>();
    const timer = startTimer(60 * dayMs, act);
    vi.advanceTimersByTime(30 * dayMs);
    timer.clear();
    expect(vi.getTimerCount()).toBe(0);
    vi.advanceTimersByTime(60 * dayMs);
    expect(act).not.toHaveBeenCalled();
  });
});
