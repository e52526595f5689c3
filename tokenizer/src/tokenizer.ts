// Text to token ids and back, for one checkpoint. Owns special tokens: when text may name them and how they are shown.
// Knows no chat and no stream. Input: tokenizer-files.ts. The text between special tokens is byte-pair.ts's.

import { ClusterError } from '@mimo/core/errors';
import { bytesFromSpelling } from './byte-level.ts';
import { createBytePairEncoder, type BytePairEncoder } from './byte-pair.ts';
import { parseTokenizerFiles, readTokenizerFiles, type TokenizerDescription } from './tokenizer-files.ts';

/** Whether text may name special tokens. */
export interface EncodeOptions {
  /**
   * True: the text `<|im_end|>` becomes that token. False, the default, for whatever a user wrote: it stays nine
   * characters of text.
   */
  readonly allowSpecial?: boolean;
  /** Stops early once there are more ids than this, so that what is too long for a context costs no more than it. */
  readonly maxTokens?: number;
}

/** How special tokens are shown. */
export interface DecodeOptions {
  /** True: special tokens give no text. Default false. */
  readonly skipSpecialTokens?: boolean;
}

/**
 * One checkpoint's tokenizer. Immutable and shared freely.
 *
 * A token is special when the files say so or when it is written `<|...|>` (the files leave the flag off for
 * `<|fim_prefix|>` and its like). The other added tokens, such as `<tool_call>`, are words: they are matched in any text.
 */
export interface Tokenizer {
  /** One more than the largest id; the model's own vocabulary may have padding rows beyond it. */
  readonly vocabularySize: number;
  readonly specialTokenIds: ReadonlySet<number>;
  /** The special tokens' texts with their ids. */
  readonly specialTokens: ReadonlyMap<string, number>;
  /** Jinja source from the checkpoint; undefined when it has none. */
  readonly chatTemplate: string | undefined;
  readonly bosToken: string | undefined;
  readonly eosToken: string | undefined;
  /** The ids of a text. Throws `invalid_argument` for a lone surrogate, which has no UTF-8. Nothing is prepended. */
  encode(text: string, options?: EncodeOptions): number[];
  /**
   * The text of token ids; bytes that are no UTF-8 become U+FFFD. For a stream use a StreamDecoder: decoding ids one by
   * one breaks characters that span tokens. Throws `invalid_argument` for what is no id.
   */
  decode(tokenIds: readonly number[], options?: DecodeOptions): string;
  /** The id of an added token's text, such as `<|im_end|>`; undefined when there is none. */
  tokenToId(text: string): number | undefined;
  /** The bytes a token stands for; none for an id without an entry. The array is shared: do not write to it. */
  tokenBytes(tokenId: number): Uint8Array;
}

/**
 * Loads the tokenizer of the checkpoint in a directory. Throws `failed_precondition` when the files are missing or ask
 * for something unsupported, `data_loss` when they are malformed, `unavailable` when they cannot be read.
 */
export async function loadTokenizer(directory: string): Promise<Tokenizer> {
  return createTokenizer(parseTokenizerFiles(await readTokenizerFiles(directory)));
}

/** Builds a tokenizer from its parsed files. Throws `failed_precondition` when the library cannot read their pattern. */
export function createTokenizer(description: TokenizerDescription): Tokenizer {
  const { addedTokens } = description;
  const encodePlain = createPlainEncoder(description);
  const bytesById = buildByteTable(description);
  const idByText = new Map(addedTokens.map(({ content, id }) => [content, id]));
  const special = addedTokens.filter((token) => token.special || /^<\|.*\|>$/su.test(token.content));
  const specialTokenIds = new Set(special.map(({ id }) => id));
  const words = addedTokens.filter(({ id }) => !specialTokenIds.has(id));
  const anyAdded = compileAlternatives(addedTokens.map(({ content }) => content));
  const anyWord = compileAlternatives(words.map(({ content }) => content));
  const noBytes = new Uint8Array(0);

  function tokenBytes(tokenId: number): Uint8Array {
    if (!Number.isInteger(tokenId) || tokenId < 0) {
      throw new ClusterError('invalid_argument', `token id ${tokenId} is not a whole number from 0`);
    }
    return bytesById[tokenId] ?? noBytes;
  }

  return {
    vocabularySize: bytesById.length,
    specialTokenIds,
    specialTokens: new Map(special.map(({ content, id }) => [content, id])),
    chatTemplate: description.chatTemplate,
    bosToken: description.bosToken,
    eosToken: description.eosToken,
    tokenBytes,
    tokenToId: (text) => idByText.get(text),

    encode(text, options = {}) {
      if (!text.isWellFormed()) {
        throw new ClusterError(
          'invalid_argument',
          'text has a lone surrogate, which cannot be encoded as UTF-8',
        );
      }
      const pattern = options.allowSpecial === true ? anyAdded : anyWord;
      const { maxTokens = Infinity } = options;
      const output: number[] = [];
      let end = 0;
      for (const match of pattern === undefined ? [] : text.matchAll(pattern)) {
        encodePlain(text.slice(end, match.index), output, maxTokens);
        output.push(idByText.get(match[0])!);
        end = match.index + match[0].length;
        if (output.length > maxTokens) {
          return output;
        }
      }
      encodePlain(text.slice(end), output, maxTokens);
      return output;
    },

    decode(tokenIds, options = {}) {
      const shown =
        options.skipSpecialTokens === true ? tokenIds.filter((id) => !specialTokenIds.has(id)) : tokenIds;
      return new TextDecoder('utf-8', { ignoreBOM: true }).decode(Buffer.concat(shown.map(tokenBytes)));
    },
  };
}

function createPlainEncoder({ bytePair }: TokenizerDescription): BytePairEncoder {
  try {
    return createBytePairEncoder(bytePair);
  } catch (cause) {
    throw new ClusterError('failed_precondition', 'tokenizer.json is not supported', { cause });
  }
}

/** Bytes by id. Its length is the vocabulary's size; ids without an entry are holes. */
function buildByteTable({ bytePair, addedTokens }: TokenizerDescription): (Uint8Array | undefined)[] {
  const table: (Uint8Array | undefined)[] = [];
  const put = (id: number, bytes: Uint8Array): void => {
    while (table.length <= id) {
      table.push(undefined);
    }
    table[id] = bytes;
  };
  const utf8 = new TextEncoder();
  for (const [spelling, id] of Object.entries(bytePair.model.vocab)) {
    put(id, bytesFromSpelling(spelling) ?? utf8.encode(spelling));
  }
  for (const { content, id } of addedTokens) {
    put(id, utf8.encode(content));
  }
  return table;
}

/** Matches the longest of the texts at the leftmost place; undefined for no texts. */
function compileAlternatives(texts: readonly string[]): RegExp | undefined {
  if (texts.length === 0) {
    return undefined;
  }
  const longestFirst = texts.toSorted((a, b) => b.length - a.length).map((text) => RegExp.escape(text));
  return new RegExp(longestFirst.join('|'), 'gu');
}
