// A model's queue and groups as its dispatcher publishes them -> the inputs of decisions. Pure.

import { queueStateFreshMs, type QueueState } from '@mimo/core/bus/signals';

import type { QueueReading } from '../decide/arrival-load.ts';
import type { GroupLoad } from '../decide/groups.ts';

/** The autoscaler's reading of a queue state. */
export function queueReading(state: QueueState): QueueReading {
  return {
    waitingRequests: state.waitingRequests,
    waitingTokens: state.waitingTokens,
    inFlightRequests: state.runningRequests,
    inFlightTokens: state.inFlightTokens,
    slots: state.slots,
    oldestWaitingMs: state.oldestWaitingMs,
    arrivedTokens: state.arrivedTokens,
    endedTokens: state.endedTokens,
    countersEpoch: state.dispatcherEpoch,
  };
}

/** How long a new dispatcher may need to reach every group. */
const takeoverMs = 5_000;

export interface QueueSight {
  /** Undefined: no recent state. */
  readonly state: QueueState | undefined;
  readonly receivedMs: number;
  /** When this dispatcher's first state was received. */
  readonly dispatcherSinceMs: number;
}

export interface ObservedLoads {
  readonly loads: ReadonlyMap<string, GroupLoad>;
  /** False: a group that is not in `loads` may be routable all the same. */
  readonly loadsComplete: boolean;
}

/**
 * The groups as the dispatcher sees them. Without a fresh state nothing is known. A new dispatcher's list of
 * reachable groups is trusted, but groups missing from it may only be not reached yet.
 */
export function observeLoads(
  { state, receivedMs, dispatcherSinceMs }: QueueSight,
  nowMs: number,
): ObservedLoads {
  if (state === undefined || nowMs - receivedMs > queueStateFreshMs) {
    return { loads: new Map(), loadsComplete: false };
  }
  const loadsComplete = nowMs - dispatcherSinceMs >= takeoverMs;
  const known = state.groups.filter(({ routable }) => loadsComplete || routable);
  return {
    loads: new Map(
      known.map(({ group, identity, routable, draining, inFlightRequests, inFlightTokens }) => [
        group,
        {
          routable,
          draining,
          inFlightRequests,
          inFlightTokens,
          waitedFor: isWaitedFor(identity, state),
        },
      ]),
    ),
    loadsComplete,
  };
}

/** Whether requests wait for an identity whose groups are all full: meanwhile new requests go to newer groups. */
function isWaitedFor(identity: string, { waitingFor, groups }: QueueState): boolean {
  const hasRoom = groups.some(
    (group) =>
      group.identity === identity &&
      group.routable &&
      !group.draining &&
      group.inFlightRequests < group.slots,
  );
  return identity !== '' && !hasRoom && waitingFor.some((waiting) => waiting.identity === identity);
}
