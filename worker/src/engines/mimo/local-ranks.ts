// Connects the local ranks of this process with their group. Owns the choice between shared memory and the network, and
// the means to unblock a step thread from outside. Knows no sequence and no model.

import { createInProcessGroup, stopInProcessGroup } from '../../collective/in-process.ts';
import { joinGroup } from '../../collective/join-group.ts';
import type { CompleteOptions, EngineOptions } from './engine-options.ts';
import type { CollectiveSource } from './step-thread.ts';

const defaultConnectTimeoutMs = 120_000;
const defaultPeerTimeoutMs = 10_000;
/** The number of pings that the leader sends within the peer timeout. */
const pingsPerTimeout = 5;
const maxPingMs = 1000;

/** The local ranks' connections to their peers, and a way to unblock them all. */
export interface LocalRanks {
  readonly sources: readonly CollectiveSource[];
  readonly pingMs: number;
  /** Shared with the step threads: not zero once this process has been asked to end. */
  readonly leaving: Int32Array;
  stop(): void;
}

/** Joins the group, over the network if it has one. Throws the errors of `joinGroup`; the signal cancels. */
export async function openGroup(
  { group }: EngineOptions,
  { manifests }: CompleteOptions,
  signal: AbortSignal,
): Promise<LocalRanks> {
  const leaving = new Int32Array(new SharedArrayBuffer(4));
  if (group.kind === 'in-process') {
    if (manifests.length === 1) {
      return { sources: [{ kind: 'single' }], pingMs: maxPingMs, leaving, stop: () => undefined };
    }
    const shared = createInProcessGroup(manifests.length);
    return {
      sources: manifests.map(({ rank }) => ({ kind: 'in-process', group: shared, rank })),
      pingMs: maxPingMs,
      leaving,
      stop: () => stopInProcessGroup(shared),
    };
  }
  const manifest = manifests[0]!;
  const firstTimeoutMs = group.connectTimeoutMs ?? defaultConnectTimeoutMs;
  const peerTimeoutMs = group.peerTimeoutMs ?? defaultPeerTimeoutMs;
  const member = {
    rank: group.rank,
    worldSize: group.addresses.length,
    shardKey: manifest.key,
    precision: manifest.profile.weights,
  };
  const listenAddress = group.listenAddress ?? group.addresses[group.rank]!;
  const peers = await joinGroup(
    { member, addresses: group.addresses, listenAddress, token: group.token, timeoutMs: firstTimeoutMs },
    signal,
  );
  const stop = new Int32Array(new SharedArrayBuffer(4));
  const { rank, worldSize } = member;
  return {
    sources: [{ kind: 'network', options: { rank, worldSize, peers, peerTimeoutMs, firstTimeoutMs, stop } }],
    pingMs: Math.min(maxPingMs, peerTimeoutMs / pingsPerTimeout),
    leaving,
    stop: () => Atomics.store(stop, 0, 1),
  };
}
