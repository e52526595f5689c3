// The standard gRPC health service, which a Kubernetes gRPC probe calls. The service name '' means the process.
//
// The library grpc-health-check would replace these sixty lines by itself, @grpc/proto-loader, protobufjs and yargs,
// which it needs to parse its .proto at every start; its watchers also get a message for each call of setStatus,
// changed or not.

import * as grpc from '@grpc/grpc-js';

import { HealthCheckResponse_ServingStatus as ServingStatus, type HealthServer } from '@mimo/proto/health';

/** The serving state of each service. Watchers get every change. Nothing to close: watches end with their calls. */
export class Health {
  readonly #status = new Map<string, ServingStatus>();
  readonly #watchers = new Set<() => void>();

  /** Sets whether a service serves. */
  set(service: string, serving: boolean): void {
    this.#status.set(service, serving ? ServingStatus.SERVING : ServingStatus.NOT_SERVING);
    for (const watcher of this.#watchers) {
      watcher();
    }
  }

  /** The handlers to register with a server. */
  implementation(): HealthServer {
    return {
      check: (call, callback) => {
        const status = this.#status.get(call.request.service);
        if (status === undefined) {
          callback({ code: grpc.status.NOT_FOUND, details: 'unknown service' });
        } else {
          callback(null, { status });
        }
      },
      list: (_call, callback) => {
        const statuses = Object.fromEntries(
          [...this.#status].map(([service, status]) => [service, { status }]),
        );
        callback(null, { statuses });
      },
      watch: (call) => {
        let last: ServingStatus | undefined;
        const send = (): void => {
          const status = this.#status.get(call.request.service) ?? ServingStatus.SERVICE_UNKNOWN;
          if (status !== last) {
            last = status;
            call.write({ status });
          }
        };
        const stop = (): void => {
          this.#watchers.delete(send);
        };
        this.#watchers.add(send);
        call.on('cancelled', stop);
        call.on('close', stop);
        send();
      },
    };
  }
}
