// From a rank's configuration to the shard that it loads and the engine's options. Owns the place of compiled shards in
// the cache; compiler/compile.ts compiles them once for all ranks of a machine.

import { createHash } from 'node:crypto';
import { realpath } from 'node:fs/promises';
import { basename, join } from 'node:path';

import type { Log } from '@mimo/core/process/log';

import type { WorkerConfig } from './config.ts';
import type { EngineOptions } from './engines/mimo/engine-host.ts';
import { compile } from './compiler/compile.ts';
import type { Precision } from './shards/target-profile.ts';

const logProgressMs = 5_000;
/** Of a checkpoint's name; a file's name has at most 255 bytes, and a character up to four. */
const readableCharacters = 48;

/** Identifies compiled shards. */
export interface ShardSet {
  readonly cacheDirectory: string;
  readonly checkpointDirectory: string;
  readonly precision: Precision;
  readonly tensorParallel: number;
}

/**
 * The cache directory of a checkpoint's shards: a readable name, made unique by the checkpoint's path. `compile` checks
 * its contents against the checkpoint.
 */
export async function shardDirectoryIn(set: ShardSet): Promise<string> {
  const path = await realpath(set.checkpointDirectory);
  const id = createHash('sha256').update(path).digest('hex').slice(0, 8);
  return join(
    set.cacheDirectory,
    'shards',
    `${basename(path).slice(0, readableCharacters)}-${id}-${set.precision}-tp${set.tensorParallel}`,
  );
}

/** Returns this rank's shard directory, and compiles the checkpoint into the cache if necessary. */
export async function prepareShard(config: WorkerConfig, log: Log, signal: AbortSignal): Promise<string> {
  if (config.shardDirectory !== '') {
    return join(config.shardDirectory, `rank-${config.rank}`);
  }
  const begin = performance.now();
  let loggedAt = begin;
  const { key, rankDirectories, upToDate } = await compile(
    {
      modelDirectory: config.checkpointDirectory,
      outDirectory: await shardDirectoryIn(config),
      tensorParallel: config.tensorParallel,
      precision: config.precision,
      onProgress: ({ doneBytes, totalBytes }) => {
        if (performance.now() - loggedAt > logProgressMs) {
          loggedAt = performance.now();
          log.info({ doneBytes, totalBytes }, 'compiling');
        }
      },
    },
    signal,
  );
  log.info({ key, upToDate, elapsedMs: Math.round(performance.now() - begin) }, 'shards ready');
  return rankDirectories[config.rank] ?? join(await shardDirectoryIn(config), `rank-${config.rank}`);
}

/** The engine's options of a rank. */
export function engineOptionsFrom(config: WorkerConfig, shardDirectory: string): EngineOptions {
  return {
    shardDirectories: [shardDirectory],
    group:
      config.tensorParallel === 1
        ? { kind: 'in-process' }
        : {
            kind: 'network',
            rank: config.rank,
            addresses: config.peers,
            ...(config.peerListen === '' ? {} : { listenAddress: config.peerListen }),
            token: config.groupToken,
            connectTimeoutMs: config.peerConnectTimeoutMs,
            peerTimeoutMs: config.peerTimeoutMs,
          },
    runtime: config.runtime,
    executionProvider: config.executionProvider,
    ...(config.runtimeLibrary === '' ? {} : { runtimeLibrary: config.runtimeLibrary }),
    ...(config.cacheDirectory === '' ? {} : { kernelDirectory: join(config.cacheDirectory, 'kernels') }),
    draftTokens: config.draftTokens,
    adaptiveSpeculation: config.adaptiveSpeculation,
    threads: config.threads,
    maxSequences: config.maxSequences,
    kvBytes: config.kvBytes,
    maxBatchTokens: config.maxBatchTokens,
    parkAfterMs: config.parkAfterMs,
    stepTimeoutMs: config.stepTimeoutMs,
    prefillChunkTokens: config.prefillChunkTokens,
  };
}
