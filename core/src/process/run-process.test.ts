import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { text } from 'node:stream/consumers';

import { describe, expect, it } from 'vitest';

const module = (name: string): string => JSON.stringify(new URL(name, import.meta.url).href);

/** Runs a process whose `start` is this code; returns its exit and its output. `signal` is sent once it serves. */
async function run(start: string, signal?: NodeJS.Signals, env: Readonly<Record<string, string>> = {}) {
  const program = `
    import { choiceSetting, parseConfig } from ${module('./config.ts')};
    import { ClusterError } from ${module('./errors.ts')};
    import { runProcess } from ${module('./run-process.ts')};
    const settings = { logLevel: choiceSetting('MIMO_TEST_LOG_LEVEL', ['info'], 'info') };
    await runProcess({
      name: 'worker',
      settings,
      parse: (env) => parseConfig({ prefix: 'MIMO_TEST_', settings }, env),
      graceMs: () => 60_000,
      fields: () => ({ rank: 3 }),
      start: async ({ lifecycle, log }) => { ${start} },
    });`;
  const child = spawn(process.execPath, ['--input-type=module-typescript', '--eval', program], {
    env: { PATH: process.env['PATH'], ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let isSent = false;
  child.stdout.on('data', (chunk: Buffer) => {
    if (signal !== undefined && !isSent && chunk.toString().includes('serving')) {
      isSent = true;
      child.kill(signal);
    }
  });
  const [[code], stdout, stderr] = await Promise.all([
    once(child, 'exit') as Promise<[number | null]>,
    text(child.stdout),
    text(child.stderr),
  ]);
  return { code, stderr, steps: [...stdout.matchAll(/"step":"(\w+)"/g)].map((match) => match[1]), stdout };
}

const parts = `
  lifecycle.onClose('first', () => log.info({ step: 'first' }, 'closed'));
  lifecycle.onClose('second', () => log.info({ step: 'second' }, 'closed'));
  lifecycle.onDrain('work', () => log.info({ step: 'work' }, 'drained'));`;
const serve = `${parts} setInterval(() => undefined, 1_000); log.info('serving');`;

describe('runProcess', () => {
  it('drains and closes in reverse on a signal, and exits with 0', async () => {
    const ended = await run(serve, 'SIGTERM');
    expect(ended).toMatchObject({ code: 0, stderr: '', steps: ['work', 'second', 'first'] });
    expect(ended.stdout).toContain('"rank":3');
  });

  it('exits with 1 when a part reports a fatal error, and logs the reason in its last line', async () => {
    const lost = `${serve} lifecycle.end(new ClusterError('aborted', 'rank 1 was lost'));`;
    const ended = await run(lost);
    expect(ended).toMatchObject({ code: 1, steps: ['work', 'second', 'first'] });
    expect(ended.stderr).toBe('worker: rank 1 was lost\n');
  });

  it('exits with 0 when a part ends as intended', async () => {
    const over = `${serve} lifecycle.end(new ClusterError('canceled', 'another rank was asked to end'));`;
    expect(await run(over)).toMatchObject({ code: 0, stderr: '', steps: ['work', 'second', 'first'] });
  });

  it.each([
    ['failed_precondition', 78],
    ['unavailable', 1],
  ])('closes opened parts when starting fails with %s, and exits with %i', async (code, exitCode) => {
    const ended = await run(`${parts} throw new ClusterError('${code}', 'no shard');`);
    expect(ended).toMatchObject({ code: exitCode, stderr: 'worker: no shard\n' });
    expect(ended.steps).toEqual(['work', 'second', 'first']);
  });

  it('exits with 78 before anything is opened when the environment is wrong', async () => {
    const ended = await run(serve, undefined, { MIMO_TEST_TYPO: 'x' });
    expect(ended).toMatchObject({ code: 78, steps: [] });
    expect(ended.stderr).toContain('MIMO_TEST_TYPO is not a setting of this process');
  });
});
