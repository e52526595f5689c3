// Any other rank of a replica group: holds its shard and computes what the leader plans. Owns its health and its end:
// it goes when the leader goes. Asked to end by itself it lets the leader know, who drains the group, and computes on until
// then. Takes no requests, sends no heartbeats.

import { beforeAbort } from '@mimo/core/process/abort';
import type { ClusterError } from '@mimo/core/process/errors';
import { startGrpcServer } from '@mimo/core/grpc/server';

import type { RankParts } from './leader.ts';

const maxReceiveBytes = 2 ** 20;
const closeServerMs = 1_000;

/** Starts a follower; resolves when the group is whole. `lost` as for `startLeader`. */
export async function startFollower(parts: RankParts): Promise<{ readonly lost: Promise<ClusterError> }> {
  const { config, log, lifecycle } = parts;
  const engine = await parts.startEngine(lifecycle.draining);
  lifecycle.onClose('engine', () => engine.close());
  const server = await startGrpcServer({ listenAddress: config.listen, services: [], maxReceiveBytes });
  lifecycle.onClose('gRPC server', () => server.close(AbortSignal.timeout(closeServerMs)));
  lifecycle.onDrain('leader', async (signal) => {
    server.health.set('', false);
    engine.leave();
    await beforeAbort(engine.failed, signal);
  });
  server.health.set('', true);
  lifecycle.ready();
  log.info({ address: server.address }, 'following');
  return { lost: engine.failed };
}
