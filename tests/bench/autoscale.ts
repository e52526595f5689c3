// `npm run bench -- autoscale [--seed N] [--target-wait S] [--max N] [--trace NAME] [--plot FILE]`: the production
// scaling rule (with at most --max groups) and other rules in a discrete-event cluster, against a clairvoyant. Prints
// a table, draws docs/explanation/autoscale.svg, and prints one JSON line last. Owns the goals; the traces, the
// cluster, the arms and the drawing are in autoscale/.

import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setImmediate } from 'node:timers/promises';
import { parseArgs } from 'node:util';

import { ClusterError } from '@mimo/core/process/errors';

import { engineMs, runCluster, type Policy, type RunOptions, type RunResult } from './autoscale/cluster.ts';
import { runOracle } from './autoscale/oracle.ts';
import { plotPareto, type ArmResult } from './autoscale/plot.ts';
import {
  createHpaOnCpu,
  createKeda,
  createKnative,
  createKubeAi,
  createPlainTokens,
  createPlusMinusOne,
  createProduction,
  createStatic,
} from './autoscale/policies.ts';
import { createTraces, type Trace } from './autoscale/traces.ts';

const startUpSeconds = [30, 60, 180];
const maxGroups = 80;

/** Arms that know the trace: they bound what can be had, and take no part in who dominates whom. */
const hindsightArms = new Set(['oracle', 'best constant', 'static peak']);

/** What the rule is meant to reach, of the traces that it is promised for. */
const goals: Readonly<Record<string, { readonly attainmentRatio: number; readonly costRatio: number }>> = {
  diurnal: { attainmentRatio: 0.97, costRatio: 1.25 },
  conversation: { attainmentRatio: 0.97, costRatio: 1.25 },
  'code bursts': { attainmentRatio: 0.9, costRatio: 1.5 },
};

/** Runs the benchmark. Throws `invalid_argument` for unknown options and traces, and the signal's reason. */
export async function run(args: readonly string[], signal: AbortSignal): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: {
      seed: { type: 'string', default: '7' },
      'target-wait': { type: 'string', default: '30' },
      max: { type: 'string', default: String(maxGroups) },
      trace: { type: 'string' },
      plot: { type: 'string', default: join(import.meta.dirname, '../../docs/explanation/autoscale.svg') },
    },
  });
  const targetWaitMs = readNumber('target-wait', values['target-wait']) * 1000;
  const ourMax = readNumber('max', values.max);
  const seed = readNumber('seed', values.seed);
  const traces = createTraces(seed).filter(({ name }) => values.trace === undefined || name === values.trace);
  if (traces.length === 0) {
    throw new ClusterError('invalid_argument', `--trace: no trace is called ${values.trace ?? ''}`);
  }

  const results: ArmResult[] = [];
  for (const trace of traces) {
    for (const seconds of startUpSeconds) {
      // The runs are synchronous: this is where an interrupt gets in.
      await setImmediate();
      signal.throwIfAborted();
      const panel = runPanel(trace, seconds, targetWaitMs, ourMax);
      printPanel(trace, seconds, panel);
      results.push(...panel);
    }
  }
  const shown = goalLines(results);
  console.log(`\n${shown.join('\n')}`);
  if (values.trace === undefined) {
    writeFileSync(values.plot, plotPareto(results, targetWaitMs));
    console.log(`\ndrawn: ${values.plot}`);
  }
  console.log(
    JSON.stringify({
      bench: 'autoscale',
      seed,
      targetWaitSeconds: targetWaitMs / 1000,
      maxGroups: ourMax,
      node: process.version,
      results: results.map((result) => ({
        trace: result.trace,
        startUpSeconds: result.startUpSeconds,
        arm: result.arm,
        attainmentRatio: round(result.attainmentRatio, 4),
        costRatio: round(result.costRatio, 3),
        replicaSeconds: Math.round(result.replicaSeconds),
        reversalsPer10Minutes: round(result.reversalsPer10Minutes, 2),
        lost: result.lost,
        waitP99Seconds: round(result.waitP99Ms / 1000, 1),
        dominatedBy: result.dominatedBy,
      })),
    }),
  );
}

function readNumber(option: string, text: string): number {
  const value = Number(text);
  if (!Number.isFinite(value) || value <= 0) {
    throw new ClusterError('invalid_argument', `--${option}: must be a number above 0, is ${text}`);
  }
  return value;
}

