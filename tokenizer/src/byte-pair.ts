// Plain text to token ids by byte-level BPE. Owns the merging, in time that grows with the text (times a logarithm)
// for any text, and stops early when given a maximum of tokens. Knows no special tokens. The rules come from
// tokenizer-files.ts. The pattern is read by Hugging Face's library, whose own merging takes twenty seconds for a word
// of a million letters. A property test compares the ids with the library's.
//
// The rule: of all pairs that may merge, the one of the lowest rank merges first, and among equals the leftmost. A heap
// holds the candidates as rank and position; an entry whose position has changed since is skipped.

import { Tokenizer as HuggingFaceTokenizer } from '@huggingface/tokenizers';
import { characterFromByte } from './byte-level.ts';
import { composeText } from './nfc.ts';
import type { TokenizerDescription } from './tokenizer-files.ts';

/** Appends a text's ids to `output`; returns early, with part of them, once there are more than `maxTokens`. */
export type BytePairEncoder = (text: string, output: number[], maxTokens: number) => void;

/** Ordinary words repeat: their ids are kept, up to this many words of this many UTF-16 units. */
const cacheMaxWords = 8_192;
const cacheMaxUnits = 32;
const none = -1;
/** Memory for longer words is released after the next word. */
const keptBytes = 65_536;
/** Ranks are below 2 ** 21 and positions below this, so that a rank and a position fit one number exactly. */
const positions = 2 ** 31;

/** Builds the encoder. Throws if the library cannot read the pattern. */
export function createBytePairEncoder({
  model,
  normalizer,
  pre_tokenizer: preTokenizer,
}: TokenizerDescription['bytePair']): BytePairEncoder {
  const merges = new MergeTable(model);
  const idByByte = characterFromByte.map((character) => model.vocab[character] ?? none);
  const idBySpelling = model.ignore_merges ? new Map(Object.entries(model.vocab)) : undefined;
  const pattern = compilePattern(preTokenizer);
  const word = new MergingWord(merges);
  const cache = new Map<string, readonly number[]>();

  function encodeWord(text: string, output: number[]): void {
    const bytes = Buffer.from(text);
    const whole = idBySpelling?.get(Array.from(bytes, (byte) => characterFromByte[byte]).join(''));
    if (whole !== undefined) {
      output.push(whole);
      return;
    }
    word.merge(bytes, idByByte, output);
  }

  function encodeCached(text: string, output: number[]): void {
    if (text.length > cacheMaxUnits) {
      encodeWord(text, output);
      return;
    }
    let ids = cache.get(text);
    if (ids === undefined) {
      const fresh: number[] = [];
      encodeWord(text, fresh);
      if (cache.size >= cacheMaxWords) {
        cache.clear();
      }
      cache.set(text, fresh);
      ids = fresh;
    }
    output.push(...ids);
  }

  return (text, output, maxTokens) => {
    const composed = normalizer === null ? text : composeText(text);
    let end = 0;
    for (const match of composed.matchAll(pattern)) {
      if (end < match.index) {
        encodeCached(composed.slice(end, match.index), output);
      }
      if (match[0] !== '') {
        encodeCached(match[0], output);
      }
      end = match.index + match[0].length;
      if (output.length > maxTokens) {
        return;
      }
    }
    if (end < composed.length) {
      encodeCached(composed.slice(end), output);
    }
  };
}

/**
 * The library's reading of a pattern in Oniguruma's dialect. It does not export the reader, so this builds an
 * empty tokenizer.
 */
function compilePattern(preTokenizer: TokenizerDescription['bytePair']['pre_tokenizer']): RegExp {
  const library = new HuggingFaceTokenizer(
    {
      pre_tokenizer: preTokenizer,
      model: { type: 'BPE', vocab: {}, merges: [] },
      normalizer: null,
      decoder: null,
      post_processor: null,
      added_tokens: [],
    },
    {},
  );
  const pattern: unknown = library.pre_tokenizer?.tokenizers?.[0]?.pattern;
  if (!(pattern instanceof RegExp)) {
    throw new Error('the library has no pattern');
  }
  return pattern;
}

/** Which neighbours merge: the rank of two ids, and the resulting id. A hash table with open addressing. */
class MergeTable {
  /** By rank. */
  readonly productIds: Int32Array;
  readonly #leftIds: Int32Array;
  readonly #rightIds: Int32Array;
  readonly #rankBySlot: Int32Array;
  readonly #mask: number;

