// The npm package as a user installs it: packed, installed into a separate folder, called from an empty directory.

import { execFile } from 'node:child_process';
import { mkdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';

import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { TestCommand } from '../harness/command.ts';

const root = join(import.meta.dirname, '../..');

/** Runs a program to its end and gives the last line that it wrote. */
async function lastLine(program: string, args: readonly string[]): Promise<string> {
  const { stdout } = await promisify(execFile)(program, [...args], { cwd: root });
  return stdout.trimEnd().split('\n').at(-1) ?? '';
}

describe('the npm package', () => {
  let command: TestCommand;
  let installed: string;
  beforeAll(async () => {
    command = await TestCommand.create();
    const out = join(command.directory, 'dist');
    const file = await lastLine(process.execPath, [join(root, 'deploy/release/pack.ts'), '--out', out]);
    const prefix = join(command.directory, 'prefix');
    const options = ['--prefix', prefix, '--ignore-scripts', '--prefer-offline', '--no-audit', '--no-fund'];
    await lastLine('npm', ['install', '--global', ...options, file]);
    installed = join(prefix, 'lib/node_modules/mimo-cluster');
    command.program = [join(prefix, 'bin/mimo')];
    command.workingDirectory = join(command.directory, 'empty');
    mkdirSync(command.workingDirectory);
  });
  afterAll(() => command.close());

  it('installs a command that starts a cluster, answers, and leaves nothing behind', async () => {
    await command.provideNatsServer();
    const { child, said, ended } = await command.up();
    expect(said()).toContain(`try      mimo chat --address ${command.address} "What is 47 + 85?"`);
    expect(said()).not.toContain("the gateway's memory");
    const programs = command.processes().map((seen) => seen.command);
    expect(
      programs.filter((line) => line.includes('/worker/src/main.js') && !line.startsWith('/bin/sh')),
    ).not.toEqual([]);
    expect(programs.filter((line) => line.includes(root) && line.includes('.ts'))).toEqual([]);

    const question = ['chat', '--address', command.address, '--temperature', '0', 'What is 47 + 85?'];
    expect(await command.run(question)).toMatchObject({ code: 0, stdout: '132\n' });
    expect((await command.run(['models', '--address', command.address])).stdout).toMatch(/^mimo-demo /);

    child.kill('SIGINT');
    expect((await ended)[0]).toBe(0);
    await command.gone();
    const nobody = await command.run(question);
    expect(nobody.stderr).toContain(`no gateway at ${command.address}: start one with \`mimo up\``);
  });

  it('works as a client without ONNX Runtime, and `up` names the missing package', async () => {
    rmSync(join(installed, 'node_modules/onnxruntime-node'), { recursive: true });
    expect(await command.run(['models', '--help'])).toMatchObject({ code: 0 });
    const outcome = await command.run(['up', '--port', String(command.port)]);
    expect(outcome.code).toBe(1);
    expect(outcome.stderr).toContain('onnxruntime-node');
    expect(outcome.stderr).toContain('--ignore-scripts');
    await command.gone();
  });

  it("runs on the caller's Node, if that is new enough, where the package's own is left out", async () => {
    rmSync(join(installed, 'node_modules/.bin/node'));
    command.program = [process.execPath, ...command.program];
    expect(await command.run(['--help'])).toMatchObject({
      code: 0,
      stderr: expect.stringContaining('mimo COMMAND') as string,
    });
  });
});
