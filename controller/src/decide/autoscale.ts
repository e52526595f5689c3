// How many replica groups a model needs. Pure: time and memory are arguments. It reads the queue in tokens (prompt plus
// permitted completion), because requests differ a thousandfold. It knows no pods. The result explains itself
// (status.ts).
//
//   speed    tokens per second of a full group, measured while at least half of its slots run (arrival-load.ts)
//   T        targetWaitSeconds
//   D        start-up time, measured
//   M        memory: 120 s + 3 D, because groups that start slowly are kept longer
//   reserve  5 % of the speed, plus 4 % for each minute of D: the longer a start-up, the later help arrives
//
// wanted is the largest of
//   recent   Replay the arrivals of the last M against each constant count, with extra groups ordered on a backlog as below.
//            Take the count that would have cost the fewest replica-seconds with 19 of 20 tokens waiting at most T, at
//            `speed` less `reserve`. Smoothed over M / 3 (replay.ts).
//   backlog  Once more than T / 2 of work waits: rate / speed + left / (speed (T + min(D, 2 T))). `rate` is the arrival
//            rate expected over the next D - T, from how similar moments continued (arrival-load.ts); later arrivals can wait
//            for what is ordered now. `left` is the work waiting after D at that rate, with starting groups helping once
//            they are ready. Until a first group serves: at least waiting / (speed T), in one step.
//   oldest   One more group than exist, while the oldest request has waited longer than 2 T and nothing is starting.
// clamped to [min, max].
//
// Up: in one step, also from zero. Down: in one step, starting groups first, but never
//   - below recent / 0.95, smoothed or not;
//   - below 3 waiting / (speed T);
//   - below the slots that all running requests need;
//   - in the first M, below the count that the controller found;
//   - while the oldest request has waited longer than 2 T.
// The last group stays until scaleToZeroAfterSeconds after the last work. An unknown queue holds the count.
//
// The plain rule (waiting + in flight) / (speed T) is a peer in tests/bench/autoscale.ts, which shows what each term
// gains. INVARIANT: min <= wanted <= max. INVARIANT: an unknown queue changes the count only to keep it within its
// limits.

import type { ScalingSpec } from '../resources/resources.ts';
import type { ScaleDecision, ScaleReason } from '../resources/status.ts';
import {
  createLoadMemory,
  expectedRate,
  groupSpeed,
  observeLoad,
  type LoadMemory,
  type QueueReading,
} from './arrival-load.ts';
import { groupsForRecent, groupsToRelease, isBacklog, planBacklog, type ServiceRule } from './replay.ts';
import { explainScale, type ScaleInputs } from './scale-explanation.ts';

/** The inputs of a decision. */
export interface ScaleObservation extends ScaleInputs {
  /** How long a start-up takes, measured; undefined before the first one. */
  readonly startUpMs: number | undefined;
}

/** What one decision passes to the next. Kept in the controller's memory; a restart resets it. */
export interface ScaleMemory {
  readonly beganMs: number;
  /** The count at its beginning. */
  readonly foundGroups: number;
  readonly wanted: number;
  readonly load: LoadMemory;
  /** `recent` before rounding, smoothed. */
  readonly recentGroups: number;
  readonly decidedMs: number;
  readonly lastWorkMs: number;
}

export interface ScaleResult {
  readonly decision: ScaleDecision;
  readonly memory: ScaleMemory;
}

/** The count falls only to what would suffice for groups this much slower, which prevents flapping. */
const downMarginRatio = 0.95;
/** A fraction of a group this small does not add a group. */
const roundingGroups = 0.25;

/** An empty memory; `wanted` is the existing count. */
export function createScaleMemory(wanted: number, nowMs: number): ScaleMemory {
  return {
    beganMs: nowMs,
    foundGroups: wanted,
    wanted,
    load: createLoadMemory(nowMs),
    recentGroups: wanted,
    decidedMs: nowMs,
    lastWorkMs: nowMs,
  };
}

/** The three terms of the rule, and their inputs. */
interface Terms {
  readonly recent: number;
  readonly backlog: number;
  readonly oldest: number;
  readonly rate: number;
  /** Whether the oldest request has waited so long that the token counts must be wrong. */
  readonly overdue: boolean;
  readonly formula: string;
}

