// The settings of one rank's process: environment variables MIMO_WORKER_* -> one frozen configuration. Owns the table
// of settings with its defaults and their reasons, and the checks across them. Does not know their uses.

import {
  addressSetting,
  booleanSetting,
  choiceSetting,
  durationSetting,
  integerSetting,
  listSetting,
  natsServersSetting,
  parseConfig,
  secretSetting,
  sizeSetting,
  textSetting,
  type ConfigOf,
  type Environment,
  type Setting,
} from '@mimo/core/process/config';
import { logLevels } from '@mimo/core/process/log';
import { precisions } from './shards/target-profile.ts';
import { executionProviders } from './runtime/runtime.ts';

const maxPort = 65_535;

/** The setting's values, and the word `auto`, which is the default. */
function autoOr<T>(setting: Setting<T>): Setting<T | 'auto'> {
  return {
    ...setting,
    fallback: 'auto',
    parse: (text) => (text === 'auto' ? text : setting.parse(text)),
  };
}

export const workerSettings = {
  /** The name under which the group serves, e.g. `mimo-demo`. */
  model: textSetting('MIMO_WORKER_MODEL'),
  /** The group's name, the same on all its ranks. */
  group: textSetting('MIMO_WORKER_GROUP', 'group-0'),
  /** Hash of the group's spec; only reported in heartbeats. */
  revision: textSetting('MIMO_WORKER_REVISION', ''),

  /**
   * The repository that `prepare` fetches into the checkpoint directory, as `organisation/name`; empty: the
   * checkpoint is already there.
   */
  hubRepository: textSetting('MIMO_WORKER_HUB_REPOSITORY', ''),
  /** A branch, tag or commit; only a commit never changes. */
  hubRevision: textSetting('MIMO_WORKER_HUB_REVISION', 'main'),
  /** URL of a hub; empty: the public one. */
  hubEndpoint: textSetting('MIMO_WORKER_HUB_ENDPOINT', ''),
  /** For private and gated models. All tools of the hub use this name. */
  hubToken: secretSetting('HF_TOKEN', ''),

  /** A Hugging Face checkpoint directory, compiled into the cache at the first start ... */
  checkpointDirectory: textSetting('MIMO_WORKER_CHECKPOINT_DIRECTORY', ''),
  /** ... or the output directory of `mimo compile`, which holds `rank-0`, `rank-1`, ... */
  shardDirectory: textSetting('MIMO_WORKER_SHARD_DIRECTORY', ''),
  cacheDirectory: textSetting('MIMO_WORKER_CACHE_DIRECTORY', ''),
  /** int8 gives the same tokens in every batch, at half the memory of bf16. */
  precision: choiceSetting('MIMO_WORKER_PRECISION', precisions, 'int8'),

  tensorParallel: integerSetting('MIMO_WORKER_TENSOR_PARALLEL', { min: 1, max: 8 }, 1),
  rank: integerSetting('MIMO_WORKER_RANK', { min: 0, max: 7 }, 0),
  /** Addresses of the ranks for collectives: `host:port` by rank. A group of one needs none. */
  peers: listSetting('MIMO_WORKER_PEERS', ''),
  /** Where this rank listens for its peers; default: its entry of `peers`. */
  peerListen: textSetting('MIMO_WORKER_PEER_LISTEN', ''),
  /** Shared by the ranks of one life of the group, so that a rank of an earlier life is rejected. */
  groupToken: secretSetting('MIMO_WORKER_GROUP_TOKEN', 'unset'),
  /** Loading 8 GB of weights from a slow volume takes minutes, and ranks start apart. */
  peerConnectTimeoutMs: durationSetting('MIMO_WORKER_PEER_CONNECT_TIMEOUT', '10m'),
  peerTimeoutMs: durationSetting('MIMO_WORKER_PEER_TIMEOUT', '10s'),

  /**
   * A longer step, waits for peers included, counts as hung, and its group ends. The largest step takes seconds on
   * two busy cores, and a device may compile in its first steps.
   */
  stepTimeoutMs: durationSetting('MIMO_WORKER_STEP_TIMEOUT', '2m'),

  /** The WorkerService on a leader, health on every rank. */
  listen: addressSetting('MIMO_WORKER_LISTEN', '0.0.0.0:50052'),
  /** The address for gateways, `host:port`; default: the listening address. */
  advertise: textSetting('MIMO_WORKER_ADVERTISE', ''),
  /** Where Prometheus reads a leader's metrics, `host:port`; empty serves no page. */
  metricsListen: textSetting('MIMO_WORKER_METRICS_LISTEN', ''),
  /** Without it the group sends no heartbeats; its Stats method must be polled instead. */
  natsUrls: natsServersSetting('MIMO_WORKER_NATS_URL', ''),
  /** A .creds file, or one line with `user:password` or a token; read again for each connection. */
  natsCredentialsFile: textSetting('MIMO_WORKER_NATS_CREDENTIALS_FILE', ''),
  /** A dispatcher stops using a group after three missing heartbeats. */
  heartbeatIntervalMs: durationSetting('MIMO_WORKER_HEARTBEAT_INTERVAL', '250ms'),

  runtime: choiceSetting('MIMO_WORKER_RUNTIME', ['auto', 'ort-capi', 'ort-node'], 'auto'),
  /** `cuda` computes on the pod's GPU; it needs precision fp16 or bf16 ... */
  executionProvider: choiceSetting('MIMO_WORKER_EXECUTION_PROVIDER', executionProviders, 'cpu'),
  /** ... and the libonnxruntime of onnxruntime-gpu with its CUDA provider beside it; default: the bundled library. */
  runtimeLibrary: textSetting('MIMO_WORKER_RUNTIME_LIBRARY', ''),
  /** Tokens that the MTP layer drafts a step; 0 turns speculation off. The text is the same either way. */
  draftTokens: integerSetting('MIMO_WORKER_DRAFT_TOKENS', { min: 0, max: 1 }, 1),
  /** Draft only while enough drafts are right to pay for their verification at the current number of sequences. */
  adaptiveSpeculation: booleanSetting('MIMO_WORKER_ADAPTIVE_SPECULATION', true),
  /** Compute threads of this rank. */
  threads: integerSetting('MIMO_WORKER_THREADS', { min: 1, max: 256 }, 1),
  /** This and the two settings below: a number, or `auto` for the execution provider's default (engine-options.ts). */
  maxSequences: autoOr(integerSetting('MIMO_WORKER_MAX_SEQUENCES', { min: 1, max: 1024 })),
  /**
   * Memory for the KV cache: a size, or `auto` for the memory of the device or container that the weights leave free.
   */
  kvBytes: autoOr(sizeSetting('MIMO_WORKER_KV_BYTES')),
  /**
   * A sequence whose client has read nothing for this long, or for as long as it ran before, gives up its place when
   * another sequence needs it.
   */
  parkAfterMs: durationSetting('MIMO_WORKER_PARK_AFTER', '2s'),
  maxBatchTokens: autoOr(integerSetting('MIMO_WORKER_MAX_BATCH_TOKENS', { min: 2, max: 65_536 })),
  prefillChunkTokens: autoOr(integerSetting('MIMO_WORKER_PREFILL_CHUNK_TOKENS', { min: 1, max: 65_536 })),

  /** Kubernetes gives a pod 30 s by default between SIGTERM and SIGKILL. */
  drainGraceMs: durationSetting('MIMO_WORKER_DRAIN_GRACE', '25s'),
  /**
   * Streams that run for longer than this while draining are handed over. A move costs a pause and computes the
   * prompt again.
   */
  drainFinishMs: durationSetting('MIMO_WORKER_DRAIN_FINISH', '10s'),
  logLevel: choiceSetting('MIMO_WORKER_LOG_LEVEL', logLevels, 'info'),
} as const;

