import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { nameFromToken, subjects, tokenFromName } from './subjects.ts';

describe('tokenFromName', () => {
  it('returns one reversible token that is also valid in a key-value key', () => {
    const names = fc.string({ minLength: 1, unit: 'binary' }).filter((name) => name.isWellFormed());
    fc.assert(
      fc.property(names, (name) => {
        const token = tokenFromName(name);
        expect(token).toMatch(/^[A-Za-z0-9_=-]+$/);
        expect(nameFromToken(token)).toBe(name);
      }),
    );
  });

  it('leaves plain names unchanged', () => {
    expect(tokenFromName('mimo-demo_7B')).toBe('mimo-demo_7B');
    expect(tokenFromName('XiaomiMiMo/MiMo-7B.v2')).toBe('XiaomiMiMo=2fMiMo-7B=2ev2');
  });

  it('refuses an empty name', () => {
    expect(() => subjects.requestsOf('')).toThrow(RangeError);
  });
});
