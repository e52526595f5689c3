// A thread that makes a fixed list of collective calls as one rank, and posts the results: see collective.test.ts.

import { parentPort, workerData } from 'node:worker_threads';
import type { Collective } from '@mimo/worker/collective/collective';
import { createInProcessCollective, type InProcessGroup } from '@mimo/worker/collective/in-process';
import { joinGroup } from '@mimo/worker/collective/join-group';
import { createNetworkCollective } from '@mimo/worker/collective/network';

/** How the thread reaches the others, and which rank it is. */
export interface CollectiveRankOptions {
  readonly rank: number;
  readonly worldSize: number;
  readonly source: { readonly group: InProcessGroup } | { readonly addresses: readonly string[] };
}

export const reduceLengths = [1, 1000, 300_001];
/** By rank; one longer than a slot of shared memory and than a socket's buffer. */
export const gatherLengths = [5, 600_000, 0, 7];
export const frames = [
  Int32Array.of(),
  Int32Array.of(1, -2),
  Int32Array.from({ length: 3000 }, (_, i) => i * i),
];

/** Rank r's value at index i: of all magnitudes, so that the order of a sum shows in its bits. */
export function valueOf(rank: number, i: number): number {
  return Math.fround(Math.sin(i + 7 * rank) * 10 ** ((i + 3 * rank) % 6));
}

function values(rank: number, length: number): Float32Array {
  return Float32Array.from({ length }, (_, i) => valueOf(rank, i));
}

async function open({ rank, worldSize, source }: CollectiveRankOptions): Promise<Collective> {
  if ('group' in source) {
    return createInProcessCollective(source.group, rank);
  }
  const { addresses } = source;
  const member = { rank, worldSize, shardKey: 'key', precision: 'fp32' };
  const peers = await joinGroup(
    { member, addresses, listenAddress: addresses[rank]!, token: 'secret', timeoutMs: 10_000 },
    new AbortController().signal,
  );
  const stop = new Int32Array(new SharedArrayBuffer(4));
  return createNetworkCollective({
    rank,
    worldSize,
    peers,
    peerTimeoutMs: 10_000,
    firstTimeoutMs: 10_000,
    stop,
  });
}

if (parentPort !== null) {
  const options = workerData as CollectiveRankOptions;
  const { rank, worldSize } = options;
  const collective = await open(options);
  const reduced = reduceLengths.map((length) => {
    const sum = values(rank, length);
    collective.allReduce(sum);
    return sum;
  });
  const lengths = gatherLengths.slice(0, worldSize);
  const parts = rank === 0 ? lengths.map((length) => new Float32Array(length)) : undefined;
  collective.gather(values(rank, lengths[rank]!), lengths, parts);
  const received = frames.map((frame) => {
    if (rank === 0) {
      collective.broadcast(frame);
      return frame;
    }
    return collective.receive();
  });
  // All have what they need before anybody leaves.
  collective.allReduce(new Float32Array(1));
  parentPort.postMessage({ reduced, parts, received });
  collective.close();
}
