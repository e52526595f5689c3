// A real nats-server for this machine: found on the PATH or in the cache, else built once from its Go module into the
// cache, outside the checkout; and its start on loopback with JetStream. Independent of what the server stores.

import { execFile } from 'node:child_process';
import { access, mkdir, mkdtemp, readdir, readFile, rename, rm } from 'node:fs/promises';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';

import { beforeAbort, pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import { withFileLock } from '@mimo/core/process/file-lock';

import { startChild, type Child } from './child-process.ts';
import { freePorts } from './free-ports.ts';

/** The Go module's version that is built. */
export const natsServerVersion = '2.15.1';
/** Filtered ordered consumers need this much; Debian 12's own server is 2.9. */
const minVersion = [2, 10] as const;
const startTimeoutMs = 30_000;
const startPollMs = 10;
/** Go ends the compilers that it runs. */
const buildGraceMs = 2_000;

/**
 * The directory for files that can be made again: $MIMO_CACHE_DIR, else $XDG_CACHE_HOME/mimo-cluster, else ~/.cache.
 */
export function cacheDirectoryFrom(env: NodeJS.ProcessEnv): string {
  return env['MIMO_CACHE_DIR'] ?? join(env['XDG_CACHE_HOME'] ?? join(homedir(), '.cache'), 'mimo-cluster');
}

export interface FindOptions {
  readonly cacheDirectory: string;
  /** Gets a line for the user about each slow step. */
  readonly onProgress: (line: string) => void;
  readonly signal: AbortSignal;
  readonly env?: NodeJS.ProcessEnv;
}

/** For `findNatsServer` alone. */
export interface FindNatsOptions extends FindOptions {
  /** Ignores the PATH: the one built here is static, and of `natsServerVersion` exactly. */
  readonly isBuiltHere?: boolean;
}

async function isRecentEnough(binary: string): Promise<boolean> {
  try {
    const { stdout } = await promisify(execFile)(binary, ['--version']);
    const [major = 0, minor = 0] = (/v(\d+)\.(\d+)/.exec(stdout) ?? []).slice(1).map(Number);
    return major > minVersion[0] || (major === minVersion[0] && minor >= minVersion[1]);
  } catch {
    return false;
  }
}

/** Builds the module into `target`; returns false, and reports the reason, if it cannot be built here. */
async function build(target: string, options: FindOptions): Promise<boolean> {
  const parent = join(target, '..');
  const directory = await mkdtemp(join(parent, 'build-'));
  const begin = performance.now();
  try {
    options.onProgress(`building nats-server ${natsServerVersion} from its Go module, once, about a minute`);
    const go = await startChild({
      name: 'go',
      command: ['go', 'install', `github.com/nats-io/nats-server/v2@v${natsServerVersion}`],
      env: { ...(options.env ?? process.env), GOBIN: directory, CGO_ENABLED: '0' },
      logFile: join(directory, 'build.log'),
    });
    // If the caller stops waiting, the build stops too; it would otherwise continue.
    const end = await beforeAbort(go.exited, options.signal).catch(async (error: unknown) => {
      await go.stop(buildGraceMs);
      throw error;
    });
    if (end.code !== 0) {
      options.onProgress(`nats-server cannot be built here: ${go.logTail().trim()}`);
      return false;
    }
    await rename(join(directory, 'nats-server'), target);
    options.onProgress(`built nats-server in ${((performance.now() - begin) / 1000).toFixed(0)} s`);
    return true;
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
}

/**
 * Finds a nats-server of at least 2.10, or builds one; null if that is
 * impossible, after `onProgress` got the reason. Processes that ask at the same time build once.
 */
export async function findNatsServer(options: FindNatsOptions): Promise<string | null> {
  if (options.isBuiltHere !== true && (await isRecentEnough('nats-server'))) {
    return 'nats-server';
  }
  const directory = join(options.cacheDirectory, 'nats-server', natsServerVersion);
  const binary = join(directory, 'nats-server');
  const isCached = async (): Promise<boolean> =>
    access(binary).then(
      () => true,
      () => false,
    );
  if (await isCached()) {
    return binary;
  }
  await mkdir(directory, { recursive: true });
  return withFileLock(
    join(directory, 'lock'),
    async () => ((await isCached()) || (await build(binary, options)) ? binary : null),
    options.signal,
  );
}

export interface StartOptions {
  readonly binary: string;
  /** Holds the streams' files and survives a restart; the server's log lies in it too. */
  readonly storeDirectory: string;
  /** 0: any free one. */
  readonly port: number;
  /** Further lines of its configuration, such as who may connect. */
  readonly configFile?: string;
}

/** A running server. Close it. */
export interface NatsServer {
  readonly url: string;
  readonly port: number;
  readonly child: Child;
  close(): Promise<void>;
}

/**
 * Starts a server on 127.0.0.1 with JetStream; fails with `unavailable` and the end of its log if it does not come
 * up.
 */
export async function startNatsServer(options: StartOptions): Promise<NatsServer> {
  await mkdir(options.storeDirectory, { recursive: true });
  const portsDirectory = await mkdtemp(join(options.storeDirectory, 'ports-'));
  // Chosen here, not by the server: after a restart it listens on the same port, which must stay free in between.
  const [freePort = 0] = options.port === 0 ? await freePorts(1) : [];
  const port = options.port === 0 ? freePort : options.port;
  const child = await startChild({
    name: 'nats-server',
    command: [
      options.binary,
      '--jetstream',
      `--store_dir=${options.storeDirectory}`,
      '--addr=127.0.0.1',
      `--port=${port}`,
      `--ports_file_dir=${portsDirectory}`,
      ...(options.configFile === undefined ? [] : [`--config=${options.configFile}`]),
    ],
    logFile: join(options.storeDirectory, 'nats-server.log'),
  });
  try {
    const url = await waitForUrl(portsDirectory, child);
    return { url, port: Number(new URL(url).port), child, close: () => child.stop(5_000) };
  } catch (error) {
    await child.stop(0);
    throw error;
  } finally {
    await rm(portsDirectory, { recursive: true, force: true });
  }
}

/** The server writes a file with its ports once it listens. */
async function waitForUrl(portsDirectory: string, child: Child): Promise<string> {
  const giveUp = AbortSignal.any([AbortSignal.timeout(startTimeoutMs), abortedBy(child.exited)]);
  while (!giveUp.aborted) {
    const [file] = await readdir(portsDirectory);
    if (file !== undefined) {
      const text = await readFile(join(portsDirectory, file), 'utf8');
      const url = /"(nats:\/\/[^"]+)"/.exec(text)?.[1];
      if (url !== undefined) {
        return url;
      }
    }
    await pause(startPollMs, giveUp);
  }
  throw new ClusterError('unavailable', `nats-server did not come up:\n${child.logTail()}`);
}

function abortedBy(end: Promise<unknown>): AbortSignal {
  const controller = new AbortController();
  void end.finally(() => controller.abort());
  return controller.signal;
}
