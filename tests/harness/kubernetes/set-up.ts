// What the project `kubernetes` does before its first test: has the programs of Kubernetes built, and the queue's server,
// outside any test's time limit. A machine that cannot build Kubernetes fails here, with what to do.

import { cacheDirectoryFrom, findNatsServer } from '../../../deploy/local/nats-server.ts';
import { findTools } from './tools.ts';

export default async function setUp(): Promise<void> {
  await findTools();
  await findNatsServer({
    cacheDirectory: cacheDirectoryFrom(process.env),
    onProgress: (line) => process.stderr.write(`mimo: ${line}\n`),
    signal: new AbortController().signal,
  });
}
