import { join } from 'node:path';
import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { StreamDecoder } from './stream-decoder.ts';
import { loadTokenizer } from './tokenizer.ts';

const tokenizer = await loadTokenizer(join(import.meta.dirname, '../../tests/golden/tokenizer/mimo-subset'));

function decodeEach(tokenIds: readonly number[], skipSpecialTokens = false): string[] {
  const decoder = new StreamDecoder(tokenizer, { skipSpecialTokens });
  return [...tokenIds.map((tokenId) => decoder.push(tokenId)), decoder.end()];
}

describe('StreamDecoder', () => {
  it('yields pieces that join to the result of decode, for text and for any ids', () => {
    const ids = fc.oneof(
      fc.string({ unit: 'grapheme' }).map((text) => tokenizer.encode(text)),
      fc.array(fc.oneof(fc.nat({ max: 255 }), fc.integer({ min: 151640, max: 151680 }))),
    );
    fc.assert(
      fc.property(ids, fc.boolean(), (tokenIds, skipSpecialTokens) => {
        expect(decodeEach(tokenIds, skipSpecialTokens).join('')).toBe(
          tokenizer.decode(tokenIds, { skipSpecialTokens }),
        );
      }),
    );
  });

  it('yields a character of several tokens whole, with the last of them', () => {
    const tokenIds = tokenizer.encode('🇫');
    expect(tokenIds.length).toBeGreaterThan(1);
    expect(decodeEach(tokenIds)).toEqual([...tokenIds.slice(1).map(() => ''), '🇫', '']);
  });

  it('replaces a character cut off by the end', () => {
    expect(decodeEach(tokenizer.encode('a🇫').slice(0, -1)).at(-1)).toBe('\ufffd');
  });

  it('shows special tokens by default', () => {
    expect(decodeEach([64, 151645])).toEqual(['a', '<|im_end|>', '']);
    expect(decodeEach([64, 151645], true)).toEqual(['a', '', '']);
  });

  it('can be used again after the end', () => {
    const decoder = new StreamDecoder(tokenizer);
    decoder.push(tokenizer.encode('🇫')[0] ?? 0);
    decoder.end();
    expect(decoder.push(64)).toBe('a');
  });
});
