// `npm run bench -- floods [--seconds S] [--scale X] [--only NAME] [--from ADDRESS]`: what floods do to others. A gateway process with keys
// serves an honest tenant, whose time to first token is measured while a second process floods; prints a table with the
// gateway's memory, and last one JSON line. The flooder runs at the lowest priority, since both share this machine.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { constants, setPriority, tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

import * as grpc from '@grpc/grpc-js';

import { pause } from '@mimo/core/abort';

import { ask, chatRequest, createClient, startTestCluster } from '../harness/cluster.ts';
import { floods } from '../harness/floods.ts';

const keys = { honest: 'honest-key-51c0de77', hostile: 'hostile-key-90ab12ef' };
/** TTFT meanwhile, of that alone. */
const goalRatio = 2;
/** Of the gateway, above what it had before the floods. */
const goalBytes = 512 * 2 ** 20;
const lowestPriority = constants.priority.PRIORITY_LOW;

interface Row {
  readonly flood: string;
  readonly asked: number;
  readonly failed: number;
  readonly ttftP50Ms: number;
  readonly ttftP99Ms: number;
  readonly peakBytes: number;
}

/** Runs the benchmark. */
export async function run(args: readonly string[], signal: AbortSignal): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: {
      seconds: { type: 'string', default: '8' },
      scale: { type: 'string', default: '1' },
      only: { type: 'string' },
      // Another peer than the honest client's, which is 127.0.0.1.
      from: { type: 'string', default: '127.0.0.2' },
    },
  });
  const seconds = Number(values.seconds);
  if (!(seconds > 0 && Number(values.scale) > 0)) {
    throw new RangeError('--seconds and --scale must be numbers above 0');
  }
  const directory = await mkdtemp(join(tmpdir(), 'mimo-bench-floods-'));
  const keysFile = join(directory, 'keys.json');
  const entries = Object.entries(keys).map(([tenant, key]) => ({ tenant, key }));
  await writeFile(keysFile, JSON.stringify({ keys: entries }), { mode: 0o600 });
  const cluster = await startTestCluster({
    tensorParallel: 1,
    apiKey: keys.honest,
    gatewayEnv: { MIMO_GATEWAY_KEYS_FILE: keysFile },
  });
  try {
    const { gatewayAddress: address, gateway } = cluster.parts;
    const pid = gateway.children[0]?.pid ?? 0;
    const measure = async (flood: string): Promise<Row> => {
      const child =
        flood === 'alone'
          ? undefined
          : spawn(
              process.execPath,
              [
                join(import.meta.dirname, 'floods/flooder.ts'),
                flood,
                address,
                keys.hostile,
                values.scale,
                values.from,
              ],
              { stdio: ['ignore', 'pipe', 'inherit'] },
            );
      if (child !== undefined) {
        await once(child.stdout, 'data');
        setPriority(child.pid ?? 0, lowestPriority);
        await pause(1_000, signal);
      }
      try {
        return { flood, ...(await observe(address, { pid, durationMs: seconds * 1_000, signal })) };
      } finally {
        if (child !== undefined && child.exitCode === null) {
          child.kill('SIGKILL');
          await once(child, 'exit');
        }
        await pause(1_000, signal);
      }
    };
    const rows: Row[] = [await measure('alone')];
    for (const flood of Object.keys(floods)) {
      if (!signal.aborted && (values.only === undefined || values.only === flood)) {
        rows.push(await measure(flood));
        print(rows.at(-1)!);
      }
    }
    rows.push(await measure('alone'));
    report(rows);
  } finally {
    await cluster.close();
    await rm(directory, { recursive: true });
  }
}

/** Asks one question after the other, and looks at the gateway's memory. */
async function observe(
  address: string,
  { pid, durationMs, signal }: { pid: number; durationMs: number; signal: AbortSignal },
): Promise<Omit<Row, 'flood'>> {
  const client = createClient(address);
  const metadata = new grpc.Metadata();
  metadata.set('authorization', `Bearer ${keys.honest}`);
  const request = chatRequest('What is 47 + 85?', { temperature: 0.6, topP: 0.95, seed: 7, maxTokens: 8 });
  const endMs = performance.now() + durationMs;
  const ttftMs: number[] = [];
  let failed = 0;
  let peakBytes = 0;
  const watching = new AbortController();
  const watched = (async (): Promise<void> => {
    while (!watching.signal.aborted) {
      peakBytes = Math.max(peakBytes, await residentBytes(pid));
      await pause(50, watching.signal);
    }
  })();
  while (performance.now() < endMs && !signal.aborted) {
    const beganMs = performance.now();
    let firstMs: number | undefined;
    const onMessage: Parameters<typeof ask>[1]['onMessage'] = ({ event }) => {
      if (event?.$case === 'delta' && firstMs === undefined) {
        firstMs = performance.now() - beganMs;
      }
    };
    try {
      await ask(client, { request, metadata, onMessage, timeoutMs: 60_000 });
    } catch {
      failed += 1;
      await pause(100, signal);
    }
    ttftMs.push(firstMs ?? Number.POSITIVE_INFINITY);
  }
  watching.abort();
  await watched;
  client.close();
  const sorted = ttftMs.toSorted((a, b) => a - b);
  const at = (ratio: number): number =>
    sorted[Math.min(sorted.length - 1, Math.floor(ratio * sorted.length))]!;
  return { asked: ttftMs.length, failed, ttftP50Ms: at(0.5), ttftP99Ms: at(0.99), peakBytes };
}

async function residentBytes(pid: number): Promise<number> {
  const status = await readFile(`/proc/${pid}/status`, 'utf8');
  return Number(/^VmRSS:\s+(\d+) kB$/m.exec(status)?.[1]) * 1_024;
}

function print({ flood, asked, failed, ttftP50Ms, ttftP99Ms, peakBytes }: Row): void {
  const figures = [
    asked,
    failed,
    ttftP50Ms.toFixed(0),
    ttftP99Ms.toFixed(0),
    (peakBytes / 2 ** 20).toFixed(0),
  ];
  console.log(`${flood.padEnd(30)}${figures.map((figure) => String(figure).padStart(10)).join('')}`);
}

function report(rows: readonly Row[]): void {
  const alone = rows.filter(({ flood }) => flood === 'alone');
  const floodRows = rows.filter(({ flood }) => flood !== 'alone');
  const aloneP50Ms = Math.max(...alone.map(({ ttftP50Ms }) => ttftP50Ms));
  const baseBytes = rows[0]!.peakBytes;
  console.log(`\n${'flood'.padEnd(30)}     asked    failed  p50 [ms]  p99 [ms] RSS [MiB]`);
  rows.forEach(print);
  const goals = floodRows.flatMap(({ flood, ttftP50Ms, failed, peakBytes }) => [
    {
      name: `${flood}: TTFT p50 against alone`,
      goal: goalRatio,
      value: Number((ttftP50Ms / aloneP50Ms).toFixed(2)),
      met: ttftP50Ms <= goalRatio * aloneP50Ms && failed === 0,
    },
    {
      name: `${flood}: memory above the start [MiB]`,
      goal: goalBytes / 2 ** 20,
      value: Math.round((peakBytes - baseBytes) / 2 ** 20),
      met: peakBytes - baseBytes <= goalBytes,
    },
  ]);
  console.log(JSON.stringify({ bench: 'floods', rows, goals }));
}
