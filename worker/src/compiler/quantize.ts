// Numbers of a checkpoint to fp32, and fp32 to the blocks of MatMulNBits. Pure; knows no file and no tensor name.
//
// The rule, per row and per block of 32 along the input dimension, symmetric, scales in fp32:
//   int8: scale = max|w| / 127          zero point 128, q in 0..255, one byte each
//   int4: scale = m / -8                 zero point 8,  q in 0..15, low nibble first; m: the first w of largest |w|
//   q = clamp(floor(fround(w * fround(1 / scale)) + 0.5) + zero point); scale 0: every q is the zero point.
// A scale so small that its inverse is not finite counts as 0.

import type { ElementDtype } from './safetensors.ts';
import { blockSize } from '../shards/shard-plan.ts';

/** Decodes `values.length` little-endian elements; returns the index of the first NaN or infinity, or -1. */
export function decodeFloats(bytes: Uint8Array, dtype: ElementDtype, values: Float32Array): number {
  const { buffer, byteOffset } = bytes;
  if (dtype === 'BF16') {
    return decodeBfloat16(new Uint16Array(buffer, byteOffset, values.length), values);
  }
  values.set(
    dtype === 'F16'
      ? new Float16Array(buffer, byteOffset, values.length)
      : new Float32Array(buffer, byteOffset, values.length),
  );
  return values.findIndex((value) => !Number.isFinite(value));
}

function decodeBfloat16(halves: Uint16Array, values: Float32Array): number {
  const exponent = 0x7f80;
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  let nonFinite = false;
  for (let i = 0; i < bits.length; i++) {
    const half = halves[i] ?? 0;
    bits[i] = half << 16;
    nonFinite ||= (half & exponent) === exponent;
  }
  return nonFinite ? halves.findIndex((half) => (half & exponent) === exponent) : -1;
}

/**
 * Quantises consecutive blocks of finite weights to 8 bits. `weights.length` is a multiple of 32; `quantized` receives
 * one byte per weight, `scales` one number per block.
 */
export function quantizeInt8(weights: Float32Array, quantized: Uint8Array, scales: Float32Array): void {
  const fround = Math.fround;
  for (let block = 0, start = 0; start < weights.length; block++, start += blockSize) {
    const end = start + blockSize;
    let largest = 0;
    for (let i = start; i < end; i++) {
      const magnitude = Math.abs(weights[i] ?? 0);
      if (magnitude > largest) {
        largest = magnitude;
      }
    }
    const scale = fround(largest / 127);
    const inverse = fround(1 / scale);
    if (inverse === Infinity) {
      scales[block] = 0;
      quantized.fill(128, start, end);
      continue;
    }
    scales[block] = scale;
    for (let i = start; i < end; i++) {
      // |w| * inverse exceeds 127 by rounding at most, so no clamp is needed: 128 - 127 = 1 to 128 + 127 = 255.
      quantized[i] = Math.floor(fround((weights[i] ?? 0) * inverse) + 0.5) + 128;
    }
  }
}

/** As `quantizeInt8` for 4 bits: `quantized` receives half a byte per weight. */
export function quantizeInt4(weights: Float32Array, quantized: Uint8Array, scales: Float32Array): void {
  const fround = Math.fround;
  for (let block = 0, start = 0; start < weights.length; block++, start += blockSize) {
    const end = start + blockSize;
    let largest = 0;
    let extreme = 0;
    for (let i = start; i < end; i++) {
      const weight = weights[i] ?? 0;
      const magnitude = Math.abs(weight);
      if (magnitude > largest) {
        largest = magnitude;
        extreme = weight;
      }
    }
    const scale = fround(extreme / -8);
    const inverse = fround(1 / scale);
    if (inverse === Infinity || inverse === -Infinity) {
      scales[block] = 0;
      quantized.fill(0x88, start / 2, end / 2);
      continue;
    }
    scales[block] = scale;
    for (let i = start; i < end; i += 2) {
      // -8..8 becomes 0..16, of which only 16 is out of range.
      const low = Math.min(15, Math.floor(fround((weights[i] ?? 0) * inverse) + 0.5) + 8);
      const high = Math.min(15, Math.floor(fround((weights[i + 1] ?? 0) * inverse) + 0.5) + 8);
      quantized[i / 2] = low | (high << 4);
    }
  }
}
