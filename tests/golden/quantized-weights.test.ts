// The quantiser against the oracle's: for every matrix of the `quantised` fixture the same bytes and scales, to the
// bit.

import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';

import { openCheckpoint } from '@mimo/worker/compiler/checkpoint';
import { decodeFloats, quantizeInt4, quantizeInt8 } from '@mimo/worker/compiler/quantize';
import { describe, expect, it } from 'vitest';

const fixture = join(import.meta.dirname, 'fixtures/quantised');

interface Digests {
  readonly sha256: Readonly<Record<string, { readonly values: string; readonly scales: string }>>;
}

const expected: { readonly quantised: { readonly int8: Digests; readonly int4: Digests } } = JSON.parse(
  readFileSync(join(fixture, 'expected.json'), 'utf8'),
);
const checkpoint = await openCheckpoint(fixture);

function digest(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex').slice(0, 16);
}

function readWeights(name: string): Float32Array {
  const tensor = checkpoint.tensors.get(name);
  expect(tensor).toBeDefined();
  const { path = '', offset = 0, bytes = 0 } = tensor ?? {};
  const data = Uint8Array.from(readFileSync(path).subarray(offset, offset + bytes));
  const weights = new Float32Array(bytes / 2);
  expect(decodeFloats(data, 'BF16', weights)).toBe(-1);
  return weights;
}

describe('quantised weights', () => {
  it.each(Object.keys(expected.quantised.int8.sha256))("of %s in int8 are the oracle's", (name) => {
    const weights = readWeights(name);
    const values = new Uint8Array(weights.length);
    const scales = new Float32Array(weights.length / 32);
    quantizeInt8(weights, values, scales);
    const digests = { values: digest(values), scales: digest(new Uint8Array(scales.buffer)) };
    expect(digests).toEqual(expected.quantised.int8.sha256[name]);
  });

  it.each(Object.keys(expected.quantised.int4.sha256))("of %s in int4 are the oracle's", (name) => {
    const weights = readWeights(name);
    const packed = new Uint8Array(weights.length / 2);
    const scales = new Float32Array(weights.length / 32);
    quantizeInt4(weights, packed, scales);
    const values = Uint8Array.from(Array.from(packed).flatMap((byte) => [byte & 15, byte >>> 4]));
    const digests = { values: digest(values), scales: digest(new Uint8Array(scales.buffer)) };
    expect(digests).toEqual(expected.quantised.int4.sha256[name]);
  });
});
