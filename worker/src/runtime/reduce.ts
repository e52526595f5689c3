// Sums over the ranks of a group: the interface of whatever adds them, and how devices that reach one another do
// (cuda-group.ts, NCCL). Where none do, the engine sums over its collective on the host.

import type { RuntimeMemory } from './memory.ts';

/** Adds the ranks' shares of a value. */
export interface Reducer {
  /** Shares pass through JavaScript memory: it must be `exchanged`, and cannot be part of what is replayed. */
  readonly crossesHost: boolean;
  /**
   * Replaces the first `count` elements by their sum over the ranks, in order with the runs. All ranks get the same
   * bits.
   */
  sum(memory: RuntimeMemory, count: number): void;
}

/** This rank's place in a group whose devices reach one another. */
export interface DeviceGroupMember {
  readonly rank: number;
  readonly worldSize: number;
  /** Called while a wait for the device lasts; throws when it has lasted too long or shall end. */
  readonly watch: (waitedMs: number) => void;
}

/** Devices that reach those of other ranks. */
export interface DeviceLink {
  /** For rank 0 of a group: what all ranks `join` with. Empty if a library is missing: the host then sums. */
  createGroupId(): Int32Array;
  /** Blocks until all ranks have joined. Throws `failed_precondition` naming what is missing. Once a runtime. */
  join(id: Int32Array, member: DeviceGroupMember): Reducer;
}
