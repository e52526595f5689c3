// The ranks of a group as threads of one process, over shared memory. Owns the memory layout and the hand-over between
// threads; knows no model. Measured on 2 cores: 6-38 us an all-reduce of 16 KiB (reference, section E).
//
// Every operation is a barrier: a rank writes its part into its slot, publishes its operation count, and waits for the
// counts it needs. Slots are double-buffered, so a rank may write operation k+2 over operation k without another wait:
// every rank has published k+1, and a rank publishes k+1 only after it has read k.

import { availableParallelism } from 'node:os';
import { ClusterError } from '@mimo/core/process/errors';
import { assertNotStopped, sumInOrder, type Collective, type StopFlag } from './collective.ts';

/** Floats of one slot; longer values go through in pieces. 1 MiB holds the rows of a prefill chunk. */
const slotFloats = 262_144;

/**
 * Polls of a peer's count before sleeping; some 10 us. Sleeping at once costs 20-80 us, spinning long starves others.
 */
const spins = 2000;

const sleepMs = 1000;

/** Shared by all ranks of an in-process group; structured-cloneable, so it can be passed to threads. */
export interface InProcessGroup {
  readonly worldSize: number;
  /** [stop, count of rank 0, count of rank 1, ...] */
  readonly control: SharedArrayBuffer;
  /** [parity, rank, slotFloats] */
  readonly slots: SharedArrayBuffer;
}

/** Memory for a group of `worldSize` threads. */
export function createInProcessGroup(worldSize: number): InProcessGroup {
  return {
    worldSize,
    control: new SharedArrayBuffer(4 * (1 + worldSize)),
    slots: new SharedArrayBuffer(4 * 2 * worldSize * slotFloats),
  };
}

/** Wakes every blocked rank with `canceled`. Callable from any thread. */
export function stopInProcessGroup(group: InProcessGroup): void {
  const control = new Int32Array(group.control);
  Atomics.store(control, 0, 1);
  for (let i = 0; i < control.length; i++) {
    Atomics.notify(control, i);
  }
}

class InProcessCollective implements Collective {
  readonly rank: number;
  readonly worldSize: number;
  readonly #control: Int32Array;
  readonly #stop: StopFlag;
  /** By parity, then rank. */
  readonly #slots: readonly (readonly Float32Array[])[];
  readonly #spins: number;
  #count = 0;

  constructor(group: InProcessGroup, rank: number) {
    this.rank = rank;
    this.worldSize = group.worldSize;
    this.#control = new Int32Array(group.control);
    this.#stop = this.#control.subarray(0, 1);
    this.#slots = [0, 1].map((parity) =>
      Array.from(
        { length: group.worldSize },
        (_, r) => new Float32Array(group.slots, 4 * slotFloats * (parity * group.worldSize + r), slotFloats),
      ),
    );
    // With more ranks than cores, the awaited peer may need the core that this rank spins on.
    this.#spins = group.worldSize <= availableParallelism() ? spins : 0;
  }

  allReduce(values: Float32Array): void {
    for (let start = 0; start < values.length; start += slotFloats) {
      const piece = values.subarray(start, start + slotFloats);
      const slots = this.#exchange(piece);
      sumInOrder(
        piece,
        slots.map((slot) => slot.subarray(0, piece.length)),
      );
    }
  }

  gather(values: Float32Array, lengths: readonly number[], parts: readonly Float32Array[] = []): void {
    // Ranks may differ in length: all make as many exchanges as the longest needs.
    const longest = Math.max(...lengths);
    for (let start = 0; start < longest; start += slotFloats) {
      const slots = this.#exchange(values.subarray(start, start + slotFloats));
      for (const [r, part] of parts.entries()) {
        const count = Math.min(slotFloats, part.length - start);
        if (count > 0) {
          part.set(slots[r]!.subarray(0, count), start);
        }
      }
    }
  }

  broadcast(frame: Int32Array): void {
    if (frame.length >= slotFloats) {
      throw new ClusterError('internal', `frame: at most ${slotFloats - 1} words, has ${frame.length}`);
    }
    const message = Int32Array.of(frame.length, ...frame);
    this.#exchange(new Float32Array(message.buffer));
  }

  receive(): Int32Array {
    const slot = this.#exchange(new Float32Array(0))[0]!;
    const words = new Int32Array(slot.buffer, slot.byteOffset, slotFloats);
    return words.slice(1, 1 + words[0]!);
  }

  watch(): void {
    assertNotStopped(this.#stop);
  }

  close(): void {
    Atomics.store(this.#stop, 0, 1);
    for (let i = 0; i < this.#control.length; i++) {
      Atomics.notify(this.#control, i);
    }
  }

  /** Publishes this rank's values and waits for everyone's; the returned slots stay valid until the next exchange. */
  #exchange(values: Float32Array): readonly Float32Array[] {
    assertNotStopped(this.#stop);
    const slots = this.#slots[this.#count & 1]!;
    slots[this.rank]!.set(values);
    this.#count = (this.#count + 1) | 0;
    Atomics.store(this.#control, 1 + this.rank, this.#count);
    Atomics.notify(this.#control, 1 + this.rank);
    for (let r = 0; r < this.worldSize; r++) {
      this.#waitFor(1 + r);
    }
    return slots;
  }

  #waitFor(cell: number): void {
    for (let i = 0; ; i++) {
      const seen = Atomics.load(this.#control, cell);
      // A difference, not a comparison: counts wrap around.
      if (((seen - this.#count) | 0) >= 0) {
        return;
      }
      if (i >= this.#spins) {
        // Before the wait, not after: a peer that leaves after this operation has published its count.
        assertNotStopped(this.#stop);
        Atomics.wait(this.#control, cell, seen, sleepMs);
      }
    }
  }
}

/** One rank's end. `close` stops the whole group: threads of one process live and die together. */
export function createInProcessCollective(group: InProcessGroup, rank: number): Collective {
  return new InProcessCollective(group, rank);
}
