// The gRPC interface of a leader: WorkerService's handlers over `Sessions` and the engine. Owns the mapping of a
// grpc-js stream to a session; knows no queue and no tokens.

import type { ServerDuplexStream } from '@grpc/grpc-js';

import type { ServiceEntry } from '@mimo/core/grpc/handlers';
import { unaryHandler } from '@mimo/core/grpc/handlers';
import { statusFromError } from '@mimo/core/grpc/status';
import {
  WorkerServiceService,
  type DrainRequest,
  type DrainResponse,
  type SessionRequest,
  type SessionResponse,
  type StatsRequest,
  type StatsResponse,
} from '@mimo/proto/worker';

import type { Sessions } from './sessions.ts';

export interface WorkerServiceParts {
  readonly sessions: Sessions;
  /** Stops accepting sequences; resolves with the number that ended meanwhile when the last has ended. */
  readonly drain: (signal: AbortSignal) => Promise<number>;
  readonly stats: () => StatsResponse;
}

/** The service, ready to be registered with a server; sessions end when their streams do. */
export function createWorkerService({ sessions, drain, stats }: WorkerServiceParts): ServiceEntry {
  return {
    definition: WorkerServiceService,
    implementation: {
      session: (call: ServerDuplexStream<SessionRequest, SessionResponse>) => serveSession(sessions, call),
      drain: unaryHandler<DrainRequest, DrainResponse>(async (_request, { signal }) => ({
        finishedSequences: await drain(signal),
      })),
      stats: unaryHandler<StatsRequest, StatsResponse>(() => Promise.resolve(stats())),
    },
  };
}

function serveSession(sessions: Sessions, call: ServerDuplexStream<SessionRequest, SessionResponse>): void {
  const session = sessions.open({
    send: (response) => call.write(response),
    end: (error) => {
      if (error === undefined) {
        call.end();
      } else {
        call.emit('error', statusFromError(error));
      }
    },
  });
  call.on('data', (request: SessionRequest) => session.receive(request));
  call.on('drain', () => session.drained());
  // A gateway that half-closes sends and expects nothing more: its sequences are aborted as if it had disconnected.
  call.on('end', () => session.end());
  call.on('cancelled', () => session.close());
  call.on('error', () => session.close());
}
