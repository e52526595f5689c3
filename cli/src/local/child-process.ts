// Child processes that cannot outlive this one: each runs under a shell that watches a pipe from here and stops its
// program when the pipe closes, which the kernel does even after a kill -9. Owns their output files and their end;
// does not know what they run.

import { spawn, type ChildProcess } from 'node:child_process';
import { closeSync, openSync, readFileSync } from 'node:fs';
import { constants } from 'node:os';
import type { Writable } from 'node:stream';

import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';

export interface ChildOptions {
  /** Names the child in errors. */
  readonly name: string;
  readonly command: readonly string[];
  readonly env?: NodeJS.ProcessEnv;
  /** Standard output and error are appended here. */
  readonly logFile: string;
}

/** How a child ended: by exit code, or by a signal. */
interface ChildExit {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
}

/** A running child, which its starter stops. */
export interface Child {
  readonly name: string;
  /** Of the program itself, not of its watching shell. */
  readonly pid: number;
  readonly exited: Promise<ChildExit>;
  /** The end of the log file, which usually says why the child failed. */
  logTail(): string;
  /** SIGTERM, then SIGKILL once `graceMs` have passed; returns when it is gone. May be called twice. */
  stop(graceMs: number): Promise<void>;
  /** SIGKILL: for tests of failure. */
  kill(): void;
}

const logTailChars = 2_000;

// The program replaces a shell that first writes its own process id to fd 4. The watcher holds no pipe but fd 3, so
// that closing it here is enough; it waits ten seconds for the program, then ends it. The outer shell ends as the
// program did.
const watchedScript = `
sh -c 'echo $$ >&4; exec 3<&- 4>&-; exec "$@"' sh "$@" &
program=$!
exec 4>&-
( read _ <&3; kill "$program" && sleep 10 && kill -9 "$program" ) >/dev/null 2>&1 &
watcher=$!
exec 3<&-
wait "$program"
code=$?
kill "$watcher" 2>/dev/null
exit "$code"
`;

/** A shell reports a program's death by signal n as the exit code 128 + n. */
function exitFromShell(code: number | null, signal: NodeJS.Signals | null): ChildExit {
  const [name] = Object.entries(constants.signals).find(([, number]) => number + 128 === code) ?? [];
  return name === undefined ? { code, signal } : { code: null, signal: name as NodeJS.Signals };
}

/**
 * Starts a program in its own session, so that a Ctrl-C in the terminal reaches only this process, which then
 * stops its children in order. Fails with `unavailable` if it cannot be started.
 */
export async function startChild(options: ChildOptions): Promise<Child> {
  const log = openSync(options.logFile, 'a');
  const shell = spawn('/bin/sh', ['-c', watchedScript, 'sh', ...options.command], {
    env: options.env,
    detached: true,
    stdio: ['ignore', log, log, 'pipe', 'pipe'],
  });
  closeSync(log);
  const exited = exitOf(shell);
  return new ShellChild(options, { shell, exited, pid: await programIdOf(shell, options.name) });
}

/** Resolves when the shell has ended, and then releases its lifeline. */
async function exitOf(shell: ChildProcess): Promise<ChildExit> {
  const lifeline = shell.stdio[3] as Writable;
  lifeline.on('error', () => undefined);
  const { promise, resolve } = Promise.withResolvers<ChildExit>();
  shell.once('error', () => resolve({ code: 127, signal: null }));
  shell.once('exit', (code, signal) => {
    lifeline.destroy();
    resolve(exitFromShell(code, signal));
  });
  return promise;
}

/** What the shell writes first: the process id of the program. */
async function programIdOf(shell: ChildProcess, name: string): Promise<number> {
  const { promise, resolve, reject } = Promise.withResolvers<number>();
  let text = '';
  const pidPipe = shell.stdio[4] as NodeJS.ReadableStream;
  pidPipe.on('data', (chunk: Buffer) => {
    text += chunk.toString();
  });
  pidPipe.on('end', () => {
    if (/^\d+\n$/.test(text)) {
      resolve(Number(text));
    } else {
      reject(new ClusterError('unavailable', `${name} cannot be started: no shell at /bin/sh`));
    }
  });
  shell.once('error', reject);
  return promise;
}

class ShellChild implements Child {
  readonly name: string;
  readonly pid: number;
  readonly exited: Promise<ChildExit>;
  readonly #logFile: string;
  readonly #shell: ChildProcess;

  constructor(
    options: ChildOptions,
    started: { readonly shell: ChildProcess; readonly exited: Promise<ChildExit>; readonly pid: number },
  ) {
    this.name = options.name;
    this.#logFile = options.logFile;
    this.#shell = started.shell;
    this.exited = started.exited;
    this.pid = started.pid;
  }

  logTail(): string {
    try {
      return readFileSync(this.#logFile, 'utf8').slice(-logTailChars);
    } catch {
      return '';
    }
  }

  kill(): void {
    this.#signal('SIGKILL');
  }

  async stop(graceMs: number): Promise<void> {
    this.#signal('SIGTERM');
    const grace = new AbortController();
    await Promise.race([this.exited, pause(graceMs, grace.signal)]);
    grace.abort();
    this.#signal('SIGKILL');
    await this.exited;
  }

  #signal(signal: NodeJS.Signals): void {
    if (this.#shell.exitCode !== null || this.#shell.signalCode !== null) {
      return;
    }
    try {
      process.kill(this.pid, signal);
    } catch {
      // Already ended: `exited` resolves.
    }
  }
}
