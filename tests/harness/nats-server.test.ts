import { chmodSync, existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { once } from 'node:events';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { afterEach, beforeEach, describe, expect, it } from 'vitest';

import {
  cacheDirectoryFrom,
  findNatsServer,
  natsServerVersion,
  startNatsServer,
} from '../../cli/src/local/nats-server.ts';

const signal = new AbortController().signal;

/** Writes a program that stands for another version of nats-server, or for `go`. */
function writeProgram(path: string, script: string): void {
  writeFileSync(path, `#!/bin/sh\n${script}\n`);
  chmodSync(path, 0o755);
}

describe('findNatsServer', () => {
  let directory: string;
  let savedPath: string | undefined;
  const lines: string[] = [];
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'mimo-find-'));
    mkdirSync(join(directory, 'bin'));
    savedPath = process.env['PATH'];
    process.env['PATH'] = `${join(directory, 'bin')}:/bin:/usr/bin`;
    lines.length = 0;
  });
  afterEach(() => {
    process.env['PATH'] = savedPath;
    rmSync(directory, { recursive: true });
  });
  const find = async (): Promise<string | null> =>
    findNatsServer({
      cacheDirectory: join(directory, 'cache'),
      onProgress: (line) => lines.push(line),
      signal,
    });

  it('uses a recent nats-server from the PATH', async () => {
    writeProgram(join(directory, 'bin/nats-server'), 'echo "nats-server: v2.10.3"');
    expect(await find()).toBe('nats-server');
  });

  it('builds once for all callers when the one on the PATH is too old', async () => {
    writeProgram(join(directory, 'bin/nats-server'), 'echo "nats-server: v2.9.25"');
    writeProgram(
      join(directory, 'bin/go'),
      `echo built >> ${directory}/builds; sleep 0.3; echo "#!/bin/sh" > "$GOBIN/nats-server"`,
    );
    const binary = join(directory, 'cache/nats-server', natsServerVersion, 'nats-server');
    expect(await Promise.all([find(), find()])).toEqual([binary, binary]);
    expect(readdirSync(join(binary, '..'))).toEqual(['nats-server']);
    expect(lines.filter((line) => line.startsWith('building'))).toHaveLength(1);
    expect(await find()).toBe(binary);
  });

  it('returns null and the reason when it cannot be built', async () => {
    writeProgram(join(directory, 'bin/nats-server'), 'exit 1');
    writeProgram(join(directory, 'bin/go'), 'echo "module lookup disabled" >&2; exit 1');
    expect(await find()).toBeNull();
    expect(lines.at(-1)).toBe('nats-server cannot be built here: module lookup disabled');
  });
});

/** The line with which a NATS server greets. */
async function greetingOf(port: number): Promise<string> {
  const socket = connect(port, '127.0.0.1');
  const [chunk] = (await once(socket, 'data')) as [Buffer];
  socket.destroy();
  return chunk.toString();
}

describe('startNatsServer', () => {
  it('serves JetStream on loopback, keeps its streams across a restart, and closes', async () => {
    const binary = await findNatsServer({
      cacheDirectory: cacheDirectoryFrom(process.env),
      onProgress: () => undefined,
      signal,
    });
    if (binary === null) {
      throw new Error('this test needs a nats-server: on the PATH, or Go to build it');
    }
    const storeDirectory = mkdtempSync(join(tmpdir(), 'mimo-nats-'));
    const first = await startNatsServer({ binary, storeDirectory, port: 0 });
    expect(await greetingOf(first.port)).toMatch(/^INFO .*"jetstream":true/);
    expect(first.url).toMatch(/^nats:\/\/127\.0\.0\.1:\d+$/);
    await first.close();
    await expect(greetingOf(first.port)).rejects.toMatchObject({ code: 'ECONNREFUSED' });
    const second = await startNatsServer({ binary, storeDirectory, port: first.port });
    expect(second.url).toBe(first.url);
    await expect(startNatsServer({ binary, storeDirectory, port: first.port })).rejects.toMatchObject({
      code: 'unavailable',
    });
    await second.close();
    expect(existsSync(join(storeDirectory, 'jetstream'))).toBe(true);
    rmSync(storeDirectory, { recursive: true });
  });
});
