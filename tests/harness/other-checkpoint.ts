// A second checkpoint for tests that replace a model: the demonstration model's tokenizer and shapes, and another text.

import { cp, open } from 'node:fs/promises';
import { join } from 'node:path';

import { readSafetensorsHeader } from '@mimo/worker/compiler/safetensors';

const demo = join(import.meta.dirname, '../../models/mimo-demo');
const changed = 'model.layers.1.mlp.up_proj.weight';

/** Copies the demonstration model to a directory, with the values of one of its tensors in reverse. */
export async function writeOtherCheckpoint(directory: string): Promise<void> {
  await cp(demo, directory, { recursive: true });
  const path = join(directory, 'model.safetensors');
  const tensor = (await readSafetensorsHeader(path)).find(({ name }) => name === changed);
  if (tensor === undefined) {
    throw new Error(`the demonstration model has no ${changed}`);
  }
  // bf16: two bytes a value, which stay finite wherever they go.
  const bytes = Buffer.alloc(tensor.shape.reduce((product, size) => product * size, 2));
  const file = await open(path, 'r+');
  try {
    await file.read(bytes, 0, bytes.length, tensor.offset);
    new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.length / 2).reverse();
    await file.write(bytes, 0, bytes.length, tensor.offset);
  } finally {
    await file.close();
  }
}
