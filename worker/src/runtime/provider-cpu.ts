// The CPU execution provider: memory is JavaScript's, runs are done on return. Owns nothing native.

import { HostMemory, hostMemoryInfo, noDeviceGroup } from './host-memory.ts';
import type { Provider, ProviderParts } from './provider.ts';

/** See `Provider`. */
export function createCpuProvider({ view }: ProviderParts): Provider {
  return {
    floatTypes: ['float', 'float16'],
    kernels: { pagedAttention: false, topK: false },
    memory: null,
    runOptions: null,
    configure: () => undefined,
    allocate: (type, length) => new HostMemory(type, length, view),
    memoryInfo: () => hostMemoryInfo(),
    replay: (_key, work) => work(),
    createSampler: () => undefined,
    createDecodeAttention: () => undefined,
    createGroupId: () => new Int32Array(0),
    joinGroup: () => {
      throw noDeviceGroup();
    },
    sum: () => {
      throw noDeviceGroup();
    },
    stop: () => undefined,
    close: () => undefined,
  };
}
