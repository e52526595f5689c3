// Any other rank of a replica group: holds its shard and executes the leader's plans. Owns its health and its end: it
// ends when the leader ends. When it is asked to end, it notifies the leader and keeps computing while the leader
// drains the group. Accepts no requests, sends no heartbeats.

import { beforeAbort } from '@mimo/core/process/abort';
import { startGrpcServer } from '@mimo/core/grpc/server';
import type { ProcessParts } from '@mimo/core/process/run-process';

import type { WorkerConfig } from './config.ts';
import type { EngineHost } from './engines/mimo/engine-host.ts';

const maxReceiveBytes = 2 ** 20;
const closeServerMs = 1_000;

/** Starts a follower; resolves when the group is whole. `openEngine` and the end are as for `startLeader`. */
export async function startFollower(
  { config, log, lifecycle }: ProcessParts<WorkerConfig>,
  openEngine: () => Promise<EngineHost>,
): Promise<void> {
  const engine = await openEngine();
  const server = await startGrpcServer({ listenAddress: config.listen, services: [], maxReceiveBytes });
  lifecycle.onClose('gRPC server', () => server.close(AbortSignal.timeout(closeServerMs)));
  lifecycle.onDrain('leader', async (signal) => {
    server.health.set('', false);
    engine.leave();
    await beforeAbort(engine.failed, signal);
  });
  void engine.failed.then((error) => lifecycle.end(error));
  server.health.set('', true);
  log.info({ address: server.address }, 'following');
}
