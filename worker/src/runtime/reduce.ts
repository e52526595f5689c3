// Sums over the ranks of a group: the interface, for devices that reach one another (cuda-group.ts, NCCL). For other
// devices, the engine sums over its collective on the host.

import type { RuntimeMemory } from './memory.ts';

/** Adds the ranks' shares of a value. */
export interface Reducer {
  /** Shares pass through JavaScript memory: it must be `exchanged`, and the sum cannot be part of a replay. */
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
  /** Called during a wait for the device; throws when the wait has timed out or was canceled. */
  readonly watch: (waitedMs: number) => void;
}

/** Devices that reach those of other ranks. */
export interface DeviceLink {
  /** For rank 0 of a group: the id with which all ranks `join`. Empty if a library is missing: the host then sums. */
  createGroupId(): Int32Array;
  /**
   * Blocks until all ranks have joined. Throws `failed_precondition` naming the missing part. Call it once per runtime.
   */
  join(id: Int32Array, member: DeviceGroupMember): Reducer;
}
