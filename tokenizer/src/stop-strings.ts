// Finds stop strings in streamed text. Owns the text held back while a stop string may be forming; knows no tokens.
//
// The rule: output ends before the stop string that is complete first; if several are complete at the same character,
// before the longest. So the result does not depend on how the text was cut into pieces.

import { ClusterError } from '@mimo/core/process/errors';

/** The text that one piece released. */
export interface StopResult {
  /** Text that no stop string can take back. */
  readonly text: string;
  /** The stop string that ended the output; undefined while it continues. */
  readonly stop: string | undefined;
}

interface Automaton {
  readonly stop: string;
  /** Knuth-Morris-Pratt: for each matched length, the longest shorter one that the same text also matches. */
  readonly fallback: readonly number[];
  matchedUnits: number;
}

/**
 * Watches one sequence's text. Holds back at most the longest stop string less one UTF-16 unit. Once a stop string
 * was found, every further call returns no text.
 */
export class StopStringMatcher {
  readonly #automata: readonly Automaton[];
  #held = '';
  #stop: string | undefined;

  /** Throws `invalid_argument` for an empty stop string or one with a lone surrogate. */
  constructor(stops: readonly string[]) {
    this.#automata = stops.map((stop) => {
      if (stop === '' || !stop.isWellFormed()) {
        throw new ClusterError(
          'invalid_argument',
          `stop string ${JSON.stringify(stop)} is empty or not well-formed`,
        );
      }
      return { stop, fallback: buildFallback(stop), matchedUnits: 0 };
    });
  }

  /** Processes the next piece of text and returns the text that is certain to be output. */
  push(text: string): StopResult {
    if (this.#stop !== undefined) {
      return { text: '', stop: this.#stop };
    }
    const seen = this.#held + text;
    for (let end = this.#held.length; end < seen.length; end += 1) {
      const stop = this.#advance(seen.charAt(end));
      if (stop !== undefined) {
        this.#stop = stop;
        this.#held = '';
        return { text: seen.slice(0, end + 1 - stop.length), stop };
      }
    }
    const heldUnits = Math.max(0, ...this.#automata.map(({ matchedUnits }) => matchedUnits));
    this.#held = seen.slice(seen.length - heldUnits);
    return { text: seen.slice(0, seen.length - heldUnits), stop: undefined };
  }

  /** The text still held back, in which no stop string was completed. */
  end(): string {
    const text = this.#held;
    this.#held = '';
    for (const automaton of this.#automata) {
      automaton.matchedUnits = 0;
    }
    return text;
  }

  /** The longest stop string that this unit completes. */
  #advance(unit: string): string | undefined {
    let completed: string | undefined;
    for (const automaton of this.#automata) {
      let matched = automaton.matchedUnits;
      while (matched > 0 && automaton.stop.charAt(matched) !== unit) {
        matched = automaton.fallback[matched] ?? 0;
      }
      automaton.matchedUnits = automaton.stop.charAt(matched) === unit ? matched + 1 : 0;
      if (
        automaton.matchedUnits === automaton.stop.length &&
        automaton.stop.length > (completed ?? '').length
      ) {
        completed = automaton.stop;
      }
    }
    return completed;
  }
}

function buildFallback(stop: string): number[] {
  const fallback = [0, 0];
  let matched = 0;
  for (let i = 1; i < stop.length; i += 1) {
    while (matched > 0 && stop.charAt(matched) !== stop.charAt(i)) {
      matched = fallback[matched] ?? 0;
    }
    if (stop.charAt(matched) === stop.charAt(i)) {
      matched += 1;
    }
    fallback.push(matched);
  }
  return fallback;
}
