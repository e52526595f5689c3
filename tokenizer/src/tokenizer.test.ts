import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Tokenizer as HuggingFaceTokenizer } from '@huggingface/tokenizers';
import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { loadTokenizer } from './tokenizer.ts';

const subset = join(import.meta.dirname, '../../tests/golden/tokenizer/mimo-subset');
const tokenizer = await loadTokenizer(subset);
const huggingFace = new HuggingFaceTokenizer(
  JSON.parse(readFileSync(join(subset, 'tokenizer.json'), 'utf8')),
  {},
);

/** Text of error-prone parts: tags, spaces, line ends, digits, marks that combine, characters of 4 bytes. */
const awkwardText = fc
  .array(
    fc.oneof(
      fc.constantFrom(
        '<think>',
        '</think>',
        '<|im_end|>',
        '<|im_start|>',
        '<|fim_pad|>',
        '<tool_call>',
        '<|',
        '|>',
        "don't",
        'The',
      ),
      fc.constantFrom(
        ' ',
        '  ',
        '\n',
        '\r\n',
        '\t',
        '\u00a0',
        '1',
        '23',
        'e\u0301',
        '👩‍👩‍👧',
        '日本',
        "'ſ",
        '\u3000',
      ),
      fc.string({ unit: 'grapheme', maxLength: 6 }),
    ),
    { maxLength: 12 },
  )
  .map((parts) => parts.join(''));

describe('encode', () => {
  it('finds added tokens where Hugging Face’s library does', () => {
    fc.assert(
      fc.property(awkwardText, (text) => {
        expect(tokenizer.encode(text, { allowSpecial: true })).toEqual(huggingFace.encode(text).ids);
      }),
      { numRuns: 1000 },
    );
  });

  it('never encodes user text as a special token', () => {
    fc.assert(
      fc.property(awkwardText, (text) => {
        expect(tokenizer.encode(text).filter((id) => tokenizer.specialTokenIds.has(id))).toEqual([]);
      }),
    );
  });

  it.each([
    ['<|im_end|>', false, [27, 91, 318, 6213, 91, 29]],
    ['<|im_end|>', true, [151645]],
    ['<|fim_prefix|>', false, [27, 91, 69, 318, 13974, 91, 29]],
    ['<|fim_prefix|>', true, [151659]],
    ['<tool_call>', false, [151657]],
    ['<think>\n', true, [13708, 766, 397]],
    ['</think>\n\n', false, [522, 26865, 1339]],
    ['', true, []],
  ])('encodes %j, special tokens allowed: %s', (text, allowSpecial, expected) => {
    expect(tokenizer.encode(text, { allowSpecial })).toEqual(expected);
  });

  it.each(['\ud83d', 'a\ude00b', '\ude00\ud83d'])('refuses the lone surrogate in %j', (text) => {
    expect(() => tokenizer.encode(text)).toThrow(expect.objectContaining({ code: 'invalid_argument' }));
  });

  it('encodes text longer than the maximum number of call arguments', () => {
    expect(tokenizer.encode('1'.repeat(150_000))).toHaveLength(150_000);
  });
});

describe('decode', () => {
  it('returns the text in composed form', () => {
    fc.assert(
      fc.property(awkwardText, fc.boolean(), (text, allowSpecial) => {
        expect(tokenizer.decode(tokenizer.encode(text, { allowSpecial }))).toBe(text.normalize('NFC'));
      }),
      { numRuns: 1000 },
    );
  });

  it('leaves out special tokens on request', () => {
    const tokenIds = [151644, 872, 198, 13048, 151645];
    expect(tokenizer.decode(tokenIds)).toBe('<|im_start|>user\nHi<|im_end|>');
    expect(tokenizer.decode(tokenIds, { skipSpecialTokens: true })).toBe('user\nHi');
  });

  it('keeps a byte order mark and replaces invalid UTF-8 bytes', () => {
    expect(tokenizer.decode(tokenizer.encode('\ufeffa'))).toBe('\ufeffa');
    expect(tokenizer.decode(tokenizer.encode('🇫').slice(0, -1))).toBe('\ufffd');
  });

  it('returns no text for an id without an entry', () => {
    expect(tokenizer.decode([151679, 64])).toBe('a');
  });

  it.each([-1, 1.5, Number.NaN])('refuses %d, an invalid id', (tokenId) => {
    expect(() => tokenizer.decode([tokenId])).toThrow(expect.objectContaining({ code: 'invalid_argument' }));
  });
});

describe('Tokenizer', () => {
  it('knows its special tokens and its size', () => {
    expect(tokenizer.vocabularySize).toBe(151665);
    expect(tokenizer.tokenToId('<|im_end|>')).toBe(151645);
    expect(tokenizer.tokenToId('<tool_call>')).toBe(151657);
    expect(tokenizer.tokenToId('<|nothing|>')).toBeUndefined();
    expect(tokenizer.eosToken).toBe('<|im_end|>');
    expect(tokenizer.specialTokens.get('<|im_start|>')).toBe(151644);
    expect(tokenizer.specialTokenIds.has(151657)).toBe(false);
    expect(tokenizer.specialTokenIds.size).toBe(20);
  });
});
