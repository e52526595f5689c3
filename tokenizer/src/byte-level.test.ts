import { describe, expect, it } from 'vitest';
import { bytesFromSpelling, characterFromByte } from './byte-level.ts';

describe('characterFromByte', () => {
  it('spells 256 bytes with 256 visible characters', () => {
    expect(characterFromByte).toHaveLength(256);
    expect(new Set(characterFromByte).size).toBe(256);
    expect(characterFromByte.join('')).toMatch(/^[^\s\p{C}]*$/u);
  });

  it.each([
    [0x20, 'Ġ'],
    [0x0a, 'Ċ'],
    [0x41, 'A'],
    [0xad, 'Ń'],
    [0xff, 'ÿ'],
  ])('spells byte %i as %s', (byte, character) => {
    expect(characterFromByte[byte]).toBe(character);
  });
});

describe('bytesFromSpelling', () => {
  it('returns every byte', () => {
    expect(bytesFromSpelling(characterFromByte.join(''))).toEqual(
      Uint8Array.from({ length: 256 }, (_, i) => i),
    );
  });

  it('refuses a character outside the alphabet', () => {
    expect(bytesFromSpelling('a b')).toBeUndefined();
    expect(bytesFromSpelling('日')).toBeUndefined();
  });
});
