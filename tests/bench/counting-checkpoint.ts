// A full-size checkpoint in the real layout whose text is known, so that drafts are right as often as a trained
// model's: after token t comes t + 1, and the MTP layer drafts that too, but after one token in nineteen. All shapes
// and bytes are the real model's, and nothing is zero but a column: engines that compute everything are compared on it
// as they are.
//
// A token's embedding is a row of noise, the head's row of t + 1 has the direction of t's embedding, and the layers
// add almost nothing. The MTP layer passes the embedding of its token on. The embedding's first number marks the
// tokens after which the draft is wrong: the MTP layer's input adds another token's embedding in its measure.

import { mimo7b, type RandomCheckpoint } from '@mimo/worker/compiler/random-checkpoint';

const poolSize = 2 ** 20;
/** Rows are runs of one pool from places so far apart. */
const rowStride = 6;
const rowsAtOnce = 64;
/** A right draft is two tokens further on, a wrong one leads to the next: nine of ten are right so. */
const wrongEvery = 19;
const mark = 24;
const markWeight = 0.2;
/** What a draft is made after a marked token. */
const wrongToken = 100;

function toBfloat16(values: Float32Array<ArrayBuffer>): Uint16Array<ArrayBuffer> {
  return Uint16Array.from(new Uint32Array(values.buffer), (bits) => (bits + 0x8000) >>> 16);
}

function noise(): Float32Array<ArrayBuffer> {
  let state = 1;
  const random = (): number => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
  return Float32Array.from({ length: poolSize }, () => {
    const [a, b] = [random() + 2 ** -33, random()];
    return Math.sqrt(-2 * Math.log(a)) * Math.cos(2 * Math.PI * b);
  });
}

/** The tensors of a counting checkpoint; the others are random. */
export function countingTensors(): NonNullable<RandomCheckpoint['chunksOf']> {
  const pool = noise();
  const scaled = (scale: number): Uint16Array<ArrayBuffer> => toBfloat16(pool.map((value) => scale * value));
  const [unit, plain, tiny] = [scaled(1), scaled(0.02), scaled(2e-4)];
  const halves = toBfloat16(
    Float32Array.of(
      1,
      mark,
      0,
      ...Array.from(
        pool.subarray(rowStride * wrongToken, rowStride * wrongToken + mimo7b.hiddenSize),
        (value) => markWeight * value,
      ),
    ),
  );
  const [one, marked, none] = halves;
  return (name, shape) => {
    const [, width = 1] = shape;
    if (name.includes('embed_tokens')) {
      return rowsOf(shape, (row, r) => {
        row.set(unit.subarray(rowStride * r, rowStride * r + width));
        row[0] = r % wrongEvery === wrongEvery - 1 ? marked! : none!;
      });
    }
    if (name.includes('lm_head')) {
      return rowsOf(shape, (row, r) => {
        const before = rowStride * Math.max(0, r - 1);
        row.set(plain.subarray(before, before + width));
        row[0] = none!;
      });
    }
    if (name.endsWith('input_proj.weight')) {
      // The hidden state first, then the embedding.
      return rowsOf(shape, (row, r) => {
        row.set(tiny.subarray(rowStride * r, rowStride * r + width));
        row[width / 2 + r] = one!;
        row[width / 2] = halves[3 + r]!;
      });
    }
    return /o_proj|down_proj/.test(name)
      ? rowsOf(shape, (row, r) => row.set(tiny.subarray(rowStride * r, rowStride * r + width)))
      : undefined;
  };
}

function* rowsOf(
  [rows = 0, width = 1]: readonly number[],
  fill: (row: Uint16Array, index: number) => void,
): Iterable<Uint8Array> {
  for (let first = 0; first < rows; first += rowsAtOnce) {
    const count = Math.min(rowsAtOnce, rows - first);
    const chunk = new Uint16Array(count * width);
    for (let i = 0; i < count; i++) {
      fill(chunk.subarray(i * width, (i + 1) * width), first + i);
    }
    yield new Uint8Array(chunk.buffer);
  }
}
