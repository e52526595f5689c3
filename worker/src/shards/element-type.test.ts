import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { decodeHalves, encodeHalves } from './element-type.ts';

describe.each(['float16', 'bfloat16'] as const)('%s', (type) => {
  it('keeps every half', () => {
    const halves = Uint16Array.from({ length: 2 ** 16 }, (_, bits) => bits);
    const floats = decodeHalves(halves, type);
    const kept = halves.filter((_, i) => !Number.isNaN(floats[i]));
    expect(encodeHalves(floats, type).filter((_, i) => !Number.isNaN(floats[i]))).toEqual(kept);
    expect(decodeHalves(encodeHalves(Float32Array.of(NaN), type), type)).toEqual(Float32Array.of(NaN));
  });

  it('rounds to the nearest half', () => {
    const step = type === 'float16' ? 2 ** -11 : 2 ** -8;
    fc.assert(
      fc.property(fc.float({ min: Math.fround(1e-4), max: 60_000, noNaN: true }), (value) => {
        const [half] = decodeHalves(encodeHalves(Float32Array.of(value), type), type);
        expect(Math.abs(half! - value)).toBeLessThanOrEqual(value * step);
      }),
    );
  });
});
