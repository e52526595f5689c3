// The clairvoyant: knows the trace, starts each group exactly early enough, and keeps one over a gap that is shorter
// than a start-up (restarting would cost as much). Of several smoothings it uses the cheapest that serves 99 % in
// time.

import { engineMs, runCluster, type Policy, type RunOptions, type RunResult } from './cluster.ts';
import type { Trace } from './traces.ts';

const stepMs = 2000;
const goalRatio = 0.99;

/**
 * The smoothest service that starts all work within `delaySteps`: the shortest path between the arrived work and the
 * same work later (a taut string), which is cheapest for every convex bill. Returns groups at each step, fractional.
 */
function smoothestService(arrived: Float64Array, delaySteps: number): Float64Array {
  const length = arrived.length;
  const upper = new Float64Array(length + 1); // work that has arrived by step t
  for (let t = 0; t < length; t++) {
    upper[t + 1] = (upper[t] ?? 0) + (arrived[t] ?? 0);
  }
  const lower = upper.map((_, t) =>
    t > length - 1 ? (upper[length] ?? 0) : (upper[Math.max(0, t - delaySteps)] ?? 0),
  );
  const rate = new Float64Array(length);
  let at = 0;
  let done = 0;
  while (at < length) {
    let steepest = -Infinity;
    let flattest = Infinity;
    let steepestAt = at + 1;
    let flattestAt = at + 1;
    let end = length;
    let slope = 0;
    for (let t = at + 1; t <= length; t++) {
      const least = ((lower[t] ?? 0) - done) / (t - at);
      const most = ((upper[t] ?? 0) - done) / (t - at);
      if (least > flattest) {
        end = flattestAt;
        slope = flattest;
        break;
      }
      if (most < steepest) {
        end = steepestAt;
        slope = steepest;
        break;
      }
      if (least >= steepest) {
        steepest = least;
        steepestAt = t;
      }
      if (most <= flattest) {
        flattest = most;
        flattestAt = t;
      }
      end = t;
      slope = least;
    }
    rate.fill(Math.max(0, slope), at, end);
    done += slope * (end - at);
    at = end;
  }
  return rate;
}

/** Wanted groups at each step: each level of `need` begins a start-up early and bridges gaps shorter than one. */
function planFor(need: Float64Array, startUpMs: number): Int32Array {
  const lead = Math.ceil(startUpMs / stepMs);
  const plan = new Int32Array(need.length);
  const levels = Math.ceil(need.reduce((a, b) => Math.max(a, b), 0) - 1e-9);
  for (let level = 0; level < levels; level++) {
    let paidUntil = 0;
    for (let t = 0; t < need.length; t++) {
      if ((need[t] ?? 0) - 1e-9 > level) {
        const from = t - paidUntil <= 2 * lead ? paidUntil : t - lead;
        for (let u = Math.max(0, from); u <= t; u++) {
          plan[u] = (plan[u] ?? 0) + 1;
        }
        paidUntil = t + 1;
      }
    }
  }
  return plan;
}

function workSteps(trace: Trace): Float64Array {
  const arrived = new Float64Array(Math.ceil(trace.durationMs / stepMs));
  for (const request of trace.requests) {
    const step = Math.floor(request.arrivalMs / stepMs);
    arrived[step] = (arrived[step] ?? 0) + engineMs(request) / stepMs;
  }
  return arrived;
}

export interface OracleResult {
  readonly result: RunResult;
  /** The most groups it ever wanted: what a static installation would have to hold. */
  readonly peakGroups: number;
}

/** Runs the oracle for one trace and start-up delay. */
export function runOracle(options: Omit<RunOptions, 'policy'>): OracleResult {
  const { trace, startUpMs, targetWaitMs } = options;
  const arrived = workSteps(trace);
  const run = (service: Float64Array, scale: number): OracleResult => {
    const plan = planFor(
      service.map((rate) => rate * scale),
      startUpMs,
    );
    const policy: Policy = {
      name: 'oracle',
      tickMs: stepMs,
      graceMs: Infinity,
      wantedGroups: ({ nowMs }) => plan[Math.min(plan.length - 1, Math.floor(nowMs / stepMs))] ?? 0,
    };
    return {
      result: runCluster({ ...options, policy, initialGroups: plan[0] ?? 0 }),
      peakGroups: plan.reduce((a, b) => Math.max(a, b), 0),
    };
  };
  let best: OracleResult | undefined;
  for (const delayMs of [0.5, 1, 2, 4].map((factor) => factor * targetWaitMs)) {
    const service = smoothestService(arrived, Math.max(1, Math.round(delayMs / stepMs)));
    let low = 0.6;
    let high = 2.4;
    for (let round = 0; round < 6; round++) {
      const scale = Math.sqrt(low * high);
      const found = run(service, scale);
      if (found.result.attainmentRatio < goalRatio) {
        low = scale;
        continue;
      }
      high = scale;
      if (best === undefined || found.result.replicaSeconds < best.result.replicaSeconds) {
        best = found;
      }
    }
  }
  if (best === undefined) {
    throw new Error(`no plan of the oracle serves ${goalRatio} of ${trace.name} in time`);
  }
  return best;
}
