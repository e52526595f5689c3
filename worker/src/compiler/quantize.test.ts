import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { decodeFloats, quantizeInt4, quantizeInt8 } from './quantize.ts';

/** The rule written from its definition, for one block; shares no code with the fast version. */
function quantizeBlock(weights: readonly number[], bits: 4 | 8): { values: number[]; scale: number } {
  const extreme = weights.reduce((most, weight) => (Math.abs(weight) > Math.abs(most) ? weight : most), 0);
  const scale = Math.fround(bits === 8 ? Math.abs(extreme) / 127 : extreme / -8);
  const inverse = scale === 0 ? 0 : Math.fround(1 / scale);
  const zeroPoint = bits === 8 ? 128 : 8;
  const largest = bits === 8 ? 255 : 15;
  const values = weights.map((weight) => {
    const rounded = Math.floor(Math.fround(weight * inverse) + 0.5) + zeroPoint;
    return Math.min(largest, Math.max(0, rounded));
  });
  return { values, scale: scale === 0 ? 0 : scale };
}

const weight = fc.float({ noNaN: true, noDefaultInfinity: true, min: -1000, max: 1000 });
const ordinary = weight.filter((value) => value === 0 || Math.abs(value) > 1e-30);
const blocks = fc.array(fc.array(fc.oneof(ordinary, fc.constant(0)), { minLength: 32, maxLength: 32 }), {
  minLength: 1,
  maxLength: 4,
});

function run8(weights: Float32Array): { values: Uint8Array; scales: Float32Array } {
  const values = new Uint8Array(weights.length);
  const scales = new Float32Array(weights.length / 32);
  quantizeInt8(weights, values, scales);
  return { values, scales };
}

function run4(weights: Float32Array): { values: number[]; scales: Float32Array } {
  const packed = new Uint8Array(weights.length / 2);
  const scales = new Float32Array(weights.length / 32);
  quantizeInt4(weights, packed, scales);
  return { values: [...packed].flatMap((byte) => [byte & 15, byte >>> 4]), scales };
}

describe('quantizeInt8 and quantizeInt4', () => {
  it('follow the rule, block by block', () => {
    fc.assert(
      fc.property(blocks, (drawn) => {
        const weights = Float32Array.from(drawn.flat());
        const eight = drawn.map((block) => quantizeBlock(block.map(Math.fround), 8));
        const four = drawn.map((block) => quantizeBlock(block.map(Math.fround), 4));
        expect([...run8(weights).values]).toEqual(eight.flatMap(({ values }) => values));
        expect([...run8(weights).scales]).toEqual(eight.map(({ scale }) => scale));
        expect(run4(weights).values).toEqual(four.flatMap(({ values }) => values));
        expect([...run4(weights).scales]).toEqual(four.map(({ scale }) => scale));
      }),
    );
  });

  it('round to within half a step of the weight', () => {
    fc.assert(
      fc.property(blocks, (drawn) => {
        const weights = Float32Array.from(drawn.flat());
        const { values, scales } = run8(weights);
        weights.forEach((value, i) => {
          const scale = scales[Math.floor(i / 32)] ?? 0;
          expect(Math.abs(((values[i] ?? 0) - 128) * scale - value)).toBeLessThanOrEqual(scale * 0.5001);
        });
      }),
    );
  });

  it('turn a block of zeros, or of values too small to divide by, into zero points', () => {
    for (const value of [0, 1e-44]) {
      const weights = new Float32Array(32).fill(value);
      expect(run8(weights)).toEqual({ values: new Uint8Array(32).fill(128), scales: new Float32Array(1) });
      expect(run4(weights)).toEqual({
        values: Array.from({ length: 32 }, () => 8),
        scales: new Float32Array(1),
      });
    }
  });

  it('use the first of two equal magnitudes as the extreme of int4', () => {
    const weights = new Float32Array(32);
    weights[3] = 2;
    weights[9] = -2;
    const { values, scales } = run4(weights);
    expect(scales[0]).toBe(-0.25);
    expect([values[3], values[9]]).toEqual([0, 15]);
  });
});

function decode(data: Float32Array | Uint16Array, dtype: 'F32' | 'BF16' | 'F16'): number[] {
  const values = new Float32Array(data.length);
  expect(decodeFloats(new Uint8Array(data.buffer), dtype, values)).toBe(-1);
  return [...values];
}

describe('decodeFloats', () => {
  it('reads every dtype', () => {
    const numbers = [0, -0, 1, -1.5, 0.0078125, 65_504, 2 ** -24];
    const wide = Float32Array.from(numbers);
    const bf16 = Uint16Array.from(new Uint32Array(wide.buffer), (bits) => bits >>> 16);
    const f16 = Uint16Array.from([0, 0x8000, 0x3c00, 0xbe00, 0x2000, 0x7bff, 1]);
    expect(decode(wide, 'F32')).toEqual(numbers);
    expect(decode(f16, 'F16')).toEqual(numbers);
    expect(decode(bf16, 'BF16')).toEqual([0, -0, 1, -1.5, 0.0078125, 65_280, 2 ** -24]);
  });

  it.each([
    ['BF16', Uint16Array.of(0x3f80, 0x7f80), 1, Infinity],
    ['BF16', Uint16Array.of(0xffc0, 0x3f80), 0, Number.NaN],
    ['F16', Uint16Array.of(0x3c00, 0x3c00, 0xfc00), 2, -Infinity],
    ['F16', Uint16Array.of(0x7e00, 0x3c00), 0, Number.NaN],
    ['F32', Float32Array.of(1, 2, Number.NaN), 2, Number.NaN],
  ] as const)('finds the first value of %s that is not finite in %j', (dtype, data, index, value) => {
    const values = new Float32Array(data.length);
    expect(decodeFloats(new Uint8Array(data.buffer), dtype, values)).toBe(index);
    expect(values[index]).toBe(value);
  });
});
