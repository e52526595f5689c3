// A real nats-server for a test, on loopback. Owns only finding its binary; the caller that starts one closes it.

import { execFile } from 'node:child_process';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';

import {
  cacheDirectoryFrom,
  findNatsServer,
  startNatsServer,
  type NatsServer,
  type StartOptions,
} from '../../cli/src/local/nats-server.ts';

/** Starts a server; the same port and directory again bring back what it held. */
export async function startTestNats(options: Omit<StartOptions, 'binary'>): Promise<NatsServer> {
  return startNatsServer({ ...options, binary: await findBinary() });
}

/** What a server says of a configuration that it reads and checks without starting; rejects where it refuses it. */
export async function checkNatsConfig(text: string, env: Record<string, string>): Promise<string> {
  const binary = await findBinary();
  const directory = await mkdtemp(join(tmpdir(), 'mimo-nats-conf-'));
  try {
    const file = join(directory, 'nats.conf');
    await writeFile(file, text);
    const { stderr } = await promisify(execFile)(binary, ['-t', '--config', file], { env });
    return stderr;
  } finally {
    await rm(directory, { recursive: true });
  }
}

async function findBinary(): Promise<string> {
  const binary = await findNatsServer({
    cacheDirectory: cacheDirectoryFrom(process.env),
    onProgress: () => undefined,
    signal: new AbortController().signal,
  });
  if (binary === null) {
    throw new Error('this test needs a nats-server: on the PATH, or a Go toolchain to build one');
  }
  return binary;
}
