// The commands as a user runs them, each in processes of their own: `mimo up`, `mimo chat`, `mimo models`.

import { chmodSync, cpSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { TestCommand } from '../harness/command.ts';

const demoModel = join(import.meta.dirname, '../../models/mimo-demo');
const question = 'What is 47 + 85?';

/** The program of a process; undefined if it has ended. */
function programOf(pid: number): string | undefined {
  try {
    return readFileSync(`/proc/${pid}/comm`, 'utf8').trim();
  } catch {
    return undefined;
  }
}

describe('the mimo command', () => {
  let command: TestCommand;
  beforeEach(async () => {
    command = await TestCommand.create();
  });
  afterEach(() => command.close());

  it('starts a cluster, answers, refuses a second one on its port, and leaves nothing behind', async () => {
    await command.provideNatsServer();
    const { child, said, ended } = await command.up();
    expect(said()).toContain(`gRPC     ${command.address}`);

    const answer = await command.run(['chat', '--address', command.address, '--temperature', '0', question]);
    expect(answer).toMatchObject({ code: 0, stdout: '132\n' });
    expect(answer.stderr).toContain('47+85');
    expect(answer.stderr).toMatch(
      /\d+ tokens, \d+ tokens\/s, first token after \d\.\d\d s, drafts accepted \d+ of \d+/,
    );
    const piped = await command.run(
      ['chat', '--address', command.address, '--temperature', '0', '--no-speculation'],
      `${question}\n`,
    );
    expect(piped).toMatchObject({ code: 0, stdout: '132\n' });
    expect(piped.stderr).not.toContain('drafts accepted');
    expect((await command.run(['models', '--address', command.address])).stdout).toMatch(
      /^mimo-demo .* 1 group ready\n$/,
    );

    const wrong = await command.run(['chat', '--address', command.address, '--temperature=-1', question]);
    expect(wrong.code).toBe(1);
    expect(wrong.stderr).toContain('sampling.temperature');
    const second = await command.run(['up', '--port', String(command.port)]);
    expect(second.code).toBe(1);
    expect(second.stderr).toContain(`port ${command.port} of 127.0.0.1 is in use`);

    child.kill('SIGINT');
    expect((await ended)[0]).toBe(0);
    // The shells that watched the programs may still be on their way out.
    const left = command.processes().map(({ pid }) => programOf(pid));
    expect(left.filter((program) => program !== undefined && program !== 'sh')).toEqual([]);
    await command.gone();
    const nobody = await command.run(['chat', '--address', command.address, question]);
    expect(nobody).toMatchObject({ code: 1, stdout: '' });
    expect(nobody.stderr).toContain(`no gateway at ${command.address}: start one with \`npm run up\``);
  });

  it('leaves no process behind when it is killed', async () => {
    await command.provideNatsServer();
    const { child } = await command.up('--tensor-parallel', '1');
    expect(command.processes().length).toBeGreaterThan(4);
    child.kill('SIGKILL');
    await command.gone();
  });

  it('keeps the queue in memory, and says so, when nats-server is not available', async () => {
    const programs = join(command.directory, 'programs');
    mkdirSync(programs);
    for (const name of ['nats-server', 'go']) {
      writeFileSync(join(programs, name), '#!/bin/sh\nexit 1\n');
      chmodSync(join(programs, name), 0o755);
    }
    command.env['PATH'] = `${programs}:${command.env['PATH']}`;
    // bootstrap.mjs puts the packages' programs first; there is no nats-server among them.
    const { said } = await command.up('--tensor-parallel', '1');
    expect(said()).toContain("queue    in the gateway's memory");
    const answer = await command.run(['chat', '--address', command.address, '--temperature', '0', question]);
    expect(answer).toMatchObject({ code: 0, stdout: '132\n' });
  });

  it.each(['mimo,v1', 'v1.0=b', '-{"a": "b"},c=d $(exit 3) 模型 é\'"\n', '.'.repeat(3) + 'm'.repeat(200)])(
    'serves a model from a directory named %j',
    async (name) => {
      await command.provideNatsServer();
      const model = join(command.directory, name);
      cpSync(demoModel, model, { recursive: true });
      await command.up('--tensor-parallel', '1', '--model', model);
      const answer = await command.run([
        'chat',
        '--address',
        command.address,
        '--temperature',
        '0',
        question,
      ]);
      expect(answer).toMatchObject({ code: 0, stdout: '132\n' });
    },
  );

  it('exits at once with the reason when a process cannot start with its settings', async () => {
    await command.provideNatsServer();
    const model = join(command.directory, 'no tokenizer');
    cpSync(demoModel, model, { recursive: true });
    for (const file of ['tokenizer.json', 'vocab.json']) {
      rmSync(join(model, file));
    }
    const outcome = await command.run(['up', '--port', String(command.port), '--model', model]);
    expect(outcome.code).toBe(1);
    expect(outcome.stderr).toContain('gateway cannot start:');
    expect(outcome.stderr).toContain(`gateway: model no tokenizer: ${model}: `);
    expect(outcome.stderr).not.toContain('starting it again');
    await command.gone();

    command.env['MIMO_WORKER_KV_BLOCK'] = 'x';
    const typo = await command.run(['up', '--port', String(command.port)]);
    expect(typo.code).toBe(1);
    expect(typo.stderr).toContain('MIMO_WORKER_KV_BLOCK is not a setting of this process');
    expect(typo.stderr).not.toContain('starting it again');
    await command.gone();
  });

  it.each([
    [['up', '--precision', 'fp8'], 1, '--precision must be one of fp32, fp16, bf16, int8, int4'],
    [['up', '--model', '/no/such/model'], 1, '/no/such/model has no config.json'],
    [['chat', '--seed', 'x', 'hi'], 1, '--seed must be a whole number'],
    [['chat', '--bogus', 'hi'], 2, "Unknown option '--bogus'"],
    [['frobnicate'], 2, "unknown command 'frobnicate'"],
    [['--help'], 0, 'up       start a whole cluster'],
    [['compile', '--help'], 0, 'mimo compile'],
  ])('says what is wrong with %j', async (args, code, message) => {
    const outcome = await command.run(args);
    expect(outcome.code).toBe(code);
    expect(outcome.stderr).toContain(message);
  });
});
