// Short prompts behind long ones in the engine: how long a short prompt waits for its first token under a flood of
// long ones, and the delay of the long ones, by the scheduler's rule and by the rule "oldest first" in turn in one run.
//
//   npm run bench -- prefill [--seconds 40] [--long 2000] [--short 23] [--flood 8] [--model models/mimo-demo]
//
// The engine and its one rank of the demonstration model compute in this thread. A stream decodes all the time, so
// that its longest gap is seen too. Short prompts come at random times, most of them in the middle of a step. "Beyond
// a step" is the time to the first token less the longest step that the prompt met.

import { mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, cpus, tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { Engine } from '@mimo/worker/engines/mimo/engine';
import { planStep } from '@mimo/worker/engines/mimo/scheduler';
import { keyedUniform } from '@mimo/worker/engines/mimo/sampler';
import { compile } from '@mimo/worker/compiler/compile';
import { openLocalGroup, testLimits, type LocalGroup } from '../harness/local-group.ts';
import { greedySampling } from '../harness/greedy-sampling.ts';
import { planOldestFirst } from './oldest-first.ts';

const rules = { 'oldest first': planOldestFirst, shared: planStep } as const;
type Rule = keyof typeof rules;

const kvBlocks = 1024;
const maxBatchTokens = 128;
const prefillChunkTokens = 64;
/** The runs take turns, so that what else the machine does meets both rules. */
const turns = 4;
/** Between two short prompts, on average. */
const shortEveryMs = 150;

interface Load {
  readonly group: LocalGroup;
  readonly rule: Rule;
  readonly seconds: number;
  readonly shortTokens: number;
  readonly longTokens: number;
  /** Long prompts that there are at any time; 0: none, and a short one comes when the one before is done. */
  readonly flood: number;
}

/** What was seen, turns added up. */
interface Seen {
  readonly shortMs: number[];
  /** The same less the longest step that each met. */
  readonly beyondStepMs: number[];
  readonly stepMs: number[];
  readonly gapMs: number[];
  longTokens: number;
  elapsedMs: number;
}

const quantile = (values: readonly number[], q: number): number =>
  values.toSorted((a, b) => a - b)[Math.min(values.length - 1, Math.floor(q * values.length))] ?? NaN;

/** Prints a table and, last, one JSON line. */
export async function run(args: readonly string[], signal: AbortSignal): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: {
      seconds: { type: 'string', default: '40' },
      long: { type: 'string', default: '2000' },
      short: { type: 'string', default: '23' },
      flood: { type: 'string', default: '8' },
      model: { type: 'string', default: join(import.meta.dirname, '../../models/mimo-demo') },
    },
  });
  const shortTokens = Number(values.short);
  const longTokens = Number(values.long);
  const directory = await mkdtemp(join(tmpdir(), 'mimo-bench-prefill-'));
  const seen = new Map<string, Seen>();
  const record = (name: string): Seen => {
    const fresh = { shortMs: [], beyondStepMs: [], stepMs: [], gapMs: [], longTokens: 0, elapsedMs: 0 };
    const found = seen.get(name) ?? fresh;
    seen.set(name, found);
    return found;
  };
  try {
    const { rankDirectories } = await compile(
      { modelDirectory: values.model, outDirectory: directory, precision: 'int8', tensorParallel: 1 },
      signal,
    );
    const group = await openLocalGroup({
      directories: rankDirectories,
      implementation: 'ort-capi',
      threads: 1,
      maxRows: maxBatchTokens,
      kvBlocks,
    });
    try {
      for (let turn = 0; turn < turns; turn++) {
        for (const rule of ['oldest first', 'shared'] as const) {
          signal.throwIfAborted();
          const seconds = Number(values.seconds) / turns;
          const load = { group, rule, shortTokens, longTokens };
          observe({ ...load, seconds: seconds / 4, flood: 0 }, turn, record(`${rule}, alone`));
          observe({ ...load, seconds, flood: Number(values.flood) }, turn, record(rule));
        }
      }
    } finally {
      await group.close();
    }
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
  for (const [name, each] of seen) {
    const { shortMs, beyondStepMs, stepMs, gapMs, longTokens: read, elapsedMs } = each;
    process.stdout.write(
      `${name.padEnd(20)} short TTFT p50 ${quantile(shortMs, 0.5).toFixed(1)} p99 ${quantile(shortMs, 0.99).toFixed(0)} ms, ` +
        `beyond a step ${quantile(beyondStepMs, 0.99).toFixed(1)} ms (${shortMs.length})  long ${((1000 * read) / elapsedMs).toFixed(0)} tok/s  ` +
        `step p50 ${quantile(stepMs, 0.5).toFixed(0)} p99 ${quantile(stepMs, 0.99).toFixed(0)} ms  ` +
        `decode gap p99 ${quantile(gapMs, 0.99).toFixed(0)} ms\n`,
    );
  }
  const before = record('oldest first');
  const after = record('shared');
  const perSecond = (of: Seen): number => (1000 * of.longTokens) / of.elapsedMs;
  const alone = quantile(record('shared, alone').shortMs, 0.99);
  const beyond = quantile(after.beyondStepMs, 0.99);
  const throughput = perSecond(after) / perSecond(before);
  const gap = quantile(after.gapMs, 0.99) / quantile(before.gapMs, 0.99);
  const goals = [
    {
      name: 'short p99 TTFT beyond a step, of 2 x alone',
      goal: 1,
      value: Number((beyond / (2 * alone)).toFixed(3)),
      met: beyond <= 2 * alone,
    },
    {
      name: "long throughput, of oldest first's",
      goal: 0.9,
      value: Number(throughput.toFixed(3)),
      met: throughput >= 0.9,
    },
    {
      name: "decode gap p99, of oldest first's",
      goal: 1.1,
      value: Number(gap.toFixed(3)),
      met: gap <= 1.1,
    },
  ];
  const results = Object.fromEntries(
    [...seen].map(([name, each]) => [
      name,
      {
        shortP50Ms: quantile(each.shortMs, 0.5),
        shortP99Ms: quantile(each.shortMs, 0.99),
        beyondStepP99Ms: quantile(each.beyondStepMs, 0.99),
        shorts: each.shortMs.length,
        longTokensPerSecond: perSecond(each),
        stepP99Ms: quantile(each.stepMs, 0.99),
        gapP99Ms: quantile(each.gapMs, 0.99),
      },
    ]),
  );
  const machine = { cores: availableParallelism(), cpu: cpus()[0]?.model };
  process.stdout.write(`${JSON.stringify({ bench: 'prefill', ...values, results, goals, ...machine })}\n`);
}

