import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { startChild, type Child } from '../../cli/src/local/child-process.ts';
import { Supervisor } from '../../cli/src/local/supervisor.ts';
import { isAlive, waitFor } from './wait-for.ts';

const repository = join(import.meta.dirname, '../..');

describe('startChild', () => {
  let directory: string;
  const children: Child[] = [];
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'mimo-child-'));
  });
  afterEach(async () => {
    await Promise.all(children.splice(0).map((child) => child.stop(0)));
    rmSync(directory, { recursive: true });
  });

  async function start(source: string): Promise<Child> {
    const child = await startChild({
      name: 'child',
      command: [process.execPath, '-e', source],
      logFile: join(directory, 'child.log'),
    });
    children.push(child);
    return child;
  }

  it("returns the program's process id, output and exit code", async () => {
    const child = await start('console.log(process.pid); console.error("why"); process.exitCode = 3');
    expect(await child.exited).toEqual({ code: 3, signal: null });
    expect(child.logTail()).toBe(`${child.pid}\nwhy\n`);
  });

  it('waits for the program to end by itself, then ends it', async () => {
    const polite = await start(
      'process.on("SIGTERM", () => process.exit(5)); setInterval(() => {}, 1e3); console.log("up")',
    );
    await waitFor('output', () => polite.logTail().includes('up'));
    await polite.stop(60_000);
    expect(await polite.exited).toEqual({ code: 5, signal: null });

    const deaf = await start(
      'process.on("SIGTERM", () => {}); setInterval(() => {}, 1e3); console.log("deaf")',
    );
    await waitFor('output', () => deaf.logTail().includes('deaf'));
    await deaf.stop(50);
    expect(await deaf.exited).toEqual({ code: null, signal: 'SIGKILL' });
    expect(isAlive(deaf.pid)).toBe(false);
  });

  it('fails with a clear error when the program does not exist', async () => {
    const child = await startChild({
      name: 'nothing',
      command: ['/no/such/program'],
      logFile: join(directory, 'nothing.log'),
    });
    expect(await child.exited).toEqual({ code: 127, signal: null });
    expect(child.logTail()).toContain('/no/such/program');
  });

  it('leaves no program behind when its parent is killed', async () => {
    const parentFile = join(directory, 'parent.ts');
    const logFile = join(directory, 'orphan.log');
    const childModule = join(repository, 'cli/src/local/child-process.ts');
    writeFileSync(
      parentFile,
      `import { startChild } from ${JSON.stringify(childModule)};
       const command = [process.execPath, '-e', 'setInterval(() => {}, 1e3)'];
       const child = await startChild({ name: 'c', command, logFile: ${JSON.stringify(logFile)} });
       console.log(child.pid);`,
    );
    const parent = spawn(process.execPath, [parentFile], { stdio: ['ignore', 'pipe', 'inherit'] });
    const [chunk] = (await once(parent.stdout, 'data')) as [Buffer];
    const pid = Number(chunk.toString());
    expect(isAlive(pid)).toBe(true);
    parent.kill('SIGKILL');
    await waitFor('the program to be gone', () => !isAlive(pid));
  });
});

describe('Supervisor', () => {
  let directory: string;
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'mimo-supervisor-'));
  });
  afterEach(() => {
    rmSync(directory, { recursive: true });
  });

  async function supervise(source: string, events: string[]): Promise<Supervisor> {
    return Supervisor.start({
      name: 'pair',
      stopGraceMs: 1_000,
      onEvent: (line) => events.push(line),
      start: async (life) =>
        Promise.all(
          ['a', 'b'].map(async (name) =>
            startChild({
              name,
              command: [process.execPath, '-e', source],
              logFile: join(directory, `${name}-${life}.log`),
            }),
          ),
        ),
    });
  }

  it('ends the whole set when one process ends, and starts it again', async () => {
    const events: string[] = [];
    const pair = await supervise('setInterval(() => {}, 1e3)', events);
    const before = pair.children.map(({ pid }) => pid);
    pair.children[1]?.kill();
    await waitFor('a second life', () => pair.life === 2);
    expect(before.map(isAlive)).toEqual([false, false]);
    expect(pair.children.map(({ pid }) => isAlive(pid))).toEqual([true, true]);
    expect(events).toEqual(['pair lost b (SIGKILL): starting it again']);
    const after = pair.children.map(({ pid }) => pid);
    await pair.stop();
    expect(after.map(isAlive)).toEqual([false, false]);
  });

  it('gives up at once when a process exits because its settings are invalid', async () => {
    const events: string[] = [];
    const source = `console.log('{"msg":"starting"}'); console.error('no such model: x'); process.exit(78)`;
    const pair = await supervise(source, events);
    await expect(pair.givenUp).rejects.toThrow(/^pair cannot start:\nno such model: x$/);
    expect(events).toEqual([]);
    await pair.stop();
  });

  it('gives up when a process never stays up, with the end of its log', async () => {
    const events: string[] = [];
    const pair = await supervise('console.error("no model"); process.exit(4)', events);
    await expect(pair.givenUp).rejects.toThrow(/pair does not stay up \(exit code 4\):\n.*no model/s);
    expect(events).toHaveLength(4);
    await pair.stop();
  });
});
