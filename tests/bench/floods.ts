// `npm run bench -- floods [--seconds S] [--scale X] [--only NAME] [--from ADDRESS]`: the effect of floods on others. A
// gateway process with keys serves an honest tenant. Its time to first token is measured while a second process floods,
// and alone before and after each flood, since the machine has other work too. Prints a table with the ratio and the
// gateway's memory, and one JSON line last. The flooder runs at the lowest priority, since both share this
// machine.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { constants, setPriority, tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

import * as grpc from '@grpc/grpc-js';

import { pause } from '@mimo/core/process/abort';

import { ask, chatRequest, createClient, startTestCluster } from '../harness/cluster.ts';
import { floods } from '../harness/floods.ts';

const keys = { honest: 'honest-key-51c0de77', hostile: 'hostile-key-90ab12ef' };
/** TTFT meanwhile, of that alone. */
const goalRatio = 2;
/** Of the gateway, above what it had before the floods. */
const goalBytes = 512 * 2 ** 20;
/** Of a flood's time, alone after each. */
const aloneShare = 0.5;
const lowestPriority = constants.priority.PRIORITY_LOW;

interface Observed {
  readonly asked: number;
  readonly failed: number;
  readonly ttftP50Ms: number;
  readonly ttftP99Ms: number;
  readonly peakBytes: number;
}

interface Row extends Observed {
  readonly flood: string;
  /** The means of before and after. */
  readonly aloneP50Ms: number;
  readonly aloneP99Ms: number;
  /** Of the medians. */
  readonly ratio: number;
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
    const observeFor = (share: number): Promise<Observed> =>
      observe(address, { pid, durationMs: share * seconds * 1_000, signal });
    const observeDuring = async (flood: string): Promise<Observed> => {
      const flooder = join(import.meta.dirname, 'floods/flooder.ts');
      const command = [flooder, flood, address, keys.hostile, values.scale, values.from];
      const child = spawn(process.execPath, command, { stdio: ['ignore', 'pipe', 'inherit'] });
      await once(child.stdout, 'data');
      setPriority(child.pid ?? 0, lowestPriority);
      try {
        return await observeFor(1);
      } finally {
        child.kill('SIGKILL');
        await once(child, 'exit');
        await pause(1_000, signal);
      }
    };
    const rows: Row[] = [];
    let before = await observeFor(aloneShare);
    const startBytes = before.peakBytes;
    console.log(heading);
    for (const flood of Object.keys(floods)) {
      if (!signal.aborted && (values.only === undefined || values.only === flood)) {
        const during = await observeDuring(flood);
        const after = await observeFor(aloneShare);
        const aloneP50Ms = (before.ttftP50Ms + after.ttftP50Ms) / 2;
        const aloneP99Ms = (before.ttftP99Ms + after.ttftP99Ms) / 2;
        const row = { flood, ...during, aloneP50Ms, aloneP99Ms, ratio: during.ttftP50Ms / aloneP50Ms };
        rows.push(row);
        print(row);
        before = after;
      }
    }
    report(rows, startBytes);
  } finally {
    await cluster.close();
    await rm(directory, { recursive: true });
  }
}

/** Asks one question after the other, and looks at the gateway's memory. */
async function observe(
  address: string,
  { pid, durationMs, signal }: { pid: number; durationMs: number; signal: AbortSignal },
): Promise<Observed> {
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

const columns = [
  'asked',
  'failed',
  'alone p50',
  'p99 [ms]',
  'p50 [ms]',
  'p99 [ms]',
  'ratio p50',
  'RSS [MiB]',
];
const heading = line('flood', columns);

function line(name: string, figures: readonly (string | number)[]): string {
  return `${name.padEnd(30)}${figures.map((figure) => String(figure).padStart(11)).join('')}`;
}

function print({ flood, ratio, ...row }: Row): void {
  const figures = [
    row.asked,
    row.failed,
    row.aloneP50Ms.toFixed(0),
    row.aloneP99Ms.toFixed(0),
    row.ttftP50Ms.toFixed(0),
    row.ttftP99Ms.toFixed(0),
    ratio.toFixed(2),
    (row.peakBytes / 2 ** 20).toFixed(0),
  ];
  console.log(line(flood, figures));
}

function report(rows: readonly Row[], startBytes: number): void {
  const goals = rows.flatMap(({ flood, ratio, failed, peakBytes }) => [
    {
      name: `${flood}: TTFT p50 against alone`,
      goal: goalRatio,
      value: Number(ratio.toFixed(2)),
      met: ratio <= goalRatio && failed === 0,
    },
    {
      name: `${flood}: memory above the start [MiB]`,
      goal: goalBytes / 2 ** 20,
      value: Math.round((peakBytes - startBytes) / 2 ** 20),
      met: peakBytes - startBytes <= goalBytes,
    },
  ]);
  console.log(JSON.stringify({ bench: 'floods', rows, goals }));
}
