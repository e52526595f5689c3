import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import type { ScalingSpec } from '../resources/resources.ts';
import { createLoadMemory, expectedRate, type LoadMemory, type QueueReading } from './arrival-load.ts';
import { createScaleMemory, decideScale, type ScaleMemory, type ScaleObservation } from './autoscale.ts';

const spec: ScalingSpec = {
  min: 0,
  max: 8,
  targetWaitSeconds: 10,
  groupTokensPerSecond: 1000,
  startUpSeconds: 60,
  scaleToZeroAfterSeconds: 300,
};

const emptyQueue: QueueReading = {
  waitingRequests: 0,
  waitingTokens: 0,
  inFlightRequests: 0,
  inFlightTokens: 0,
  slots: 0,
  oldestWaitingMs: 0,
  arrivedTokens: 0,
  endedTokens: 0,
  countersEpoch: 1,
};

function seenWith(queue: Partial<QueueReading>, groups: Partial<ScaleObservation> = {}): ScaleObservation {
  return {
    queue: { ...emptyQueue, ...queue },
    readyGroups: 0,
    startingReadyInMs: [],
    startUpMs: undefined,
    ...groups,
  };
}

/** A steady load through `readyGroups` groups, read every two seconds. */
function runSteady(
  memory: ScaleMemory,
  load: { readonly seconds: number; readonly tokensPerSecond: number; readonly fromMs: number },
): { readonly counts: readonly number[]; readonly memory: ScaleMemory } {
  const counts: number[] = [];
  let current = memory;
  for (let at = 2; at <= load.seconds; at += 2) {
    const nowMs = load.fromMs + at * 1000;
    const tokens = load.tokensPerSecond * (nowMs / 1000);
    const busy = load.tokensPerSecond > 0;
    const seen = seenWith(
      {
        arrivedTokens: tokens,
        endedTokens: tokens,
        inFlightRequests: busy ? 3 : 0,
        slots: current.wanted * 16,
      },
      { readyGroups: current.wanted },
    );
    const result = decideScale(spec, seen, current, nowMs);
    current = result.memory;
    counts.push(current.wanted);
  }
  return { counts, memory: current };
}

/**
 * Arrivals of a tenth of a token a second with a burst of `height` tokens a second, `burstSeconds` long, every 200 s.
 */
function memoryOfBursts(height: number, burstSeconds: number, bursts: number): LoadMemory {
  // Bins of two seconds.
  const period = Array.from({ length: 100 }, (_, bin) => (bin >= 100 - burstSeconds / 2 ? height * 2 : 0.2));
  return { ...createLoadMemory(0), arrivals: Array.from({ length: bursts }, () => period).flat() };
}

describe('expectedRate', () => {
  it('expects a burst like earlier ones to pass as they did', () => {
    // The present is the end of the third burst: the two before it were followed by a minute of silence.
    const expected = expectedRate(memoryOfBursts(1000, 20, 3), 60_000);
    expect(expected).toBeGreaterThan(0);
    expect(expected).toBeLessThan(500);
  });

  it('expects an unprecedented surge to last, and the more so the longer the history', () => {
    const calm = memoryOfBursts(0, 20, 9);
    const surge = { ...calm, arrivals: [...calm.arrivals, ...Array.from({ length: 10 }, () => 2000)] };
    expect(expectedRate(surge, 60_000)).toBeGreaterThan(950);
    const started = { ...surge, arrivals: surge.arrivals.slice(-10) };
    expect(expectedRate(started, 60_000)).toBe((1000 * 20) / 80);
  });

  it('returns the rate of a steady load', () => {
    const steady = { ...createLoadMemory(0), arrivals: Array.from({ length: 300 }, () => 100) };
    expect(expectedRate(steady, 60_000)).toBeCloseTo(50);
    expect(expectedRate(createLoadMemory(0), 60_000)).toBe(0);
  });
});

