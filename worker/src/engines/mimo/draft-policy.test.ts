import { describe, expect, it } from 'vitest';
import { DraftPolicy } from './draft-policy.ts';

const costs = [
  { sequences: 8, share: 0 },
  { sequences: 64, share: 0.25 },
  { sequences: 256, share: 0.65 },
];

/** How many of so many steps make drafts, where `rightShare` of them turn out right. */
function stepsWithDrafts(policy: DraftPolicy, decoding: number, rightShare: number, steps: number): number {
  let made = 0;
  for (let step = 0; step < steps; step++) {
    if (policy.pays(decoding)) {
      made += 1;
      policy.observe({ drafted: decoding, right: rightShare * decoding });
    }
  }
  return made;
}

describe('DraftPolicy', () => {
  it('makes drafts as long as enough of them are right for their cost', () => {
    expect(stepsWithDrafts(new DraftPolicy(costs), 256, 0.9, 100)).toBe(100);
    expect(stepsWithDrafts(new DraftPolicy(costs), 64, 0.5, 100)).toBe(100);
    expect(stepsWithDrafts(new DraftPolicy(costs), 8, 0, 100)).toBe(100);
  });

  it('stops where they are wrong too often, but for a probe now and then', () => {
    const policy = new DraftPolicy(costs);
    expect(stepsWithDrafts(policy, 256, 0.5, 1)).toBe(1);
    expect(stepsWithDrafts(policy, 256, 0.5, 640)).toBe(10);
    expect(stepsWithDrafts(policy, 64, 0.5, 10)).toBe(10);
  });

  it('begins again once a probe shows that they are right', () => {
    const policy = new DraftPolicy(costs);
    stepsWithDrafts(policy, 256, 0.1, 10);
    expect(stepsWithDrafts(policy, 256, 0.9, 200)).toBeGreaterThan(100);
  });

  it('makes none with more sequences than any cost is known for', () => {
    expect(stepsWithDrafts(new DraftPolicy(costs), 257, 1, 200)).toBe(0);
    expect(stepsWithDrafts(new DraftPolicy([]), 1, 1, 200)).toBe(0);
  });
});
