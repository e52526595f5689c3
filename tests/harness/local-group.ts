// A tensor-parallel group for tests and benches that compare logits: rank 0 runs passes in the caller's own thread, the
// others are the engine's ordinary step threads. Owns their start and end.

import { once } from 'node:events';
import { Worker } from 'node:worker_threads';
import { createSingleRankCollective, type Collective } from '@mimo/worker/collective/collective';
import { createInProcessCollective, createInProcessGroup } from '@mimo/worker/collective/in-process';
import type { EngineLimits, PassExecutor } from '@mimo/worker/engines/mimo/engine';
import type { HeadRow } from '@mimo/worker/engines/mimo/head-rows';
import { kvBlockTokens } from '@mimo/worker/engines/mimo/kv-cache';
import { gatherMemories } from '@mimo/worker/engines/mimo/memory-budget';
import { createGroupId } from '@mimo/worker/engines/mimo/reduce';
import { ShardRunner } from '@mimo/worker/engines/mimo/shard-runner';
import { encodeStepPlan, type PassPlan, type RowSpan } from '@mimo/worker/engines/mimo/step-plan';
import { readShardManifest, type ShardManifest } from '@mimo/worker/shards/shard';
import { createRuntime } from '@mimo/worker/runtime/create-runtime';
import type { RuntimeImplementation, RuntimeOptions } from '@mimo/worker/runtime/runtime';

const defaultKvBlocks = 64;

export interface LocalGroupOptions {
  /** Compiled shards of all ranks, in rank order. */
  readonly directories: readonly string[];
  readonly implementation: RuntimeImplementation;
  /** Default: the CPU. */
  readonly device?: Pick<RuntimeOptions, 'executionProvider' | 'libraryPath' | 'kernelDirectory' | 'without'>;
  /** Of all ranks together; default: one a rank. */
  readonly threads?: number;
  /** Rows of a pass, and those that may get logits; default 256. */
  readonly maxRows?: number;
  /** Default: as many. */
  readonly maxHeadRows?: number;
  readonly kvBlocks?: number;
  /** Default: the vocabulary. */
  readonly usableVocab?: number;
}

/** Runs passes over all ranks. `close` ends the threads. */
export interface LocalGroup extends PassExecutor {
  readonly manifest: ShardManifest;
  close(): Promise<void>;
}

/** Loads the shards and starts the follower threads. The caller closes it. */
export async function openLocalGroup({
  directories,
  implementation,
  device = { executionProvider: 'cpu' },
  threads = 1,
  maxRows = 256,
  maxHeadRows = maxRows,
  kvBlocks = defaultKvBlocks,
  usableVocab,
}: LocalGroupOptions): Promise<LocalGroup> {
  const manifests = await Promise.all(directories.map((directory) => readShardManifest(directory)));
  const manifest = manifests[0]!;
  const worldSize = directories.length;
  const shared = createInProcessGroup(worldSize);
  const runtimeOptions = { implementation, ...device, intraOpThreads: threads };
  const followers = directories.slice(1).map(
    (directory, i) =>
      new Worker(new URL('../../worker/src/engines/mimo/step-thread.ts', import.meta.url), {
        workerData: {
          directory,
          manifest: manifests[i + 1],
          runtime: runtimeOptions,
          collective: { kind: 'in-process', group: shared, rank: i + 1 },
          limits: testLimits(manifest),
          isKvAuto: false,
          pingMs: 1000,
          leaving: new Int32Array(1),
          turns: new Int32Array(1),
        },
      }),
  );
  const exits = followers.map((follower) => once(follower, 'exit'));
  const collective: Collective =
    worldSize === 1 ? createSingleRankCollective() : createInProcessCollective(shared, 0);
  const runtime = await createRuntime(runtimeOptions);
  const runner = new ShardRunner({ runtime, directory: directories[0]!, manifest, collective });
  gatherMemories(runtime.memoryInfo(), collective);
  const configure = {
    kind: 'configure',
    kvBlocks,
    maxRows,
    maxHeadRows,
    usableVocab: usableVocab ?? manifest.config.vocabSize,
    deviceGroupId: createGroupId(runtime, collective),
  } as const;
  collective.broadcast(encodeStepPlan(configure));
  runner.configure(configure, kvBlockTokens);
  collective.allReduce(new Float32Array(1));
  return {
    manifest,
    run: (plan: PassPlan): readonly HeadRow[] => {
      collective.broadcast(encodeStepPlan(plan));
      return runner.run(plan);
    },
    close: async () => {
      collective.broadcast(encodeStepPlan({ kind: 'stop' }));
      runner.close();
      runtime.close();
      await Promise.all(exits);
      collective.close();
    },
  };
}

