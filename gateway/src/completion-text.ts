// Completion tokens -> the text that a client gets: decoded over token boundaries, the thinking split from the
// answer, cut at a stop text. Owns the order of these steps and the text held back by them; knows neither streams nor
// requests.

import { ReasoningSplitter, StopStringMatcher, StreamDecoder, type TokenTable } from '@mimo/tokenizer';

/** New text of a completion, and the stop text that ended it, if one did. */
export interface TextDelta {
  readonly text: string;
  readonly reasoning: string;
  /** How many of the given tokens belong to the completion: fewer if a stop text ended it. */
  readonly tokens: number;
  readonly stop: string | undefined;
}

/** How a completion becomes text. */
export interface CompletionTextOptions {
  readonly tokenTable: TokenTable;
  readonly stop: readonly string[];
  /** Looks for stop texts in the thinking and its tags too, not in the answer alone. */
  readonly stopInReasoning: boolean;
  /** Stop texts are matched only after this many tokens. */
  readonly minTokens: number;
  /** Splits `<think>…</think>` from the answer, continuing the prompt's tags; undefined: everything is the answer. */
  readonly reasoning: { readonly begun: string } | undefined;
}

/** The text of one completion. Push each token once, in order, then call `end`. */
export class CompletionText {
  readonly #decoder: StreamDecoder;
  readonly #stops: StopStringMatcher;
  readonly #stopTextById: ReadonlyMap<number, string>;
  readonly #splitter: ReasoningSplitter | undefined;
  readonly #stopInReasoning: boolean;
  readonly #minTokens: number;
  #tokens = 0;

  constructor({ tokenTable, stop, stopInReasoning, minTokens, reasoning }: CompletionTextOptions) {
    this.#decoder = new StreamDecoder(tokenTable, { skipSpecialTokens: true });
    this.#stops = new StopStringMatcher(stop);
    this.#stopTextById = new Map(
      stop.flatMap((text) => {
        const id = tokenTable.specialTokens.get(text);
        return id === undefined ? [] : [[id, text]];
      }),
    );
    this.#splitter = reasoning === undefined ? undefined : new ReasoningSplitter(reasoning);
    this.#stopInReasoning = stopInReasoning;
    this.#minTokens = minTokens;
  }

  /** Decodes the next tokens. Not to be called again after a stop text. */
  push(tokenIds: readonly number[]): TextDelta {
    let text = '';
    let reasoning = '';
    for (const [index, tokenId] of tokenIds.entries()) {
      const piece = this.#decoder.push(tokenId);
      this.#tokens += 1;
      const taken = this.#take(piece, { last: false });
      text += taken.text;
      reasoning += taken.reasoning;
      if (taken.stop !== undefined) {
        return { text, reasoning, tokens: index + 1, stop: taken.stop };
      }
    }
    return { text, reasoning, tokens: tokenIds.length, stop: undefined };
  }

  /** Releases the text held back; the end of a broken character may itself complete a stop text. */
  end(): TextDelta {
    return { ...this.#take(this.#decoder.end(), { last: true }), tokens: 0 };
  }

  /** The stop text that stands for a special token; undefined if there is none. */
  stopTextOf(tokenId: number): string | undefined {
    return this.#stopTextById.get(tokenId);
  }

  #take(piece: string, { last }: { last: boolean }): Omit<TextDelta, 'tokens'> {
    if (this.#stopInReasoning) {
      const { text, stop } = this.#search(piece, last);
      return { ...this.#split(text, last || stop !== undefined), stop };
    }
    const part = this.#split(piece, last);
    return { ...this.#search(part.text, last), reasoning: part.reasoning };
  }

  #search(text: string, last: boolean): { text: string; stop: string | undefined } {
    if (!last && this.#tokens <= this.#minTokens) {
      return { text, stop: undefined };
    }
    const found = this.#stops.push(text);
    return last ? { text: found.text + this.#stops.end(), stop: found.stop } : found;
  }

  #split(text: string, last: boolean): { text: string; reasoning: string } {
    if (this.#splitter === undefined) {
      return { text, reasoning: '' };
    }
    const part = this.#splitter.push(text);
    const rest = last ? this.#splitter.end() : { thinking: '', answer: '' };
    return { text: part.answer + rest.answer, reasoning: part.thinking + rest.thinking };
  }
}
