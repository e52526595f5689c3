// How long groups take from their creation until they serve, measured. Pure. A group that could not be placed tells how
// full the cluster is, not how long a start-up takes, so it is left out.

import { isServing, type ReplicaGroup } from './groups.ts';

/** What was measured; `startingUids` are the first pods of groups that are being timed. */
export interface StartUpMemory {
  readonly startUpMs: number | undefined;
  readonly startingUids: ReadonlySet<string>;
}

export const noStartUp: StartUpMemory = { startUpMs: undefined, startingUids: new Set() };

/** Weight of the latest start-up: images and caches make the next ones like it. */
const latestWeight = 0.5;

/** Takes in the groups as they are: call it at every look. */
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

/** For each group that starts and does not serve yet, when it will; 0 where it is overdue. */
export function readyInMs(
  groups: readonly ReplicaGroup[],
  startUpMs: number,
  nowMs: number,
): readonly number[] {
  return groups
    .filter((group) => group.state === 'starting' && !isServing(group))
    .map(({ createdMs }) => Math.max(0, createdMs + startUpMs - nowMs));
}
