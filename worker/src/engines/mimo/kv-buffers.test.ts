import { afterAll, describe, expect, it } from 'vitest';
import { createRuntime } from '../../runtime/create-runtime.ts';
import type { RuntimeTensor } from '../../runtime/memory.ts';
import { KvBuffers, type KvShape } from './kv-buffers.ts';

const runtime = await createRuntime({ implementation: 'auto', executionProvider: 'cpu', intraOpThreads: 1 });
afterAll(() => runtime.close());

const shape: KvShape = { floatType: 'float', layers: 2, kvHeads: 2, headDim: 4, budgetTokens: 64 };

const floats = ({ data }: RuntimeTensor): Float32Array => data as Float32Array;

/** The rows of one head, [rows, headDim]. */
function headRows(tensor: RuntimeTensor, of: { head: number; capacity: number; rows: number }): number[] {
  const start = of.head * of.capacity * shape.headDim;
  return [...floats(tensor).subarray(start, start + of.rows * shape.headDim)];
}

describe('KvBuffers', () => {
  it('keeps the first rows of every head, layer and kind when a slot grows', () => {
    const kv = new KvBuffers(runtime, shape);
    kv.reserve(3, 8, 0);
    const before = [0, 1].map((layer) => kv.layer(3, layer));
    for (const [layer, { key, value }] of before.entries()) {
      floats(key).forEach((_, i, all) => (all[i] = 1000 * layer + i));
      floats(value).forEach((_, i, all) => (all[i] = 1000 * layer + 500 + i));
    }
    kv.reserve(3, 32, 5);
    for (const layer of [0, 1]) {
      for (const kind of ['key', 'value'] as const) {
        for (const head of [0, 1]) {
          const rows = headRows(kv.layer(3, layer)[kind], { head, capacity: 32, rows: 5 });
          expect(rows).toEqual(headRows(before[layer]![kind], { head, capacity: 8, rows: 5 }));
        }
      }
    }
    kv.close();
  });

  it('reuses released memory and stays within the budget once slots are released', () => {
    const kv = new KvBuffers(runtime, shape);
    kv.reserve(0, 32, 0);
    kv.reserve(1, 32, 0);
    expect(kv.allocatedTokens).toBe(64);
    const first = kv.layer(0, 0).key.data;
    kv.release(0);
    kv.reserve(2, 32, 0);
    expect(kv.allocatedTokens).toBe(64);
    const reused = [0, 1].flatMap((layer) => [kv.layer(2, layer).key.data, kv.layer(2, layer).value.data]);
    expect(reused).toContain(first);
    kv.release(1);
    for (const slot of [3, 4, 5, 6]) {
      kv.reserve(slot, 8, 0);
    }
    expect(kv.allocatedTokens).toBeLessThanOrEqual(64);
    kv.close();
    expect(kv.allocatedTokens).toBe(0);
  });

  it('rejects a slot without memory', () => {
    const kv = new KvBuffers(runtime, shape);
    expect(() => kv.layer(0, 0)).toThrow('KV slot 0, layer 0: never reserved');
    kv.close();
  });
});
