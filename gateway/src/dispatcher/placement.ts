// Decides which request runs next, and in which group. Pure: the same state and time always produce the same plan.
//
// The rule: requests are placed in order of arrival. Each goes to the group of its identity with the smallest share of
// its slots in use; ties go to the first by name. If none of these groups has a free slot, the request waits, and no
// later one of the same identity overtakes it. A request whose deadline has passed is not placed: its gateway ends it,
// and if the gateway fails to, the record is abandoned.
//
// Requests on trial may have broken their last groups (suspicion.ts). They come first, because a group mostly has the
// company that they need when it has just restarted; those with the most breaks lead. Each goes to a group with
// suitable company, which is then closed to all others. Without such a group, one is cleared: it gets no requests until
// its company is suitable, even if it is the only group. The choice is the group with the fewest requests; ties go to
// the first by name. Since a cleared group only empties, the choice changes only to one with as few requests or fewer.
// So a request on trial waits for running requests, and never for newly arriving ones.
//
// INVARIANT: no group gets more requests than its free slots, or a request of another identity; a request is placed at
// most once; a group that gets a request on trial gets no other; at most one group is cleared for requests of one
// identity; of two requests of one identity that are not on trial and could both be placed, the earlier one is.

import { Company } from '@mimo/proto/queue';

/** A recorded request that no group has. */
export interface WaitingRequest {
  readonly requestId: string;
  /** Latest possible time of its deadline; infinite without one. */
  readonly expiredMs: number;
  /** Not to be offered before this time, because its gateway did not answer. */
  readonly notBeforeMs: number;
  /** The identity of the groups that may compute it. If empty, any group may. */
  readonly identity: string;
  readonly company: Company;
}

/** A request whose company is restricted; `company` is the least restrictive one that it accepts. */
export interface TrialRequest extends WaitingRequest {
  /** Groups in a row that broke with it. */
  readonly breaks: number;
}

/** A group that accepts requests. */
export interface OpenGroup {
  readonly group: string;
  readonly identity: string;
  readonly slots: number;
  readonly usedSlots: number;
  /** Not to be used before this time, because an attempt on it failed. */
  readonly notBeforeMs: number;
  /** The company in the group, according to the group; UNSPECIFIED also if unknown. */
  readonly company: Company;
}

/** The input of the decision. */
export interface DispatchView {
  readonly onTrial: Iterable<TrialRequest>;
  /** In order of arrival, on trial or not; read only as far as there are free slots. */
  readonly waiting: Iterable<WaitingRequest>;
  readonly groups: readonly OpenGroup[];
}

/** Which request goes to which group, and with which company; UNSPECIFIED: no promise. */
export interface Placement {
  readonly requestId: string;
  readonly group: string;
  readonly company: Company;
  /** Breaks of the request, as far as is known. */
  readonly breaks: number;
}

/** Plans by the rule above. */
export function planAssignments({ onTrial, waiting, groups }: DispatchView, nowMs: number): Placement[] {
  const plan: Placement[] = [];
  let open = groups
    .filter((group) => group.notBeforeMs <= nowMs && group.usedSlots < group.slots)
    .map((group) => ({ ...group }));
  const close = (name: string): void => {
    open = open.filter(({ group }) => group !== name);
  };
  const isDue = (request: WaitingRequest): boolean =>
    !isExpired(request, nowMs) && request.notBeforeMs <= nowMs;

  const taken = new Set<string>();
  const cleared: OpenGroup[] = [];
  const trials = [...onTrial].filter(isDue).toSorted((one, other) => other.breaks - one.breaks);
  for (const request of trials) {
    const { requestId, company, breaks } = request;
    const target = leastLoaded(open.filter((group) => fits(request, group) && group.company >= company));
    if (target !== undefined) {
      plan.push({ requestId, group: target.group, company: target.company, breaks });
      taken.add(target.group);
      close(target.group);
    } else if (!cleared.some((group) => fits(request, group))) {
      const next = emptiest(groups.filter((group) => fits(request, group) && !taken.has(group.group)));
      if (next !== undefined) {
        cleared.push(next);
        close(next.group);
      }
    }
  }
  if (open.length === 0) {
    return plan;
  }
  for (const request of waiting) {
    const isOrdinary = request.company === Company.UNSPECIFIED;
    const target =
      isOrdinary && isDue(request) ? leastLoaded(open.filter((group) => fits(request, group))) : undefined;
    if (target !== undefined) {
      plan.push({
        requestId: request.requestId,
        group: target.group,
        company: Company.UNSPECIFIED,
        breaks: 0,
      });
      target.usedSlots += 1;
      if (target.usedSlots === target.slots) {
        close(target.group);
        if (open.length === 0) {
          break;
        }
      }
    }
  }
  return plan;
}

/** A gateway ends its requests at their deadline; after this extra time the dispatcher deletes the record. */
export const abandonAfterMs = 10_000;

/** Requests so far past their deadline that their gateway must be gone: their records may be deleted. */
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

function fits({ identity }: WaitingRequest, group: OpenGroup): boolean {
  return identity === '' || identity === group.identity;
}

function leastLoaded<Group extends Pick<OpenGroup, 'group' | 'slots' | 'usedSlots'>>(
  groups: readonly Group[],
): Group | undefined {
  let best: Group | undefined;
  for (const candidate of groups) {
    if (best === undefined || isBefore(candidate, best)) {
      best = candidate;
    }
  }
  return best;
}

function emptiest(groups: readonly OpenGroup[]): OpenGroup | undefined {
  return groups.toSorted((a, b) => a.usedSlots - b.usedSlots || (a.group < b.group ? -1 : 1))[0];
}

function isBefore(a: Pick<OpenGroup, 'group' | 'slots' | 'usedSlots'>, b: typeof a): boolean {
  // Compares the shares as products of integers, so that equal shares are exactly equal.
  const difference = a.usedSlots * b.slots - b.usedSlots * a.slots;
  return difference < 0 || (difference === 0 && a.group < b.group);
}
