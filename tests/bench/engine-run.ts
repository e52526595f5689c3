// The engine's decoding, measured: sequences of one prompt, all chunks of prefill, then greedy steps, with drafts or
// without. Owns the loop and the synthetic acceptance; the caller chooses model, group and table.
//
// Random weights accept no drafts. `synthetic` computes everything, then replaces the tokens of the head and the draft
// layer with scripted ones, so that a given share of the drafts is right.

import { Engine, type PassExecutor } from '@mimo/worker/engines/mimo/engine';
import type { SequenceSampling } from '@mimo/worker/engines/mimo/engine-api';
import type { HeadRow } from '@mimo/worker/engines/mimo/head-rows';
import { kvBlockTokens } from '@mimo/worker/engines/mimo/kv-cache';
import type { PassPlan } from '@mimo/worker/engines/mimo/step-plan';
import { testLimits, type LocalGroup } from '../harness/local-group.ts';
import { greedySampling } from '../harness/greedy-sampling.ts';

export type Speculation = 'off' | 'on' | 'synthetic';

export interface EngineRun {
  readonly group: LocalGroup;
  readonly batch: number;
  readonly promptTokens: number;
  readonly tokens: number;
  readonly prefillChunkTokens: number;
  readonly kvBlocks: number;
  readonly speculation: Speculation;
  /** Beside greedy. */
  readonly sampling?: Partial<SequenceSampling>;
  /** Share of the drafts that `synthetic` makes right. */
  readonly acceptance: number;
  /** Default: the script's, the same for all. */
  readonly promptOf?: (sequence: number) => readonly number[];
  /** Default 2048. */
  readonly maxContextTokens?: number;
}

export interface EngineFigures {
  readonly decodePerSecond: number;
  readonly prefillPerSecond: number;
  readonly stepMs: number;
  /** Of all ranks and threads of this process, per decoded token. */
  readonly cpuMsPerToken: number;
  readonly acceptedRatio: number;
}

/** `batch` sequences to their end. Times are medians over steps. */
export function measureEngine(run: EngineRun): EngineFigures {
  const { group, batch, promptTokens, tokens, prefillChunkTokens, speculation } = run;
  const { vocabSize } = group.manifest.config;
  const executor = speculation === 'synthetic' ? withScript(group, run.acceptance) : group;
  const engine = new Engine(
    executor,
    testLimits(group.manifest, {
      maxSequences: batch,
      maxBatchTokens: Math.max(2 * prefillChunkTokens, 2 * batch),
      prefillChunkTokens,
      kvBlocks: run.kvBlocks,
      maxContextTokens: run.maxContextTokens ?? 32 * kvBlockTokens,
    }),
  );
  const draftTokens = speculation === 'off' ? 0 : 1;
  const sampling = greedySampling({ maxTokens: tokens, draftTokens, ...run.sampling });
  const tokenIds = Array.from({ length: promptTokens }, (_, position) => scripted(position, vocabSize));
  for (let sequenceId = 0; sequenceId < batch; sequenceId++) {
    // With credit for one token all sequences wait for the last to be read, and then decode together.
    engine.submit({
      sequenceId,
      tokenIds: run.promptOf?.(sequenceId) ?? tokenIds,
      resumedTokens: 0,
      sampling: { ...sampling, seed: sequenceId },
      creditTokens: 1,
    });
  }
  const prefillMs: number[] = [];
  const decodeMs: number[] = [];
  let decoded = 0;
  let decodeCpuMs = 0;
  let isDecoding = false;
  for (;;) {
    const promptBefore = engine.stats().promptTokens;
    const startedMs = performance.now();
    const startedCpuMs = cpuMs();
    const frame = engine.step();
    const elapsedMs = performance.now() - startedMs;
    if (frame === undefined) {
      if (isDecoding) {
        break;
      }
      isDecoding = true;
      for (let sequenceId = 0; sequenceId < batch; sequenceId++) {
        engine.addCredit(sequenceId, Infinity);
      }
      continue;
    }
    const promptRows = frame.stats.promptTokens - promptBefore;
    if (promptRows > 0) {
      prefillMs.push(elapsedMs / promptRows);
    } else if (frame.stats.runningSequences === batch) {
      decodeMs.push(elapsedMs);
      decodeCpuMs += cpuMs() - startedCpuMs;
      decoded += frame.deltas.reduce((sum, delta) => sum + delta.tokenIds.length, 0);
    }
  }
  const { draftedTokens, acceptedTokens } = engine.stats();
  const stepMs = median(decodeMs);
  return {
    decodePerSecond: (1000 * decoded) / decodeMs.length / stepMs,
    prefillPerSecond: 1000 / median(prefillMs),
    stepMs,
    cpuMsPerToken: decodeCpuMs / decoded,
    acceptedRatio: draftedTokens === 0 ? 0 : acceptedTokens / draftedTokens,
  };
}

export function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? NaN;
}

/** The token at a position, the same in all sequences. */
function scripted(position: number, vocabSize: number): number {
  return (position * 7919) % vocabSize;
}

/** Runs the group's passes, and replaces the best tokens by the script's, drafts by another for a share of them. */
function withScript(group: LocalGroup, acceptance: number): PassExecutor {
  const { vocabSize } = group.manifest.config;
  let drafts = 0;
  return {
    run: (plan: PassPlan): readonly HeadRow[] => {
      const chosen = [...group.run(plan)];
      let row = 0;
      for (const { start, rows, headRows } of plan.spans) {
        for (let i = rows - headRows; i < rows; i++) {
          // A row knows the token after its position; a slot of the draft layer knows that one, and drafts the next.
          const position = start + i + (plan.kind === 'forward' ? 1 : 2);
          const isRight = plan.kind === 'forward' || (drafts++ * acceptance) % 1 < acceptance;
          chosen[row] = { tokenId: scripted(position + (isRight ? 0 : 1), vocabSize), logit: 0 };
          row += 1;
        }
      }
      return chosen;
    },
  };
}

function cpuMs(): number {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
}
