// What a backlog asks for, and what count would have been best for the recent arrivals, given that a backlog is helped so.
// Pure. Reads the memory of arrival-load.ts; autoscale.ts decides. Work is a fluid of tokens, served in order of arrival.

import { binMs, rateBins, type LoadMemory } from './arrival-load.ts';

/** How fast groups are, and how fast they have to be. */
export interface ServiceRule {
  /** Tokens that one group retires a second. */
  readonly perSecond: number;
  readonly targetMs: number;
  readonly startUpMs: number;
}

/** Half of the target may be spent waiting before it counts as a backlog; what helped goes when it is a third. */
const backlogTargets = 1 / 2;
const releasesPerTarget = 3;
/**
 * What waits once new groups are up is worked off in the target and another start-up, but no longer than this many targets:
 * what was long in coming should not take as long again.
 */
const longestClearTargets = 2;
/** Part of the recent tokens that may have waited longer than the target. */
const lateRatio = 0.05;

/** Whether more waits than `groups` work off in half the target. */
export function isBacklog(waitingTokens: number, groups: number, rule: ServiceRule): boolean {
  return waitingTokens > (backlogTargets * groups * rule.perSecond * rule.targetMs) / 1000;
}

/** The count to come down to while this much waits: it works that off in a third of the target. */
export function groupsToRelease(waitingTokens: number, rule: ServiceRule): number {
  return Math.ceil((waitingTokens * releasesPerTarget * 1000) / (rule.perSecond * rule.targetMs));
}

interface Backlog {
  readonly waitingTokens: number;
  /** Tokens that arrive a second. */
  readonly rate: number;
  /** What the groups that exist can work over the next start-up, summed: those that start, from when they are ready. */
  readonly groupMs: number;
}

/** The count that keeps up with the rate and works off what will be left (tokens) after one start-up, within clearMs. */
export function planBacklog(
  { waitingTokens, rate, groupMs }: Backlog,
  { perSecond, targetMs, startUpMs }: ServiceRule,
): { readonly groups: number; readonly left: number; readonly clearMs: number } {
  const left = Math.max(0, waitingTokens + (rate * startUpMs - groupMs * perSecond) / 1000);
  const clearMs = targetMs + Math.min(startUpMs, longestClearTargets * targetMs);
  return { groups: Math.ceil(rate / perSecond + (left * 1000) / (perSecond * clearMs)), left, clearMs };
}

interface Replayed {
  readonly lateTokens: number;
  /** The same without help. */
  readonly lateAloneTokens: number;
  /** Groups that existed in each bin, summed: the bill. */
  readonly groupBins: number;
}

/** The arrivals again, with `held` groups that stay; others are ordered on a backlog, ready a start-up later, and let go. */
function replay(arrivals: readonly number[], held: number, rule: ServiceRule): Replayed {
  const perBin = (rule.perSecond * binMs) / 1000;
  const targetBins = rule.targetMs / binMs;
  const startUpBins = Math.max(1, Math.ceil(rule.startUpMs / binMs));
  let ready = held;
  /** Orders by when they are ready, and how many groups they are in all. */
  let starting: { readonly at: number; readonly groups: number }[] = [];
  let ordered = 0;
  let waiting = 0;
  let lately = 0;
  let lateTokens = 0;
  let waitingAlone = 0;
  let lateAloneTokens = 0;
  let groupBins = 0;
  for (const [at, tokens] of arrivals.entries()) {
    for (let due = starting[0]; due !== undefined && due.at <= at; due = starting[0]) {
      ready += due.groups;
      ordered -= due.groups;
      starting.shift();
    }
    /** Bins of one group that are worked in the next `bins`. */
    const worked = (bins: number): number =>
      starting.reduce((sum, order) => sum + order.groups * Math.max(0, at + bins - order.at), ready * bins);
    waiting += tokens;
    lately += tokens - (arrivals[at - rateBins] ?? 0);
    lateTokens += waiting - tokens / 2 > worked(targetBins) * perBin ? tokens : 0;
    waiting = Math.max(0, waiting - ready * perBin);
    waitingAlone += tokens;
    lateAloneTokens += waitingAlone - tokens / 2 > held * targetBins * perBin ? tokens : 0;
    waitingAlone = Math.max(0, waitingAlone - held * perBin);

    const existing = ready + ordered;
    if (isBacklog(waiting, existing, rule)) {
      const rate = (lately * 1000) / (Math.min(rateBins, at + 1) * binMs);
      const groupMs = worked(startUpBins) * binMs;
      const more = planBacklog({ waitingTokens: waiting, rate, groupMs }, rule).groups - existing;
      if (more > 0) {
        starting.push({ at: at + startUpBins, groups: more });
        ordered += more;
      }
    } else if (existing > held) {
      const kept = Math.min(existing, Math.max(held, groupsToRelease(waiting, rule)));
      if (kept < existing) {
        ready = Math.min(ready, kept);
        ordered = kept - ready;
        starting = ordered === 0 ? [] : [{ at: starting[0]?.at ?? at, groups: ordered }];
      }
    }
    groupBins += ready + ordered;
  }
  return { lateTokens, lateAloneTokens, groupBins };
}

interface RecentRule extends ServiceRule {
  /** How much of the memory is replayed. */
  readonly memoryMs: number;
  readonly maxGroups: number;
}

/**
 * The count (at most maxGroups) that, held through the arrivals of the last `memoryMs`, would have made the smallest bill with
 * all but a twentieth of the tokens in time. Where groups start within the target, help is in time and few are held; where
 * bursts pass faster than groups start, help is late, and those that are held must do alone. 0 where nothing arrived.
 */
export function groupsForRecent(memory: LoadMemory, rule: RecentRule): number {
  const arrivals = memory.arrivals.slice(-Math.max(1, Math.ceil(rule.memoryMs / binMs)));
  const total = arrivals.reduce((sum, tokens) => sum + tokens, 0);
  if (total <= 0) {
    return 0;
  }
  let best = rule.maxGroups;
  let leastBins = Infinity;
  let aloneTokens = Infinity;
  // Fewer than the mean would only push the work past the end of the memory. Steps of 3 % where there are many.
  let held = Math.ceil((total * 1000) / (arrivals.length * binMs * rule.perSecond));
  for (; held < rule.maxGroups && aloneTokens > lateRatio * total; held += Math.ceil(held / 32)) {
    const { lateTokens, lateAloneTokens, groupBins } = replay(arrivals, held, rule);
    if (lateTokens <= lateRatio * total && groupBins < leastBins) {
      best = held;
      leastBins = groupBins;
    }
    aloneTokens = lateAloneTokens;
  }
  return best;
}
