// A gRPC server with health, reflection and a defence against cancel storms; behind a gate if anybody may connect.
// Handlers are made in handlers.ts.

import { readFileSync } from 'node:fs';
import type { Http2Server, ServerOptions } from 'node:http2';

import * as grpc from '@grpc/grpc-js';

import { HealthService } from '@mimo/proto/health';
import { ServerReflectionService } from '@mimo/proto/reflection';
import { ServerReflectionService as ServerReflectionServiceV1Alpha } from '@mimo/proto/reflection-v1alpha';

import { beforeAbort } from '../process/abort.ts';
import { ClusterError } from '../process/errors.ts';
import { keepLongDeadlines } from './deadline.ts';
import { keepLivingCalls } from './keepalive.ts';
import {
  Gate,
  type GateCounts,
  type GateLimits,
  type GateMethod,
  type GateOptions,
  type ServeStream,
} from './gate.ts';
import type { ServiceEntry } from './handlers.ts';
import { Health } from './health.ts';
import { withholdGrpcLog } from './log.ts';
import { createReflection } from './reflection.ts';
import { boundUnzipping } from './unzip.ts';

/** What a server needs. `listenAddress` is host:port; port 0 chooses a free port. */
export interface GrpcServerOptions {
  readonly listenAddress: string;
  readonly services: readonly ServiceEntry[];
  /** Bound of one incoming message; larger ones end their call with RESOURCE_EXHAUSTED. */
  readonly maxReceiveBytes: number;
  /** For a server that anybody can reach. Without it, all peers are trusted, as between the processes of a cluster. */
  readonly gate?: Pick<GateOptions, 'admit' | 'limits' | 'onRefused'>;
}

/** A running server. Close it. */
export interface GrpcServer {
  /** host:port, with the actual port. */
  readonly address: string;
  readonly port: number;
  readonly health: Health;
  /** The gate's state; undefined without a gate. */
  gateCounts(): GateCounts | undefined;
  /**
   * Asks connected clients to make their next calls over a new connection, which a load balancer sends to another
   * server. Running calls continue, and new connections are still accepted.
   */
  goAway(): void;
  /** Rejects new calls and waits for running ones; when the signal fires, ends them. */
  close(signal: AbortSignal): Promise<void>;
}

/**
 * Node counts stream resets and closes a connection, with everybody's streams, beyond 1,000 and 33 a second. A
 * gateway's connection may be a proxy's whose users all leave at once; more than that is a flood.
 */
const trustedResets = { streamResetBurst: 1_000_000, streamResetRate: 100_000 };
const guardedResets = { streamResetBurst: 20_000, streamResetRate: 1_000 };

/** Memory for one connection's headers, streams and unread answers; each unread stream may hold 64 kB of it. */
const maxSessionMegabytes = 256;

/** Number of headers of a stream; a client with tracing sends about twenty. */
const maxHeaderListPairs = 64;

/** Requests to health and reflection contain only names. */
const openMaxMessageBytes = 4_096;

// setTimeout's longest delay: `close` ends draining connections, not a timer of grpc-js.
const noDrainLimitMs = 2 ** 31 - 1;

/** Services of every server, which need no key. */
const openServices = [HealthService, ServerReflectionService, ServerReflectionServiceV1Alpha];

