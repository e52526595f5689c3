import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { composeText } from './nfc.ts';

/** Marks of many combining classes, marks of class 0, marks that decompose, and characters between runs of them. */
const mark = fc.constantFrom(
  ...Array.from(
    '\u0300\u0301\u0308\u0327\u0328\u0334\u0345\u0360\u05b0\u05b4\u064b\u0670\u093c\u0e38\u0f71\u302a\u3099',
  ),
  '\u{1d165}',
  '\u{1e94a}',
  '\u0903',
  '\u09be',
  '\u0344',
  '\u0f73',
  '\u034f',
);
const run = fc.array(mark, { minLength: 50, maxLength: 200 }).map((marks) => marks.join(''));
const text = fc
  .array(fc.oneof(run, fc.constantFrom('a', 'ω', 'か', 'क', '각', ' '), fc.string({ unit: 'grapheme' })), {
    maxLength: 6,
  })
  .map((parts) => parts.join(''));

describe('composeText', () => {
  it('returns the same as the engine’s own normalize', () => {
    fc.assert(
      fc.property(text, (given) => {
        expect(composeText(given)).toBe(given.normalize('NFC'));
      }),
      { numRuns: 500 },
    );
  });

  it('finds the class of every mark', () => {
    const marks: string[] = [];
    for (let code = 0; code <= 0x10ffff; code += 1) {
      const character = String.fromCodePoint(code);
      if (/[\p{Mn}\p{Mc}]/u.test(character)) {
        marks.push(character);
      }
    }
    for (const order of [marks, marks.toReversed()]) {
      const given = `a${order.join('')}`;
      expect(composeText(given)).toBe(given.normalize('NFC'));
    }
  });

  it('finishes on a megabyte of marks out of order', () => {
    // The engine's own normalize would take hours.
    const given = `a${'\u0301\u0327'.repeat(250_000)}`;
    expect(composeText(given)).toBe(
      `${'a\u0327\u0301'.normalize('NFC')}${'\u0327'.repeat(249_999)}${'\u0301'.repeat(249_999)}`,
    );
  });
});
