import { describe, expect, it } from 'vitest';

import { createLoadMemory, type LoadMemory } from './arrival-load.ts';
import { groupsForRecent, groupsToRelease, isBacklog, planBacklog } from './replay.ts';

const rule = { perSecond: 1000, targetMs: 30_000, startUpMs: 60_000, memoryMs: 1_800_000, maxGroups: 80 };

/** Arrivals in bins of two seconds: `burst` groups' work a second for 20 s of every 200 s, `floor` in between. */
function memoryOf({ burst, floor }: { readonly burst: number; readonly floor: number }): LoadMemory {
  const arrivals = Array.from({ length: 900 }, (_, bin) => (bin % 100 >= 90 ? burst : floor) * 2000);
  return { ...createLoadMemory(0), arrivals };
}

describe('planBacklog', () => {
  it('keeps up with the rate and works off the rest once the groups are up', () => {
    const plan = planBacklog({ waitingTokens: 150_000, rate: 2000, groupMs: 90_000 }, rule);
    expect(plan).toEqual({ groups: 4, left: 180_000, clearMs: 90_000 });
  });

  it('allows at most three targets, however slowly groups start', () => {
    expect(
      planBacklog({ waitingTokens: 0, rate: 0, groupMs: 0 }, { ...rule, startUpMs: 600_000 }).clearMs,
    ).toBe(90_000);
  });

  it('releases groups only below the backlog at which it orders more', () => {
    expect(isBacklog(15_001, 1, rule)).toBe(true);
    expect(isBacklog(15_000, 1, rule)).toBe(false);
    expect(groupsToRelease(15_000, rule)).toBe(2);
    expect(groupsToRelease(0, rule)).toBe(0);
  });
});

describe('groupsForRecent', () => {
  it('keeps as many groups as a steady load needs, however quickly groups start', () => {
    for (const startUpMs of [5000, 60_000, 600_000]) {
      expect(groupsForRecent(memoryOf({ burst: 3.5, floor: 3.5 }), { ...rule, startUpMs })).toBe(4);
    }
  });

  it('keeps few groups for bursts if others start within the target, else as many as a burst needs', () => {
    const bursts = memoryOf({ burst: 20, floor: 1 });
    const slow = groupsForRecent(bursts, { ...rule, startUpMs: 180_000 });
    const alone = groupsForRecent(bursts, { ...rule, startUpMs: 1e9 });
    const quick = groupsForRecent(bursts, { ...rule, startUpMs: 5000 });
    expect(slow).toBe(alone);
    expect(alone).toBeGreaterThanOrEqual(7);
    expect(quick).toBeLessThan(alone);
    expect(quick).toBeGreaterThanOrEqual(3);
  });

  it('returns the maximum if even that is too late, and zero if nothing arrived', () => {
    expect(
      groupsForRecent(memoryOf({ burst: 20, floor: 1 }), { ...rule, startUpMs: 180_000, maxGroups: 4 }),
    ).toBe(4);
    expect(groupsForRecent(createLoadMemory(0), rule)).toBe(0);
    // Counters that went back without saying so.
    expect(groupsForRecent(memoryOf({ burst: -1, floor: -1 }), rule)).toBe(0);
  });
});
