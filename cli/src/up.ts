// `mimo up`: a whole cluster on this machine, from a checkpoint to a gateway that answers. Owns the messages to the
// user and the order of preparations (compile, nats-server); the processes are cli/src/local's.

import { access } from 'node:fs/promises';
import { basename, join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';

import { beforeAbort } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import { compile } from '@mimo/worker/compiler/compile';
import { createProgressPrinter } from '@mimo/worker/compiler/compile-command';
import { precisions } from '@mimo/worker/shards/target-profile';
import { shardDirectoryIn } from '@mimo/worker/shard-cache';

import { commandLine } from './command-line.ts';
import { Connection } from './connection.ts';
import { startLocalCluster, type LocalCluster } from './local/local-cluster.ts';
import { cacheDirectoryFrom, findNatsServer } from './local/nats-server.ts';
import { note, printable, styled } from './terminal.ts';

const defaultModel = resolve(import.meta.dirname, '../../models/mimo-demo');
const defaultPort = 50_051;
const runtimes = ['auto', 'ort-capi', 'ort-node'] as const;
const readyPollMs = 50;

export const upHelp = `mimo up [options]
  --model DIR              directory of a MiMo checkpoint; default: models/mimo-demo
  --precision P            ${precisions.join(', ')}; default: int8
  --tensor-parallel N      ranks of each group, one process each; default: 2
  --groups N               groups, each with a copy of the model; default: 1
  --runtime R              ${runtimes.join(', ')}; default: auto
  --threads N              compute threads of each rank; default: 1
  --port N                 port of the gateway on 127.0.0.1; default: ${defaultPort}`;

function choice<const Word extends string>(name: string, words: readonly Word[], value: string): Word {
  const word = words.find((candidate) => candidate === value);
  if (word === undefined) {
    throw new ClusterError(
      'invalid_argument',
      `--${name} must be one of ${words.join(', ')}, not '${value}'`,
    );
  }
  return word;
}

function count(name: string, value: string, max: number): number {
  const number = Number(value);
  if (!/^\d+$/.test(value) || number < 1 || number > max) {
    throw new ClusterError(
      'invalid_argument',
      `--${name} must be a whole number from 1 to ${max}, not '${value}'`,
    );
  }
  return number;
}

interface UpOptions {
  /** As the user gave it. */
  readonly model: string;
  readonly modelDirectory: string;
  readonly modelName: string;
  readonly precision: (typeof precisions)[number];
  readonly tensorParallel: number;
  readonly groups: number;
  readonly runtime: (typeof runtimes)[number];
  readonly threads: number;
  readonly port: number;
}

function parseUpOptions(argv: readonly string[]): UpOptions {
  const { values } = parseArgs({
    args: [...argv],
    options: {
      model: { type: 'string', default: defaultModel },
      precision: { type: 'string', default: 'int8' },
      'tensor-parallel': { type: 'string', default: '2' },
      groups: { type: 'string', default: '1' },
      runtime: { type: 'string', default: 'auto' },
      threads: { type: 'string', default: '1' },
      port: { type: 'string', default: String(defaultPort) },
    },
  });
  const modelDirectory = resolve(values.model);
  return {
    model: values.model,
    modelDirectory,
    modelName: basename(modelDirectory),
    precision: choice('precision', precisions, values.precision),
    tensorParallel: count('tensor-parallel', values['tensor-parallel'], 8),
    groups: count('groups', values.groups, 16),
    runtime: choice('runtime', runtimes, values.runtime),
    threads: count('threads', values.threads, 256),
    port: count('port', values.port, 65_535),
  };
}

/** Runs the command until the signal fires; resolves with the exit code. */
export async function runUp(argv: readonly string[], signal: AbortSignal): Promise<number> {
  const options = parseUpOptions(argv);
  const begin = performance.now();
  await access(join(options.modelDirectory, 'config.json')).catch((error: unknown) => {
    const text = `--model ${options.model} has no config.json: give the directory of a MiMo checkpoint`;
    throw new ClusterError('not_found', text, { cause: error });
  });
  if (options.modelName === '') {
    const text = `--model ${options.model} has no name that the model could take: give a directory with a name`;
    throw new ClusterError('invalid_argument', text);
  }
  const cacheDirectory = cacheDirectoryFrom(process.env);
  const [natsServerBinary, shardDirectory] = await Promise.all([
    findNatsServer({ cacheDirectory, signal, onProgress: note }),
    compileIntoCache(options, cacheDirectory, signal),
  ]);
  const ranks = options.groups * options.tensorParallel;
  note(`starting the queue, the gateway and ${ranks} worker process${ranks === 1 ? '' : 'es'}`);
  const dataDirectory = join(cacheDirectory, 'local', String(options.port));
  const cluster = await startLocalCluster({
    modelName: options.modelName,
    modelDirectory: options.modelDirectory,
    shardDirectory,
    precision: options.precision,
    tensorParallel: options.tensorParallel,
    groups: options.groups,
    gatewayPort: options.port,
    natsServerBinary,
    dataDirectory,
    workerEnv: { MIMO_WORKER_RUNTIME: options.runtime, MIMO_WORKER_THREADS: String(options.threads) },
    onEvent: note,
  });
  const over = new AbortController();
  try {
    const until = AbortSignal.any([signal, over.signal]);
    await Promise.race([waitUntilReady(cluster, options, until), cluster.givenUp]);
    announce({ options, cluster, dataDirectory, elapsedMs: performance.now() - begin });
    const { promise: forever } = Promise.withResolvers<never>();
    await Promise.race([beforeAbort(forever, until), cluster.givenUp]);
    return 0;
  } catch (error) {
    if (signal.aborted) {
      note('stopping ...');
      return 0;
    }
    throw error;
  } finally {
    // Pending waits for a failed cluster would keep this process alive.
    over.abort();
    await cluster.close();
  }
}

async function compileIntoCache(
  options: UpOptions,
  cacheDirectory: string,
  signal: AbortSignal,
): Promise<string> {
  const { modelDirectory, precision, tensorParallel } = options;
  const outDirectory = await shardDirectoryIn({
    cacheDirectory,
    checkpointDirectory: modelDirectory,
    precision,
    tensorParallel,
  });
  const onProgress = createProgressPrinter(performance.now());
  await compile({ modelDirectory, outDirectory, tensorParallel, precision, onProgress }, signal);
  return outDirectory;
}

/** Polls the gateway, as any client would, until every group accepts requests. */
async function waitUntilReady(cluster: LocalCluster, options: UpOptions, signal: AbortSignal): Promise<void> {
  const connection = new Connection(cluster.gatewayAddress, undefined);
  try {
    for (;;) {
      const models = await connection.listModels(signal).catch((error: unknown) => {
        signal.throwIfAborted();
        if (ClusterError.from(error).code !== 'unavailable') {
          throw error;
        }
        return [];
      });
      if (
        models.some(({ name, readyGroups }) => name === options.modelName && readyGroups === options.groups)
      ) {
        return;
      }
      await sleep(readyPollMs, undefined, { signal });
    }
  } finally {
    connection.close();
  }
}

interface Announcement {
  readonly options: UpOptions;
  readonly cluster: LocalCluster;
  readonly dataDirectory: string;
  readonly elapsedMs: number;
}

function announce({ options, cluster, dataDirectory, elapsedMs }: Announcement): void {
  const { modelName, precision, tensorParallel, groups, port } = options;
  const address = port === defaultPort ? '' : `--address ${cluster.gatewayAddress} `;
  note(
    [
      `${styled('green', 'ready')} in ${(elapsedMs / 1000).toFixed(1)} s`,
      `  model    ${printable(modelName)}, ${precision}, ${groups} group${groups === 1 ? '' : 's'} of ${tensorParallel}`,
      `  gRPC     ${cluster.gatewayAddress}  (reflection and health on)`,
      `  queue    ${cluster.natsUrl ?? `in the gateway's memory, because nats-server was not found: requests are lost when the gateway stops`}`,
      `  logs     ${join(dataDirectory, 'logs')}`,
      `  try      ${styled('bold', commandLine('chat', `${address}"What is 47 + 85?"`))}`,
      '  Ctrl-C stops everything',
    ].join('\n'),
  );
}