/** The configuration of one rank. Times in milliseconds, sizes in bytes; '' for optional texts that are not set. */
export type WorkerConfig = ConfigOf<typeof workerSettings>;

/** What to run: a rank, or the command that finds, compiles and publishes its model in advance. */
export type WorkerCommand = 'rank' | 'prepare';

function checkModel(config: WorkerConfig): string[] {
  const problems: string[] = [];
  if ((config.checkpointDirectory === '') === (config.shardDirectory === '')) {
    problems.push(
      'exactly one of MIMO_WORKER_CHECKPOINT_DIRECTORY and MIMO_WORKER_SHARD_DIRECTORY must be set',
    );
  }
  if (config.checkpointDirectory !== '' && config.cacheDirectory === '') {
    problems.push('MIMO_WORKER_CACHE_DIRECTORY must be set, because a checkpoint has to be compiled');
  }
  if (config.hubRepository !== '' && !/^\w[\w.-]*(\/\w[\w.-]*)?$/.test(config.hubRepository)) {
    problems.push(
      `MIMO_WORKER_HUB_REPOSITORY must be organisation/name, not ${JSON.stringify(config.hubRepository)}`,
    );
  }
  if (config.hubEndpoint !== '' && !/^https?:\/\/./.test(config.hubEndpoint)) {
    // Not its text, which may contain a password.
    problems.push('MIMO_WORKER_HUB_ENDPOINT must be a URL such as https://huggingface.co');
  }
  return problems;
}

