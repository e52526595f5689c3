// A device plugin with pretend GPUs: the kubelet's own API over gRPC on a Unix socket, so that a real kubelet offers
// nvidia.com/gpu on a machine that has none. Runs in the test's process, which reaches the node's files from outside.

import { existsSync, watch } from 'node:fs';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';

import * as grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';

import { waitFor } from '../wait-for.ts';

const apiVersion = 'v1beta1';
const endpoint = 'mimo-gpu.sock';

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

  let closed = false;
  // The socket is there before the kubelet listens on it.
  const register = async (): Promise<void> =>
    waitFor('the kubelet to take device plugins', async () => closed || serve().then(() => true), 60_000);
  await register();
  // A kubelet that starts empties the directory, makes its socket again and knows no plugins.
  let serving = Promise.resolve();
  const watcher = watch(directory, (_, name) => {
    // Several events tell of one new socket: one after another, since each takes the place of the one before.
    if (name === 'kubelet.sock' && existsSync(join(directory, name))) {
      serving = serving
        .then(register)
        .catch((error: unknown) => console.error(`pretend GPUs: ${String(error)}`));
    }
  });
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
      closed = true;
      watcher.close();
      await serving;
      server?.forceShutdown();
    },
  };
}
