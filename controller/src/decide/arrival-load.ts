// The autoscaler's memory of the load: arrived tokens, in bins of two seconds, and the speed of full groups. Pure.
// Its input is the queue's cumulative counters, so a missed reading loses nothing. replay.ts reads the past,
// autoscale.ts decides.

/**
 * The queue as the dispatcher reports it. Tokens are prompt plus permitted completion, because both are known in
 * advance.
 */
export interface QueueReading {
  readonly waitingRequests: number;
  readonly waitingTokens: number;
  readonly inFlightRequests: number;
  readonly inFlightTokens: number;
  /** Sequences that the ready groups can run at once. */
  readonly slots: number;
  readonly oldestWaitingMs: number;
  /** Tokens of all requests that arrived, and that ended, since the counters began. */
  readonly arrivedTokens: number;
  readonly endedTokens: number;
  /** Changes when the counters restart at zero. */
  readonly countersEpoch: number;
}

export interface LoadMemory {
  readonly lastQueue: QueueReading | undefined;
  readonly lastReadMs: number;
  /** Tokens that arrived in each bin, oldest first; the last bin, which began at lastBinMs, still fills. */
  readonly arrivals: readonly number[];
  readonly lastBinMs: number;
  /** Tokens retired, and seconds of full groups it took; both fade. */
  readonly retiredTokens: number;
  readonly fullGroupSeconds: number;
}

/** Length of a bin of arrivals. */
export const binMs = 2000;
/** Window of the current rate: a burst of seconds should count, a single large request should not. */
export const rateBins = 5;
/** Shortest memory of arrivals: bursts must be seen a few times before they are recognised. */
const precedentMs = 1_800_000;
/** A moment at least half as busy as now counts as similar; two separate ones predict how such moments continue. */
const precedentRatio = 0.5;
const leastMoments = 2;
/** Below half the slots a step's fixed cost hides how fast a full group would be. */
const measurableSlotsRatio = 0.5;
/** The mix of requests changes over the day. The first guess weighs as much as this many seconds of one group. */
const speedFadeMs = 900_000;
const guessSeconds = 30;

export function createLoadMemory(nowMs: number): LoadMemory {
  return {
    lastQueue: undefined,
    lastReadMs: nowMs,
    arrivals: [0],
    lastBinMs: nowMs,
    retiredTokens: 0,
    fullGroupSeconds: 0,
  };
}

interface LoadReading {
  readonly queue: QueueReading;
  readonly readyGroups: number;
  readonly memoryMs: number;
  readonly nowMs: number;
}

/** Adds a reading. Arrivals during a gap between readings are spread over it; restarted counters count from zero. */
export function observeLoad(
  before: LoadMemory,
  { queue, readyGroups, memoryMs, nowMs }: LoadReading,
): LoadMemory {
  const last = before.lastQueue;
  const known = last !== undefined && last.countersEpoch === queue.countersEpoch;
  const arrivedTokens = last === undefined ? 0 : queue.arrivedTokens - (known ? last.arrivedTokens : 0);

  const newBins = Math.max(0, Math.floor((nowMs - before.lastBinMs) / binMs));
  const keptBins = Math.ceil(Math.max(memoryMs, precedentMs) / binMs);
  const arrivals = before.arrivals.slice(Math.max(0, before.arrivals.length + newBins - keptBins));
  const share = arrivedTokens / Math.max(1, newBins);
  if (newBins === 0) {
    arrivals.push((arrivals.pop() ?? 0) + arrivedTokens);
  }
  for (let bin = 0; bin < Math.min(newBins, keptBins); bin++) {
    arrivals.push(share);
  }

  let { retiredTokens, fullGroupSeconds } = before;
  const usedRatio = queue.slots === 0 ? 0 : Math.min(1, queue.inFlightRequests / queue.slots);
  if (known && readyGroups > 0 && usedRatio >= measurableSlotsRatio) {
    const elapsedMs = nowMs - before.lastReadMs;
    const keep = Math.exp(-elapsedMs / speedFadeMs);
    // Requests in flight count as half done, so that a burst is not judged by its beginning, when none has ended.
    const begunTokens = (queue.inFlightTokens - last.inFlightTokens) / 2;
    retiredTokens = Math.max(0, retiredTokens * keep + queue.endedTokens - last.endedTokens + begunTokens);
    fullGroupSeconds = fullGroupSeconds * keep + (readyGroups * usedRatio * elapsedMs) / 1000;
  }
  return {
    lastQueue: queue,
    lastReadMs: nowMs,
    arrivals,
    lastBinMs: before.lastBinMs + newBins * binMs,
    retiredTokens,
    fullGroupSeconds,
  };
}

/** Tokens per second of a full group: measured, and mixed with the first guess while there is little data. */
export function groupSpeed(memory: LoadMemory, guessPerSecond: number): number {
  const seen = memory.retiredTokens + guessPerSecond * guessSeconds;
  return Math.max(1, seen / (memory.fullGroupSeconds + guessSeconds));
}

/** Recently arrived tokens per second. */
export function arrivalRate(memory: LoadMemory): number {
  const recent = memory.arrivals.slice(-rateBins);
  return recent.reduce((sum, tokens) => sum + tokens, 0) / ((recent.length * binMs) / 1000);
}

/**
 * Expected tokens per second over the next `horizonMs`, from how remembered moments continued that were at least half
 * as busy as now: a burst like many before it will pass like them. With too few such moments, the current rate is
 * expected to last as long as the memory reaches (Lindy): a controller with a long memory takes an unprecedented load
 * seriously, a newly started one less so.
 */
export function expectedRate(memory: LoadMemory, horizonMs: number): number {
  const { arrivals } = memory;
  const horizonBins = Math.max(1, Math.ceil(horizonMs / binMs));
  const sums = [0];
  for (const tokens of arrivals) {
    sums.push((sums.at(-1) ?? 0) + tokens);
  }
  const perBin = (from: number, to: number): number => ((sums[to] ?? 0) - (sums[from] ?? 0)) / (to - from);
  const rate = arrivalRate(memory);
  const present = perBin(Math.max(0, arrivals.length - rateBins), arrivals.length);

  let followed = 0;
  let precedents = 0;
  let moments = 0;
  let lastMomentAt = Number.NEGATIVE_INFINITY;
  for (let at = rateBins; at + horizonBins <= arrivals.length; at++) {
    const then = perBin(at - rateBins, at);
    if (then > 0 && then >= precedentRatio * present) {
      followed += perBin(at, at + horizonBins) / then;
      precedents += 1;
      if (at - lastMomentAt >= rateBins) {
        moments += 1;
        lastMomentAt = at;
      }
    }
  }
  const knownMs = arrivals.length * binMs;
  const lastingRatio = moments < leastMoments ? knownMs / (knownMs + horizonMs) : followed / precedents;
  return rate * Math.min(1, lastingRatio);
}
