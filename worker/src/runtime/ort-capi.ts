// ONNX Runtime through its C API: koffi on the library that onnxruntime-node bundles, or another. Owns the environment
// with one global thread pool, the sessions, the tensors and the pointer arrays of each segment. Knows no model;
// `provider.ts` hides the differences between execution providers.
// Deliberate difference from the public binding: outputs are written into the caller's memory and never copied.

import { ClusterError } from '@mimo/core/process/errors';
import { createCpuProvider } from './provider-cpu.ts';
import { assertCudaProvider, createCudaProvider } from './provider-cuda.ts';
import { createWebgpuProvider } from './provider-webgpu.ts';
import type { Provider, ProviderParts } from './provider.ts';
import { elementBytes, type ElementType, type FloatType } from '../shards/element-type.ts';
import { addresses, bundledLibrary, nativeText, ort, OrtApi, tensorElementTypes } from './ort-api.ts';
import type {
  DecodeAttention,
  DecodeShape,
  DeviceLayers,
  LayersShape,
  OptionalKernels,
  OwnKernel,
  SamplerShape,
  Segment,
  SegmentSource,
  TokenSampler,
} from './kernel.ts';
import type { MemoryInfo, MemoryUse, RuntimeMemory, RuntimeTensor, TensorData } from './memory.ts';
import type { DeviceLink } from './reduce.ts';
import type { Runtime, RuntimeOptions } from './runtime.ts';

class CapiTensor implements RuntimeTensor {
  // Nothing on the native side roots JavaScript memory: this reference keeps it alive.
  readonly data?: TensorData;
  pointer: bigint;
  readonly #release: (tensor: CapiTensor) => void;

  constructor(data: TensorData | undefined, pointer: bigint, release: (tensor: CapiTensor) => void) {
    if (data !== undefined) {
      this.data = data;
    }
    this.pointer = pointer;
    this.#release = release;
  }

  release(): void {
    this.#release(this);
  }
}

class CapiSegment implements Segment {
  readonly name: string;
  readonly session: bigint;
  readonly inputNames: BigUint64Array;
  readonly outputNames: BigUint64Array;
  readonly inputPointers: BigUint64Array;
  readonly outputPointers: BigUint64Array;
  readonly nameBytes: readonly Buffer[];

  constructor(source: SegmentSource, session: bigint) {
    const inputs = source.inputs.map(nativeText);
    const outputs = source.outputs.map(nativeText);
    this.name = source.name;
    this.session = session;
    this.nameBytes = [...inputs, ...outputs];
    this.inputNames = addresses(inputs);
    this.outputNames = addresses(outputs);
    this.inputPointers = new BigUint64Array(inputs.length);
    this.outputPointers = new BigUint64Array(outputs.length);
  }
}

