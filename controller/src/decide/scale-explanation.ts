// The explanation of a scaling decision: the clamped count, the reason in words, the formula and the inputs, as the
// status and the Events of a ModelService show them. Pure; autoscale.ts decides.

import type { ScalingSpec } from '../resources/resources.ts';
import type { ScaleDecision, ScaleReason } from '../resources/status.ts';
import type { QueueReading } from './arrival-load.ts';

/** The part of an observation that is shown. */
export interface ScaleInputs {
  readonly queue: QueueReading | 'unknown';
  /** Groups that run requests. */
  readonly readyGroups: number;
  /** For each starting group, the expected time until it is ready, from measured start-ups; 0 if it is overdue. */
  readonly startingReadyInMs: readonly number[];
  /** Why groups cannot start, in the scheduler's words. */
  readonly blocker?: string | undefined;
}

interface Explained {
  readonly spec: ScalingSpec;
  readonly seen: ScaleInputs;
  readonly before: number;
  readonly asked: number;
  readonly reason: ScaleReason;
  /** Undefined if the count was held without a computation. */
  readonly terms: { readonly formula: string; readonly rate: number } | undefined;
  readonly startUpMs: number;
  readonly perSecond: number;
}

const reasonTexts: Readonly<Record<ScaleReason, string>> = {
  QueueUnknown: 'the queue cannot be read, so the count is held',
  Oldest: 'the oldest request has waited twice the target and no group is starting',
  Backlog: 'more work waits than the existing groups can finish in time',
  RecentLoad: 'the recent arrivals need this count',
  Learning: 'the controller started too recently to go below the count that it found',
  Stabilising: 'fewer groups would do, but not yet for long enough, or without a margin',
  KeepWarm: 'the last group stays until scaleToZeroAfterSeconds after the last work',
  Idle: 'there is nothing to do',
};

/** Clamps the count and explains it. */
export function explainScale({
  spec,
  seen,
  before,
  asked,
  reason,
  terms,
  startUpMs,
  perSecond,
}: Explained): ScaleDecision {
  const wanted = Math.min(spec.max, Math.max(spec.min, asked));
  const clamps: string[] = [];
  if (wanted !== asked) {
    const limit = wanted > asked ? 'min' : 'max';
    clamps.push(`${limit} ${wanted} instead of ${asked}`);
  }
  const change = wanted === before ? `${wanted} held` : `${before} -> ${wanted}`;
  const queue = seen.queue === 'unknown' ? undefined : seen.queue;
  return {
    wanted,
    before,
    reason,
    message: `${change}: ${reasonTexts[reason]}${clamps.length === 0 ? '' : ` (${clamps.join(', ')})`}`,
    formula: terms?.formula ?? `hold ${before}`,
    clamps,
    ...(seen.blocker === undefined ? {} : { blocker: seen.blocker }),
    inputs: {
      readyGroups: seen.readyGroups,
      startingGroups: seen.startingReadyInMs.length,
      ...(queue === undefined
        ? {}
        : {
            waitingRequests: queue.waitingRequests,
            waitingTokens: Math.round(queue.waitingTokens),
            inFlightTokens: Math.round(queue.inFlightTokens),
            oldestWaitingSeconds: Math.round(queue.oldestWaitingMs / 1000),
          }),
      ...(terms === undefined ? {} : { arrivalTokensPerSecond: Math.round(terms.rate) }),
      groupTokensPerSecond: Math.round(perSecond),
      startUpSeconds: Math.round(startUpMs / 1000),
    },
  };
}
