// The tables of rotary position embeddings. Pure.

/** RoPE's cos and sin of position * theta^(-2 i / D), angles in fp32 as the reference computes them. */
export function ropeTables(rope: {
  readonly headDim: number;
  readonly ropeTheta: number;
  readonly positions: number;
}): {
  cos: Float32Array<ArrayBuffer>;
  sin: Float32Array<ArrayBuffer>;
} {
  const half = rope.headDim / 2;
  const cos = new Float32Array(rope.positions * half); // [positions, D / 2]
  const sin = new Float32Array(rope.positions * half); // [positions, D / 2]
  const frequencies = Float32Array.from({ length: half }, (_, pair) => {
    const exponent = Math.fround((2 * pair) / rope.headDim);
    return 1 / Math.fround(rope.ropeTheta ** exponent);
  });
  for (let position = 0; position < rope.positions; position++) {
    frequencies.forEach((frequency, pair) => {
      const angle = Math.fround(position * frequency);
      cos[position * half + pair] = Math.cos(angle);
      sin[position * half + pair] = Math.sin(angle);
    });
  }
  return { cos, sin };
}
