// Heartbeats without NATS: polls the leaders named in the configuration several times a second, and publishes their
// heartbeats on the bus in memory.

import * as grpc from '@grpc/grpc-js';

import { pause } from '@mimo/core/process/abort';
import { callUnary, channelOptions } from '@mimo/core/grpc/client';
import type { Heartbeats } from '@mimo/core/bus/signals';
import { WorkerServiceClient, WorkerServiceService } from '@mimo/proto/worker';

const pollMs = 250;
const pollTimeoutMs = 1_000;
const maxReceiveBytes = 4 * 2 ** 20;

/** Polls one leader until the signal fires. A leader that does not answer has no heartbeat. */
export async function pollHeartbeats(
  address: string,
  heartbeats: Pick<Heartbeats, 'publish'>,
  signal: AbortSignal,
): Promise<void> {
  const credentials = grpc.credentials.createInsecure();
  const client = new WorkerServiceClient(address, credentials, channelOptions(maxReceiveBytes));
  try {
    while (!signal.aborted) {
      const limits = { request: {}, signal, timeoutMs: pollTimeoutMs };
      const stats = await callUnary(client, WorkerServiceService.stats, limits).catch(() => undefined);
      if (stats?.heartbeat !== undefined) {
        heartbeats.publish(stats.heartbeat);
      }
      await pause(pollMs, signal);
    }
  } finally {
    client.close();
  }
}
