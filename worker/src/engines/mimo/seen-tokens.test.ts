import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { SeenTokens } from './seen-tokens.ts';

describe('SeenTokens', () => {
  it('holds the same counts as a map, as pairs and one by one, and adds one more without changing itself', () => {
    const steps = fc.array(fc.record({ tokenId: fc.nat(20), times: fc.nat(2) }), { maxLength: 60 });
    fc.assert(
      fc.property(steps, fc.nat(3), fc.nat(20), (added, capacity, next) => {
        const seen = new SeenTokens(capacity);
        const model = new Map<number, number>();
        for (const { tokenId, times } of added) {
          seen.add(tokenId, times);
          model.set(tokenId, (model.get(tokenId) ?? 0) + times);
        }
        const more = new Map(model).set(next, (model.get(next) ?? 0) + 1);
        const followed = seen.followedBy(next);
        expect(new Map(followed)).toEqual(more);
        expect([...followed.pairs]).toEqual([...more].flat());
        expect(new Map(seen)).toEqual(model);
        expect([...seen.pairs]).toEqual([...model].flat());
      }),
    );
  });
});