/** Steps an engine under the load for a while, and notes what is seen. */
function observe(load: Load, seed: number, seen: Seen): void {
  const { group, shortTokens, longTokens, flood } = load;
  const limits = testLimits(group.manifest, {
    maxSequences: 16,
    maxBatchTokens,
    prefillChunkTokens,
    kvBlocks,
    maxContextTokens: group.manifest.maxPositions,
  });
  const engine = new Engine(group, limits, { plan: rules[load.rule] });
  const decoder = 0;
  let nextId = 1;
  const longs = new Set<number>();
  const shorts = new Map<number, { readonly sinceMs: number; longestStepMs: number }>();
  const submit = (tokens: number, maxTokens: number): number => {
    const id = nextId++;
    engine.submit({
      sequenceId: id,
      tokenIds: Array.from({ length: tokens }, (_, i) => 17 + ((i * 31 + id) % 400)),
      resumedTokens: 0,
      sampling: greedySampling({ maxTokens, draftTokens: 1 }),
      creditTokens: Infinity,
    });
    return id;
  };
  const decode = (): void =>
    engine.submit({
      sequenceId: decoder,
      tokenIds: [17, 18, 19],
      resumedTokens: 0,
      sampling: greedySampling({ maxTokens: 1000, draftTokens: 1 }),
      creditTokens: Infinity,
    });
  if (flood > 0) {
    decode();
  }
  const beganMs = performance.now();
  const untilMs = beganMs + 1000 * load.seconds;
  let shorted = 0;
  let dueMs = flood > 0 ? beganMs + shortEveryMs : Infinity;
  let decodedMs = NaN;
  let stepMs = 0;
  for (let nowMs = beganMs; nowMs < untilMs || shorts.size > 0;) {
    if (nowMs < untilMs) {
      while (longs.size < flood) {
        longs.add(submit(longTokens, 1));
      }
      for (; dueMs <= nowMs; dueMs += 2 * shortEveryMs * keyedUniform(seed, 3, shorted++)) {
        shorts.set(submit(shortTokens, 1), { sinceMs: dueMs, longestStepMs: stepMs });
      }
      if (flood === 0 && shorts.size === 0) {
        shorts.set(submit(shortTokens, 1), { sinceMs: nowMs, longestStepMs: 0 });
      }
    }
    const promptBefore = engine.stats().promptTokens;
    const frame = engine.step();
    const endedMs = performance.now();
    if (frame === undefined) {
      throw new Error('the engine has nothing to do');
    }
    stepMs = endedMs - nowMs;
    if (frame.stats.promptTokens - promptBefore >= maxBatchTokens / 2) {
      seen.stepMs.push(stepMs);
    }
    for (const { sequenceId, finish } of frame.deltas) {
      const short = shorts.get(sequenceId);
      if (short !== undefined) {
        const shortMs = endedMs - short.sinceMs;
        seen.shortMs.push(shortMs);
        seen.beyondStepMs.push(shortMs - short.longestStepMs);
        shorts.delete(sequenceId);
      }
      if (longs.delete(sequenceId) && nowMs < untilMs) {
        seen.longTokens += longTokens;
      }
      if (sequenceId === decoder) {
        if (!Number.isNaN(decodedMs)) {
          seen.gapMs.push(endedMs - decodedMs);
        }
        decodedMs = finish === undefined ? endedMs : NaN;
        if (finish !== undefined) {
          decode();
        }
      }
    }
    for (const short of shorts.values()) {
      short.longestStepMs = Math.max(short.longestStepMs, stepMs);
    }
    nowMs = endedMs;
  }
  seen.elapsedMs += untilMs - beganMs;
  for (const id of [decoder, ...longs]) {
    engine.abort(id);
  }
  // The pages of what was left go back with a pass.
  submit(1, 1);
  while (engine.step() !== undefined) {
    // Until nothing is left.
  }
}
