// How many groups a backlog needs, and which count would have been best for the recent arrivals, given that help for
// backlogs. Pure. Reads the memory of arrival-load.ts; autoscale.ts decides. Work is a fluid of tokens, served in
// order of arrival.

import { binMs, rateBins, type LoadMemory } from './arrival-load.ts';

/** The speed of groups, and the target. */
export interface ServiceRule {
  /** Tokens per second of one group. */
  readonly perSecond: number;
  readonly targetMs: number;
  readonly startUpMs: number;
}

/** Waiting work counts as a backlog from half of the target; extra groups are released at a third. */
const backlogTargets = 1 / 2;
const releasesPerTarget = 3;
/**
 * Work that waits when new groups are ready is finished within the target plus another start-up, but within at most
 * this many targets: long start-ups should not also mean slow recovery.
 */
const longestClearTargets = 2;
/** Share of the recent tokens that may have waited longer than the target. */
const lateRatio = 0.05;

/** Whether more work waits than `groups` finish in half the target. */
export function isBacklog(waitingTokens: number, groups: number, rule: ServiceRule): boolean {
  return waitingTokens > (backlogTargets * groups * rule.perSecond * rule.targetMs) / 1000;
}

/** The lowest count for this much waiting work: it finishes that in a third of the target. */
export function groupsToRelease(waitingTokens: number, rule: ServiceRule): number {
  return Math.ceil((waitingTokens * releasesPerTarget * 1000) / (rule.perSecond * rule.targetMs));
}

interface Backlog {
  readonly waitingTokens: number;
  /** Arriving tokens per second. */
  readonly rate: number;
  /** The capacity of existing groups over the next start-up; starting groups count from when they are ready. */
  readonly groupMs: number;
}

/**
 * The count that keeps up with the rate and finishes the remaining work (tokens) after one start-up, within clearMs.
 */
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
  /** Groups that existed in each bin, summed: the cost. */
  readonly groupBins: number;
}

/**
 * Replays the arrivals with `held` constant groups; more are ordered on a backlog, are ready after a start-up, and
 * are released again.
 */
function replay(arrivals: readonly number[], held: number, rule: ServiceRule): Replayed {
  const perBin = (rule.perSecond * binMs) / 1000;
  const targetBins = rule.targetMs / binMs;
  const startUpBins = Math.max(1, Math.ceil(rule.startUpMs / binMs));
  let ready = held;
  /** Orders by the time they are ready, and their total number of groups. */
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
    /** Group-bins of capacity in the next `bins`. */
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
 * The constant count (at most maxGroups) that would have cost the fewest replica-seconds over the last `memoryMs`,
 * with 19 of 20 tokens in time. If groups start within the target, help comes in time and few constant groups are
 * needed; if bursts pass faster than groups start, help comes late and the constant groups must suffice. 0 without
 * arrivals.
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
  // Fewer than the mean would only push work past the end of the memory. Steps of 3 % for large counts.
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
