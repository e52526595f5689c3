// The meaning of a checkpoint's token ids. Owns the bytes of each id and the set of special ids, as plain data that
// travels between processes: decoding a stream needs nothing else of a tokenizer. Knows neither encoding nor
// templates.

import { ClusterError } from '@mimo/core/process/errors';
import { bytesFromSpelling } from './byte-level.ts';
import type { TokenizerDescription } from './tokenizer-files.ts';

/** The table as data. */
export interface TokenTableData {
  /** The bytes of all ids, one after another. */
  readonly bytes: Uint8Array;
  /** By id, where its bytes end. An id without an entry has none. */
  readonly ends: Uint32Array;
  readonly specialTokens: readonly (readonly [text: string, tokenId: number])[];
}

/**
 * The meaning of the ids of one checkpoint. Immutable and shared freely.
 *
 * A token is special when the files say so or when it is written `<|...|>` (the files leave the flag off for
 * `<|fim_prefix|>` and its like). The other added tokens, such as `<tool_call>`, are words: they are matched in any
 * text.
 */
export interface TokenTable {
  /** One more than the largest id; the model's own vocabulary may have padding rows beyond it. */
  readonly vocabularySize: number;
  readonly specialTokenIds: ReadonlySet<number>;
  /** The special tokens' texts with their ids. */
  readonly specialTokens: ReadonlyMap<string, number>;
  /** The bytes of a token; none for an id without an entry. The array is shared: do not write to it. */
  tokenBytes(this: void, tokenId: number): Uint8Array;
  /** No encoding of the text has fewer tokens than this; found from its length alone. */
  leastTokens(this: void, text: string): number;
}

/** The table of a description, and the data from which `createTokenTable` recreates it. */
export function describeTokens({ bytePair, addedTokens }: TokenizerDescription): TokenTableData {
  const byId: Uint8Array[] = [];
  const utf8 = new TextEncoder();
  for (const [spelling, id] of Object.entries(bytePair.model.vocab)) {
    byId[id] = bytesFromSpelling(spelling) ?? utf8.encode(spelling);
  }
  for (const { content, id } of addedTokens) {
    byId[id] = utf8.encode(content);
  }
  const ends = new Uint32Array(byId.length);
  const pieces: Uint8Array[] = [];
  let end = 0;
  for (let id = 0; id < byId.length; id += 1) {
    const bytes = byId[id];
    if (bytes !== undefined) {
      pieces.push(bytes);
      end += bytes.length;
    }
    ends[id] = end;
  }
  const special = addedTokens.filter((token) => token.special || /^<\|.*\|>$/su.test(token.content));
  return {
    bytes: Buffer.concat(pieces),
    ends,
    specialTokens: special.map(({ content, id }) => [content, id]),
  };
}

export function createTokenTable({ bytes, ends, specialTokens }: TokenTableData): TokenTable {
  const longestBytes = ends.reduce((longest, end, id) => Math.max(longest, end - (ends[id - 1] ?? 0)), 1);
  return {
    vocabularySize: ends.length,
    specialTokenIds: new Set(specialTokens.map(([, id]) => id)),
    specialTokens: new Map(specialTokens),
    tokenBytes: (tokenId) => {
      if (!Number.isInteger(tokenId) || tokenId < 0) {
        throw new ClusterError('invalid_argument', `token id ${tokenId} is not a whole number from 0`);
      }
      return bytes.subarray(ends[tokenId - 1] ?? 0, ends[tokenId] ?? 0);
    },
    leastTokens: (text) => Math.ceil(leastComposedBytes(text) / longestBytes),
  };
}

/**
 * No composed form (NFC) of the text has fewer bytes than this. ASCII is composed already; other characters shrink to a
 * quarter at most: the worst case, U+1FBE U+0308 U+0301 to U+0390, goes from 7 bytes to 2.
 */
export function leastComposedBytes(text: string): number {
  const bytes = Buffer.byteLength(text);
  // A UTF-16 unit beyond ASCII has 2 or 3 bytes, or 2 where it is half of a character of 4: at most twice its excess
  // over 1.
  const asciiBytes = Math.max(0, 2 * text.length - bytes);
  return asciiBytes + (bytes - asciiBytes) / 4;
}