class OrtCapiRuntime implements Runtime {
  readonly implementation = 'ort-capi';
  readonly floatTypes: readonly FloatType[];
  readonly kernels: OptionalKernels;
  readonly #api: OrtApi;
  readonly #env: bigint;
  readonly #memory: bigint;
  readonly #provider: Provider;
  readonly #without: readonly OwnKernel[];
  readonly #segments: CapiSegment[] = [];
  readonly #tensors = new Set<CapiTensor>();
  readonly #releaseTensor = (tensor: CapiTensor): void => {
    if (this.#tensors.delete(tensor)) {
      this.#api.functions.releaseValue(tensor.pointer);
      tensor.pointer = 0n;
    }
  };
  #closed = false;

  constructor(options: RuntimeOptions) {
    const { executionProvider, intraOpThreads } = options;
    this.#without = options.without ?? [];
    const file = options.libraryPath ?? bundledLibrary();
    if (executionProvider === 'cuda') {
      assertCudaProvider(file);
    }
    const api = new OrtApi(file);
    const { functions } = api;
    this.#api = api;
    const threading = api.create((out) => functions.createThreadingOptions(out));
    api.check(functions.setGlobalIntraOpThreads(threading, intraOpThreads));
    api.check(functions.setGlobalInterOpThreads(threading, 1));
    api.check(functions.setGlobalSpinControl(threading, 1));
    this.#env = api.create((out) =>
      functions.createEnvWithGlobalThreadPools(ort.logLevelError, 'mimo', threading, out),
    );
    functions.releaseThreadingOptions(threading);
    this.#memory = api.create((out) =>
      functions.createCpuMemoryInfo(ort.arenaAllocator, ort.memTypeDefault, out),
    );
    this.#registerSharedArena();
    const parts: ProviderParts = {
      api,
      env: this.#env,
      view: (at, dims, type) => this.#view(at, dims, type),
      anySession: () => this.#segments[0]?.session,
      kernelDirectory: options.kernelDirectory,
    };
    this.#provider = createProvider[executionProvider](parts);
    this.floatTypes = this.#provider.floatTypes;
    this.kernels = this.#provider.kernels;
  }

  loadSegment(source: SegmentSource): Segment {
    const sessionOptions = this.#createSessionOptions();
    let session: bigint;
    try {
      session = this.#api.create((out) =>
        this.#api.functions.createSession(this.#env, source.path, sessionOptions, out),
      );
    } catch (error) {
      const { message } = ClusterError.from(error);
      // Creating a session uploads its weights to the device.
      const code = /out of memory|failed to allocate/i.test(message) ? 'resource_exhausted' : 'data_loss';
      throw new ClusterError(code, `segment ${source.name}: ${message}`, { cause: error });
    } finally {
      this.#api.functions.releaseSessionOptions(sessionOptions);
    }
    const segment = new CapiSegment(source, session);
    this.#segments.push(segment);
    return segment;
  }

  tensor(data: Float32Array | Int32Array | BigInt64Array, dims: readonly number[]): RuntimeTensor {
    const type = data instanceof Float32Array ? 'float' : data instanceof Int32Array ? 'int32' : 'int64';
    return this.#view(data, dims, type);
  }

  allocate(type: ElementType, length: number, use: MemoryUse): RuntimeMemory {
    return this.#provider.allocate(type, length, use);
  }

  memoryInfo(): MemoryInfo | undefined {
    return this.#provider.memoryInfo();
  }

  replay(key: string, work: () => void): void {
    this.#provider.replay(key, work);
  }

  createSampler(shape: SamplerShape): TokenSampler | undefined {
    return this.#without.includes('sampling') ? undefined : this.#provider.createSampler?.(shape);
  }

  createDecodeAttention(shape: DecodeShape): DecodeAttention | undefined {
    return this.#without.includes('attention') ? undefined : this.#provider.createDecodeAttention?.(shape);
  }

  createDeviceLayers(shape: LayersShape): DeviceLayers | undefined {
    return this.#without.includes('layers') ? undefined : this.#provider.createDeviceLayers?.(shape);
  }

  get deviceLink(): DeviceLink | undefined {
    return this.#provider.deviceLink;
  }

  #view(at: TensorData | bigint, dims: readonly number[], type: ElementType): RuntimeTensor {
    const shape = BigInt64Array.from(dims, BigInt);
    const onDevice = typeof at === 'bigint';
    const bytes = onDevice ? dims.reduce((product, dim) => product * dim, elementBytes[type]) : at.byteLength;
    const memory = onDevice ? this.#provider.memory : this.#memory;
    const pointer = this.#api.create((out) =>
      this.#api.functions.createTensor(memory, at, bytes, shape, dims.length, tensorElementTypes[type], out),
    );
    const tensor = new CapiTensor(onDevice ? undefined : at, pointer, this.#releaseTensor);
    this.#tensors.add(tensor);
    return tensor;
  }

  run(segment: Segment, inputs: readonly RuntimeTensor[], outputs: readonly RuntimeTensor[]): void {
    const target = segment as CapiSegment;
    fillPointers(target.inputPointers, inputs);
    fillPointers(target.outputPointers, outputs);
    const status = this.#api.functions.run(
      target.session,
      this.#provider.runOptions,
      target.inputNames,
      target.inputPointers,
      inputs.length,
      target.outputNames,
      outputs.length,
      target.outputPointers,
    );
    if (status) {
      this.#api.check(status);
    }
  }

  close(): void {
    if (this.#closed) {
      return;
    }
    this.#closed = true;
    this.#provider.stop();
    for (const tensor of this.#tensors) {
      tensor.release();
    }
    const { functions } = this.#api;
    for (const segment of this.#segments) {
      functions.releaseSession(segment.session);
    }
    functions.releaseMemoryInfo(this.#memory);
    this.#provider.close();
    functions.releaseEnv(this.#env);
  }

  #createSessionOptions(): bigint {
    const { functions } = this.#api;
    const options = this.#api.create((out) => functions.createSessionOptions(out));
    this.#api.check(functions.disablePerSessionThreads(options));
    this.#api.check(functions.addConfigEntry(options, 'session.use_env_allocators', '1'));
    this.#provider.configure(options);
    return options;
  }

  /** One arena for all sessions: with one arena per session, each of a hundred would keep its own peak. */
  #registerSharedArena(): void {
    this.#api.registerOnce(() =>
      this.#api.functions.createAndRegisterAllocator(this.#env, this.#memory, null),
    );
  }
}

const createProvider = {
  cpu: createCpuProvider,
  cuda: createCudaProvider,
  webgpu: createWebgpuProvider,
} as const;

function fillPointers(pointers: BigUint64Array, tensors: readonly RuntimeTensor[]): void {
  if (tensors.length !== pointers.length) {
    throw new ClusterError(
      'internal',
      `segment takes ${pointers.length} tensors here, was given ${tensors.length}`,
    );
  }
  for (let i = 0; i < tensors.length; i++) {
    pointers[i] = (tensors[i] as CapiTensor).pointer;
  }
}

/** Throws if koffi or the library cannot be loaded. See `createRuntime`. */
export function createOrtCapiRuntime(options: RuntimeOptions): Runtime {
  return new OrtCapiRuntime(options);
}