  constructor({ vocab, merges }: TokenizerDescription['bytePair']['model']) {
    const slots = 2 ** Math.ceil(Math.log2(merges.length * 2 + 2));
    this.#mask = slots - 1;
    this.#rankBySlot = new Int32Array(slots).fill(none);
    this.#leftIds = new Int32Array(merges.length);
    this.#rightIds = new Int32Array(merges.length);
    this.productIds = new Int32Array(merges.length);
    for (const [rank, [left, right]] of merges.entries()) {
      const leftId = vocab[left];
      const rightId = vocab[right];
      // A half without an id never occurs.
      if (leftId !== undefined && rightId !== undefined) {
        this.#leftIds[rank] = leftId;
        this.#rightIds[rank] = rightId;
        this.productIds[rank] = vocab[left + right] ?? none;
        // Of equal merges the last one counts.
        this.#rankBySlot[this.#slotOf(leftId, rightId)] = rank;
      }
    }
  }

  /** -1: they do not merge. */
  rankOf(leftId: number, rightId: number): number {
    return this.#rankBySlot[this.#slotOf(leftId, rightId)]!;
  }

  /** The slot that holds the pair, or where it would go. */
  #slotOf(leftId: number, rightId: number): number {
    let slot = (Math.imul(leftId, 0x9e3779b1) ^ Math.imul(rightId, 0x85ebca6b)) >>> 0;
    slot ^= slot >>> 15;
    for (; ; slot += 1) {
      const rank = this.#rankBySlot[slot & this.#mask]!;
      if (rank === none || (this.#leftIds[rank] === leftId && this.#rightIds[rank] === rightId)) {
        return slot & this.#mask;
      }
    }
  }
}

/** The memory that one word at a time is merged in. */
class MergingWord {
  readonly #merges: MergeTable;
  // By position, which is that of a part's first byte: its id, its neighbours, and the rank of merging it with the
  // next.
  #ids = new Int32Array(0);
  #previous = new Int32Array(0);
  #next = new Int32Array(0);
  #ranks = new Int32Array(0);
  readonly #heap = new NumberHeap();

  constructor(merges: MergeTable) {
    this.#merges = merges;
  }

  merge(bytes: Uint8Array, idByByte: readonly number[], output: number[]): void {
    const { length } = bytes;
    this.#reserve(length);
    const [ids, previous, next, ranks] = [this.#ids, this.#previous, this.#next, this.#ranks];
    for (let at = 0; at < length; at += 1) {
      ids[at] = idByByte[bytes[at]!]!;
      previous[at] = at - 1;
      next[at] = at + 1 < length ? at + 1 : none;
    }
    for (let at = 0; at < length; at += 1) {
      this.#rank(at);
    }
    for (let key = this.#heap.pop(); key !== undefined; key = this.#heap.pop()) {
      const at = key % positions;
      const rank = Math.floor(key / positions);
      if (ranks[at] !== rank) {
        continue;
      }
      const right = next[at]!;
      const after = next[right]!;
      ids[at] = this.#merges.productIds[rank]!;
      ranks[right] = none;
      next[at] = after;
      if (after !== none) {
        previous[after] = at;
      }
      this.#rank(at);
      if (previous[at] !== none) {
        this.#rank(previous[at]!);
      }
    }
    for (let at = length > 0 ? 0 : none; at !== none; at = next[at]!) {
      output.push(ids[at]!);
    }
  }

  /** Looks up the pair that begins at a position. */
  #rank(at: number): void {
    const right = this.#next[at]!;
    const rank = right === none ? none : this.#merges.rankOf(this.#ids[at]!, this.#ids[right]!);
    this.#ranks[at] = rank;
    if (rank !== none) {
      this.#heap.push(rank * positions + at);
    }
  }

  #reserve(length: number): void {
    if (this.#ids.length < length || this.#ids.length > keptBytes) {
      const size = Math.max(length, 64);
      [this.#ids, this.#previous] = [new Int32Array(size), new Int32Array(size)];
      [this.#next, this.#ranks] = [new Int32Array(size), new Int32Array(size)];
    }
  }
}

/** Smallest first. */
class NumberHeap {
  readonly #numbers: number[] = [];

  push(number: number): void {
    const numbers = this.#numbers;
    let at = numbers.length;
    numbers.push(number);
    while (at > 0) {
      const above = (at - 1) >> 1;
      if (numbers[above]! <= number) {
        break;
      }
      numbers[at] = numbers[above]!;
      at = above;
    }
    numbers[at] = number;
  }

  pop(): number | undefined {
    const numbers = this.#numbers;
    const smallest = numbers[0];
    const last = numbers.pop();
    if (last === undefined || numbers.length === 0) {
      return smallest;
    }
    let at = 0;
    for (;;) {
      let below = at * 2 + 1;
      if (below >= numbers.length) {
        break;
      }
      if (below + 1 < numbers.length && numbers[below + 1]! < numbers[below]!) {
        below += 1;
      }
      if (numbers[below]! >= last) {
        break;
      }
      numbers[at] = numbers[below]!;
      at = below;
    }
    numbers[at] = last;
    return smallest;
  }
}
