// `node worker/src/main.ts prepare`: the preparation of a model before its groups can start. Finds the checkpoint or
// fetches it from a hub, compiles its shards into the cache, publishes tokenizer and configuration to the catalogue.
// Each is done once, however many processes run it. Owns the command's exit code, by which the controller decides
// whether to retry.

import { hostname } from 'node:os';
import { parseArgs } from 'node:util';

import type { Environment } from '@mimo/core/process/config';
import { ClusterError, type ErrorCode } from '@mimo/core/process/errors';
import { createLog, type Log } from '@mimo/core/process/log';
import type { ModelFiles } from '@mimo/core/bus/model-catalog';
import { NatsLink } from '@mimo/core/bus/nats/link';
import { createModelCatalog } from '@mimo/core/bus/nats/model-catalog';
import { readTextFiles } from '@mimo/core/bus/model-identity';

import { parseWorkerConfig, type WorkerConfig } from './config.ts';
import { fetchCheckpoint } from './compiler/hub.ts';
import { identityOf } from './identity.ts';
import { openCheckpoint } from './compiler/checkpoint.ts';
import { prepareShard } from './shard-cache.ts';

interface PrepareSteps {
  readonly compile: boolean;
  readonly publish: boolean;
}

/** Errors that another attempt would only repeat: the model or its settings must change first. */
const terminalCodes: ReadonlySet<ErrorCode> = new Set([
  'not_found',
  'invalid_argument',
  'failed_precondition',
  'permission_denied',
  'unauthenticated',
  'unimplemented',
]);
const exitCodes = { done: 0, again: 1, settings: 2, terminal: 3 } as const;

const publishMs = 60_000;
const logProgressMs = 5_000;

/** A tokenizer is one file, or the older pair of files. */
const tokenizerFile = 'tokenizer.json';
const vocabularyFiles = ['vocab.json', 'merges.txt'];

/**
 * Runs the command and returns its exit code: 0 done, 3 model not found or not runnable with these settings, 2 wrong
 * settings or arguments, 1 any other failure. The last line on standard error names the cause. The signal cancels; the
 * next call continues from the finished work.
 */
export async function runPrepare(
  args: readonly string[],
  env: Environment,
  signal: AbortSignal,
): Promise<number> {
  let steps: PrepareSteps;
  let config: WorkerConfig;
  try {
    steps = parsePrepareArgs(args);
    config = parseWorkerConfig(env, 'prepare');
    if (steps.publish && config.natsUrls.length === 0) {
      throw new ClusterError('invalid_argument', '--publish needs MIMO_WORKER_NATS_URL');
    }
  } catch (error) {
    return fail(ClusterError.from(error), exitCodes.settings);
  }
  const log = createLog({ process: 'prepare', level: config.logLevel }).child({ model: config.model });
  try {
    await prepare(config, steps, { log, signal });
    return exitCodes.done;
  } catch (error) {
    const failure = ClusterError.from(error);
    log.error({ error: failure }, 'not prepared');
    return fail(failure, terminalCodes.has(failure.code) ? exitCodes.terminal : exitCodes.again);
  }
}

/** Kubernetes shows a container's last line as its termination message: one line, however the message is laid out. */
function fail({ message }: ClusterError, exitCode: number): number {
  process.stderr.write(`prepare: ${message.replaceAll(/\s*\n\s*/g, '; ')}\n`);
  return exitCode;
}

function parsePrepareArgs(args: readonly string[]): PrepareSteps {
  const options = {
    compile: { type: 'boolean', default: false },
    publish: { type: 'boolean', default: false },
  } as const;
  try {
    return parseArgs({ args: [...args], options }).values;
  } catch (error) {
    throw new ClusterError('invalid_argument', ClusterError.from(error).message, { cause: error });
  }
}

async function prepare(
  config: WorkerConfig,
  steps: PrepareSteps,
  { log, signal }: { readonly log: Log; readonly signal: AbortSignal },
): Promise<void> {
  const { checkpointDirectory: directory } = config;
  if (config.hubRepository !== '') {
    await fetchFromHub(config, log, signal);
  }
  await openCheckpoint(directory);
  const files = await readModelFiles(directory);
  log.info({ directory }, 'checkpoint found');
  if (steps.compile) {
    await prepareShard(config, log, signal);
  }
  // Last, so that every model in the catalogue is ready to run.
  if (steps.publish) {
    const identity = await identityOf(config, signal);
    await publish({ name: config.model, files, identity }, { config, log, signal });
  }
}

async function fetchFromHub(config: WorkerConfig, log: Log, signal: AbortSignal): Promise<void> {
  const begin = performance.now();
  let loggedAt = begin;
  const { hubRepository: repository, hubRevision: revision } = config;
  log.info(
    { repository, revision, directory: config.checkpointDirectory },
    'fetching the checkpoint unless it is there',
  );
  await fetchCheckpoint(
    {
      repository,
      revision,
      directory: config.checkpointDirectory,
      ...(config.hubEndpoint === '' ? {} : { endpoint: config.hubEndpoint }),
      ...(config.hubToken === '' ? {} : { token: config.hubToken }),
      onProgress: (progress) => {
        if (performance.now() - loggedAt > logProgressMs) {
          loggedAt = performance.now();
          log.info(progress, 'fetching');
        }
      },
    },
    signal,
  );
  log.info({ repository, revision, elapsedMs: Math.round(performance.now() - begin) }, 'fetched');
}

/** The files to publish; throws `failed_precondition` if they include no tokenizer. */
async function readModelFiles(directory: string): Promise<ReadonlyMap<string, Uint8Array>> {
  const files = await readTextFiles(directory);
  if (!files.has(tokenizerFile) && !vocabularyFiles.every((name) => files.has(name))) {
    const text = `${directory}: has no tokenizer: neither ${tokenizerFile} nor ${vocabularyFiles.join(' with ')}`;
    throw new ClusterError('failed_precondition', text);
  }
  return files;
}

async function publish(
  model: ModelFiles,
  { config, log, signal }: { readonly config: WorkerConfig; readonly log: Log; readonly signal: AbortSignal },
): Promise<void> {
  const link = new NatsLink({
    servers: config.natsUrls,
    credentialsFile: config.natsCredentialsFile,
    clientName: `mimo-prepare ${hostname()}`,
    log,
  });
  // The gateways set the number of replicas.
  const catalog = createModelCatalog(link, { replicas: 1, log });
  const limit = AbortSignal.timeout(publishMs);
  try {
    const { digest, identity } = await catalog.publish(model, AbortSignal.any([signal, limit]));
    log.info({ digest, identity, files: [...model.files.keys()] }, 'published');
  } catch (error) {
    if (limit.aborted) {
      const text = `NATS at MIMO_WORKER_NATS_URL did not store the model within ${publishMs} ms`;
      throw new ClusterError('unavailable', text, { cause: error });
    }
    throw error;
  } finally {
    await link.close();
  }
}
