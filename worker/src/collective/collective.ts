// What the ranks of a group do together, as blocking calls in the step thread: all-reduce, gather, broadcast. Owns the
// interface and the group of one. Knows no model; every rank makes the same calls in the same order.

import { ClusterError } from '@mimo/core/process/errors';

/**
 * One rank's place in its group. Calls block until the peers have made the same call, and throw `canceled` when the
 * group is stopped, `unavailable` when a peer is lost, `deadline_exceeded` when it stays silent.
 */
export interface Collective {
  readonly rank: number;
  readonly worldSize: number;
  /**
   * Replaces `values` by the sum over ranks. INVARIANT: parts are added in rank order on every rank, so all ranks hold
   * the same bits afterwards.
   */
  allReduce(values: Float32Array): void;
  /**
   * Sends `values` to rank 0, where rank r's arrive in `parts[r]`, rank 0's own included. Every rank knows all
   * `lengths`, by rank, in floats; only rank 0 passes parts.
   */
  gather(values: Float32Array, lengths: readonly number[], parts?: readonly Float32Array[]): void;
  /** Rank 0: sends a frame to all others, who are in `receive`. */
  broadcast(frame: Int32Array): void;
  /** Other ranks: the next frame of rank 0. */
  receive(): Int32Array;
  /** For code that waits for peers by other means: throws the same errors as the blocking calls. */
  watch(waitedMs: number): void;
  /** Leaves the group. Idempotent. */
  close(): void;
}

/** Another thread sets this flag to stop blocked calls: one int32, zero while the group runs. */
export type StopFlag = Int32Array;

/** Throws `canceled` once the flag is set. */
export function assertNotStopped(flag: StopFlag): void {
  if (Atomics.load(flag, 0) !== 0) {
    throw new ClusterError('canceled', 'the engine is closing');
  }
}

/**
 * Sums `parts` (equal lengths) into `into`, in order, rounding to float32 after each addition. `into` may be a part.
 */
export function sumInOrder(into: Float32Array, parts: readonly Float32Array[]): void {
  const first = parts[0]!;
  const second = parts[1]!;
  if (parts.length === 2) {
    for (let i = 0; i < into.length; i++) {
      into[i] = first[i]! + second[i]!;
    }
    return;
  }
  for (let i = 0; i < into.length; i++) {
    let sum = first[i]!;
    for (let r = 1; r < parts.length; r++) {
      sum = Math.fround(sum + parts[r]![i]!);
    }
    into[i] = sum;
  }
}

/** The group of one: every call returns at once. */
export function createSingleRankCollective(): Collective {
  return {
    rank: 0,
    worldSize: 1,
    allReduce: () => undefined,
    gather: (values, _lengths, parts) => parts?.[0]?.set(values),
    broadcast: () => undefined,
    receive: () => {
      throw new ClusterError('internal', 'a group of one has no leader to receive from');
    },
    watch: () => undefined,
    close: () => undefined,
  };
}
