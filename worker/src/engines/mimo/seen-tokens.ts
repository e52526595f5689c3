// The tokens of one sequence that penalties apply to, with their counts in the completion. Owns their layout: pairs of
// an id and its count, as a device reads them. Knows no penalty.

/** Ids with their counts, in the order of their first occurrence; a prompt's token may have 0. */
export class SeenTokens implements Iterable<readonly [number, number]> {
  #pairs: Int32Array;
  #length = 0;
  readonly #places = new Map<number, number>();

  constructor(capacity: number) {
    this.#pairs = new Int32Array(2 * capacity);
  }

  /** Valid until the next `add`. */
  get pairs(): Int32Array {
    return this.#pairs.subarray(0, this.#length);
  }

  *[Symbol.iterator](): Iterator<readonly [number, number]> {
    for (let at = 0; at < this.#length; at += 2) {
      yield [this.#pairs[at]!, this.#pairs[at + 1]!];
    }
  }

  add(tokenId: number, times: number): void {
    const at = this.#places.get(tokenId) ?? this.#length;
    if (at === this.#length) {
      if (at === this.#pairs.length) {
        const grown = new Int32Array(2 * at + 2);
        grown.set(this.#pairs);
        this.#pairs = grown;
      }
      this.#places.set(tokenId, at);
      this.#pairs[at] = tokenId;
      this.#length += 2;
    }
    this.#pairs[at + 1]! += times;
  }

  /** These tokens and one more of the completion. */
  followedBy(tokenId: number): { readonly pairs: Int32Array } & Iterable<readonly [number, number]> {
    const at = this.#places.get(tokenId) ?? this.#length;
    const pairs = new Int32Array(Math.max(this.#length, at + 2));
    pairs.set(this.pairs);
    pairs[at] = tokenId;
    pairs[at + 1]! += 1;
    return {
      pairs,
      *[Symbol.iterator]() {
        for (let i = 0; i < pairs.length; i += 2) {
          yield [pairs[i]!, pairs[i + 1]!] as const;
        }
      },
    };
  }
}
