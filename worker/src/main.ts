// The process of one rank: `node worker/src/main.ts`, configured by MIMO_WORKER_* (config.ts). Rank 0 leads its group,
// the others follow. `prepare` as an argument runs prepare.ts instead, in the same environment.

import { ClusterError } from '@mimo/core/process/errors';
import { reportGrpcTo } from '@mimo/core/grpc/log';
import { runProcess, unusableExitCode, type ProcessParts } from '@mimo/core/process/run-process';

import { parseWorkerConfig, workerSettings, type WorkerConfig } from './config.ts';
import { startEngine, type EngineHost } from './engines/mimo/engine-host.ts';
import { startFollower } from './follower.ts';
import { startLeader } from './leader.ts';
import { engineOptionsFrom, prepareShard } from './shard-cache.ts';

/** Starts a rank: loads its shard, joins its group and serves. */
async function startRank(parts: ProcessParts<WorkerConfig>): Promise<void> {
  const { config, log, lifecycle } = parts;
  reportGrpcTo(log);
  const openEngine = async (): Promise<EngineHost> => {
    const shard = await prepareShard(config, log, lifecycle.draining);
    const options = engineOptionsFrom(config, shard);
    return lifecycle.opened('engine', await startEngine(options, lifecycle.draining));
  };
  const start = config.rank === 0 ? startLeader : startFollower;
  await start(parts, openEngine);
}

/** The other command; a rank does not load its modules. */
async function prepare(args: readonly string[]): Promise<never> {
  const { runPrepare } = await import('./prepare.ts');
  const stopping = new AbortController();
  for (const signal of ['SIGTERM', 'SIGINT'] as const) {
    process.once(signal, () => stopping.abort(new ClusterError('canceled', `stopped by ${signal}`)));
  }
  process.exit(await runPrepare(args, process.env, stopping.signal));
}

const [command, ...args] = process.argv.slice(2);
if (command === 'prepare') {
  await prepare(args);
} else if (command === undefined) {
  await runProcess({
    name: 'worker',
    settings: workerSettings,
    parse: parseWorkerConfig,
    graceMs: ({ drainGraceMs }) => drainGraceMs,
    fields: ({ model, group, rank }) => ({ model, group, rank }),
    start: startRank,
  });
} else {
  process.stderr.write(`worker: unknown command ${JSON.stringify(command)}: the only command is prepare\n`);
  process.exitCode = unusableExitCode;
}