/** Engine limits that fit a local group. */
export function testLimits(
  { config, maxPositions }: ShardManifest,
  more: Partial<EngineLimits> = {},
): EngineLimits {
  return {
    maxSequences: 8,
    maxBatchTokens: 64,
    prefillChunkTokens: 32,
    kvBlocks: defaultKvBlocks,
    maxContextTokens: Math.min(maxPositions, defaultKvBlocks * kvBlockTokens),
    vocabSize: config.vocabSize,
    usableVocab: config.vocabSize,
    eosTokenIds: config.eosTokenIds,
    draftTokens: Math.min(1, config.mtpLayers),
    draftCosts: [{ sequences: Infinity, share: 0 }],
    parkAfterMs: 2_000,
    ...more,
  };
}

/** Logits of every position, and of every MTP slot, of the given prompts. */
export interface PromptLogits {
  readonly backbone: readonly Float32Array[];
  readonly mtp: readonly Float32Array[];
}

/**
 * Runs prompts together, each `chunkTokens` rows at a time. MTP slot s has the hidden state of position s and token
 * s+1, so the last position has none.
 */
export function promptLogits(
  group: LocalGroup,
  prompts: readonly (readonly number[])[],
  chunkTokens: number,
): readonly PromptLogits[] {
  const results = prompts.map(() => ({ backbone: [] as Float32Array[], mtp: [] as Float32Array[] }));
  const longest = Math.max(...prompts.map((prompt) => prompt.length));
  for (let start = 0; start < longest; start += chunkTokens) {
    const live = prompts.map((prompt, slot) => ({
      slot,
      ids: prompt.slice(start, start + chunkTokens),
      prompt,
    }));
    const forward = live.filter(({ ids }) => ids.length > 0);
    const run = (kind: PassPlan['kind'], spans: readonly RowSpan[], tokenIds: readonly number[]): void => {
      const logits = group.run({
        kind,
        heads: tokenIds.map(() => ({ kind: 'logits' })),
        releasedSlots: [],
        spans,
        tokenIds: Int32Array.from(tokenIds),
      });
      let row = 0;
      for (const span of spans) {
        for (let i = 0; i < span.rows; i++, row++) {
          const target = results[span.slot]![kind === 'forward' ? 'backbone' : 'mtp'];
          target.push((logits[row] as Float32Array).slice());
        }
      }
    };
    const span = (slot: number, rows: number, hiddenRow: number): RowSpan => ({
      slot,
      start,
      rows,
      headRows: rows,
      hiddenRow,
      capacityTokens: Math.max(16, start + chunkTokens + 1),
    });
    run(
      'forward',
      forward.map(({ slot, ids }) => span(slot, ids.length, 0)),
      forward.flatMap(({ ids }) => ids),
    );
    let hiddenRow = 0;
    const drafts = forward.map(({ slot, ids, prompt }) => {
      const next = prompt.slice(start + 1, start + 1 + ids.length);
      const draft = { span: span(slot, next.length, hiddenRow), next };
      hiddenRow += ids.length;
      return draft;
    });
    const kept = drafts.filter(({ next }) => next.length > 0);
    if (group.manifest.config.mtpLayers > 0 && kept.length > 0) {
      run(
        'draft',
        kept.map((draft) => draft.span),
        kept.flatMap(({ next }) => next),
      );
    }
  }
  group.run({
    kind: 'forward',
    heads: [],
    releasedSlots: prompts.map((_, slot) => slot),
    spans: [],
    tokenIds: new Int32Array(0),
  });
  return results;
}
