// The WebGPU execution provider that onnxruntime-node bundles (Dawn on Vulkan, Metal or Direct3D): weights, keys,
// values and activations in buffers of the device. Owns those buffers; knows no segment.
//
// A buffer has a handle and no address, so a view starts at the beginning of its buffer. Values that cross to the host
// in every pass (token ids, partial sums, logits) are in JavaScript memory, and a run copies them in or out.

import { ClusterError } from '@mimo/core/process/errors';
import { elementBytes, type ElementType } from '../shards/element-type.ts';
import { HostMemory } from './host-memory.ts';
import { NativeOptions, ort, type OrtApi } from './ort-api.ts';
import type { Provider, ProviderParts } from './provider.ts';
import type { RuntimeMemory, RuntimeTensor } from './memory.ts';

/** See `Provider`. Throws `failed_precondition` naming the missing part. */
export function createWebgpuProvider({ api, view, anySession }: ProviderParts): Provider {
  const { functions } = api;
  const options = new NativeOptions({});
  // Each holds one reference to the device, and a session releases one: sessions cannot share options.
  const configure = (sessionOptions: bigint): void => {
    api.check(
      functions.appendProvider(sessionOptions, 'WebGPU', options.keys, options.values, options.count),
    );
    api.check(functions.addConfigEntry(sessionOptions, 'session.disable_cpu_ep_fallback', '1'));
  };
  try {
    const attempt = api.create((out) => functions.createSessionOptions(out));
    configure(attempt);
    functions.releaseSessionOptions(attempt);
  } catch (error) {
    const { message } = ClusterError.from(error);
    const reason = /adapter/i.test(message)
      ? 'no device: needs a driver and loader of Vulkan (libvulkan.so.1), Metal or Direct3D'
      : 'this libonnxruntime does not contain the provider';
    throw new ClusterError('failed_precondition', `executionProvider webgpu: ${reason}: ${message}`, {
      cause: error,
    });
  }
  const memory = api.create((out) =>
    functions.createMemoryInfo('WebGPU_Buf', ort.deviceAllocator, 0, ort.memTypeDefault, out),
  );
  let allocator: bigint | undefined;
  return {
    // PagedAttention has a kernel for float16 only.
    floatTypes: ['float16'],
    kernels: { pagedAttention: true, topK: false },
    memory,
    runOptions: null,
    configure,
    allocate: (type, length, use) => {
      if (use === 'exchanged') {
        return new HostMemory(type, length, view);
      }
      allocator ??= createAllocator(api, memory, anySession());
      return new BufferMemory({ api, allocator, type, length, view });
    },
    memoryInfo: () => undefined,
    replay: (_key, work) => work(),
    stop: () => {
      // A session's allocator must not outlive it.
      if (allocator !== undefined) {
        functions.releaseAllocator(allocator);
      }
    },
    close: () => functions.releaseMemoryInfo(memory),
  };
}

/** A session's provider allocates the device's buffers; all sessions share one device. */
function createAllocator(api: OrtApi, memory: bigint, session: bigint | undefined): bigint {
  if (session === undefined) {
    throw new ClusterError(
      'internal',
      'WebGPU memory can be allocated only after the first segment is loaded',
    );
  }
  return api.create((out) => api.functions.createAllocator(session, memory, out));
}

class BufferMemory implements RuntimeMemory {
  readonly type: ElementType;
  readonly #api: OrtApi;
  readonly #allocator: bigint;
  readonly #buffer: bigint;
  readonly #view: ProviderParts['view'];
  #released = false;

  constructor(of: {
    readonly api: OrtApi;
    readonly allocator: bigint;
    readonly type: ElementType;
    readonly length: number;
    readonly view: ProviderParts['view'];
  }) {
    this.type = of.type;
    this.#api = of.api;
    this.#allocator = of.allocator;
    this.#view = of.view;
    const bytes = Math.max(1, of.length) * elementBytes[of.type];
    try {
      this.#buffer = of.api.create((out) => of.api.functions.allocatorAlloc(of.allocator, bytes, out));
    } catch (error) {
      throw new ClusterError(
        'resource_exhausted',
        `device memory: a buffer of ${bytes} bytes: ${ClusterError.from(error).message}`,
        { cause: error },
      );
    }
  }

  tensor(start: number, dims: readonly number[]): RuntimeTensor {
    if (start !== 0) {
      throw new ClusterError('internal', `a view of a WebGPU buffer begins at 0, not at ${start}`);
    }
    return this.#view(this.#buffer, dims, this.type);
  }

  write(): void {
    throw resident();
  }

  read(): Float32Array {
    throw resident();
  }

  release(): void {
    if (!this.#released) {
      this.#released = true;
      this.#api.check(this.#api.functions.allocatorFree(this.#allocator, this.#buffer));
    }
  }
}

function resident(): ClusterError {
  return new ClusterError('internal', 'only segments can access resident memory of a WebGPU device');
}
