// The collectives between real threads and over real sockets: the same results, to the bit, on every rank.

import { once } from 'node:events';
import { Worker } from 'node:worker_threads';
import { describe, expect, it } from 'vitest';
import { createInProcessGroup } from '@mimo/worker/collective/in-process';
import {
  frames,
  gatherLengths,
  reduceLengths,
  valueOf,
  type CollectiveRankOptions,
} from '../harness/collective-rank.ts';
import { freeAddresses } from '../../cli/src/local/free-ports.ts';

interface RankResults {
  readonly reduced: readonly Float32Array[];
  readonly parts: readonly Float32Array[] | undefined;
  readonly received: readonly Int32Array[];
}

async function runRanks(worldSize: number, source: CollectiveRankOptions['source']): Promise<RankResults[]> {
  const threads = Array.from({ length: worldSize }, (_, rank) => {
    const workerData: CollectiveRankOptions = { rank, worldSize, source };
    return new Worker(new URL('../harness/collective-rank.ts', import.meta.url), { workerData });
  });
  const messages = await Promise.all(threads.map((thread) => once(thread, 'message')));
  await Promise.all(threads.map((thread) => thread.terminate()));
  return messages.map(([results]) => results as RankResults);
}

/** Float32 additions in rank order. */
function sumAt(worldSize: number, i: number): number {
  let sum = valueOf(0, i);
  for (let rank = 1; rank < worldSize; rank++) {
    sum = Math.fround(sum + valueOf(rank, i));
  }
  return sum;
}

describe.each(['in-process', 'network'] as const)('the %s collective', (kind) => {
  it.each([2, 3, 4])('sums in rank order, gathers and broadcasts over %i ranks', async (worldSize) => {
    const source =
      kind === 'in-process'
        ? { group: createInProcessGroup(worldSize) }
        : { addresses: await freeAddresses(worldSize) };
    const results = await runRanks(worldSize, source);
    for (const [rank, { reduced, parts, received }] of results.entries()) {
      for (const [i, length] of reduceLengths.entries()) {
        const expected = Float32Array.from({ length }, (_, at) => sumAt(worldSize, at));
        expect(Buffer.from(reduced[i]!.buffer).equals(Buffer.from(expected.buffer))).toBe(true);
      }
      expect(received).toEqual(frames);
      expect(parts === undefined).toBe(rank !== 0);
    }
    for (const [rank, part] of results[0]!.parts!.entries()) {
      const expected = Float32Array.from({ length: gatherLengths[rank]! }, (_, i) => valueOf(rank, i));
      expect(Buffer.from(part.buffer).equals(Buffer.from(expected.buffer))).toBe(true);
    }
  });
});
