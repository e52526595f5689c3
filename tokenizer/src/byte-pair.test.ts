import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Tokenizer as HuggingFaceTokenizer } from '@huggingface/tokenizers';
import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { characterFromByte } from './byte-level.ts';
import { createBytePairEncoder } from './byte-pair.ts';
import { parseTokenizerFiles, type TokenizerDescription } from './tokenizer-files.ts';

type BytePair = TokenizerDescription['bytePair'];

const subset = join(import.meta.dirname, '../../tests/golden/tokenizer/mimo-subset/tokenizer.json');
const noFiles = {
  tokenizerJson: undefined,
  tokenizerConfigJson: undefined,
  chatTemplateJinja: undefined,
  vocabJson: undefined,
  mergesTxt: undefined,
};
const { bytePair } = parseTokenizerFiles({ ...noFiles, tokenizerJson: readFileSync(subset, 'utf8') });

function encoderOf(description: BytePair): (text: string, maxTokens?: number) => number[] {
  const encode = createBytePairEncoder(description);
  return (text, maxTokens = Infinity) => {
    const output: number[] = [];
    encode(text, output, maxTokens);
    return output;
  };
}

function libraryOf(description: BytePair): (text: string) => number[] {
  const library = new HuggingFaceTokenizer({ ...description, added_tokens: [], post_processor: null }, {});
  return (text) => library.encode(text).ids;
}

/** The same kind with merges over a few letters, in any order of ranks, as no training would give them. */
const wildBytePair = fc
  .record({
    pairs: fc.array(fc.tuple(fc.nat(), fc.nat()), { maxLength: 30 }),
    order: fc.infiniteStream(fc.nat()),
    ignoreMerges: fc.boolean(),
  })
  .map(({ pairs, order, ignoreMerges }): BytePair => {
    const spellings = ['a', 'b', 'c', 'Ġ'];
    const merges = new Map<string, [string, string]>();
    for (const [first, second] of pairs) {
      const left = spellings[first % spellings.length]!;
      const right = spellings[second % spellings.length]!;
      if (left.length + right.length <= 12) {
        merges.set(`${left} ${right}`, [left, right]);
        spellings.push(left + right);
      }
    }
    const ranked = [...merges.values()]
      .map((merge) => ({ merge, place: order.next().value! }))
      .toSorted((one, other) => one.place - other.place);
    return {
      ...bytePair,
      model: {
        ...bytePair.model,
        vocab: Object.fromEntries(
          [...new Set([...characterFromByte, ...spellings])].map((spelling, id) => [spelling, id]),
        ),
        merges: ranked.map(({ merge }) => merge),
        ignore_merges: ignoreMerges,
      },
    };
  });

/** Long words of few letters, where everything may merge, between words of the usual kind. */
const fewLetters = fc
  .array(
    fc.oneof(
      fc.constantFrom('a', 'b', 'ab', 'aa', 'cab', ' ', '\n'),
      fc
        .tuple(fc.constantFrom('a', 'ab', 'abc', ' '), fc.nat({ max: 80 }))
        .map(([part, times]) => part.repeat(times)),
    ),
    { maxLength: 30 },
  )
  .map((parts) => parts.join(''));

describe('createBytePairEncoder', () => {
  const encode = encoderOf(bytePair);
  const expected = libraryOf(bytePair);

  it('returns the library’s ids for any text', () => {
    fc.assert(
      fc.property(fc.oneof(fewLetters, fc.string({ unit: 'binary', maxLength: 200 })), (text) => {
        expect(encode(text)).toEqual(expected(text));
      }),
      { numRuns: 1_000 },
    );
  });

  it('returns the library’s ids for any order of merges', () => {
    fc.assert(
      fc.property(wildBytePair, fewLetters, (description, text) => {
        expect(encoderOf(description)(text)).toEqual(libraryOf(description)(text));
      }),
      { numRuns: 1_000 },
    );
  });

  it.each([
    ['a word longer than any memory kept', 'abcd'.repeat(40_000)],
    ['one letter', 'a'.repeat(100_000)],
    ['white space', ' \n\t'.repeat(40_000)],
    ['combining marks', `a${'\u0301'.repeat(50_000)}`],
    ['Han characters', '日本語'.repeat(20_000)],
  ])('returns the library’s ids for %s', (_, text) => {
    expect(encode(text)).toEqual(expected(text));
    // What a long word leaves behind does not reach the next one.
    expect(encode('The next.')).toEqual(expected('The next.'));
  });

  it('stops soon after the requested number of tokens', () => {
    const text = 'one two three '.repeat(10_000);
    const part = encode(text, 100);
    expect(part.length).toBeGreaterThan(100);
    expect(part.length).toBeLessThan(120);
    expect(encode(text).slice(0, part.length)).toEqual(part);
  });
});
