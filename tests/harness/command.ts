// The `mimo` command as a user runs it, in separate processes and with a separate cache: through npm, or by the script
// that npm runs. Owns the test's directory and every remaining process. Asserts nothing.

import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Readable } from 'node:stream';
import { text } from 'node:stream/consumers';

import { freePorts } from '../../cli/src/local/free-ports.ts';
import { cacheDirectoryFrom, findNatsServer, natsServerVersion } from '../../cli/src/local/nats-server.ts';
import { isAlive, waitFor } from './wait-for.ts';

const repository = join(import.meta.dirname, '../..');

/** How a command ended. */
export interface Outcome {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** A process of the command, as /proc has it. */
export interface SeenProcess {
  readonly pid: number;
  readonly command: string;
}

/** A started command. */
export interface StartedCommand {
  readonly child: ChildProcess;
  /** What it has written, all together. */
  readonly said: () => string;
  readonly ended: Promise<unknown[]>;
}

/** The command with a cache of its own. Close it. */
export class TestCommand {
  readonly directory = mkdtempSync(join(tmpdir(), 'mimo-up-'));
  readonly env: NodeJS.ProcessEnv = { ...process.env, MIMO_CACHE_DIR: join(this.directory, 'cache') };
  readonly port: number;
  /** What runs the command: the script that npm runs in a checkout, or an installed program. */
  program: readonly string[] = [
    process.execPath,
    join(repository, 'cli/src/local/bootstrap.mjs'),
    'cli/src/main.ts',
  ];
  /** Where it runs. */
  workingDirectory = repository;
  readonly #started: ChildProcess[] = [];

  private constructor(port: number) {
    this.port = port;
  }

  static async create(): Promise<TestCommand> {
    const [port = 0] = await freePorts(1);
    return new TestCommand(port);
  }

  get address(): string {
    return `127.0.0.1:${this.port}`;
  }

  /** Puts the nats-server that this machine has into the test's own cache. */
  async provideNatsServer(): Promise<void> {
    const cacheDirectory = cacheDirectoryFrom(process.env);
    const signal = new AbortController().signal;
    const binary = await findNatsServer({ cacheDirectory, signal, onProgress: () => undefined });
    if (binary === null) {
      throw new Error('this test needs a nats-server: on the PATH, or Go to build it');
    }
    const folder = join(this.directory, 'cache/nats-server', natsServerVersion);
    mkdirSync(folder, { recursive: true });
    if (binary !== 'nats-server') {
      symlinkSync(binary, join(folder, 'nats-server'));
    }
  }

  /** Every process that has this test's directory in its environment, except those that have ended. */
  processes(): SeenProcess[] {
    return readdirSync('/proc')
      .filter((name) => /^\d+$/.test(name) && isAlive(Number(name)))
      .flatMap((name) => {
        try {
          const environment = readFileSync(`/proc/${name}/environ`, 'utf8');
          const command = readFileSync(`/proc/${name}/cmdline`, 'utf8').replaceAll('\0', ' ');
          return environment.includes(`MIMO_CACHE_DIR=${this.directory}/`)
            ? [{ pid: Number(name), command }]
            : [];
        } catch {
          return [];
        }
      });
  }

  async gone(): Promise<void> {
    await waitFor('every process to be gone', () => this.processes().length === 0);
  }

  /** Starts a program with the command's environment. */
  start(program: string, args: readonly string[]): StartedCommand {
    const child = spawn(program, args, { cwd: this.workingDirectory, env: this.env, stdio: 'pipe' });
    this.#started.push(child);
    const said: string[] = [];
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8').on('data', (chunk: string) => said.push(chunk));
    }
    return { child, said: () => said.join(''), ended: once(child, 'exit') };
  }

  /** Starts the command. */
  mimo(...args: readonly string[]): StartedCommand {
    const [program = '', ...first] = this.program;
    return this.start(program, [...first, ...args]);
  }

  /** Runs it to its end. */
  async run(args: readonly string[], input = ''): Promise<Outcome> {
    const { child } = this.mimo(...args);
    child.stdin?.end(input);
    const [[code], stdout, stderr] = await Promise.all([
      once(child, 'exit') as Promise<[number | null]>,
      text(child.stdout as Readable),
      text(child.stderr as Readable),
    ]);
    return { code, stdout, stderr };
  }

  /** Starts the cluster and waits until it says that it is ready. */
  async up(...args: readonly string[]): Promise<StartedCommand> {
    return this.ready(this.mimo('up', '--port', String(this.port), ...args));
  }

  /** Waits until a started cluster says that it is ready. */
  async ready(started: StartedCommand): Promise<StartedCommand> {
    await waitFor('the cluster to be ready', () => {
      if (started.child.exitCode !== null) {
        throw new Error(started.said());
      }
      return started.said().includes('Ctrl-C stops everything');
    });
    return started;
  }

  async close(): Promise<void> {
    for (const child of this.#started.splice(0)) {
      child.kill('SIGKILL');
    }
    await this.gone();
    rmSync(this.directory, { recursive: true });
  }
}
