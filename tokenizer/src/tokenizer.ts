// Text to token ids and back, for one checkpoint. Owns special tokens: when text may name them and how they are shown.
// Knows no chat and no stream. Its input comes from tokenizer-files.ts; byte-pair.ts encodes the text between special
// tokens.

import { ClusterError } from '@mimo/core/process/errors';
import { createBytePairEncoder, type BytePairEncoder } from './byte-pair.ts';
import { createTokenTable, describeTokens, type TokenTable, type TokenTableData } from './token-table.ts';
import { parseTokenizerFiles, readTokenizerFiles, type TokenizerDescription } from './tokenizer-files.ts';

/** Whether text may name special tokens. */
export interface EncodeOptions {
  /**
   * True: the text `<|im_end|>` becomes that token. False, the default, is for users' text: it remains nine
   * characters of text.
   */
  readonly allowSpecial?: boolean;
  /**
   * Encoding stops as soon as the text certainly has more ids than this, so that a long text costs no more than one
   * that fits.
   */
  readonly maxTokens?: number;
}

/** A text has more tokens than allowed. */
export class TooManyTokensError extends ClusterError {
  /** It has at least this many; the rest was not counted. */
  readonly leastTokens: number;

  constructor(leastTokens: number, maxTokens: number) {
    super('invalid_argument', `the text has at least ${leastTokens} tokens; the limit is ${maxTokens}`);
    this.leastTokens = leastTokens;
  }
}

/** How special tokens are shown. */
export interface DecodeOptions {
  /** True: special tokens are left out. Default false. */
  readonly skipSpecialTokens?: boolean;
}

/** One checkpoint's tokenizer. Immutable and shared freely. */
export interface Tokenizer extends TokenTable {
  /** The meaning of the ids, as data. */
  readonly tokenTable: TokenTableData;
  /** Jinja source from the checkpoint; undefined when it has none. */
  readonly chatTemplate: string | undefined;
  readonly bosToken: string | undefined;
  readonly eosToken: string | undefined;
  /**
   * The ids of a text. Throws `invalid_argument` for a lone surrogate, which has no UTF-8, and `TooManyTokensError`
   * for more than `maxTokens`. Nothing is prepended.
   */
  encode(text: string, options?: EncodeOptions): number[];
  /**
   * The text of token ids; invalid UTF-8 bytes become U+FFFD. For a stream use a StreamDecoder: decoding ids one by
   * one breaks characters that span tokens. Throws `invalid_argument` for an invalid id.
   */
  decode(tokenIds: readonly number[], options?: DecodeOptions): string;
  /** The id of an added token's text, such as `<|im_end|>`; undefined when there is none. */
  tokenToId(text: string): number | undefined;
}

/**
 * Loads the tokenizer of the checkpoint in a directory. Throws `failed_precondition` when the files are missing or need
 * an unsupported feature, `data_loss` when they are malformed, `unavailable` when they cannot be read.
 */
export async function loadTokenizer(directory: string): Promise<Tokenizer> {
  return createTokenizer(parseTokenizerFiles(await readTokenizerFiles(directory)));
}

/**
 * Builds a tokenizer from its parsed files. Throws `failed_precondition` when the library cannot read their pattern.
 */
export function createTokenizer(description: TokenizerDescription): Tokenizer {
  const { addedTokens } = description;
  const encodePlain = createPlainEncoder(description);
  const tokenTable = describeTokens(description);
  const table = createTokenTable(tokenTable);
  const idByText = new Map(addedTokens.map(({ content, id }) => [content, id]));
  const words = addedTokens.filter(({ id }) => !table.specialTokenIds.has(id));
  const anyAdded = compileAlternatives(addedTokens.map(({ content }) => content));
  const anyWord = compileAlternatives(words.map(({ content }) => content));

  return {
    ...table,
    tokenTable,
    chatTemplate: description.chatTemplate,
    bosToken: description.bosToken,
    eosToken: description.eosToken,
    tokenToId: (text) => idByText.get(text),

    encode(text, options = {}) {
      if (!text.isWellFormed()) {
        throw new ClusterError(
          'invalid_argument',
          'text has a lone surrogate, which cannot be encoded as UTF-8',
        );
      }
      const { maxTokens = Infinity } = options;
      const leastTokens = table.leastTokens(text);
      if (leastTokens > maxTokens) {
        throw new TooManyTokensError(leastTokens, maxTokens);
      }
      const pattern = options.allowSpecial === true ? anyAdded : anyWord;
      const output: number[] = [];
      let end = 0;
      for (const match of pattern === undefined ? [] : text.matchAll(pattern)) {
        encodePlain(text.slice(end, match.index), output, maxTokens);
        output.push(idByText.get(match[0])!);
        end = match.index + match[0].length;
        if (output.length > maxTokens) {
          break;
        }
      }
      encodePlain(text.slice(end), output, maxTokens);
      if (output.length > maxTokens) {
        throw new TooManyTokensError(output.length, maxTokens);
      }
      return output;
    },

    decode(tokenIds, options = {}) {
      const shown =
        options.skipSpecialTokens === true
          ? tokenIds.filter((id) => !table.specialTokenIds.has(id))
          : tokenIds;
      return new TextDecoder('utf-8', { ignoreBOM: true }).decode(Buffer.concat(shown.map(table.tokenBytes)));
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

/** Matches the longest of the texts at the leftmost place; undefined for no texts. */
function compileAlternatives(texts: readonly string[]): RegExp | undefined {
  if (texts.length === 0) {
    return undefined;
  }
  const longestFirst = texts.toSorted((a, b) => b.length - a.length).map((text) => RegExp.escape(text));
  return new RegExp(longestFirst.join('|'), 'gu');
}