function checkRank(config: WorkerConfig): string[] {
  const problems: string[] = [];
  if (config.rank >= config.tensorParallel) {
    problems.push(
      `MIMO_WORKER_RANK must be below MIMO_WORKER_TENSOR_PARALLEL (${config.tensorParallel}), not ${config.rank}`,
    );
  }
  if (config.tensorParallel > 1 && config.peers.length !== config.tensorParallel) {
    problems.push(
      `MIMO_WORKER_PEERS must name ${config.tensorParallel} addresses, one a rank, not ${config.peers.length}`,
    );
  }
  if (config.drainFinishMs >= config.drainGraceMs) {
    problems.push(
      `MIMO_WORKER_DRAIN_FINISH (${config.drainFinishMs} ms) must be below MIMO_WORKER_DRAIN_GRACE (${config.drainGraceMs} ms)`,
    );
  }
  const listenHost = config.listen.slice(0, config.listen.lastIndexOf(':'));
  if (config.natsUrls.length > 0 && config.advertise === '' && ['0.0.0.0', '[::]'].includes(listenHost)) {
    problems.push(
      `MIMO_WORKER_ADVERTISE must be set, because MIMO_WORKER_LISTEN is every address (${config.listen})`,
    );
  }
  for (const peer of config.peers) {
    const port = Number(peer.slice(peer.lastIndexOf(':') + 1));
    if (!peer.includes(':') || !(port > 0 && port <= maxPort)) {
      problems.push(`MIMO_WORKER_PEERS entries must be host:port, not ${JSON.stringify(peer)}`);
    }
  }
  return problems;
}

/**
 * Reads the environment of a rank, or that of its pod's `prepare`, which needs no addresses; fails with
 * `invalid_argument` listing every problem.
 */
export function parseWorkerConfig(env: Environment, command: WorkerCommand = 'rank'): WorkerConfig {
  const check = (config: WorkerConfig): string[] => [
    ...checkModel(config),
    ...(command === 'rank'
      ? checkRank(config)
      : config.shardDirectory === ''
        ? []
        : ['MIMO_WORKER_SHARD_DIRECTORY needs no preparation: set MIMO_WORKER_CHECKPOINT_DIRECTORY']),
  ];
  return parseConfig({ prefix: 'MIMO_WORKER_', settings: workerSettings, check }, env);
}
