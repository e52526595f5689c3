// Each sequence's share of the KV cache. Pure bookkeeping: blocks of positions, slots, capacities; the memory itself is
// in kv-buffers.ts on every rank. Attention needs one contiguous buffer per sequence. So a sequence holds one run of
// blocks whose capacity is a power of two (limited by the longest context), and grows by doubling.
//
// INVARIANT: the capacities of all grants add up to the used blocks, which never exceed the total; no slot has two
// owners.

import { ClusterError } from '@mimo/core/process/errors';

/** Positions of one block. 64 rows are as efficient a prefill chunk as any larger (reference, section F). */
export const kvBlockTokens = 64;

/** A sequence's grant. */
export interface KvGrant {
  readonly slot: number;
  readonly blocks: number;
}

/** Blocks for a sequence of `tokens` positions: the next power of two, but no more than `maxBlocks`. */
export function blocksFor(tokens: number, maxBlocks: number): number {
  let blocks = 1;
  while (blocks * kvBlockTokens < tokens) {
    blocks *= 2;
  }
  return Math.min(blocks, maxBlocks);
}

/** Blocks and slots of one engine. */
export class KvCache {
  readonly totalBlocks: number;
  readonly #slots: number;
  readonly #grants = new Map<number, KvGrant>();
  readonly #freeSlots: number[];
  #usedBlocks = 0;

  constructor(size: { readonly blocks: number; readonly slots: number }) {
    this.totalBlocks = size.blocks;
    this.#slots = size.slots;
    this.#freeSlots = Array.from({ length: size.slots }, (_, i) => size.slots - 1 - i);
  }

  get usedBlocks(): number {
    return this.#usedBlocks;
  }

  get freeBlocks(): number {
    return this.totalBlocks - this.#usedBlocks;
  }

  /** The number of sequences that hold blocks. */
  get holders(): number {
    return this.#grants.size;
  }

  grantOf(sequenceId: number): KvGrant | undefined {
    return this.#grants.get(sequenceId);
  }

  /** Grants the sequence at least `blocks`, keeping its slot. Throws `internal` beyond the free blocks or slots. */
  grant(sequenceId: number, blocks: number): KvGrant {
    const held = this.#grants.get(sequenceId);
    if (held !== undefined && held.blocks >= blocks) {
      return held;
    }
    const more = blocks - (held?.blocks ?? 0);
    const slot = held?.slot ?? this.#freeSlots.at(-1);
    if (slot === undefined || more > this.freeBlocks) {
      throw new ClusterError(
        'internal',
        `KV cache: sequence ${sequenceId} wants ${more} more blocks, ${this.freeBlocks} and ${this.#freeSlots.length} slots are free`,
      );
    }
    if (held === undefined) {
      this.#freeSlots.pop();
    }
    const grant = { slot, blocks };
    this.#grants.set(sequenceId, grant);
    this.#usedBlocks += more;
    return grant;
  }

  /** Releases the sequence's blocks and slot; returns the freed slot, or undefined if it held nothing. */
  release(sequenceId: number): number | undefined {
    const held = this.#grants.get(sequenceId);
    if (held === undefined) {
      return undefined;
    }
    this.#grants.delete(sequenceId);
    this.#usedBlocks -= held.blocks;
    this.#freeSlots.push(held.slot);
    return held.slot;
  }

  /** Throws `internal` naming the violated invariant. */
  checkIntegrity(): void {
    const grants = [...this.#grants.values()];
    const blocks = grants.reduce((sum, grant) => sum + grant.blocks, 0);
    const slots = new Set([...grants.map((grant) => grant.slot), ...this.#freeSlots]);
    const problems = [
      blocks === this.#usedBlocks || `grants hold ${blocks} blocks, counted are ${this.#usedBlocks}`,
      blocks <= this.totalBlocks || `grants hold ${blocks} blocks of ${this.totalBlocks}`,
      slots.size === this.#slots || `${slots.size} different slots of ${this.#slots}`,
      grants.length + this.#freeSlots.length === this.#slots || 'a slot is both granted and free',
    ].filter((problem) => problem !== true);
    if (problems.length > 0) {
      throw new ClusterError('internal', `KV cache: ${problems.join('; ')}`);
    }
  }
}
