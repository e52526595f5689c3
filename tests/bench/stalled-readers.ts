// Clients that do not read: the time to an honest client's first token beside 16, 64 and 500 of them, on a cluster of
// real processes with one group of the demonstration model and 16 slots.
//
//   npm run bench -- stalled-readers [--counts 16,64,500] [--asks 40] [--window 0] [--hold 2]
//
// --window: bytes that each of them reads: with 0 not even the first message, with 600 some tokens. --hold: seconds
// before the honest client starts. It times out after 150 s.

import { availableParallelism, cpus } from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';

import { ask, chatRequest, startTestCluster, type TestCluster } from '../harness/cluster.ts';
import { openSlowReader } from '../harness/slow-reader.ts';

const patienceMs = 150_000;
const recommended = { temperature: 0.6, topP: 0.95 };

/** Prints a table and, last, one JSON line. */
export async function run(args: readonly string[], signal: AbortSignal): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: {
      counts: { type: 'string', default: '16,64,500' },
      asks: { type: 'string', default: '40' },
      window: { type: 'string', default: '0' },
      hold: { type: 'string', default: '2' },
    },
  });
  const results: Record<string, unknown>[] = [];
  const goals: Record<string, unknown>[] = [];
  for (const count of values.counts.split(',').map(Number)) {
    signal.throwIfAborted();
    // A cluster for each, so that none starts with another's remains.
    const cluster = await startTestCluster();
    const reader = openSlowReader(cluster.parts.gatewayAddress, { windowBytes: Number(values.window) });
    try {
      await askAll(cluster, 10);
      const alone = await askAll(cluster, Number(values.asks));
      const stalled = chatRequest('What is 47 + 85?', { ...recommended, ignoreEos: true });
      for (let i = 0; i < count; i++) {
        reader.chat(stalled);
      }
      await sleep(1000 * Number(values.hold), undefined, { signal });
      const beside = await askAll(cluster, Number(values.asks));
      const ratio = median(beside) / median(alone);
      process.stdout.write(
        `${count} that do not read: honest TTFT ${median(alone).toFixed(1)} ms alone, beside them the first ` +
          `${beside[0]?.toFixed(1)}, median ${median(beside).toFixed(1)}, longest ${Math.max(...beside).toFixed(1)} ms\n`,
      );
      results.push({
        count,
        aloneMs: median(alone),
        besideMs: median(beside),
        longestMs: Math.max(...beside),
      });
      goals.push({
        name: `honest TTFT beside ${count}, of alone`,
        goal: 2,
        value: Number(ratio.toFixed(2)),
        met: ratio <= 2,
      });
    } finally {
      reader.close();
      await cluster.close();
    }
  }
  const machine = { cores: availableParallelism(), cpu: cpus()[0]?.model };
  process.stdout.write(
    `${JSON.stringify({ bench: 'stalled-readers', ...values, results, goals, ...machine })}\n`,
  );
}

/** Times to the first token of so many requests, one after the other; one that has none in time ends the list. */
async function askAll(cluster: TestCluster, asks: number): Promise<number[]> {
  const times: number[] = [];
  for (let i = 0; i < asks; i++) {
    const sentMs = performance.now();
    let firstMs = Number.POSITIVE_INFINITY;
    try {
      await ask(cluster.client, {
        request: chatRequest('What is 47 + 85?', { ...recommended, maxTokens: 8 }),
        signal: AbortSignal.timeout(patienceMs),
        onMessage: ({ event }) => {
          if (event?.$case === 'delta') {
            firstMs = Math.min(firstMs, performance.now() - sentMs);
          }
        },
      });
    } catch (error) {
      process.stdout.write(
        `no answer after ${((performance.now() - sentMs) / 1000).toFixed(0)} s: ${String(error)}\n`,
      );
      return [...times, firstMs];
    }
    times.push(firstMs);
  }
  return times;
}

function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? Number.NaN;
}
