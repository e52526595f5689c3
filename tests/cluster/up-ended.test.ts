// `npm run up` leaves nothing behind, whichever of its processes ends and however.

import { existsSync } from 'node:fs';

import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import { TestCommand, type SeenProcess, type StartedCommand } from '../harness/command.ts';
import { waitFor } from '../harness/wait-for.ts';

describe('npm run up', () => {
  let command: TestCommand;
  beforeEach(async () => {
    command = await TestCommand.create();
    await command.provideNatsServer();
  });
  afterEach(() => command.close());

  const args = (): readonly string[] => [
    'run',
    'up',
    '--',
    '--port',
    String(command.port),
    '--tensor-parallel',
    '1',
  ];

  const idOf = (part: RegExp): number =>
    command.processes().find((each) => part.test(each.command))?.pid ?? 0;
  /** The processes of the command, from the outside in. */
  const chain = (
    npm: StartedCommand,
  ): { readonly npm: number; readonly launcher: number; readonly up: number } => ({
    npm: npm.child.pid ?? 0,
    launcher: idOf(/^\S*node \S*bootstrap\.mjs /),
    up: idOf(/^\S*node \S*cli\/src\/main\.ts up /),
  });

  const endings = [
    ['npm', 'SIGTERM'],
    ['npm', 'SIGINT'],
    ['npm', 'SIGHUP'],
    ['npm', 'SIGKILL'],
    ['launcher', 'SIGTERM'],
    ['launcher', 'SIGHUP'],
    ['launcher', 'SIGKILL'],
    ['up', 'SIGTERM'],
    ['up', 'SIGHUP'],
    ['up', 'SIGKILL'],
  ] as const;
  it.each(endings)('leaves nothing behind when its %s gets %s', async (which, signal) => {
    const npm = await command.ready(command.start('npm', args()));
    const pid = chain(npm)[which];
    expect(pid).toBeGreaterThan(0);
    process.kill(pid, signal);
    await npm.ended;
    await command.gone();
    expect(command.processes()).toEqual([]);
  });

  it('leaves nothing behind when npm is killed before the cluster starts', async () => {
    const npm = command.start('npm', args());
    await waitFor('the command to have begun', () => chain(npm).up > 0);
    npm.child.kill('SIGKILL');
    await npm.ended;
    await command.gone();
    expect(command.processes()).toEqual([]);
  });

  it('leaves nothing behind when its terminal is closed', async () => {
    if (!existsSync('/usr/bin/script')) {
      throw new Error('this test needs `script`, which util-linux brings');
    }
    // `script` holds the terminal: it is closed when that is gone.
    const terminal = command.start('script', [
      '--quiet',
      '--command',
      ['npm', ...args()].join(' '),
      '/dev/null',
    ]);
    await command.ready(terminal);
    terminal.child.kill('SIGKILL');
    await command.gone();
    expect(command.processes()).toEqual([]);
  });

  it('keeps running when one of its processes ends, and leaves nothing of that process behind', async () => {
    const npm = await command.ready(command.start('npm', args()));
    const parts = (): SeenProcess[] =>
      command
        .processes()
        .filter(
          ({ command: line }) =>
            /nats-server --jetstream|(gateway|worker)\/src\/main\.ts/.test(line) &&
            !line.startsWith('/bin/sh') &&
            !line.startsWith('sh '),
        );
    for (const signal of ['SIGTERM', 'SIGKILL'] as const) {
      const before = parts().map(({ pid }) => pid);
      expect(before).toHaveLength(3);
      for (const pid of before) {
        process.kill(pid, signal);
      }
      await waitFor('other lives', () => {
        const now = parts().map(({ pid }) => pid);
        return now.length === 3 && now.every((pid) => !before.includes(pid));
      });
    }
    npm.child.kill('SIGTERM');
    await npm.ended;
    await command.gone();
    expect(command.processes()).toEqual([]);
  });
});
