import { join } from 'node:path';
import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { createTokenTable, leastComposedBytes } from './token-table.ts';
import { loadTokenizer } from './tokenizer.ts';

const tokenizer = await loadTokenizer(join(import.meta.dirname, '../../tests/golden/tokenizer/mimo-subset'));

function longer(one: string, other: string): string {
  return Buffer.byteLength(one) > Buffer.byteLength(other) ? one : other;
}

describe('createTokenTable', () => {
  it('describes every id as the tokenizer does, even after a transfer between processes', () => {
    const table = createTokenTable(structuredClone(tokenizer.tokenTable));
    expect(table.vocabularySize).toBe(tokenizer.vocabularySize);
    expect(table.specialTokens).toEqual(tokenizer.specialTokens);
    const ids = Array.from({ length: table.vocabularySize + 1 }, (_, id) => id);
    const differing = ids.filter(
      (id) => Buffer.compare(table.tokenBytes(id), tokenizer.tokenBytes(id)) !== 0,
    );
    expect(differing).toEqual([]);
  });
});

describe('leastTokens', () => {
  it('never exceeds the actual number', () => {
    const part = fc.oneof(
      fc.string({ unit: 'binary' }),
      fc.constantFrom(
        '\u1fbe\u0308\u0301',
        '\u2126\u0314\u0342\u0345',
        '\u212a',
        '<|im_start|>',
        '\u1100\u1161\u11a8',
        'a'.repeat(64),
      ),
    );
    fc.assert(
      fc.property(fc.array(part), (parts) => {
        const text = parts.join('');
        expect(tokenizer.leastTokens(text)).toBeLessThanOrEqual(
          tokenizer.encode(text, { allowSpecial: true }).length,
        );
      }),
      { numRuns: 1_000 },
    );
  });

  it('does not read the text', () => {
    expect(tokenizer.leastTokens('a'.repeat(1_000_000))).toBeGreaterThan(10_000);
  });
});

describe('leastComposedBytes', () => {
  it('is a lower bound for every composed character, from its longest spelling', () => {
    // By part of a decomposition: its longest spelling in UTF-8.
    const longest = new Map<string, string>();
    const characters = Array.from({ length: 0x110000 }, (_, code) => String.fromCodePoint(code)).filter(
      (text) => text.isWellFormed(),
    );
    for (const character of characters) {
      const part = character.normalize('NFD');
      if (Array.from(part).length === 1) {
        longest.set(part, longer(character, longest.get(part) ?? ''));
      }
    }
    const short = characters.filter((character) => {
      const parts = Array.from(character.normalize('NFD'));
      const spelled = parts.map((part) => longest.get(part) ?? part).join('');
      const plain = parts.join('');
      const composedBytes = Buffer.byteLength(character.normalize('NFC'));
      return [
        spelled,
        plain,
        (parts[0] ?? '') + spelled.slice((longest.get(parts[0] ?? '') ?? '').length),
      ].some((source) => leastComposedBytes(source) > composedBytes);
    });
    expect(short).toEqual([]);
  });
});