/** An observation whose queue could be read. */
interface KnownObservation extends ScaleObservation {
  readonly queue: QueueReading;
}

/** What a reading teaches, and what follows from it for the rule. */
interface Lesson extends Pick<ScaleMemory, 'load' | 'recentGroups' | 'lastWorkMs'> {
  /** `recentGroups` before smoothing. */
  readonly replayed: number;
  /** No work for `scaleToZeroAfterSeconds`. */
  readonly idle: boolean;
  /** Too little seen since the memory began to go below the count that it began with. */
  readonly learning: boolean;
  readonly rule: ServiceRule;
}

/**
 * Decides the count. Call it every few seconds and when the queue changes; the same arguments return the same result.
 */
export function decideScale(
  spec: ScalingSpec,
  seen: ScaleObservation,
  before: ScaleMemory,
  nowMs: number,
): ScaleResult {
  const startUpMs = seen.startUpMs ?? spec.startUpSeconds * 1000;
  if (seen.queue === 'unknown') {
    const decision = explainScale({
      spec,
      seen,
      before: before.wanted,
      asked: before.wanted,
      reason: 'QueueUnknown',
      terms: undefined,
      startUpMs,
      perSecond: groupSpeed(before.load, spec.groupTokensPerSecond),
    });
    // Unseen arrivals are possible: idle time counts from the next reading.
    return {
      decision,
      memory: { ...before, wanted: decision.wanted, decidedMs: nowMs, lastWorkMs: nowMs },
    };
  }
  const known = { ...seen, queue: seen.queue };
  const lesson = learn(spec, known, before, { startUpMs, nowMs });
  const { load, recentGroups, lastWorkMs, rule } = lesson;
  const terms = computeTerms(known, load, { ...rule, recentGroups });
  const { wanted, reason } = chooseCount(known, lesson, terms, before);
  const decision = explainScale({
    spec,
    seen,
    before: before.wanted,
    asked: wanted,
    reason,
    terms,
    startUpMs,
    perSecond: rule.perSecond,
  });
  return {
    decision,
    memory: { ...before, wanted: decision.wanted, load, recentGroups, decidedMs: nowMs, lastWorkMs },
  };
}

function learn(
  spec: ScalingSpec,
  { queue, readyGroups }: KnownObservation,
  before: ScaleMemory,
  { startUpMs, nowMs }: { readonly startUpMs: number; readonly nowMs: number },
): Lesson {
  const memoryMs = spec.memorySeconds === undefined ? 120_000 + 3 * startUpMs : spec.memorySeconds * 1000;
  const targetMs = spec.targetWaitSeconds * 1000;
  const load = observeLoad(before.load, { queue, readyGroups, memoryMs, nowMs });
  const busy = queue.waitingRequests + queue.inFlightRequests > 0;
  const lastWorkMs = busy ? nowMs : before.lastWorkMs;
  const idle = nowMs - lastWorkMs >= spec.scaleToZeroAfterSeconds * 1000;

  const perSecond = groupSpeed(load, spec.groupTokensPerSecond);
  const reserveRatio = Math.min(0.5, 0.05 + (0.04 * startUpMs) / 60_000);
  const replayed = groupsForRecent(load, {
    perSecond: perSecond * (1 - reserveRatio),
    targetMs,
    startUpMs,
    memoryMs,
    maxGroups: spec.max,
  });
  const weight = 1 - Math.exp((-3 * (nowMs - before.decidedMs)) / memoryMs);
  return {
    load,
    lastWorkMs,
    replayed,
    recentGroups: before.recentGroups + (replayed - before.recentGroups) * weight,
    idle,
    learning: !idle && nowMs - before.beganMs < memoryMs,
    rule: { perSecond, targetMs, startUpMs },
  };
}

interface Choice {
  readonly wanted: number;
  readonly reason: ScaleReason;
}

