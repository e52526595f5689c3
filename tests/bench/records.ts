// `npm run bench -- records [--store encrypted|plain] [--seconds N] [--waiting N]`: how many requests a second the
// queue records and deletes, 32 at once with 2 kB each, on a real nats-server, while other requests wait in it.

import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

import { createNatsBus } from '@mimo/core/bus/nats/bus';
import { createLog } from '@mimo/core/process/log';
import { RequestRecord } from '@mimo/proto/queue';

import { startTestNats } from '../harness/nats.ts';

const atOnce = 32;
/** On two shared cores with 2,000 waiting (2026-11). A store in plain text overwrites each record. */
const goalPerSecond = { encrypted: 2_500, plain: 100 } as const;

const configs = {
  encrypted: `jetstream { cipher: chachapoly, key: "${'k'.repeat(64)}" }`,
  plain: '',
} as const;

/** What the server and this process have used: a busy machine makes requests slower, and these hardly larger. */
async function cpuMicroseconds(
  serverPid: number,
): Promise<{ readonly server: number; readonly client: number }> {
  const { user, system } = process.cpuUsage();
  const fields = (await readFile(`/proc/${serverPid}/stat`, 'utf8')).split(') ')[1]?.split(' ') ?? [];
  // utime and stime, in hundredths of a second.
  return { server: (Number(fields[11]) + Number(fields[12])) * 10_000, client: user + system };
}

/** Runs the benchmark. */
export async function run(args: readonly string[], signal: AbortSignal): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: {
      store: { type: 'string', default: 'encrypted' },
      seconds: { type: 'string', default: '5' },
      waiting: { type: 'string', default: '2000' },
    },
  });
  const store = values.store === 'plain' ? 'plain' : 'encrypted';
  const [seconds, waiting] = [Number(values.seconds), Number(values.waiting)];
  if (!(seconds > 0 && waiting >= 0)) {
    throw new RangeError('--seconds must be a number above 0, --waiting one from 0');
  }
  const directory = await mkdtemp(join(tmpdir(), 'mimo-bench-records-'));
  const configFile = join(directory, 'nats.conf');
  await writeFile(configFile, configs[store]);
  const nats = await startTestNats({ storeDirectory: join(directory, 'nats'), port: 0, configFile });
  const queue = createNatsBus({
    servers: [nats.url],
    clientName: 'bench',
    replicas: 1,
    recordMaxAgeMs: 3_600_000,
    limits: { maxBytes: 2 ** 30, maxRecords: 200_000 },
    log: createLog({ process: 'bench', level: 'error' }),
  });
  try {
    await queue.opened(signal);
    const promptTokenIds = Array.from({ length: 680 }, (_, index) => 140_000 + index);
    const recordOf = (requestId: string): RequestRecord =>
      RequestRecord.fromPartial({ requestId, model: 'mimo-demo', gatewayId: 'bench', promptTokenIds });
    for (let at = 0; at < waiting; at += atOnce) {
      await Promise.all(
        Array.from({ length: atOnce }, (_, lane) => queue.records.publish(recordOf(`w${at + lane}`))),
      );
    }
    const beganMs = performance.now();
    const before = await cpuMicroseconds(nats.child.pid);
    let requests = 0;
    const lane = async (): Promise<void> => {
      while (performance.now() - beganMs < seconds * 1_000 && !signal.aborted) {
        requests += 1;
        await queue.records.erase(await queue.records.publish(recordOf(`r${requests}`)));
      }
    };
    await Promise.all(Array.from({ length: atOnce }, lane));
    const value = Math.round((requests / (performance.now() - beganMs)) * 1_000);
    const after = await cpuMicroseconds(nats.child.pid);
    const cpuMicrosecondsEach = {
      server: Math.round((after.server - before.server) / requests),
      client: Math.round((after.client - before.client) / requests),
    };
    console.log(
      `${value} requests/s recorded and deleted, ${store} store, ${waiting} waiting; ` +
        `CPU each ${cpuMicrosecondsEach.server} us in nats-server, ${cpuMicrosecondsEach.client} us here`,
    );
    const goal = goalPerSecond[store];
    const goals = [{ name: `requests/s, ${store} store`, goal, value, met: value >= goal }];
    const figures = { bench: 'records', store, waiting, seconds, cpuMicrosecondsEach, goals };
    console.log(JSON.stringify({ ...figures, node: process.version }));
  } finally {
    await queue.close();
    await nats.close();
    await rm(directory, { recursive: true, force: true });
  }
}
