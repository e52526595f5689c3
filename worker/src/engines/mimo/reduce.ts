// How the ranks' shares of a value are added: by the devices if they reach one another, else on the host over the
// collective; one rank adds nothing. Owns the choice, which rank 0 makes for all by the group id in its plan.

import { ClusterError } from '@mimo/core/process/errors';
import type { Collective } from '../../collective/collective.ts';
import type { Reducer } from '../../runtime/reduce.ts';
import type { Runtime } from '../../runtime/runtime.ts';

/** The id with which the group's devices join; empty: the host sums. Called by rank 0, which sends it to the others. */
export function createGroupId({ deviceLink }: Runtime, { worldSize }: Collective): Int32Array {
  return (worldSize === 1 ? undefined : deviceLink?.createGroupId()) ?? new Int32Array(0);
}

/** With a group id, blocks until all devices have joined. Throws `failed_precondition` if this rank's device cannot. */
export function createReducer({ deviceLink }: Runtime, collective: Collective, groupId: Int32Array): Reducer {
  const { rank, worldSize } = collective;
  if (worldSize === 1) {
    return { crossesHost: false, sum: () => undefined };
  }
  if (groupId.length === 0) {
    return {
      crossesHost: true,
      sum: (memory, count) => {
        const values = memory.read(0, count);
        collective.allReduce(values);
        memory.write(0, values);
      },
    };
  }
  if (deviceLink === undefined) {
    throw new ClusterError(
      'failed_precondition',
      `rank 0 sums on devices, rank ${rank} has none that reach others`,
    );
  }
  return deviceLink.join(groupId, { rank, worldSize, watch: (waitedMs) => collective.watch(waitedMs) });
}
