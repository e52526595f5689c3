// Completion tokens -> the text that a client gets: decoded over token boundaries, cut at a stop text, the thinking told
// apart from the answer. Owns the order of these steps and the text held back by them; knows neither streams nor requests.

import { ReasoningSplitter, StopStringMatcher, StreamDecoder, type Tokenizer } from '@mimo/tokenizer';

/** New text of a completion, and the stop text that ended it, if one did. */
export interface TextDelta {
  readonly text: string;
  readonly reasoning: string;
  /** How many of the given tokens belong to the completion: fewer than given where a stop text ended it. */
  readonly tokens: number;
  readonly stop: string | undefined;
}

/** How a completion becomes text. */
export interface CompletionTextOptions {
  readonly tokenizer: Tokenizer;
  readonly stop: readonly string[];
  /** Stop texts are not looked for before this many tokens. */
  readonly minTokens: number;
  /** Tells `<think>…</think>` apart from the answer. */
  readonly splitReasoning: boolean;
}

/** The text of one completion. Fed once with each token, in order, then ended. */
export class CompletionText {
  readonly #decoder: StreamDecoder;
  readonly #stops: StopStringMatcher;
  readonly #splitter: ReasoningSplitter | undefined;
  readonly #minTokens: number;
  #tokens = 0;

  constructor(options: CompletionTextOptions) {
    this.#decoder = new StreamDecoder(options.tokenizer, { skipSpecialTokens: true });
    this.#stops = new StopStringMatcher(options.stop);
    this.#splitter = options.splitReasoning ? new ReasoningSplitter() : undefined;
    this.#minTokens = options.minTokens;
  }

  /** Takes the next tokens. After a stop text nothing more may be given. */
  push(tokenIds: readonly number[]): TextDelta {
    let text = '';
    for (const [index, tokenId] of tokenIds.entries()) {
      const piece = this.#decoder.push(tokenId);
      this.#tokens += 1;
      if (this.#tokens <= this.#minTokens) {
        text += piece;
        continue;
      }
      const released = this.#stops.push(piece);
      text += released.text;
      if (released.stop !== undefined) {
        return this.#split(text, { tokens: index + 1, stop: released.stop, last: true });
      }
    }
    return this.#split(text, { tokens: tokenIds.length, stop: undefined, last: false });
  }

  /** Releases what was held back; the end of a broken character may itself complete a stop text. */
  end(): TextDelta {
    const rest = this.#stops.push(this.#decoder.end());
    const text = rest.text + this.#stops.end();
    return this.#split(text, { tokens: 0, stop: rest.stop, last: true });
  }

  #split(text: string, facts: { tokens: number; stop: string | undefined; last: boolean }): TextDelta {
    const { tokens, stop, last } = facts;
    if (this.#splitter === undefined) {
      return { text, reasoning: '', tokens, stop };
    }
    const part = this.#splitter.push(text);
    const rest = last ? this.#splitter.end() : { thinking: '', answer: '' };
    return { text: part.answer + rest.answer, reasoning: part.thinking + rest.thinking, tokens, stop };
  }
}
