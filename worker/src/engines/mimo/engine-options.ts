// Turns the worker's options into a complete, checked set. Owns the defaults, their reasons and the limits that follow
// from the shards. Reads manifests, and nothing else from disk.

import { ClusterError } from '@mimo/core/process/errors';
import { readShardManifest, type ShardManifest } from '../../shards/shard.ts';
import type { Precision } from '../../shards/target-profile.ts';
import { elementBytes } from '../../shards/element-type.ts';
import type { ExecutionProvider, RuntimeOptions } from '../../runtime/runtime.ts';
import type { EngineLimits } from './engine.ts';
import { type ChosenSize, chooseSizes, type Size } from './default-sizes.ts';
import type { DraftCost } from './draft-policy.ts';
import { blocksFor, kvBlockTokens } from './kv-cache.ts';

/** Where the other ranks of the group are. */
export type GroupOptions =
  /** All ranks are threads of this process; one shard directory per rank. A single directory is a group of one. */
  | { readonly kind: 'in-process' }
  /** One rank per process, joined by TCP; one shard directory, this rank's. */
  | {
      readonly kind: 'network';
      readonly rank: number;
      /**
       * `host:port` of every rank by rank, this one's included (others reach it there). Higher ranks dial lower ones.
       */
      readonly addresses: readonly string[];
      /** Where this rank listens, `host:port`; default: its entry of `addresses`. */
      readonly listenAddress?: string;
      /** Shared secret of the group; a peer with a different one is rejected. */
      readonly token: string;
      /** The whole group must have met and loaded within this time. Default 120 s. */
      readonly connectTimeoutMs?: number;
      /** A peer that is silent for this long in a step, or while idle, is lost. Default 10 s. */
      readonly peerTimeoutMs?: number;
    };

export interface EngineOptions {
  /** Compiled shards: every rank's in order for an in-process group, this rank's alone for a network group. */
  readonly shardDirectories: readonly string[];
  readonly group: GroupOptions;
  readonly runtime?: 'ort-capi' | 'ort-node' | 'auto';
  /** Where ranks compute. Default `cpu`. */
  readonly executionProvider?: ExecutionProvider;
  /** libonnxruntime to load; default: the library bundled with onnxruntime-node. `cuda` needs another. */
  readonly runtimeLibrary?: string;
  /** Cache directory for device kernels, which are compiled at the first start; default: none. */
  readonly kernelDirectory?: string;
  /** Compute threads per rank. Default 1. */
  readonly threads?: number;
  /** Sequences that hold KV cache at a time. `auto`, the default, by the execution provider: 16, or 256 on `cuda`. */
  readonly maxSequences?: number | 'auto';
  /**
   * KV cache of one rank in bytes; the leader's value counts. Default `auto`: the memory that every rank's device or
   * container has left after the weights, less a reserve; 1 GiB if no limit is known.
   */
  readonly kvBytes?: number | 'auto';
  /** The same in blocks of 64 positions; takes precedence over kvBytes. */
  readonly kvBlocks?: number;
  /** Rows of one step, all sequences together. Default `auto`: 128, or 2048. */
  readonly maxBatchTokens?: number | 'auto';
  /** Rows of one sequence's prefill in one step. Default `auto`: 64, or 512. */
  readonly prefillChunkTokens?: number | 'auto';
  /** Ids at or above this are padding and are never chosen. Default: the model's vocabulary. */
  readonly usableVocab?: number;
  /** Tokens drafted a step; at most one, and none without an MTP layer. Default 1; 0 turns speculation off. */
  readonly draftTokens?: number;
  /** Draft only while verifying pays (draft-policy.ts); false: always draft. Default true. */
  readonly adaptiveSpeculation?: boolean;
  /** A sequence without credit for this long is parked when others need its memory. Default 2 s. */
  readonly parkAfterMs?: number;
  /** A longer step counts as hung and ends the group. Default 2 min. */
  readonly stepTimeoutMs?: number;
}

