// A real nats-server for a test, on loopback. Owns nothing but the finding of its binary; whoever starts one closes it.

import {
  cacheDirectoryFrom,
  findNatsServer,
  startNatsServer,
  type NatsServer,
  type StartOptions,
} from '../../deploy/local/nats-server.ts';

/** Starts a server; the same port and directory again bring back what it held. */
export async function startTestNats(options: Omit<StartOptions, 'binary'>): Promise<NatsServer> {
  const binary = await findNatsServer({
    cacheDirectory: cacheDirectoryFrom(process.env),
    onProgress: () => undefined,
    signal: new AbortController().signal,
  });
  if (binary === null) {
    throw new Error('this test needs a nats-server: on the PATH, or a Go toolchain to build one');
  }
  return startNatsServer({ ...options, binary });
}
