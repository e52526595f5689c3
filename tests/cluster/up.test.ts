// The commands as a user runs them, each in processes of their own: `mimo up`, `mimo chat`, `mimo models`.

import { spawn, type ChildProcessByStdio } from 'node:child_process';
import { once } from 'node:events';
import {
  chmodSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Readable, Writable } from 'node:stream';
import { text } from 'node:stream/consumers';

import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { freePorts } from '../../deploy/local/local-cluster.ts';
import { cacheDirectoryFrom, findNatsServer, natsServerVersion } from '../../deploy/local/nats-server.ts';
import { isAlive, waitFor } from '../harness/wait-for.ts';

const repository = join(import.meta.dirname, '../..');
const question = 'What is 47 + 85?';

/** The program of a process; undefined where it has ended. */
function programOf(pid: number): string | undefined {
  try {
    return readFileSync(`/proc/${pid}/comm`, 'utf8').trim();
  } catch {
    return undefined;
  }
}

describe('the mimo command', () => {
  let directory: string;
  let env: NodeJS.ProcessEnv;
  let port: number;
  const started: ChildProcessByStdio<Writable, Readable, Readable>[] = [];
  beforeEach(async () => {
    directory = mkdtempSync(join(tmpdir(), 'mimo-up-'));
    env = { ...process.env, MIMO_CACHE_DIR: join(directory, 'cache') };
    [port = 0] = await freePorts(1);
  });
  afterEach(async () => {
    for (const child of started.splice(0)) {
      child.kill('SIGKILL');
    }
    await waitFor('every process to be gone', () => processesOfThisTest().length === 0);
    rmSync(directory, { recursive: true });
  });

  /** Puts the nats-server that this machine has into the test's own cache. */
  async function provideNatsServer(): Promise<void> {
    const cacheDirectory = cacheDirectoryFrom(process.env);
    const signal = new AbortController().signal;
    const binary = await findNatsServer({ cacheDirectory, signal, onProgress: () => undefined });
    if (binary === null) {
      throw new Error('this test needs a nats-server: on the PATH, or Go to build it');
    }
    const folder = join(directory, 'cache/nats-server', natsServerVersion);
    mkdirSync(folder, { recursive: true });
    if (binary !== 'nats-server') {
      symlinkSync(binary, join(folder, 'nats-server'));
    }
  }
  /** Every process that has this test's directory in its environment, except those that have ended. */
  function processesOfThisTest(): number[] {
    return readdirSync('/proc')
      .filter((name) => /^\d+$/.test(name) && isAlive(Number(name)))
      .filter((name) => {
        try {
          return readFileSync(`/proc/${name}/environ`, 'utf8').includes(`MIMO_CACHE_DIR=${directory}/`);
        } catch {
          return false;
        }
      })
      .map(Number);
  }
  function mimo(...args: string[]): ChildProcessByStdio<Writable, Readable, Readable> {
    const bootstrap = join(repository, 'deploy/local/bootstrap.mjs');
    const child = spawn(process.execPath, [bootstrap, 'cli/src/main.ts', ...args], { env, stdio: 'pipe' });
    started.push(child);
    return child;
  }
  async function run(args: readonly string[], input = '') {
    const child = mimo(...args);
    child.stdin.end(input);
    const [[code], stdout, stderr] = await Promise.all([
      once(child, 'exit') as Promise<[number | null]>,
      text(child.stdout),
      text(child.stderr),
    ]);
    return { code, stdout, stderr };
  }
  /** Starts the cluster and waits until it says that it is ready. */
  async function up(...args: string[]) {
    const child = mimo('up', '--port', String(port), ...args);
    const said: string[] = [];
    child.stderr.on('data', (chunk: Buffer) => said.push(chunk.toString()));
    const ended = once(child, 'exit') as Promise<[number | null]>;
    await waitFor('the cluster to be ready', () => {
      if (child.exitCode !== null) {
        throw new Error(said.join(''));
      }
      return said.join('').includes('Ctrl-C stops everything');
    });
    return { child, said: () => said.join(''), ended };
  }
  const address = (): string => `127.0.0.1:${port}`;

  it('starts a cluster, answers, refuses a second one on its port, and stops without a trace', async () => {
    await provideNatsServer();
    const { child, said, ended } = await up();
    expect(said()).toContain(`gRPC     ${address()}`);

    const answer = await run(['chat', '--address', address(), '--temperature', '0', question]);
    expect(answer).toMatchObject({ code: 0, stdout: '132\n' });
    expect(answer.stderr).toContain('47+85');
    expect(answer.stderr).toMatch(
      /\d+ tokens, \d+ tokens\/s, first token after \d\.\d\d s, drafts accepted \d+ of \d+/,
    );
    const piped = await run(
      ['chat', '--address', address(), '--temperature', '0', '--no-speculation'],
      `${question}\n`,
    );
    expect(piped).toMatchObject({ code: 0, stdout: '132\n' });
    expect(piped.stderr).not.toContain('drafts accepted');
    expect((await run(['models', '--address', address()])).stdout).toMatch(/^mimo-demo .* 1 group ready\n$/);

    const wrong = await run(['chat', '--address', address(), '--temperature=-1', question]);
    expect(wrong.code).toBe(1);
    expect(wrong.stderr).toContain('sampling.temperature');
    const second = await run(['up', '--port', String(port)]);
    expect(second.code).toBe(1);
    expect(second.stderr).toContain(`port ${port} of 127.0.0.1 is taken`);

    child.kill('SIGINT');
    expect((await ended)[0]).toBe(0);
    // The shells that watched the programs may still be on their way out.
    const left = processesOfThisTest().map(programOf);
    expect(left.filter((program) => program !== undefined && program !== 'sh')).toEqual([]);
    await waitFor('every process to be gone', () => processesOfThisTest().length === 0);
    const nobody = await run(['chat', '--address', address(), question]);
    expect(nobody).toMatchObject({ code: 1, stdout: '' });
    expect(nobody.stderr).toContain(`no gateway at ${address()}: start one with \`npm run up\``);
  });

  it('leaves no process behind when it is killed outright', async () => {
    await provideNatsServer();
    const { child } = await up('--tensor-parallel', '1');
    expect(processesOfThisTest().length).toBeGreaterThan(4);
    child.kill('SIGKILL');
    await waitFor('every process to be gone', () => processesOfThisTest().length === 0);
  });

  it('keeps the queue in memory, and says so, where no nats-server can be had', async () => {
    const programs = join(directory, 'programs');
    mkdirSync(programs);
    for (const name of ['nats-server', 'go']) {
      writeFileSync(join(programs, name), '#!/bin/sh\nexit 1\n');
      chmodSync(join(programs, name), 0o755);
    }
    env['PATH'] = `${programs}:${env['PATH']}`;
    // bootstrap.mjs puts the packages' programs first; there is no nats-server among them.
    const { said } = await up('--tensor-parallel', '1');
    expect(said()).toContain("queue    in the gateway's memory");
    const answer = await run(['chat', '--address', address(), '--temperature', '0', question]);
    expect(answer).toMatchObject({ code: 0, stdout: '132\n' });
  });

  it.each([
    [['up', '--precision', 'fp8'], 1, '--precision must be one of fp32, fp16, bf16, int8, int4'],
    [['up', '--model', '/no/such/model'], 1, '/no/such/model holds no config.json'],
    [['chat', '--seed', 'x', 'hi'], 1, '--seed must be a whole number'],
    [['chat', '--bogus', 'hi'], 2, "Unknown option '--bogus'"],
    [['frobnicate'], 2, "there is no command 'frobnicate'"],
    [['--help'], 0, 'up       start a whole cluster'],
    [['compile', '--help'], 0, 'mimo compile'],
  ])('says what is wrong with %j', async (args, code, message) => {
    const outcome = await run(args);
    expect(outcome.code).toBe(code);
    expect(outcome.stderr).toContain(message);
  });
});