describe('decideScale', () => {
  it('scales from zero to as many groups as the waiting tokens need, in one decision', () => {
    const seen = seenWith({
      waitingRequests: 40,
      waitingTokens: 40 * 1000,
      arrivedTokens: 40_000,
      oldestWaitingMs: 50,
    });
    const { decision } = decideScale(spec, seen, createScaleMemory(0, 0), 2000);
    expect(decision).toMatchObject({ wanted: 4, before: 0, reason: 'Backlog', clamps: [] });
    expect(decision.formula).toContain('backlog ceil(40000 / (1000 * 10 s)) = 4');
    expect(decision.message).toBe('0 -> 4: more work waits than the existing groups can finish in time');
  });

  it('does not order groups again that are already starting', () => {
    const first = decideScale(
      spec,
      seenWith({ waitingRequests: 40, waitingTokens: 40_000, arrivedTokens: 40_000 }),
      createScaleMemory(0, 0),
      2000,
    );
    const starting = { startingReadyInMs: [58_000, 58_000, 58_000, 58_000] };
    const again = decideScale(
      spec,
      seenWith(
        { waitingRequests: 40, waitingTokens: 40_000, arrivedTokens: 40_000, oldestWaitingMs: 2000 },
        starting,
      ),
      first.memory,
      4000,
    );
    expect(again.decision.wanted).toBe(4);
  });

  it('reports which limit changed the result', () => {
    const seen = seenWith({ waitingRequests: 500, waitingTokens: 500_000 });
    const { decision } = decideScale(spec, seen, createScaleMemory(0, 0), 2000);
    expect(decision).toMatchObject({ wanted: 8, clamps: ['max 8 instead of 50'] });
    expect(decision.message).toContain('(max 8 instead of 50)');
    const floor = decideScale({ ...spec, min: 2 }, seenWith({}), createScaleMemory(0, 0), 2000);
    expect(floor.decision).toMatchObject({ wanted: 2, reason: 'Idle', clamps: ['min 2 instead of 0'] });
  });

  it('keeps the count as long as the queue is unknown', () => {
    let memory = createScaleMemory(3, 0);
    for (let nowMs = 0; nowMs < 3_600_000; nowMs += 60_000) {
      const result = decideScale(spec, { ...seenWith({}), queue: 'unknown', readyGroups: 3 }, memory, nowMs);
      expect(result.decision).toMatchObject({ wanted: 3, reason: 'QueueUnknown', formula: 'hold 3' });
      expect(result.decision.inputs.waitingRequests).toBeUndefined();
      memory = result.memory;
    }
    const known = decideScale(spec, seenWith({}, { readyGroups: 3 }), memory, 3_600_000);
    expect(known.decision.wanted).toBeGreaterThanOrEqual(2);
  });

  it('counts idle time from when the queue is known again', () => {
    const blind = { ...seenWith({}), queue: 'unknown' as const, readyGroups: 1 };
    const { memory } = decideScale(spec, blind, createScaleMemory(1, 0), 3_600_000);
    const known = decideScale(spec, seenWith({}, { readyGroups: 1 }), memory, 3_602_000);
    expect(known.decision.wanted).toBe(1);
    const later = decideScale(spec, seenWith({}, { readyGroups: 1 }), known.memory, 3_900_000);
    expect(later.decision).toMatchObject({ wanted: 0, reason: 'Idle' });
  });

  it('applies changed limits while the queue is unknown', () => {
    const seen = { ...seenWith({}), queue: 'unknown' as const, readyGroups: 3 };
    expect(decideScale({ ...spec, max: 2 }, seen, createScaleMemory(3, 0), 0).decision.wanted).toBe(2);
  });

  it('scales down once it has learnt the load, and then keeps the count', () => {
    const learning = runSteady(createScaleMemory(6, 0), { seconds: 298, tokensPerSecond: 1500, fromMs: 0 });
    expect(new Set(learning.counts)).toEqual(new Set([6]));
    const { counts } = runSteady(learning.memory, { seconds: 1800, tokensPerSecond: 1500, fromMs: 298_000 });
    expect(counts).toEqual(counts.toSorted((a, b) => b - a));
    // 1,500 tokens a second need 1.5 groups, and the margin on the way down another half.
    expect(counts.at(-1)).toBe(2);
  });

  it('keeps as many groups as work off the waiting requests in a third of the target', () => {
    const memory: ScaleMemory = { ...createScaleMemory(8, 0), beganMs: -3_600_000, recentGroups: 1 };
    const seen = seenWith({ waitingRequests: 10, waitingTokens: 10_000 }, { readyGroups: 8 });
    expect(decideScale(spec, seen, memory, 2000).decision).toMatchObject({ wanted: 3, reason: 'RecentLoad' });
  });

  it('keeps as many groups as have slots for all running requests', () => {
    const memory: ScaleMemory = { ...createScaleMemory(8, 0), beganMs: -3_600_000, recentGroups: 1 };
    const seen = seenWith({ inFlightRequests: 50, slots: 128 }, { readyGroups: 8 });
    expect(decideScale(spec, seen, memory, 2000).decision.wanted).toBe(4);
  });

  it('removes groups ordered for a burst, starting or ready, once the burst has passed', () => {
    const quick = { ...spec, startUpSeconds: 5 };
    const before = decideScale(quick, seenWith({}, { readyGroups: 4 }), createScaleMemory(4, 0), 2000);
    const burst = seenWith(
      { waitingRequests: 60, waitingTokens: 60_000, arrivedTokens: 60_000 },
      { readyGroups: 4 },
    );
    const up = decideScale(quick, burst, before.memory, 4000);
    expect(up.decision.wanted).toBe(8);
    const passed = { inFlightRequests: 1, slots: 64, arrivedTokens: 60_000, endedTokens: 59_000 };
    const starting = seenWith(passed, { readyGroups: 4, startingReadyInMs: [1000, 1000, 1000, 1000] });
    const ready = seenWith({ ...passed, slots: 128 }, { readyGroups: 8 });
    for (const seen of [starting, ready]) {
      // Not below what the controller found, while it learns.
      expect(decideScale(quick, seen, up.memory, 64_000).decision.wanted).toBe(4);
    }
  });

  it.each([2, 5, 30, 180])(
    'orders no more groups while those of a burst from zero start in %i s',
    (startUpSeconds) => {
      const burst = { waitingRequests: 40, waitingTokens: 30_000, arrivedTokens: 30_000 };
      const startUpMs = startUpSeconds * 1000;
      const idle = decideScale(spec, seenWith({}, { startUpMs }), createScaleMemory(0, 0), 600_000);
      const up = decideScale(spec, seenWith(burst, { startUpMs }), idle.memory, 602_000);
      expect(up.decision.wanted).toBe(3);
      let { memory } = up;
      for (const afterMs of [100, 500, 2000, 10_000]) {
        const startingReadyInMs = [1, 2, 3].map(() => Math.max(0, startUpMs - afterMs));
        const seen = seenWith({ ...burst, oldestWaitingMs: afterMs }, { startUpMs, startingReadyInMs });
        const { decision, memory: after } = decideScale(spec, seen, memory, 602_000 + afterMs);
        expect(decision.wanted).toBe(3);
        memory = after;
      }
    },
  );

  it('keeps the groups that a burst from zero needs when the first of them is up', () => {
    const burst = { inFlightRequests: 0, arrivedTokens: 60_000 };
    const before = decideScale(spec, seenWith({}), createScaleMemory(0, 0), 2000);
    const up = decideScale(
      spec,
      seenWith({ ...burst, waitingRequests: 40, waitingTokens: 60_000 }),
      before.memory,
      4000,
    );
    expect(up.decision.wanted).toBe(6);
    let memory = up.memory;
    const counts = [14, 16, 18, 20].map((seconds) => {
      const seen = seenWith(
        { ...burst, inFlightRequests: 16, inFlightTokens: 60_000, slots: 16 },
        { readyGroups: 1, startingReadyInMs: Array.from({ length: memory.wanted - 1 }, () => 2000) },
      );
      memory = decideScale(spec, seen, memory, seconds * 1000).memory;
      return memory.wanted;
    });
    expect(Math.min(...counts)).toBeGreaterThan(2);
    expect(counts).toEqual(counts.toSorted((a, b) => b - a));
  });

  it('keeps the last group for scaleToZeroAfterSeconds, then removes it', () => {
    const busy = runSteady(createScaleMemory(1, 0), { seconds: 600, tokensPerSecond: 500, fromMs: 0 });
    expect(busy.counts.at(-1)).toBe(1);
    let memory = busy.memory;
    const arrivedTokens = 500 * 600;
    const counts = [290, 298, 302, 310].map((seconds) => {
      const seen = seenWith({ arrivedTokens, endedTokens: arrivedTokens }, { readyGroups: memory.wanted });
      const result = decideScale(spec, seen, memory, 600_000 + seconds * 1000);
      memory = result.memory;
      return [result.decision.wanted, result.decision.reason];
    });
    expect(counts[0]?.[0]).toBe(1);
    expect(counts[1]?.[0]).toBe(1);
    expect(counts[2]).toEqual([0, 'Idle']);
    expect(counts[3]).toEqual([0, 'Idle']);
  });

  it('adds a group when the oldest request keeps waiting, even if the tokens need none', () => {
    const memory = createScaleMemory(2, 0);
    const seen = seenWith(
      { waitingRequests: 1, waitingTokens: 10, inFlightRequests: 32, slots: 32, oldestWaitingMs: 21_000 },
      { readyGroups: 2 },
    );
    expect(decideScale(spec, seen, memory, 2000).decision).toMatchObject({ wanted: 3, reason: 'Oldest' });
    const starting = { ...seen, startingReadyInMs: [30_000] };
    expect(decideScale(spec, starting, { ...memory, wanted: 3 }, 4000).decision.wanted).toBe(3);
  });

  it('reports what keeps groups from starting', () => {
    const blocker = '0/3 nodes are available: 3 Insufficient nvidia.com/gpu';
    const seen = { ...seenWith({ waitingRequests: 1, waitingTokens: 10 }), blocker };
    expect(decideScale(spec, seen, createScaleMemory(1, 0), 0).decision.blocker).toBe(blocker);
  });

  it('measures the speed of full groups and needs fewer of them than guessed', () => {
    // One group retires 4,000 tokens a second, four times the guess.
    let memory = createScaleMemory(1, 0);
    let speed = 0;
    for (let at = 2; at <= 600; at += 2) {
      const seen = seenWith(
        {
          waitingRequests: 5,
          waitingTokens: 2000,
          inFlightRequests: 16,
          inFlightTokens: 30_000,
          slots: 16,
          arrivedTokens: 4000 * at,
          endedTokens: 4000 * at,
        },
        { readyGroups: 1 },
      );
      const result = decideScale(spec, seen, memory, at * 1000);
      memory = result.memory;
      speed = result.decision.inputs.groupTokensPerSecond;
    }
    expect(speed).toBeGreaterThan(3500);
    expect(speed).toBeLessThanOrEqual(4000);
  });

  it('stays within its limits and explains every decision, for any observation', () => {
    const amount = fc.integer({ min: 0, max: 10_000_000 });
    const reading = fc.record({
      waitingRequests: fc.integer({ min: 0, max: 100_000 }),
      waitingTokens: amount,
      inFlightRequests: fc.integer({ min: 0, max: 5000 }),
      inFlightTokens: amount,
      slots: fc.integer({ min: 0, max: 5000 }),
      oldestWaitingMs: amount,
      arrivedTokens: amount,
      endedTokens: amount,
      countersEpoch: fc.integer({ min: 1, max: 3 }),
    });
    const observation = fc.record({
      queue: fc.oneof(
        { weight: 4, arbitrary: reading },
        { weight: 1, arbitrary: fc.constant('unknown' as const) },
      ),
      readyGroups: fc.integer({ min: 0, max: 20 }),
      startingReadyInMs: fc.array(fc.integer({ min: 0, max: 600_000 }), { maxLength: 10 }),
      startUpMs: fc.option(fc.integer({ min: 0, max: 600_000 }), { nil: undefined }),
    });
    const steps = fc.array(fc.tuple(observation, fc.integer({ min: 0, max: 120_000 })), { maxLength: 30 });
    const limits = fc.tuple(fc.integer({ min: 0, max: 5 }), fc.integer({ min: 5, max: 30 }));
    fc.assert(
      fc.property(steps, limits, (observations, [min, max]) => {
        let memory = createScaleMemory(min, 0);
        let nowMs = 0;
        for (const [seen, elapsedMs] of observations) {
          nowMs += elapsedMs;
          const before = memory.wanted;
          const result = decideScale({ ...spec, min, max }, seen, memory, nowMs);
          const { decision } = result;
          expect(decision.wanted).toBeGreaterThanOrEqual(min);
          expect(decision.wanted).toBeLessThanOrEqual(max);
          expect(decision.message.length * decision.formula.length).toBeGreaterThan(0);
          expect(seen.queue === 'unknown' ? decision.wanted : before).toBe(before);
          // A scale-down leaves enough groups to finish the waiting work in a third of the target.
          const waiting =
            seen.queue === 'unknown' || decision.wanted >= before ? 0 : seen.queue.waitingTokens;
          const perTarget = (decision.inputs.groupTokensPerSecond + 1) * spec.targetWaitSeconds;
          expect(waiting).toBeLessThanOrEqual(((decision.wanted + 1) * perTarget) / 3);
          expect(decideScale({ ...spec, min, max }, seen, memory, nowMs)).toEqual(result);
          memory = result.memory;
        }
      }),
      { numRuns: 200 },
    );
  });
});