/** Starts a server. Fails with `unavailable` if the address is in use or not available. */
export async function startGrpcServer(options: GrpcServerOptions): Promise<GrpcServer> {
  const server = new grpc.Server({
    'grpc.max_receive_message_length': options.maxReceiveBytes,
    'grpc.max_send_message_length': -1,
    // Detects a client that vanished, within six minutes: see grpc/keepalive.ts.
    'grpc.keepalive_time_ms': 30_000,
    ...(options.gate !== undefined && {
      'grpc.max_concurrent_streams': options.gate.limits.maxStreamsPerConnection,
      'grpc-node.max_session_memory': maxSessionMegabytes,
    }),
  });
  setHttp2Options(server, options.gate?.limits);
  const gate = options.gate === undefined ? undefined : placeGate(server, options, options.gate);
  keepLivingCalls();
  withholdGrpcLog();
  keepLongDeadlines();
  boundUnzipping();
  const health = new Health();
  const descriptors = readFileSync(new URL(import.meta.resolve('@mimo/proto/descriptor.binpb')));
  const definitions = [...options.services.map(({ definition }) => definition), ...openServices];
  const reflection = createReflection(descriptors, definitions.map(nameOf));
  server.addService(HealthService, health.implementation());
  server.addService(ServerReflectionService, reflection);
  server.addService(ServerReflectionServiceV1Alpha, reflection);
  for (const { definition, implementation } of options.services) {
    server.addService(definition, implementation);
  }
  const { promise: bound, resolve, reject } = Promise.withResolvers<number>();
  server.bindAsync(options.listenAddress, grpc.ServerCredentials.createInsecure(), (error, port) => {
    if (error === null) {
      resolve(port);
    } else {
      reject(new ClusterError('unavailable', `cannot listen on ${options.listenAddress}: ${error.message}`));
    }
  });
  const port = await bound;
  const host = options.listenAddress.slice(0, options.listenAddress.lastIndexOf(':'));
  return {
    address: `${host}:${port}`,
    port,
    health,
    gateCounts: () => gate?.counts(),
    goAway: () => server.drain(`${host}:${port}`, noDrainLimitMs),
    close: async (signal) => {
      const { promise: shut, resolve: done } = Promise.withResolvers<void>();
      server.tryShutdown(() => done());
      await beforeAbort(shut, signal).catch(() => undefined);
      server.forceShutdown();
      gate?.close();
    },
  };
}

/** The full name of a service, as in the paths of its methods. */
function nameOf(definition: grpc.ServiceDefinition): string {
  return Object.values(definition)[0]?.path.split('/')[1] ?? '';
}

/**
 * Sets options that grpc-js does not expose, in the options that it passes to http2, before the first port is bound:
 * node:http2's rapid-reset limits, which a storm of client cancels or expired deadlines exceeds, and the size of
 * headers. server.test.ts notices when a release of grpc-js keeps them elsewhere.
 */
function setHttp2Options(server: grpc.Server, limits: GateLimits | undefined): void {
  const http2Options: unknown = Reflect.get(server, 'commonServerOptions');
  if (typeof http2Options !== 'object' || http2Options === null) {
    throw new ClusterError(
      'internal',
      'this version of grpc-js does not keep its http2 options in commonServerOptions',
    );
  }
  if (limits === undefined) {
    Object.assign(http2Options, trustedResets);
    return;
  }
  const settings = {
    ...(http2Options as ServerOptions).settings,
    maxHeaderListSize: limits.maxHeaderBytes,
  };
  Object.assign(http2Options, guardedResets, { settings, maxHeaderListPairs });
}

/** Puts a gate between the server's HTTP/2 servers and grpc-js's handler of streams. */
function placeGate(
  server: grpc.Server,
  { services, maxReceiveBytes }: GrpcServerOptions,
  options: NonNullable<GrpcServerOptions['gate']>,
): Gate {
  const methods = new Map<string, GateMethod>();
  const register = (definition: grpc.ServiceDefinition, open: boolean): void => {
    for (const { path, requestStream } of Object.values(definition)) {
      const maxMessageBytes = open ? openMaxMessageBytes : maxReceiveBytes;
      methods.set(path, { open, requestStream, maxMessageBytes });
    }
  };
  services.forEach(({ definition }) => register(definition, false));
  openServices.forEach((definition) => register(definition, true));
  const gate = new Gate({ ...options, methods });
  const hook = '_setupHandlers';
  const setUp: unknown = Reflect.get(server, hook);
  if (typeof setUp !== 'function') {
    throw new ClusterError(
      'internal',
      `this version of grpc-js does not set up its http2 servers in ${hook}`,
    );
  }
  const setUpBehindGate = (http2Server: Http2Server, ...rest: unknown[]): void => {
    Reflect.apply(setUp, server, [http2Server, ...rest]);
    const listeners = http2Server.listeners('stream') as unknown as ServeStream[];
    http2Server.removeAllListeners('stream');
    gate.guard(http2Server, (...args) => listeners.forEach((serve) => serve(...args)));
  };
  Object.assign(server, { [hook]: setUpBehindGate });
  return gate;
}