/** The largest term; lower than before only with a margin; at least one group for as long as it is kept warm. */
function chooseCount(seen: KnownObservation, lesson: Lesson, terms: Terms, before: ScaleMemory): Choice {
  const asked = Math.max(lesson.idle ? 0 : terms.recent, terms.backlog, terms.oldest);
  const reason =
    asked === terms.oldest && terms.oldest > terms.recent
      ? 'Oldest'
      : asked === terms.backlog && terms.backlog > terms.recent
        ? 'Backlog'
        : 'RecentLoad';
  const choice: Choice =
    asked < before.wanted
      ? lowerCount({ wanted: asked, reason }, { seen, lesson, terms, before })
      : { wanted: asked, reason };
  if (choice.wanted > 0) {
    return choice;
  }
  // A serving or starting group survives short idle times; a count of zero stays without work.
  const existing = seen.readyGroups + seen.startingReadyInMs.length;
  const isKept = !lesson.idle && existing > 0 && before.wanted > 0;
  return isKept ? { wanted: 1, reason: 'KeepWarm' } : { wanted: 0, reason: 'Idle' };
}

/** How far the count may decrease now: to the requested count, less far, or not at all. */
function lowerCount(
  asked: Choice,
  given: {
    readonly seen: KnownObservation;
    readonly lesson: Lesson;
    readonly terms: Terms;
    readonly before: ScaleMemory;
  },
): Choice {
  const { seen, lesson, terms, before } = given;
  const { queue, readyGroups } = seen;
  // A recent change has hardly moved the smoothed figure yet, and may last.
  const needed = Math.max(lesson.recentGroups, lesson.replayed) / downMarginRatio;
  const slotsPerGroup = queue.slots / Math.max(1, readyGroups);
  const floor = Math.max(
    asked.wanted,
    // Requests of a removed group move to free slots of other groups.
    slotsPerGroup > 0 ? Math.ceil(queue.inFlightRequests / slotsPerGroup) : 0,
    lesson.idle ? 0 : Math.ceil(needed - roundingGroups),
    groupsToRelease(queue.waitingTokens, lesson.rule),
    lesson.learning ? before.foundGroups : 0,
  );
  if (!terms.overdue && floor < before.wanted) {
    return { wanted: floor, reason: asked.reason };
  }
  return { wanted: before.wanted, reason: lesson.learning && !terms.overdue ? 'Learning' : 'Stabilising' };
}

function computeTerms(
  seen: KnownObservation,
  load: LoadMemory,
  rule: ServiceRule & { readonly recentGroups: number },
): Terms {
  const { queue, readyGroups, startingReadyInMs } = seen;
  const { perSecond, targetMs, startUpMs } = rule;
  const { waitingTokens } = queue;
  const existing = readyGroups + startingReadyInMs.length;
  const rate = expectedRate(load, Math.max(0, startUpMs - targetMs));

  const recent = Math.ceil(rule.recentGroups - roundingGroups);
  const parts = [`recent ${recent}`];
  let backlog = 0;
  if (isBacklog(waitingTokens, existing, rule)) {
    const groupMs = startingReadyInMs.reduce(
      (sum, readyInMs) => sum + Math.max(0, startUpMs - readyInMs),
      readyGroups * startUpMs,
    );
    const planned = planBacklog({ waitingTokens, rate, groupMs }, rule);
    const speed = Math.round(perSecond);
    const fromNothing = Math.ceil((waitingTokens * 1000) / (perSecond * targetMs));
    // Only the waiting work counts then: the beginning of a burst overstates its size.
    if (existing === 0 || (readyGroups === 0 && fromNothing < planned.groups)) {
      backlog = fromNothing;
      parts.push(`backlog ceil(${waitingTokens} / (${speed} * ${targetMs / 1000} s)) = ${backlog}`);
    } else {
      backlog = planned.groups;
      const clearSeconds = (planned.clearMs / 1000).toFixed(0);
      parts.push(
        `backlog ceil(${Math.round(rate)} / ${speed} + ` +
          `${Math.round(planned.left)} / (${speed} * ${clearSeconds} s)) = ${backlog}`,
      );
    }
  }
  const overdue = queue.oldestWaitingMs > 2 * targetMs;
  const oldest = overdue && startingReadyInMs.length === 0 ? existing + 1 : 0;
  if (oldest > 0) {
    parts.push(`oldest ${existing} + 1 = ${oldest}`);
  }
  return {
    recent,
    backlog,
    oldest,
    rate,
    overdue,
    formula: `max(${parts.join(', ')})`,
  };
}
