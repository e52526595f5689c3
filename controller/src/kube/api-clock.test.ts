import * as fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';

import { ApiClock } from './api-clock.ts';

const minuteMs = 60_000;

/** Asks a server that is this far ahead, with so much time on either way. */
function ask(clock: ApiClock, aheadMs: number, roundTripMs = 4): void {
  const askedMs = performance.now();
  vi.advanceTimersByTime(roundTripMs / 2);
  const date = new Date(Date.now() + aheadMs).toUTCString();
  vi.advanceTimersByTime(roundTripMs / 2);
  clock.observe(date, askedMs, performance.now());
}

describe('ApiClock', () => {
  beforeEach(() => {
    vi.useFakeTimers();
  });
  afterEach(() => {
    vi.useRealTimers();
  });

  it('returns this machine’s time until the server has answered, or if it sends no date', () => {
    const clock = new ApiClock();
    clock.observe(undefined, 0, 1);
    clock.observe('yesterday', 0, 1);
    expect(Math.abs(clock.nowMs() - Date.now())).toBeLessThan(1);
  });

  it('returns the server’s time, within a second after one answer and closer after many', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: -10 * minuteMs, max: 10 * minuteMs }),
        fc.array(fc.integer({ min: 1, max: 5_000 }), { minLength: 40, maxLength: 60 }),
        (aheadMs, pausesMs) => {
          const clock = new ApiClock();
          ask(clock, aheadMs);
          expect(Math.abs(clock.nowMs() - Date.now() - aheadMs)).toBeLessThanOrEqual(1_004);
          for (const pauseMs of pausesMs) {
            vi.advanceTimersByTime(pauseMs);
            const beforeMs = clock.nowMs();
            ask(clock, aheadMs);
            expect(Math.abs(clock.nowMs() - Date.now() - aheadMs)).toBeLessThanOrEqual(1_004);
            expect(clock.nowMs()).toBeGreaterThanOrEqual(beforeMs - 1_004);
          }
        },
      ),
      { numRuns: 50 },
    );
  });

  it('is unaffected when this machine’s clock is set', () => {
    const clock = new ApiClock();
    ask(clock, 0);
    const beforeMs = clock.nowMs();
    vi.setSystemTime(Date.now() + 5 * minuteMs);
    vi.advanceTimersByTime(1_000);
    expect(clock.nowMs() - beforeMs).toBe(1_000);
  });

  it('follows a server whose clock is set', () => {
    const clock = new ApiClock();
    ask(clock, 0);
    for (const aheadMs of [5 * minuteMs, -5 * minuteMs]) {
      ask(clock, aheadMs);
      expect(Math.abs(clock.nowMs() - Date.now() - aheadMs)).toBeLessThanOrEqual(1_004);
    }
  });
});
