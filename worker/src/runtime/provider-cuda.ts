// The CUDA execution provider of onnxruntime-gpu: weights and memory on the device, everything in one stream, runs that
// do not wait. Owns the provider's options; other modules own the stream, the ranks and the recorded passes.

import { existsSync } from 'node:fs';
import * as path from 'node:path';
import { ClusterError } from '@mimo/core/process/errors';
import { createCudaAttention } from './cuda-attention.ts';
import { CudaDevice, DeviceMemory } from './cuda-device.ts';
import { CudaLink } from './cuda-group.ts';
import { CudaReplays } from './cuda-replay.ts';
import { createCudaLayers } from './cuda-layers.ts';
import { createCudaSampler } from './cuda-sampler.ts';
import type { ElementType } from '../shards/element-type.ts';
import { NativeOptions, ort, type OrtApi } from './ort-api.ts';
import type { Provider, ProviderParts } from './provider.ts';
import type { RuntimeMemory } from './memory.ts';

/** Throws `failed_precondition`: the provider is a separate library, which ONNX Runtime loads from its own folder. */
export function assertCudaProvider(library: string): void {
  const names = ['libonnxruntime_providers_shared.so', 'libonnxruntime_providers_cuda.so'];
  const missing = [library, ...names.map((name) => path.join(path.dirname(library), name))].filter(
    (file) => !existsSync(file),
  );
  if (missing.length > 0) {
    throw new ClusterError(
      'failed_precondition',
      `executionProvider cuda: needs ${missing.join(', ')} (from onnxruntime-gpu 1.30.0); libraryPath names libonnxruntime`,
    );
  }
}

/** One arena for all sessions: they run one after another, and each arena would keep its peak. */
function shareArena(api: OrtApi, env: bigint, memory: bigint): void {
  const { functions } = api;
  const [noLimit, sameAsRequested, byDefault] = [0, 1, -1];
  const config = api.create((out) =>
    functions.createArenaConfig(noLimit, sameAsRequested, byDefault, byDefault, out),
  );
  const options = new NativeOptions({ device_id: '0' });
  api.registerOnce(() =>
    functions.registerProviderAllocator(
      env,
      'CUDAExecutionProvider',
      memory,
      config,
      options.keys,
      options.values,
      options.count,
    ),
  );
  functions.releaseArenaConfig(config);
}

/** If one of our kernels is not available, ONNX Runtime does the same work more slowly. */
function orWarn<T>(otherwise: string, create: () => T): T | undefined {
  try {
    return create();
  } catch (error) {
    process.emitWarning(`cuda: ${otherwise}: ${ClusterError.from(error).message}`);
    return undefined;
  }
}

/** Options of the provider and of its runs: everything runs in the device's stream, and no run waits for it. */
function createOptions(
  api: OrtApi,
  { stream }: CudaDevice,
): { readonly cudaOptions: bigint; readonly runOptions: bigint } {
  const { functions } = api;
  const cudaOptions = api.create((out) => functions.createCudaOptions(out));
  const options = new NativeOptions({
    device_id: '0',
    // Without it the address below is ignored, and everything runs in the legacy stream.
    has_user_compute_stream: '1',
    user_compute_stream: String(stream),
    arena_extend_strategy: 'kSameAsRequested',
  });
  api.check(functions.updateCudaOptions(cudaOptions, options.keys, options.values, options.count));
  const runOptions = api.create((out) => functions.createRunOptions(out));
  api.check(functions.addRunConfigEntry(runOptions, 'disable_synchronize_execution_providers', '1'));
  return { cudaOptions, runOptions };
}

/** See `Provider`. Throws `failed_precondition` naming the missing part. */
export function createCudaProvider({ api, env, view, kernelDirectory }: ProviderParts): Provider {
  const { functions } = api;
  const device = new CudaDevice();
  const replays = new CudaReplays(device);
  const link = new CudaLink(device);
  const { cudaOptions, runOptions } = createOptions(api, device);
  const memory = api.create((out) =>
    functions.createMemoryInfo('Cuda', ort.deviceAllocator, 0, ort.memTypeDefault, out),
  );
  shareArena(api, env, memory);
  const allocate = (type: ElementType, length: number): RuntimeMemory =>
    new DeviceMemory(device, { type, length }, view);
  return {
    // GroupQueryAttention has no kernel for float.
    floatTypes: ['float16', 'bfloat16'],
    kernels: { pagedAttention: true, topK: true },
    memory,
    runOptions,
    configure: (sessionOptions) => {
      api.check(functions.appendCuda(sessionOptions, cudaOptions));
      // A node without a CUDA kernel would send its inputs to the host and back in every run.
      api.check(functions.addConfigEntry(sessionOptions, 'session.disable_cpu_ep_fallback', '1'));
      api.check(
        functions.addConfigEntry(sessionOptions, 'session.use_device_allocator_for_initializers', '1'),
      );
    },
    allocate,
    memoryInfo: () => device.memoryInfo(),
    replay: (key, work) => replays.run(key, work),
    createSampler: (shape) =>
      orWarn('sampling on the host', () => createCudaSampler(device, shape, kernelDirectory)),
    createDecodeAttention: (shape) =>
      orWarn('decode passes use ONNX Runtime attention', () =>
        createCudaAttention(device, shape, { allocate, cacheDirectory: kernelDirectory }),
      ),
    createDeviceLayers: (shape) =>
      orWarn('layers are computed by ONNX Runtime', () => createCudaLayers(device, shape, kernelDirectory)),
    deviceLink: link,
    stop: () => {
      try {
        device.synchronize();
      } catch {
        // The group is lost and aborted; every wait for it has failed already.
      }
      replays.close();
      link.abort();
    },
    close: () => {
      functions.releaseCudaOptions(cudaOptions);
      functions.releaseRunOptions(runOptions);
      functions.releaseMemoryInfo(memory);
      device.close();
    },
  };
}
