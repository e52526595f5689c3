// The CPU execution provider: memory is JavaScript's, runs are done on return. Owns nothing native.

import { HostMemory, hostMemoryInfo } from './host-memory.ts';
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
    stop: () => undefined,
    close: () => undefined,
  };
}
