import { describe, expect, it } from 'vitest';
import { DraftPolicy } from './draft-policy.ts';

const costs = [
  { sequences: 8, share: 0 },
  { sequences: 64, share: 0.25 },
  { sequences: 256, share: 0.65 },
];

/** Counts the steps that make drafts when `rightShare` of the drafts turn out right. */
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
  it('makes drafts while enough of them are right to pay for their cost', () => {
    expect(stepsWithDrafts(new DraftPolicy(costs), 256, 0.9, 100)).toBe(100);
    expect(stepsWithDrafts(new DraftPolicy(costs), 64, 0.5, 100)).toBe(100);
    expect(stepsWithDrafts(new DraftPolicy(costs), 8, 0, 100)).toBe(100);
  });

  it('stops when drafts are wrong too often, except for an occasional probe', () => {
    const policy = new DraftPolicy(costs);
    expect(stepsWithDrafts(policy, 256, 0.5, 1)).toBe(1);
    expect(stepsWithDrafts(policy, 256, 0.5, 640)).toBe(10);
    expect(stepsWithDrafts(policy, 64, 0.5, 10)).toBe(10);
  });

  it('resumes once a probe shows that drafts are right', () => {
    const policy = new DraftPolicy(costs);
    stepsWithDrafts(policy, 256, 0.1, 10);
    expect(stepsWithDrafts(policy, 256, 0.9, 200)).toBeGreaterThan(100);
  });

  it('makes no drafts with more sequences than the cost table covers', () => {
    expect(stepsWithDrafts(new DraftPolicy(costs), 257, 1, 200)).toBe(0);
    expect(stepsWithDrafts(new DraftPolicy([]), 1, 1, 200)).toBe(0);
  });
});
