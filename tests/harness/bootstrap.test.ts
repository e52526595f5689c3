import { spawn, type ChildProcessByStdio } from 'node:child_process';
import { once } from 'node:events';
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Readable } from 'node:stream';
import { text } from 'node:stream/consumers';

import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { waitFor } from './wait-for.ts';

const local = join(import.meta.dirname, '../../cli/src/local');

// Stands for npm: installs by writing what the real one writes last, and counts its runs.
const npmScript = `
const fs = require('node:fs');
fs.appendFileSync('npm-runs', process.argv.slice(2).join(' ') + '\\n');
if (fs.existsSync('npm-fails')) { console.error('ENOSUCH package'); process.exit(9); }
setTimeout(() => {
  fs.mkdirSync('node_modules/.bin', { recursive: true });
  fs.symlinkSync(process.execPath, 'node_modules/.bin/node');
  fs.copyFileSync('package-lock.json', 'node_modules/.package-lock.json');
}, 300);
`;

describe('bootstrap.mjs', () => {
  let checkout: string;
  beforeEach(() => {
    checkout = mkdtempSync(join(tmpdir(), 'mimo-bootstrap-'));
    mkdirSync(join(checkout, 'cli/src/local'), { recursive: true });
    for (const file of ['bootstrap.mjs', 'launch.mjs']) {
      copyFileSync(join(local, file), join(checkout, 'cli/src/local', file));
    }
    writeFileSync(join(checkout, 'npm-cli.js'), npmScript);
    lock({ 'node_modules/a': { version: '1.0.0', integrity: 'x' }, 'node_modules/b': { optional: true } });
    writeFileSync(
      join(checkout, 'script.ts'),
      `const words: string[] = process.argv.slice(2);
       if (words[0] === 'wait') { process.on('SIGTERM', () => process.exit(7)); setInterval(() => {}, 1000); }
       console.log(words.join('+'), process.env['PATH']?.startsWith(import.meta.dirname + '/node_modules/.bin:'));
       if (words[0] === 'exit') process.exit(Number(words[1]));
       if (words[0] === 'die') { process.kill(process.pid, 'SIGKILL'); setInterval(() => {}, 1000); }`,
    );
  });
  afterEach(() => {
    rmSync(checkout, { recursive: true });
  });

  function lock(packages: Readonly<Record<string, object>>): void {
    writeFileSync(join(checkout, 'package-lock.json'), JSON.stringify({ packages: { '': {}, ...packages } }));
  }
  function start(...args: string[]): ChildProcessByStdio<null, Readable, Readable> {
    return spawn(process.execPath, [join(checkout, 'cli/src/local/bootstrap.mjs'), ...args], {
      cwd: tmpdir(),
      env: { ...process.env, npm_execpath: join(checkout, 'npm-cli.js') },
      stdio: ['ignore', 'pipe', 'pipe'],
    });
  }
  async function run(...args: string[]) {
    const child = start(...args);
    const [[code, signal], stdout, stderr] = await Promise.all([
      once(child, 'exit') as Promise<[number | null, NodeJS.Signals | null]>,
      text(child.stdout),
      text(child.stderr),
    ]);
    return { code, signal, stdout, stderr };
  }
  const npmRuns = (): string[] =>
    existsSync(join(checkout, 'npm-runs'))
      ? readFileSync(join(checkout, 'npm-runs'), 'utf8').trim().split('\n')
      : [];

  it('installs once, however many processes start at once, and not again', async () => {
    const outcomes = await Promise.all([run('script.ts', 'a'), run('script.ts', 'b'), run('script.ts', 'c')]);
    expect(outcomes.map(({ code, stdout }) => [code, stdout])).toEqual([
      [0, 'a true\n'],
      [0, 'b true\n'],
      [0, 'c true\n'],
    ]);
    expect(npmRuns()).toEqual(['ci']);
    expect(outcomes.map(({ stderr }) => stderr).filter((said) => said.includes('npm ci'))).toHaveLength(1);
    expect(await run('script.ts', 'd')).toMatchObject({ code: 0, stdout: 'd true\n', stderr: '' });
    expect(npmRuns()).toEqual(['ci']);
  });

  it('installs again when package-lock.json has changed or an install was cut off', async () => {
    await run('script.ts');
    lock({ 'node_modules/a': { version: '1.0.1', integrity: 'y' } });
    rmSync(join(checkout, 'node_modules/.bin/node'));
    expect(await run('script.ts')).toMatchObject({ code: 0 });
    rmSync(join(checkout, 'node_modules'), { recursive: true });
    mkdirSync(join(checkout, 'node_modules/a'), { recursive: true });
    expect(await run('script.ts')).toMatchObject({ code: 0 });
    expect(npmRuns()).toEqual(['ci', 'ci', 'ci']);
  });

  it("shows npm's output when it fails, and ignores a stale lock", async () => {
    writeFileSync(join(checkout, 'npm-fails'), '');
    const failed = await run('script.ts');
    expect(failed).toMatchObject({ code: 1, stdout: '' });
    expect(failed.stderr).toContain('ENOSUCH package');
    rmSync(join(checkout, 'npm-fails'));
    expect(await run('script.ts')).toMatchObject({ code: 0 });
  });

  it('exits as the script does: by code, by signal, by a forwarded signal', async () => {
    expect(await run('script.ts', 'exit', '5')).toMatchObject({ code: 5 });
    expect(await run('script.ts', 'die')).toMatchObject({ code: null, signal: 'SIGKILL' });
    const child = start('script.ts', 'wait');
    let output = '';
    child.stdout.on('data', (chunk: Buffer) => {
      output += chunk.toString();
    });
    await waitFor('the script to run', () => output.includes('wait'));
    child.kill('SIGTERM');
    expect(await once(child, 'exit')).toEqual([7, null]);
  });

  it('names the missing Node when this one is too old and no package brings one', async () => {
    await run('script.ts');
    rmSync(join(checkout, 'node_modules/.bin/node'));
    const source = readFileSync(join(local, 'launch.mjs'), 'utf8').replace(
      'const minNodeMajor = 26;',
      'const minNodeMajor = 999;',
    );
    writeFileSync(join(checkout, 'cli/src/local/launch.mjs'), source);
    const refused = await run('script.ts');
    expect(refused.code).toBe(1);
    expect(refused.stderr).toContain(`needs Node 999 or later, this is ${process.versions.node}`);
    symlinkSync(process.execPath, join(checkout, 'node_modules/.bin/node'));
    expect(await run('script.ts')).toMatchObject({ code: 0 });
  });
});