function runPanel(trace: Trace, seconds: number, targetWaitMs: number, ourMax: number): ArmResult[] {
  const startUpMs = seconds * 1000;
  const work = trace.requests.reduce((sum, request) => sum + engineMs(request), 0);
  const tokens = trace.requests.reduce(
    (sum, { promptTokens, permittedTokens }) => sum + promptTokens + permittedTokens,
    0,
  );
  // All begin with what the first ten minutes need and a fifth more, as a cluster that has run for a while would.
  const early = trace.requests.filter(({ arrivalMs }) => arrivalMs < 600_000);
  const initialGroups = Math.ceil(
    (1.2 * early.reduce((sum, request) => sum + engineMs(request), 0)) / 600_000,
  );
  const options = { trace, startUpMs, targetWaitMs, initialGroups, maxGroups };
  const limits = { maxGroups, targetWaitMs, initialGroups };

  const oracle = runOracle(options);
  const arms: readonly Policy[] = [
    createProduction({ ...limits, maxGroups: ourMax }),
    createPlainTokens(limits, (tokens / work) * 1000),
    createHpaOnCpu(limits),
    createKnative(limits),
    createKeda(limits),
    createKubeAi(limits),
    createPlusMinusOne(limits),
  ];
  const peak = Math.min(maxGroups, oracle.peakGroups);
  const measured = [
    { arm: 'oracle', result: oracle.result },
    { arm: 'best constant', result: runBestConstant(options, goals[trace.name]?.attainmentRatio ?? 0.95) },
    ...arms.map((policy) => ({ arm: policy.name, result: runCluster({ ...options, policy }) })),
    {
      arm: 'static peak',
      result: runCluster({ ...options, policy: createStatic(peak), initialGroups: peak }),
    },
  ];
  return measured.map(({ arm, result }) => {
    const isBetter = (other: RunResult): boolean =>
      other.attainmentRatio >= result.attainmentRatio &&
      other.replicaSeconds <= result.replicaSeconds &&
      (other.attainmentRatio > result.attainmentRatio || other.replicaSeconds < result.replicaSeconds);
    return {
      ...result,
      trace: trace.name,
      startUpSeconds: seconds,
      arm,
      costRatio: result.replicaSeconds / oracle.result.replicaSeconds,
      dominatedBy: measured
        .filter((other) => !hindsightArms.has(other.arm) && isBetter(other.result))
        .map((other) => other.arm),
      reversalsPer10Minutes: result.reversals / (trace.durationMs / 600_000),
    };
  });
}

/**
 * The fewest groups that, held throughout, would have reached the attainment: the least bill without foresight or
 * luck.
 */
function runBestConstant(options: Omit<RunOptions, 'policy'>, attainmentRatio: number): RunResult {
  const runWith = (groups: number): RunResult =>
    runCluster({ ...options, policy: createStatic(groups), initialGroups: groups });
  let least = 1;
  let enough = options.maxGroups;
  while (least < enough) {
    const middle = Math.floor((least + enough) / 2);
    if (runWith(middle).attainmentRatio >= attainmentRatio) {
      enough = middle;
    } else {
      least = middle + 1;
    }
  }
  return runWith(enough);
}

function printPanel(trace: Trace, seconds: number, panel: readonly ArmResult[]): void {
  console.log(`\n${trace.name}, ${trace.requests.length} requests, groups start in ${seconds} s`);
  for (const result of panel) {
    console.log(
      `  ${result.arm.padEnd(17)} ${percent(result.attainmentRatio)} in time, ` +
        `${result.costRatio.toFixed(2).padStart(6)} x oracle, ` +
        `${result.reversalsPer10Minutes.toFixed(1).padStart(4)} reversals/10 min, lost ${String(result.lost).padStart(5)}, ` +
        `wait p99 ${(result.waitP99Ms / 1000).toFixed(1).padStart(6)} s${result.dominatedBy.length === 0 ? '  front' : ''}`,
    );
  }
}

/** One line a goal: reached or missed, with the figures. */
function goalLines(results: readonly ArmResult[]): string[] {
  const ours = results.filter(({ arm }) => arm === 'ours');
  const lines = ours.flatMap((result) => {
    const goal = goals[result.trace];
    if (goal === undefined) {
      return [];
    }
    const reached = result.attainmentRatio >= goal.attainmentRatio && result.costRatio <= goal.costRatio;
    const constant = results.find(
      ({ arm, trace, startUpSeconds: delay }) =>
        arm === 'best constant' && trace === result.trace && delay === result.startUpSeconds,
    );
    return [
      `${reached ? 'reached' : 'MISSED '} ${result.trace}, start-up ${result.startUpSeconds} s: ` +
        `${percent(result.attainmentRatio)} at ${result.costRatio.toFixed(2)} x ` +
        `(goal ${percent(goal.attainmentRatio)} at ${goal.costRatio} x; ` +
        `the best constant count, chosen in hindsight: ${constant?.costRatio.toFixed(2)} x)`,
    ];
  });
  const steady = ours.filter(({ trace }) => trace === 'steady');
  const worst = steady.reduce((most, { reversalsPer10Minutes }) => Math.max(most, reversalsPer10Minutes), 0);
  const dominated = ours.filter(({ dominatedBy }) => dominatedBy.length > 0);
  return [
    ...lines,
    `${worst <= 1 ? 'reached' : 'MISSED '} steady load: at most ${worst.toFixed(1)} reversals in 10 minutes (goal 1)`,
    dominated.length === 0
      ? 'reached on the Pareto front everywhere'
      : `MISSED  not on the Pareto front: ${dominated
          .map((result) => `${result.trace} at ${result.startUpSeconds} s (${result.dominatedBy.join(', ')})`)
          .join(', ')}`,
  ];
}

function percent(ratio: number): string {
  return `${(ratio * 100).toFixed(1).padStart(5)} %`;
}

function round(value: number, digits: number): number {
  return Number(value.toFixed(digits));
}
