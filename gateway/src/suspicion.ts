// Which requests may be what breaks their groups. Pure.
//
// The rule: a break counts against a request that had less than `provenTokens` from that group; more of them clear it. After
// two breaks in a row it is tried only among requests that made progress there, and none joins them until it does too, or
// ends; after three it is tried alone. It is guilty when at least three groups in a row broke with it and it was alone in the
// last.
//
// INVARIANT: a request that never broke a group alone is never guilty. INVARIANT: one that breaks every group that it is in,
// before it makes progress, is guilty after at most four breaks.

import { Company } from '@mimo/proto/queue';

/** A sequence that has got so many tokens from a group is not what breaks it at its first step. */
export const provenTokens = 8;

const sharedBreaks = 2;
const guiltyBreaks = 3;

/** What is held against a request. */
export interface Suspicion {
  /** Groups in a row that broke before it made progress. */
  readonly breaks: number;
  /** It was alone in the last of them. */
  readonly alone: boolean;
}

export const unsuspected: Suspicion = { breaks: 0, alone: false };

/** How an attempt ended that was not the last. */
export interface LostAttempt {
  /** The group broke with the sequence in it; else it refused or handed over what it had. */
  readonly broke: boolean;
  /** Tokens that this attempt added. */
  readonly tokens: number;
  /** Nobody else was in the group. */
  readonly alone: boolean;
}

/** What is held against a request after an attempt. */
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

/** Whether it is given to no further group. */
export function isGuilty({ breaks, alone }: Suspicion): boolean {
  return breaks >= guiltyBreaks && alone;
}
