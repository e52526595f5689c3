// One rank's key and value memory: per slot and layer a K and a V buffer, [1, kvHeads, capacity, headDim], as
// GroupQueryAttention needs them. Owns allocation, growth and reuse; the leader decides each slot's capacity
// (kv-cache.ts), which arrives with each pass.

import { ClusterError } from '@mimo/core/process/errors';
import type { FloatType } from '../../shards/element-type.ts';
import type { RuntimeMemory, RuntimeTensor } from '../../runtime/memory.ts';
import type { Runtime } from '../../runtime/runtime.ts';

export interface KvShape {
  readonly floatType: FloatType;
  /** Layers that keep keys and values, the MTP layer included. */
  readonly layers: number;
  /** This rank's. */
  readonly kvHeads: number;
  readonly headDim: number;
  /** Positions that all slots together may hold; unused buffers beyond it are dropped. */
  readonly budgetTokens: number;
}

interface Buffer {
  readonly memory: RuntimeMemory;
  readonly tensor: RuntimeTensor;
}

interface Slot {
  readonly capacity: number;
  /** By layer: keys, values. */
  readonly layers: readonly { readonly key: Buffer; readonly value: Buffer }[];
}

/** Lives as long as the shard; `close` frees all. */
export class KvBuffers {
  readonly #runtime: Runtime;
  readonly #shape: KvShape;
  readonly #slots = new Map<number, Slot>();
  /** Unused buffers by capacity. */
  readonly #free = new Map<number, Buffer[]>();
  #allocatedTokens = 0;

  constructor(runtime: Runtime, shape: KvShape) {
    this.#runtime = runtime;
    this.#shape = shape;
  }

  /** Positions of all buffers, used and unused, counted once per K/V pair and layer. */
  get allocatedTokens(): number {
    return this.#allocatedTokens / (2 * this.#shape.layers);
  }

  /** Grows the slot to `capacity` positions and keeps its first `keepTokens`. */
  reserve(slot: number, capacity: number, keepTokens: number): void {
    const current = this.#slots.get(slot);
    if (current !== undefined && current.capacity >= capacity) {
      return;
    }
    const grow = (old: Buffer | undefined): Buffer => {
      const buffer = this.#take(capacity);
      if (old !== undefined && current !== undefined) {
        this.#copyRows(old, buffer, { from: current.capacity, to: capacity, rows: keepTokens });
        this.#give(current.capacity, old);
      }
      return buffer;
    };
    // Buffer by buffer, so that growing needs one spare buffer and not a whole second slot.
    this.#slots.set(slot, {
      capacity,
      layers: Array.from({ length: this.#shape.layers }, (_, layer) => ({
        key: grow(current?.layers[layer]?.key),
        value: grow(current?.layers[layer]?.value),
      })),
    });
  }

  /** [1, kvHeads, capacity, headDim] each. */
  layer(slot: number, layer: number): { readonly key: RuntimeTensor; readonly value: RuntimeTensor } {
    const held = this.#slots.get(slot)?.layers[layer];
    if (held === undefined) {
      throw new ClusterError('internal', `KV slot ${slot}, layer ${layer}: never reserved`);
    }
    return { key: held.key.tensor, value: held.value.tensor };
  }

  release(slot: number): void {
    const held = this.#slots.get(slot);
    this.#slots.delete(slot);
    for (const { key, value } of held?.layers ?? []) {
      this.#give(held!.capacity, key);
      this.#give(held!.capacity, value);
    }
  }

  close(): void {
    for (const slot of this.#slots.keys()) {
      this.release(slot);
    }
    this.#drop(() => true);
  }

  #take(capacity: number): Buffer {
    const unused = this.#free.get(capacity)?.pop();
    if (unused !== undefined) {
      return unused;
    }
    const limit = 2 * this.#shape.layers * this.#shape.budgetTokens;
    this.#drop(() => this.#allocatedTokens + capacity > limit);
    const { floatType, kvHeads, headDim } = this.#shape;
    const memory = this.#runtime.allocate(floatType, kvHeads * capacity * headDim, 'resident');
    this.#allocatedTokens += capacity;
    return { memory, tensor: memory.tensor(0, [1, kvHeads, capacity, headDim]) };
  }

  #give(capacity: number, buffer: Buffer): void {
    const unused = this.#free.get(capacity) ?? [];
    unused.push(buffer);
    this.#free.set(capacity, unused);
  }

  #drop(needed: () => boolean): void {
    for (const [capacity, unused] of this.#free) {
      while (unused.length > 0 && needed()) {
        const dropped = unused.pop();
        dropped?.tensor.release();
        dropped?.memory.release();
        this.#allocatedTokens -= capacity;
      }
    }
  }

  #copyRows(source: Buffer, target: Buffer, size: { from: number; to: number; rows: number }): void {
    const { kvHeads, headDim } = this.#shape;
    // The kernels that use these buffers compute on the host, so the memory is JavaScript's.
    const [from, to] = [source, target].map(({ tensor }) => tensor.data as Float32Array);
    for (let head = 0; head < kvHeads; head++) {
      const start = head * size.from * headDim;
      to!.set(from!.subarray(start, start + size.rows * headDim), head * size.to * headDim);
    }
  }
}
