// A device plugin with pretend GPUs: the kubelet's own API over gRPC on a Unix socket, so that a real kubelet offers
// nvidia.com/gpu on a machine that has none. Runs in the test's process, which reaches the node's files from outside.

import { statSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

import * as grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';

import { waitFor } from '../wait-for.ts';

const apiVersion = 'v1beta1';
const endpoint = 'mimo-gpu.sock';
/** How soon a kubelet that has started again is noticed. */
const lookMs = 200;

interface Device {
  readonly ID: string;
  readonly health: 'Healthy' | 'Unhealthy';
}

type DeviceStream = grpc.ServerWritableStream<unknown, { readonly devices: readonly Device[] }>;
interface AllocateRequest {
  readonly container_requests: readonly { readonly devices_ids: readonly string[] }[];
}

/** Pretend GPUs of one node. Close it. */
export interface GpuPlugin {
  /** Makes one GPU sick or well; the kubelet offers one less or more. */
  setHealthy(index: number, healthy: boolean): void;
  /** Identifiers of the GPUs that each container was given, in order of allocation. */
  readonly allocations: readonly (readonly string[])[];
  /** How often a kubelet has taken the plugin; one that restarts takes it again. */
  readonly registrations: number;
  close(): Promise<void>;
}

export interface GpuPluginOptions {
  /** The node's /var/lib/kubelet/device-plugins as seen from here. */
  readonly directory: string;
  readonly count: number;
  readonly resourceName?: string;
}

/** Registers the GPUs with the node's kubelet, and again each time that it restarts. */
export async function startGpuPlugin(options: GpuPluginOptions): Promise<GpuPlugin> {
  const { directory, count, resourceName = 'nvidia.com/gpu' } = options;
  const definition = loadSync(join(import.meta.dirname, 'device-plugin.proto'), { keepCase: true });
  const loaded = grpc.loadPackageDefinition(definition)[apiVersion] as grpc.GrpcObject;
  const Registration = loaded['Registration'] as grpc.ServiceClientConstructor;
  const { service } = loaded['DevicePlugin'] as grpc.ServiceClientConstructor;

  let devices: readonly Device[] = Array.from({ length: count }, (_, index) => ({
    ID: `GPU-pretend-${index}`,
    health: 'Healthy',
  }));
  const streams = new Set<DeviceStream>();
  const allocations: (readonly string[])[] = [];
  const implementation: grpc.UntypedServiceImplementation = {
    GetDevicePluginOptions: (_: unknown, answer: grpc.sendUnaryData<object>) => answer(null, {}),
    ListAndWatch: (stream: DeviceStream) => {
      streams.add(stream);
      stream.on('cancelled', () => streams.delete(stream));
      stream.write({ devices });
    },
    Allocate: (call: grpc.ServerUnaryCall<AllocateRequest, object>, answer: grpc.sendUnaryData<object>) => {
      const identifiers = call.request.container_requests.map((request) => request.devices_ids);
      allocations.push(...identifiers);
      answer(null, {
        container_responses: identifiers.map((ids) => ({ envs: { NVIDIA_VISIBLE_DEVICES: ids.join(',') } })),
      });
    },
  };

  let server: grpc.Server | undefined;
  let registrations = 0;
  const serve = async (): Promise<void> => {
    server?.forceShutdown();
    await rm(join(directory, endpoint), { force: true });
    server = new grpc.Server();
    server.addService(service, implementation);
    const bound = Promise.withResolvers<void>();
    server.bindAsync(
      `unix://${join(directory, endpoint)}`,
      grpc.ServerCredentials.createInsecure(),
      (error) => (error === null ? bound.resolve() : bound.reject(error)),
    );
    await bound.promise;
    const kubelet = new Registration(
      `unix://${join(directory, 'kubelet.sock')}`,
      grpc.credentials.createInsecure(),
    );
    const registered = Promise.withResolvers<void>();
    const request = { version: apiVersion, endpoint, resource_name: resourceName, options: {} };
    kubelet['Register']?.(request, (error: Error | null) =>
      error === null ? registered.resolve() : registered.reject(error),
    );
    await registered.promise.finally(() => kubelet.close());
    registrations += 1;
  };

  const closing = new AbortController();
  /** The socket of the kubelet that knows these GPUs. */
  let known: string | undefined;
  const socket = (): string | undefined => {
    const found = statSync(join(directory, 'kubelet.sock'), { throwIfNoEntry: false });
    // A number may be used again for the next socket, a time not.
    return found === undefined ? undefined : `${found.ino} ${found.ctimeMs}`;
  };
  // Once for each kubelet: one that is registered with again gives up the GPUs when it sees the plugin before end. The
  // socket is there before the kubelet listens on it.
  const register = async (): Promise<void> => {
    const present = socket();
    if (present !== undefined && present !== known) {
      await serve();
      known = present;
    }
  };
  await waitFor(
    'the kubelet to take device plugins',
    async () => register().then(() => known !== undefined),
    60_000,
  );
  // A kubelet that starts empties the directory, makes its socket again and knows no plugins.
  const keepRegistered = async (): Promise<void> => {
    while (!closing.signal.aborted) {
      await register().catch(() => undefined);
      await sleep(lookMs);
    }
  };
  const keeping = keepRegistered();
  return {
    allocations,
    get registrations() {
      return registrations;
    },
    setHealthy: (index, healthy) => {
      devices = devices.map((device, at) =>
        at === index ? { ID: device.ID, health: healthy ? 'Healthy' : 'Unhealthy' } : device,
      );
      for (const stream of streams) {
        stream.write({ devices });
      }
    },
    close: async () => {
      closing.abort();
      await keeping;
      server?.forceShutdown();
    },
  };
}
