// Who runs next, and where. Pure: the same state and time always give the same plan.
//
// The rule: requests in order of arrival; each goes to the group with the smallest share of its slots in use, of equals
// the first by name. Where no group has a free slot the rest waits: nobody overtakes. A request whose deadline has passed
// is not given to a group; its gateway ends it, and if that does not happen the record is abandoned.
//
// INVARIANT: no group is given more than its free slots; a request is placed at most once; of two requests that may both
// be placed, the earlier one is. The work grows with the free slots and not with the queue.

/** A recorded request that no group has. */
export interface WaitingRequest {
  readonly requestId: string;
  /** By this time its deadline has passed, or some time ago; infinite: it has none. */
  readonly expiredMs: number;
  /** Not to be offered before this, because its gateway did not answer, or asked for it. */
  readonly notBeforeMs: number;
}

/** A group that takes requests. */
export interface OpenGroup {
  readonly group: string;
  readonly slots: number;
  readonly usedSlots: number;
  /** Not to be used before this, because an attempt on it failed. */
  readonly notBeforeMs: number;
}

/** What is decided upon. */
export interface DispatchView {
  /** In order of arrival; read no further than there are free slots. */
  readonly waiting: Iterable<WaitingRequest>;
  readonly groups: readonly OpenGroup[];
}

/** Which request goes to which group. */
export interface Placement {
  readonly requestId: string;
  readonly group: string;
}

/** Plans by the rule above. */
export function planAssignments({ waiting, groups }: DispatchView, nowMs: number): Placement[] {
  const plan: Placement[] = [];
  const open = groups
    .filter((group) => group.notBeforeMs <= nowMs)
    .map(({ group, slots, usedSlots }) => ({ group, slots, usedSlots }));
  let target = leastLoaded(open);
  if (target === undefined) {
    return plan;
  }
  for (const request of waiting) {
    if (!isExpired(request, nowMs) && request.notBeforeMs <= nowMs) {
      target.usedSlots += 1;
      plan.push({ requestId: request.requestId, group: target.group });
      target = leastLoaded(open);
      if (target === undefined) {
        break;
      }
    }
  }
  return plan;
}

/** A gateway ends its requests at their deadline; it gets this long before somebody else cleans up. */
export const abandonAfterMs = 10_000;

/** The requests so far past their deadline that their gateway cannot be there any more: their records may go. */
export function planAbandoned(waiting: Iterable<WaitingRequest>, nowMs: number): string[] {
  const abandoned: string[] = [];
  for (const request of waiting) {
    if (isExpired(request, nowMs - abandonAfterMs)) {
      abandoned.push(request.requestId);
    }
  }
  return abandoned;
}

function isExpired({ expiredMs }: WaitingRequest, nowMs: number): boolean {
  return expiredMs <= nowMs;
}

function leastLoaded<Group extends Pick<OpenGroup, 'group' | 'slots' | 'usedSlots'>>(
  groups: readonly Group[],
): Group | undefined {
  let best: Group | undefined;
  for (const candidate of groups) {
    if (candidate.usedSlots < candidate.slots && (best === undefined || isBefore(candidate, best))) {
      best = candidate;
    }
  }
  return best;
}

function isBefore(a: Pick<OpenGroup, 'group' | 'slots' | 'usedSlots'>, b: typeof a): boolean {
  // Shares compared as products of whole numbers, so that equal shares are equal.
  const difference = a.usedSlots * b.slots - b.usedSlots * a.slots;
  return difference < 0 || (difference === 0 && a.group < b.group);
}
