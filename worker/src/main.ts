// The process of one rank: `node worker/src/main.ts`, configured by MIMO_WORKER_* (config.ts). Owns the exit code: 0 after
// a drain that was asked for, here or at another rank, 1 where the rank could not start or its group was lost, 78 where it
// cannot start with what it was given. `prepare` as an argument runs prepare.ts instead, in the same environment.

import { ClusterError } from '@mimo/core/process/errors';
import { reportGrpcTo } from '@mimo/core/grpc/log';
import { exitCodeOf, Lifecycle, stopOnSignals } from '@mimo/core/process/lifecycle';
import { createLog, logCrashes } from '@mimo/core/process/log';

import { parseWorkerConfig } from './config.ts';
import { startEngine } from './engines/mimo/engine-host.ts';
import { startFollower } from './follower.ts';
import { startLeader } from './leader.ts';
import { engineOptionsFrom, prepareShard } from './shard-cache.ts';

async function run(): Promise<void> {
  const config = parseWorkerConfig(process.env);
  const log = createLog({ process: 'worker', level: config.logLevel }).child({
    model: config.model,
    group: config.group,
    rank: config.rank,
  });
  logCrashes(log);
  reportGrpcTo(log);
  const lifecycle = new Lifecycle({ log, graceMs: config.drainGraceMs });
  stopOnSignals(lifecycle);
  const exitWith = async (error: ClusterError, message: string, exitCode = 1): Promise<void> => {
    if (lifecycle.draining.aborted) {
      // Its end was asked for; whoever asked waits for the exit that follows.
      return;
    }
    const isInOrder = error.code === 'canceled';
    log[isInOrder ? 'info' : 'error']({ error }, isInOrder ? 'the group ends' : message);
    await lifecycle.stop(message);
    if (!isInOrder) {
      // The last line that a supervisor, or Kubernetes, shows.
      process.stderr.write(`worker: ${message}: ${error.message}\n`);
    }
    process.exit(isInOrder ? 0 : exitCode);
  };
  try {
    const start = config.rank === 0 ? startLeader : startFollower;
    const { lost } = await start({
      config,
      log,
      lifecycle,
      startEngine: async (signal) =>
        startEngine(engineOptionsFrom(config, await prepareShard(config, log, signal)), signal),
    });
    await exitWith(await lost, 'the group was lost');
  } catch (error) {
    const known = ClusterError.from(error);
    await exitWith(known, 'the rank could not start', exitCodeOf(known));
  }
}

/** The other command, whose own modules no rank needs. */
async function prepare(args: readonly string[]): Promise<never> {
  const { runPrepare } = await import('./prepare.ts');
  const stopping = new AbortController();
  for (const signal of ['SIGTERM', 'SIGINT'] as const) {
    process.once(signal, () => stopping.abort(new ClusterError('canceled', `stopped by ${signal}`)));
  }
  process.exit(await runPrepare(args, process.env, stopping.signal));
}

try {
  const [command, ...args] = process.argv.slice(2);
  if (command === 'prepare') {
    await prepare(args);
  } else if (command !== undefined) {
    throw new ClusterError('invalid_argument', `${JSON.stringify(command)} is no command: there is prepare`);
  }
  await run();
} catch (error) {
  const known = ClusterError.from(error);
  process.stderr.write(`worker: ${known.message}\n`);
  process.exitCode = exitCodeOf(known);
}