/** Complete options, with the manifests of the local ranks. */
export interface CompleteOptions {
  readonly manifests: readonly ShardManifest[];
  readonly directories: readonly string[];
  readonly runtime: Omit<RuntimeOptions, 'intraOpThreads'>;
  readonly threads: number;
  /** With `isKvAuto`, `kvBlocks` and `maxContextTokens` are upper bounds. */
  readonly limits: EngineLimits;
  readonly isKvAuto: boolean;
  readonly stepTimeoutMs: number;
  /** The reasons for the sizes. */
  readonly sizes: Readonly<Record<Size, ChosenSize>>;
}

/** A client that pauses for less keeps its place; computing a long prompt again takes about as long. */
const defaultParkAfterMs = 2_000;

/** The largest step of a 7B model takes seconds on two busy cores; a device may compile in its first ones. */
const defaultStepTimeoutMs = 120_000;

/**
 * Sequences up to which a draft pays: verifying doubles the rows, which costs little until the step is bound by
 * arithmetic. On CPUs this depends on the storage of matrices (reference, section MTP: about 4 rows with int4, 6 with
 * int8).
 */
const speculatingOnProcessors: Readonly<Record<Precision, number>> = {
  int4: 4,
  int8: 6,
  fp32: 8,
  fp16: 8,
  bf16: 8,
};

/**
 * The share that a draft adds to a step on an H200 (2026-11), rounded up: 17-24 % up to 64 sequences, 35 % at 128, 60 %
 * at 256.
 */
const draftCostsOnDevices: readonly DraftCost[] = [
  { sequences: 64, share: 0.25 },
  { sequences: 128, share: 0.4 },
  { sequences: Infinity, share: 0.65 },
];

function draftCosts(
  { executionProvider = 'cpu', adaptiveSpeculation = true }: EngineOptions,
  weights: Precision,
): readonly DraftCost[] {
  if (!adaptiveSpeculation) {
    return [{ sequences: Infinity, share: 0 }];
  }
  return executionProvider === 'cpu'
    ? [{ sequences: speculatingOnProcessors[weights], share: 0 }]
    : draftCostsOnDevices;
}

/**
 * Fills in defaults and reads the manifests. Throws `invalid_argument` listing every option out of range, and
 * `failed_precondition` if the shards do not match the group.
 */
export async function completeOptions(options: EngineOptions): Promise<CompleteOptions> {
  const { shardDirectories: directories } = options;
  const sizes = checkSizes(options);
  const manifests = await Promise.all(directories.map((directory) => readShardManifest(directory)));
  assertGroupShards(manifests, options);
  return {
    manifests,
    directories,
    runtime: {
      implementation: options.runtime ?? 'auto',
      executionProvider: options.executionProvider ?? 'cpu',
      ...(options.runtimeLibrary === undefined ? {} : { libraryPath: options.runtimeLibrary }),
      ...(options.kernelDirectory === undefined ? {} : { kernelDirectory: options.kernelDirectory }),
    },
    threads: sizes.threads,
    isKvAuto: options.kvBlocks === undefined && sizes.kvBytes === 'auto',
    stepTimeoutMs: sizes.stepTimeoutMs,
    sizes: sizes.chosen,
    limits: limitsOf(options, sizes, manifests[0]!),
  };
}

/** The options that need no manifest. */
type Sizes = ReturnType<typeof checkSizes>;

