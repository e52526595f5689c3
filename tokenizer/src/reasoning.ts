// Splits a completion's text into the model's thinking and its answer. Owns the tags and the text held back while a tag
// may be forming. Knows no tokens, because MiMo's tags are plain text spread over several tokens.
//
// The rule, on the whole text:
//   1. Thinking opens only if the text begins with `<think>`, after white space at most, which is dropped. Any other
//      text is all answer, with its tags.
//   2. It ends at the first `</think>`; without one, all the rest is thinking.
//   3. Line ends next to a tag belong to the tag: after `<think>`, before `</think>`, after `</think>`.
// The whole text is the part already in the prompt (`begun`), then the completion; only the completion's part is
// output.

/** The text that one piece added to each part; either may be empty. */
export interface ReasoningDelta {
  readonly thinking: string;
  readonly answer: string;
}

/** The text that the completion continues. */
export interface ReasoningOptions {
  /** The part of the text at the prompt's end: an opening tag, or a continued message. */
  readonly begun?: string;
}

const openTag = '<think>';
const closeTag = '</think>';

/** Where the next text goes. `after...` states drop line ends until another character arrives. */
type State = 'opening' | 'afterOpen' | 'thinking' | 'afterClose' | 'answer';

/**
 * Follows one sequence's text. INVARIANT: the deltas joined depend only on the whole text, not on how it was cut.
 */
export class ReasoningSplitter {
  #state: State = 'opening';
  #held = '';
  /** How much of `#held` belongs to the prompt. */
  #begunUnits = 0;

  constructor({ begun = '' }: ReasoningOptions = {}) {
    this.push(begun);
    this.#begunUnits = this.#held.length;
  }

  /** Whether the thinking is over, or never began. */
  get isAnswering(): boolean {
    return this.#state === 'answer' || this.#state === 'afterClose';
  }

  /** Processes the next piece of text; text that may still become part of a tag is held back. */
  push(text: string): ReasoningDelta {
    let thinking = '';
    let answer = '';
    let rest = this.#held + text;
    this.#held = '';
    for (;;) {
      switch (this.#state) {
        case 'opening': {
          const begun = rest.trimStart();
          if (begun.startsWith(openTag)) {
            rest = begun.slice(openTag.length);
            this.#begunUnits = 0;
            this.#state = 'afterOpen';
            continue;
          }
          if (openTag.startsWith(begun)) {
            this.#held = rest;
            return { thinking, answer };
          }
          rest = this.#completed(rest);
          this.#state = 'answer';
          continue;
        }
        case 'afterOpen':
        case 'afterClose': {
          rest = rest.replace(/^[\r\n]+/u, '');
          if (rest === '') {
            return { thinking, answer };
          }
          this.#state = this.#state === 'afterOpen' ? 'thinking' : 'answer';
          continue;
        }
        case 'thinking': {
          const close = rest.indexOf(closeTag);
          if (close >= 0) {
            thinking += this.#completed(rest.slice(0, close).replace(/[\r\n]+$/u, ''));
            this.#begunUnits = 0;
            rest = rest.slice(close + closeTag.length);
            this.#state = 'afterClose';
            continue;
          }
          const certainUnits = rest.length - heldUnits(rest);
          thinking += this.#completed(rest.slice(0, certainUnits));
          this.#held = rest.slice(certainUnits);
          return { thinking, answer };
        }
        case 'answer':
          answer += rest;
          return { thinking, answer };
      }
    }
  }

  /** Releases the held text: no more text can complete a tag. */
  end(): ReasoningDelta {
    const text = this.#completed(this.#held);
    this.#held = '';
    return this.#state === 'thinking' ? { thinking: text, answer: '' } : { thinking: '', answer: text };
  }

  /** The held text to output, without the prompt's part. */
  #completed(text: string): string {
    const completed = text.slice(this.#begunUnits);
    this.#begunUnits -= text.length - completed.length;
    return completed;
  }
}

/** The units at the end that may belong to a closing tag: line ends, then a beginning of the tag. */
function heldUnits(text: string): number {
  let tagUnits = Math.min(closeTag.length - 1, text.length);
  while (!closeTag.startsWith(text.slice(text.length - tagUnits))) {
    tagUnits -= 1;
  }
  let start = text.length - tagUnits;
  while (start > 0 && (text[start - 1] === '\n' || text[start - 1] === '\r')) {
    start -= 1;
  }
  return text.length - start;
}
