// `npm run bench -- queue [--requests N] [--bytes B]`: the cost of waiting requests. N chats with a prompt of B bytes
// wait at a gateway without a group, with a real nats-server. The gateway's memory is read after a garbage collection:
// before, while they wait, and after they have left.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { parseArgs } from 'node:util';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';

import { pause } from '@mimo/core/process/abort';
import { createLog } from '@mimo/core/process/log';
import { parseGatewayConfig } from '@mimo/gateway/config';

import { openGateway } from '../harness/in-process.ts';
import { startTestNats } from '../harness/nats.ts';
import { waitFor } from '../harness/wait-for.ts';

const demoModel = join(import.meta.dirname, '../../models/mimo-demo');
const model = 'mimo-demo';
/** Of a waiting request with a prompt of 2 kB; most of it is gRPC's stream. */
const goalKilobytes = 25;

interface Memory {
  readonly heapBytes: number;
  readonly outsideBytes: number;
  readonly residentBytes: number;
}

/** After a collection: garbage is nobody's. */
function readMemory(): Memory {
  setFlagsFromString('--expose-gc');
  const collect = runInNewContext('gc') as () => void;
  collect();
  collect();
  const { heapUsed, external, rss } = process.memoryUsage();
  return { heapBytes: heapUsed, outsideBytes: external, residentBytes: rss };
}

/** Runs the benchmark. */
export async function run(args: readonly string[], signal: AbortSignal): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: {
      requests: { type: 'string', default: '2000' },
      bytes: { type: 'string', default: '2048' },
    },
  });
  const requests = Number(values.requests);
  const bytes = Number(values.bytes);
  if (!(requests > 0 && bytes > 0)) {
    throw new RangeError('--requests and --bytes must be numbers above 0');
  }
  const directory = await mkdtemp(join(tmpdir(), 'mimo-bench-queue-'));
  const nats = await startTestNats({ storeDirectory: directory, port: 0 });
  const config = parseGatewayConfig({
    MIMO_GATEWAY_LISTEN: '127.0.0.1:0',
    MIMO_GATEWAY_MODELS: `${model}=${demoModel}`,
    MIMO_GATEWAY_NATS: nats.url,
  });
  const gateway = await openGateway(config, createLog({ process: 'bench', level: 'error' }));
  try {
    const wait = async (count: number): Promise<() => Promise<void>> => {
      const path = join(import.meta.dirname, 'waiting-clients.ts');
      const child = spawn(process.execPath, [path, gateway.address, model, String(count), String(bytes)], {
        stdio: ['pipe', 'pipe', 'inherit'],
        signal,
      });
      const lines = createInterface(child.stdout);
      const [line] = (await Promise.race([once(lines, 'line'), once(child, 'exit')])) as [unknown];
      if (line !== `waiting ${count}`) {
        throw new Error(`of ${count} requests not all wait: ${String(line)}`);
      }
      return async () => {
        child.stdin.end();
        child.kill();
        await once(child, 'exit');
        await waitFor('the requests to be gone', () => {
          const { requests: held, deletingRecords } = gateway.counts();
          return held + deletingRecords === 0;
        });
      };
    };
    // What is loaded and compiled once is not the requests'.
    await (
      await wait(100)
    )();
    const before = readMemory();
    const leave = await wait(requests);
    await pause(2_000, signal);
    const waiting = readMemory();
    await leave();
    await pause(2_000, signal);
    const after = readMemory();
    const each = (from: Memory, to: Memory, part: keyof Memory): number =>
      Math.round((to[part] - from[part]) / requests / 102.4) / 10;
    const kilobytesEach = {
      heap: each(before, waiting, 'heapBytes'),
      outside: each(before, waiting, 'outsideBytes'),
      resident: each(before, waiting, 'residentBytes'),
    };
    const value = Math.round((kilobytesEach.heap + kilobytesEach.outside) * 10) / 10;
    console.log(
      `${requests} waiting prompts of ${bytes} bytes: ${value} kB each in the gateway ` +
        `(heap ${kilobytesEach.heap}, outside it ${kilobytesEach.outside}, resident ${kilobytesEach.resident})`,
    );
    console.log(
      JSON.stringify({
        bench: 'queue',
        requests,
        bytes,
        kilobytesEach,
        keptKilobytesEach: each(before, after, 'heapBytes'),
        goals: [
          {
            name: 'memory of a waiting request, kB',
            goal: goalKilobytes,
            value,
            met: value <= goalKilobytes,
          },
        ],
        node: process.version,
      }),
    );
  } finally {
    await gateway.close();
    await nats.close();
    await rm(directory, { recursive: true, force: true });
  }
}
