// Which requests may be breaking their groups. Pure.
//
// The rule: a break counts against a request that had less than `provenTokens` from that group; more of them clear
// it. After two breaks in a row it is tried only among requests that made progress there, and none joins them until
// it does too, or ends; after three it is tried alone. It is guilty when at least three groups in a row broke with it
// and it was alone in the last.
//
// Where it does not get to be alone, since what else is in its group runs for long, it is tried among requests that
// made progress after all, for which it waits longer after each break: an innocent one makes progress this way, and a
// guilty one breaks few groups more until it is alone, which is mostly at once: a group that has just broken is
// empty.
//
// INVARIANT: a request that never broke a group alone is never guilty. INVARIANT: one that breaks every group that it
// is in, before it makes progress, and is alone where it waits for that, is guilty after at most four breaks. Each
// trial that is disturbed costs one break more: where the patience ends, or where a new dispatcher gives the group
// more before a heartbeat says who is on trial there.

import { Company, type Needs } from '@mimo/proto/queue';

/** A sequence that got this many tokens from a group does not break it at its first step. */
export const provenTokens = 8;

const sharedBreaks = 2;
const guiltyBreaks = 3;

/** Most answers end within it. */
const aloneWaitMs = 15_000;

/** The suspicion against a request. */
export interface Suspicion {
  /** Groups in a row that broke before it made progress. */
  readonly breaks: number;
  /** It was alone in the last of them. */
  readonly alone: boolean;
}

export const unsuspected: Suspicion = { breaks: 0, alone: false };

/** How an attempt ended that was not the last. */
export interface LostAttempt {
  /** True: the group broke while it ran the sequence. False: it rejected or handed over the sequence. */
  readonly broke: boolean;
  /** Tokens that this attempt added. */
  readonly tokens: number;
  /** Nobody else was in the group. */
  readonly alone: boolean;
}

/** The suspicion against a request after an attempt. */
export function suspicionAfter(before: Suspicion, { broke, tokens, alone }: LostAttempt): Suspicion {
  if (tokens >= provenTokens) {
    return unsuspected;
  }
  return broke ? { breaks: before.breaks + 1, alone } : before;
}

/** With whom a request may be in a group. */
export function companyFor({ breaks }: Suspicion): Company {
  return breaks < sharedBreaks
    ? Company.UNSPECIFIED
    : breaks === sharedBreaks
      ? Company.PROVEN
      : Company.NONE;
}

/** How long a request waits, after so many breaks, for a group to itself before it is tried among proven ones. */
export function patienceMs({ company, breaks }: Pick<Needs, 'company' | 'breaks'>): number {
  return company === Company.NONE ? aloneWaitMs * 2 ** Math.max(0, breaks - guiltyBreaks) : 0;
}

/**
 * What its owner takes, from a dispatcher that knows of so many breaks: that one has waited for as long as it should.
 */
export function leastCompany(needs: Pick<Needs, 'company' | 'breaks'>, knownBreaks: number): Company {
  return needs.company === Company.NONE && needs.breaks === knownBreaks ? Company.PROVEN : needs.company;
}

/** Whether it is given to no further group. */
export function isGuilty({ breaks, alone }: Suspicion): boolean {
  return breaks >= guiltyBreaks && alone;
}
