// Element types of tensors, and float32 to and from the halves. Pure; knows no tensor and no model.

/** Floats that segments compute in, by their ONNX names. */
export type FloatType = 'float' | 'float16' | 'bfloat16';

export type ElementType = FloatType | 'int32' | 'int64';

/** Bytes of one element. */
export const elementBytes: Readonly<Record<ElementType, number>> = {
  float: 4,
  float16: 2,
  bfloat16: 2,
  int32: 4,
  int64: 8,
};

/** float32 to the bits of a half, rounded to nearest, ties to even. Values beyond float16's 65504 become infinities. */
export function encodeHalves(values: Float32Array, type: 'float16' | 'bfloat16'): Uint16Array<ArrayBuffer> {
  if (type === 'float16') {
    return new Uint16Array(Float16Array.from(values).buffer);
  }
  const bits = new Uint32Array(Float32Array.from(values).buffer);
  const halves = new Uint16Array(bits.length);
  for (let i = 0; i < bits.length; i++) {
    const word = bits[i] ?? 0;
    // Rounding would carry a NaN of a small payload into an infinity.
    const isNaN = (word & 0x7fffffff) > 0x7f800000;
    halves[i] = isNaN ? (word >>> 16) | 0x40 : (word + 0x7fff + ((word >>> 16) & 1)) >>> 16;
  }
  return halves;
}

/** The bits of halves to float32, exactly. */
export function decodeHalves(
  halves: Uint16Array<ArrayBuffer>,
  type: 'float16' | 'bfloat16',
): Float32Array<ArrayBuffer> {
  if (type === 'float16') {
    return Float32Array.from(new Float16Array(halves.buffer, halves.byteOffset, halves.length));
  }
  return new Float32Array(Uint32Array.from(halves, (half) => half << 16).buffer);
}
