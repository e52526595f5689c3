// One process, from its environment to its exit code: configuration -> log -> parts, opened in order -> ready ->
// drained and closed in reverse. Owns signals and exit codes; nothing else ends a process. Each main.ts names its
// parts.

import { printableConfig, type ConfigOf, type Environment, type Settings } from './config.ts';
import { ClusterError } from './errors.ts';
import { Lifecycle } from './lifecycle.ts';
import { createLog, logCrashes, type Log, type LogLevel } from './log.ts';

/** sysexits' EX_CONFIG: the process cannot work with its settings, so restarting it is useless. */
export const unusableExitCode = 78;

const unusableCodes = new Set(['invalid_argument', 'failed_precondition', 'not_found', 'permission_denied']);

/** The exit code of a process that could not start: a supervisor should not restart it after 78. */
function exitCodeOf({ code }: ClusterError): number {
  return unusableCodes.has(code) ? unusableExitCode : 1;
}

/** What the parts of a process are opened with. Each registers its end with the lifecycle as soon as it is open. */
export interface ProcessParts<Config> {
  readonly config: Config;
  readonly log: Log;
  readonly lifecycle: Lifecycle;
}

/** What is different from one kind of process to another. */
export interface ProcessKind<Table extends Settings> {
  /** Names the process in its log, and as a prefix on standard error. */
  readonly name: 'gateway' | 'worker' | 'controller';
  readonly settings: Table;
  readonly parse: (env: Environment) => ConfigOf<Table> & { readonly logLevel: LogLevel };
  /** How long it may drain. */
  readonly graceMs: (config: ConfigOf<Table>) => number;
  /** Fields of each of its log lines. */
  readonly fields?: (config: ConfigOf<Table>) => Readonly<Record<string, string | number>>;
  /** Opens the parts; resolves when the process serves. */
  readonly start: (parts: ProcessParts<ConfigOf<Table>>) => Promise<unknown>;
}

/**
 * Runs a process to its end. It exits with 0 after a signal or an end in order (`Lifecycle.end` with `canceled`), 78
 * where what it was given cannot work, else 1; the reason is the last line of standard error, which a supervisor shows.
 */
export async function runProcess<Table extends Settings>(kind: ProcessKind<Table>): Promise<void> {
  const fail = (error: ClusterError, exitCode: number): never => {
    process.stderr.write(`${kind.name}: ${error.message}\n`);
    process.exit(exitCode);
  };
  let config;
  try {
    config = kind.parse(process.env);
  } catch (caught) {
    const error = ClusterError.from(caught);
    return fail(error, exitCodeOf(error));
  }
  const log = createLog({ process: kind.name, level: config.logLevel }).child(kind.fields?.(config) ?? {});
  log.info({ config: printableConfig(kind.settings, config), node: process.version }, 'starting');
  logCrashes(log);
  const lifecycle = new Lifecycle({ log, graceMs: kind.graceMs(config) });
  stopOnSignals(lifecycle);
  let reason: ClusterError;
  let exitCode = 1;
  try {
    await kind.start({ config, log, lifecycle });
    lifecycle.ready();
    reason = await lifecycle.over;
  } catch (error) {
    reason = ClusterError.from(error);
    exitCode = exitCodeOf(reason);
  }
  if (lifecycle.draining.aborted) {
    // A signal came first: it exits once everything is closed.
    return;
  }
  const isInOrder = reason.code === 'canceled';
  log[isInOrder ? 'info' : 'error']({ error: reason }, isInOrder ? 'the end is in order' : 'cannot go on');
  await lifecycle.stop(reason.message);
  if (isInOrder) {
    process.exit(0);
  }
  fail(reason, exitCode);
}

/** Stops on SIGTERM and SIGINT, and exits with 0; a second signal exits at once with 1. */
function stopOnSignals(lifecycle: Lifecycle): void {
  for (const signal of ['SIGTERM', 'SIGINT'] as const) {
    process.on(signal, () => {
      if (lifecycle.state === 'draining') {
        process.exit(1);
      }
      void lifecycle.stop(signal).then(() => process.exit(0));
    });
  }
}
