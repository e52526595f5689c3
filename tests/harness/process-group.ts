// A tensor-parallel group as it is deployed, for tests and benches that compare logits: rank 0 runs passes in the
// caller's own thread, every other rank is the engine in a separate process, with its own device. Owns their start
// and end.

import { once } from 'node:events';
import { joinGroup } from '@mimo/worker/collective/join-group';
import { createNetworkCollective } from '@mimo/worker/collective/network';
import type { HeadRow } from '@mimo/worker/engines/mimo/head-rows';
import { kvBlockTokens } from '@mimo/worker/engines/mimo/kv-cache';
import { gatherMemories } from '@mimo/worker/engines/mimo/memory-budget';
import { createGroupId } from '@mimo/worker/engines/mimo/reduce';
import { ShardRunner } from '@mimo/worker/engines/mimo/shard-runner';
import { encodeStepPlan, type PassPlan } from '@mimo/worker/engines/mimo/step-plan';
import { readShardManifest } from '@mimo/worker/shards/shard';
import { createRuntime } from '@mimo/worker/runtime/create-runtime';
import type { RuntimeOptions } from '@mimo/worker/runtime/runtime';
import { freeAddresses } from '../../cli/src/local/free-ports.ts';
import { RankProcess } from './engine-ranks.ts';
import type { LocalGroup } from './local-group.ts';

export interface ProcessGroupOptions {
  /** Compiled shards of all ranks, in rank order. */
  readonly directories: readonly string[];
  readonly device: Pick<RuntimeOptions, 'executionProvider' | 'libraryPath'>;
  readonly maxRows: number;
  readonly maxHeadRows: number;
  readonly kvBlocks: number;
  /** Add partial sums on the host though devices could. */
  readonly sumOnHost?: boolean;
  /** Variables of each other rank's process beside this one's. */
  readonly environmentOf?: (rank: number) => NodeJS.ProcessEnv;
}

const token = 'process-group';
const startTimeoutMs = 300_000;

/** Loads the shards on all ranks. The caller closes it. */
export async function openProcessGroup(options: ProcessGroupOptions): Promise<LocalGroup> {
  const { directories, device, maxRows, maxHeadRows, kvBlocks } = options;
  const worldSize = directories.length;
  const addresses = await freeAddresses(worldSize);
  const followers = directories.slice(1).map((directory, i) => {
    const rank = i + 1;
    return new RankProcess(
      {
        shardDirectories: [directory],
        group: {
          kind: 'network',
          rank,
          addresses,
          token,
          connectTimeoutMs: startTimeoutMs,
          peerTimeoutMs: startTimeoutMs,
        },
        executionProvider: device.executionProvider,
        ...(device.libraryPath === undefined ? {} : { runtimeLibrary: device.libraryPath }),
      },
      { ...process.env, ...options.environmentOf?.(rank) },
    );
  });
  const manifest = await readShardManifest(directories[0]!);
  const member = { rank: 0, worldSize, shardKey: manifest.key, precision: manifest.profile.weights };
  const peers = await joinGroup(
    { member, addresses, listenAddress: addresses[0]!, token, timeoutMs: startTimeoutMs },
    AbortSignal.timeout(startTimeoutMs),
  );
  const collective = createNetworkCollective({
    rank: 0,
    worldSize,
    peers,
    peerTimeoutMs: 60_000,
    firstTimeoutMs: startTimeoutMs,
    stop: new Int32Array(new SharedArrayBuffer(4)),
  });
  const runtime = await createRuntime({ implementation: 'ort-capi', ...device, intraOpThreads: 1 });
  const runner = new ShardRunner({ runtime, directory: directories[0]!, manifest, collective });
  gatherMemories(runtime.memoryInfo(), collective);
  const configure = {
    kind: 'configure',
    kvBlocks,
    maxRows,
    maxHeadRows,
    usableVocab: manifest.config.vocabSize,
    deviceGroupId: options.sumOnHost === true ? new Int32Array(0) : createGroupId(runtime, collective),
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
      const exits = followers.map(({ process: child }) =>
        child.exitCode === null ? once(child, 'exit') : Promise.resolve(),
      );
      collective.broadcast(encodeStepPlan({ kind: 'stop' }));
      runner.close();
      runtime.close();
      collective.close();
      followers.forEach((follower) => follower.send({ kind: 'close' }));
      await Promise.all(exits);
    },
  };
}