/** Throws `invalid_argument` listing every problem that can be found without a manifest. */
function checkSizes(options: EngineOptions) {
  const { group, shardDirectories } = options;
  const problems: string[] = [];
  const count = (name: keyof EngineOptions, fallback: number, least = 1): number => {
    const value = (options[name] ?? fallback) as number;
    if (!Number.isInteger(value) || value < least) {
      problems.push(`${name}: must be an integer from ${least}, is ${value}`);
    }
    return value;
  };
  const chosen = chooseSizes(options, options.executionProvider ?? 'cpu');
  const size = (name: Size): number =>
    options[name] === 'auto' ? chosen[name].value : count(name, chosen[name].value);
  const maxSequences = size('maxSequences');
  const maxBatchTokens = size('maxBatchTokens');
  const sizes = {
    maxSequences,
    maxBatchTokens,
    prefillChunkTokens: size('prefillChunkTokens'),
    chosen,
    threads: count('threads', 1),
    stepTimeoutMs: count('stepTimeoutMs', defaultStepTimeoutMs),
    parkAfterMs: count('parkAfterMs', defaultParkAfterMs, 0),
    kvBlocks: options.kvBlocks === undefined ? undefined : count('kvBlocks', 1),
    kvBytes: (options.kvBytes ?? 'auto') === 'auto' ? ('auto' as const) : count('kvBytes', 1),
    usableVocab: options.usableVocab === undefined ? undefined : count('usableVocab', 1),
  };
  if (maxBatchTokens < 2 * maxSequences) {
    problems.push(
      `maxBatchTokens: must be at least 2 x maxSequences (${2 * maxSequences}), is ${maxBatchTokens}`,
    );
  }
  const local = group.kind === 'network' ? 1 : Math.max(1, shardDirectories.length);
  if (shardDirectories.length !== local) {
    problems.push(
      `shardDirectories: a ${group.kind} group takes ${local} here, has ${shardDirectories.length}`,
    );
  }
  throwIfAny(problems);
  return sizes;
}

function throwIfAny(problems: readonly string[]): void {
  if (problems.length > 0) {
    throw new ClusterError('invalid_argument', problems.join('; '));
  }
}

/** The limits that the engine works with. Throws `invalid_argument` for options that the model does not allow. */
function limitsOf(options: EngineOptions, sizes: Sizes, manifest: ShardManifest): EngineLimits {
  const { config, maxPositions } = manifest;
  const { maxSequences, maxBatchTokens, prefillChunkTokens, parkAfterMs, kvBytes } = sizes;
  const usableVocab = sizes.usableVocab ?? config.vocabSize;
  const blockBytes = kvBlockBytes(manifest);
  const givenBlocks = kvBytes === 'auto' ? Infinity : Math.floor(kvBytes / blockBytes);
  const mostBlocks = maxSequences * blocksFor(maxPositions, Math.ceil(maxPositions / kvBlockTokens));
  const kvBlocks = Math.min(sizes.kvBlocks ?? givenBlocks, mostBlocks);
  throwIfAny([
    ...(kvBlocks < 1 ? [`kvBytes: one block takes ${blockBytes}, are ${kvBytes}`] : []),
    ...(usableVocab > config.vocabSize
      ? [`usableVocab: must be at most ${config.vocabSize}, is ${usableVocab}`]
      : []),
  ]);
  return {
    maxSequences,
    maxBatchTokens,
    prefillChunkTokens,
    kvBlocks,
    maxContextTokens: Math.min(maxPositions, kvBlocks * kvBlockTokens),
    vocabSize: config.vocabSize,
    usableVocab,
    eosTokenIds: config.eosTokenIds,
    draftTokens: Math.min(options.draftTokens ?? 1, 1, config.mtpLayers),
    draftCosts: draftCosts(options, manifest.profile.weights),
    parkAfterMs,
  };
}

/** Bytes that one block takes on one rank: keys and values of every layer, the MTP layer included. */
export function kvBlockBytes({ config, tensorParallel, profile }: ShardManifest): number {
  const layers = config.layers + Math.min(1, config.mtpLayers);
  const bytes = elementBytes[profile.activations];
  return bytes * 2 * layers * (config.kvHeads / tensorParallel) * kvBlockTokens * config.headDim;
}

function assertGroupShards(
  manifests: readonly ShardManifest[],
  { group, shardDirectories }: EngineOptions,
): void {
  const worldSize = group.kind === 'network' ? group.addresses.length : manifests.length;
  const firstRank = group.kind === 'network' ? group.rank : 0;
  for (const [i, manifest] of manifests.entries()) {
    const expected = { rank: firstRank + i, tensorParallel: worldSize, key: manifests[0]!.key };
    for (const field of ['tensorParallel', 'rank', 'key'] as const) {
      if (manifest[field] !== expected[field]) {
        throw new ClusterError(
          'failed_precondition',
          `${shardDirectories[i]}: ${field} must be ${expected[field]}, is ${manifest[field]}`,
        );
      }
    }
  }
}
