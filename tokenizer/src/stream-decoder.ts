// Token ids to text, one id at a time. Owns the bytes of a character that is not yet whole. Knows nothing of tags or
// stop strings (reasoning.ts and stop-strings.ts read its output).

import type { TokenTable } from './token-table.ts';
import type { DecodeOptions } from './tokenizer.ts';

/**
 * Decodes one sequence's completion token ids as they arrive. A character whose bytes span several tokens is returned
 * whole with the last of them. INVARIANT: all `push` results and `end` joined equal `tokenizer.decode` of the ids.
 */
export class StreamDecoder {
  readonly #tokens: TokenTable;
  readonly #skipSpecialTokens: boolean;
  readonly #utf8 = new TextDecoder('utf-8', { ignoreBOM: true });

  constructor(tokens: TokenTable, options: DecodeOptions = {}) {
    this.#tokens = tokens;
    this.#skipSpecialTokens = options.skipSpecialTokens ?? false;
  }

  /** The text that the next id completes, perhaps empty. Throws `invalid_argument` for an invalid id. */
  push(tokenId: number): string {
    if (this.#skipSpecialTokens && this.#tokens.specialTokenIds.has(tokenId)) {
      return '';
    }
    return this.#utf8.decode(this.#tokens.tokenBytes(tokenId), { stream: true });
  }

  /** The remaining text: U+FFFD when the stream ended inside a character, else nothing. Resets the decoder. */
  end(): string {
    return this.#utf8.decode();
  }
}
