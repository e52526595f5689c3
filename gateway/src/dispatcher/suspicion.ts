// Which requests may be breaking their groups. Pure.
//
// The rule: a break counts against a request that had got fewer than `provenTokens` tokens from that group; getting
// that many clears it. After two breaks in a row the request is tried only in a group whose other requests have made
// progress there, and none joins them until it makes progress too, or ends. After three breaks it is tried alone. It is
// guilty when at least three groups in a row broke with it and it was alone in the last.
//
// A request may wait in vain to be alone, because other requests run for long. Then it is tried among proven ones after
// all, after a wait that doubles with each break. An innocent request makes progress this way; a guilty one breaks a
// few more groups until it is alone, mostly soon, since a group that has just broken is empty.
//
// INVARIANT: a request that never broke a group while alone is never guilty. INVARIANT: a request that breaks each of
// its groups before it makes progress, and is alone whenever it waits for that, is guilty after at most four breaks.
// Each disturbed trial costs one more break: its patience ends, or a new dispatcher gives the group other requests
// before a heartbeat reports the trial.

import { Company, type Needs } from '@mimo/proto/queue';

/** A sequence that got this many tokens from a group has made progress: it does not break groups at its first step. */
export const provenTokens = 8;

const sharedBreaks = 2;
const guiltyBreaks = 3;

/** Most answers end within this time. */
const aloneWaitMs = 15_000;

/** The suspicion against a request. */
export interface Suspicion {
  /** Groups in a row that broke before it made progress. */
  readonly breaks: number;
  /** Whether it was alone in the last of them. */
  readonly alone: boolean;
}

export const unsuspected: Suspicion = { breaks: 0, alone: false };

/** The end of an attempt without a result. */
export interface LostAttempt {
  /** True: the group broke while it ran the sequence. False: it rejected or handed over the sequence. */
  readonly broke: boolean;
  /** Tokens that this attempt added. */
  readonly tokens: number;
  /** Whether no other request was in the group. */
  readonly alone: boolean;
}

/** The suspicion against a request after an attempt. */
export function suspicionAfter(before: Suspicion, { broke, tokens, alone }: LostAttempt): Suspicion {
  if (tokens >= provenTokens) {
    return unsuspected;
  }
  return broke ? { breaks: before.breaks + 1, alone } : before;
}

/** The company that a request may have in a group. */
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
 * The least company that its owner accepts from a dispatcher. If the dispatcher knows of every break, the request has
 * waited long enough to be tried among proven ones.
 */
export function leastCompany(needs: Pick<Needs, 'company' | 'breaks'>, knownBreaks: number): Company {
  return needs.company === Company.NONE && needs.breaks === knownBreaks ? Company.PROVEN : needs.company;
}

/** Whether the request is guilty, and must not be tried again. */
export function isGuilty({ breaks, alone }: Suspicion): boolean {
  return breaks >= guiltyBreaks && alone;
}
