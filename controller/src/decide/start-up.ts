// The measured time from a group's creation until it serves. Pure. A group that could not be placed reflects a full
// cluster, not a slow start-up, so it is left out.

import { isServing, type ReplicaGroup } from './groups.ts';

/** The measurement; `startingUids` are the first pods of groups being timed. */
export interface StartUpMemory {
  readonly startUpMs: number | undefined;
  readonly startingUids: ReadonlySet<string>;
}

export const noStartUp: StartUpMemory = { startUpMs: undefined, startingUids: new Set() };

/** Weight of the latest start-up: images and caches make the next ones like it. */
const latestWeight = 0.5;

/** Updates from the current groups: call it in every round. */
export function observeStartUps(
  before: StartUpMemory,
  groups: readonly ReplicaGroup[],
  nowMs: number,
): StartUpMemory {
  let { startUpMs } = before;
  const startingUids = new Set<string>();
  for (const { state, blocker, pods, createdMs } of groups) {
    const uid = pods[0]?.uid ?? '';
    if (state === 'starting' && blocker === undefined) {
      startingUids.add(uid);
    } else if (state === 'ready' && before.startingUids.has(uid)) {
      const tookMs = nowMs - createdMs;
      startUpMs = startUpMs === undefined ? tookMs : startUpMs + (tookMs - startUpMs) * latestWeight;
    }
  }
  return { startUpMs, startingUids };
}

/** For each starting group, the expected time until it serves; 0 if it is overdue. */
export function readyInMs(
  groups: readonly ReplicaGroup[],
  startUpMs: number,
  nowMs: number,
): readonly number[] {
  return groups
    .filter((group) => group.state === 'starting' && !isServing(group))
    .map(({ createdMs }) => Math.max(0, createdMs + startUpMs - nowMs));
}
