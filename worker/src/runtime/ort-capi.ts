// ONNX Runtime through its C API: koffi on the library that onnxruntime-node bundles. Owns the function table, the
// environment with one global thread pool, and the pointer arrays of each segment. Knows no model.
// Slots of OrtApi are those of onnxruntime_c_api.h up to version 11, which upstream freezes with static asserts.
// Deliberate difference from the public binding: outputs are written where the caller says and are never copied.

import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import * as path from 'node:path';
import koffi from 'koffi';
import { ClusterError } from '@mimo/core/errors';
import { CudaDevice, DeviceMemory } from './cuda-device.ts';
import { elementBytes, type ElementType, type FloatType } from './element-type.ts';
import { HostMemory } from './host-memory.ts';
import type {
  Runtime,
  RuntimeMemory,
  RuntimeOptions,
  RuntimeTensor,
  Segment,
  SegmentSource,
  TensorData,
} from './runtime.ts';

/** A native address; 0n or null is none. */
type Pointer = bigint | null;

/** Calls one slot of the OrtApi table. */
type ApiFunction = (...args: readonly unknown[]) => Pointer;

const apiVersion = 11;
const logLevelError = 3;
const ortDeviceAllocator = 0;
const ortArenaAllocator = 1;
const ortMemTypeDefault = 0;

/** ONNXTensorElementDataType. */
const elementTypes: Readonly<Record<ElementType, number>> = {
  float: 1,
  int32: 6,
  int64: 7,
  float16: 10,
  bfloat16: 16,
};

function bundledLibrary(): string {
  const root = path.dirname(createRequire(import.meta.url).resolve('onnxruntime-node/package.json'));
  const file = process.platform === 'darwin' ? 'libonnxruntime.1.30.0.dylib' : 'libonnxruntime.so.1';
  return path.join(root, 'bin', 'napi-v6', process.platform, process.arch, file);
}

/** The function table. Loaded once per thread and never dropped: koffi unloads a library whose handle is collected. */
function loadApi(file: string) {
  const library = koffi.load(file);
  const base: Pointer = library.func('OrtGetApiBase', 'void *', [])();
  const getApi = koffi.decode(koffi.decode(base, 0, 'void *'), koffi.proto('void *', ['uint32_t']));
  const table: Pointer = getApi(apiVersion);
  const slot = (index: number, result: string, args: string[]): ApiFunction =>
    koffi.decode(koffi.decode(table, index * 8, 'void *'), koffi.proto(result, args));
  const status = (index: number, args: string[]): ApiFunction => slot(index, 'void *', args);
  return {
    library,
    errorMessage: slot(2, 'str', ['void *']) as (...args: readonly unknown[]) => unknown,
    createSession: status(7, ['void *', 'str', 'void *', '_Out_ void **']),
    run: status(9, ['void *', 'void *', 'void *', 'void *', 'size_t', 'void *', 'size_t', 'void *']),
    createSessionOptions: status(10, ['_Out_ void **']),
    createRunOptions: status(39, ['_Out_ void **']),
    createTensor: status(49, ['void *', 'void *', 'size_t', 'void *', 'size_t', 'int', '_Out_ void **']),
    createMemoryInfo: status(68, ['str', 'int', 'int', 'int', '_Out_ void **']),
    createCpuMemoryInfo: status(69, ['int', 'int', '_Out_ void **']),
    releaseEnv: slot(92, 'void', ['void *']),
    releaseStatus: slot(93, 'void', ['void *']),
    releaseMemoryInfo: slot(94, 'void', ['void *']),
    releaseSession: slot(95, 'void', ['void *']),
    releaseValue: slot(96, 'void', ['void *']),
    releaseRunOptions: slot(97, 'void', ['void *']),
    releaseSessionOptions: slot(100, 'void', ['void *']),
    createEnvWithGlobalThreadPools: status(119, ['int', 'str', 'void *', '_Out_ void **']),
    disablePerSessionThreads: status(120, ['void *']),
    createThreadingOptions: status(121, ['_Out_ void **']),
    releaseThreadingOptions: slot(122, 'void', ['void *']),
    addConfigEntry: status(130, ['void *', 'str', 'str']),
    createAndRegisterAllocator: status(144, ['void *', 'void *', 'void *']),
    setGlobalIntraOpThreads: status(147, ['void *', 'int']),
    setGlobalInterOpThreads: status(148, ['void *', 'int']),
    setGlobalSpinControl: status(149, ['void *', 'int']),
    addRunConfigEntry: status(165, ['void *', 'str', 'str']),
    appendCuda: status(204, ['void *', 'void *']),
    createCudaOptions: status(205, ['_Out_ void **']),
    updateCudaOptions: status(206, ['void *', 'void *', 'void *', 'size_t']),
    releaseCudaOptions: slot(208, 'void', ['void *']),
  };
}

const loadedApis = new Map<string, ReturnType<typeof loadApi>>();

/** What CUDA adds to a runtime. */
interface CudaBinding {
  readonly device: CudaDevice;
  readonly memory: bigint;
  readonly runOptions: bigint;
}

/** The provider is a library of its own, which ONNX Runtime looks for beside itself. */
function assertCudaProvider(library: string): void {
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
    const inputs = source.inputs.map((name) => Buffer.from(`${name}\0`));
    const outputs = source.outputs.map((name) => Buffer.from(`${name}\0`));
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
  readonly #api: ReturnType<typeof loadApi>;
  readonly #env: bigint;
  readonly #memory: bigint;
  /** None on the CPU. */
  readonly #cuda: CudaBinding | undefined;
  readonly #sessionOptions: bigint;
  readonly #segments: CapiSegment[] = [];
  readonly #tensors = new Set<CapiTensor>();
  readonly #releaseTensor = (tensor: CapiTensor): void => {
    if (this.#tensors.delete(tensor)) {
      this.#api.releaseValue(tensor.pointer);
      tensor.pointer = 0n;
    }
  };
  #closed = false;

  constructor(options: RuntimeOptions) {
    const file = options.libraryPath ?? bundledLibrary();
    if (options.executionProvider === 'cuda') {
      assertCudaProvider(file);
    }
    const api = loadedApis.get(file) ?? loadApi(file);
    loadedApis.set(file, api);
    this.#api = api;
    const threading = this.#create((out) => api.createThreadingOptions(out));
    this.#check(api.setGlobalIntraOpThreads(threading, options.intraOpThreads));
    this.#check(api.setGlobalInterOpThreads(threading, 1));
    this.#check(api.setGlobalSpinControl(threading, 1));
    this.#env = this.#create((out) =>
      api.createEnvWithGlobalThreadPools(logLevelError, 'mimo', threading, out),
    );
    api.releaseThreadingOptions(threading);
    this.#memory = this.#create((out) => api.createCpuMemoryInfo(ortArenaAllocator, ortMemTypeDefault, out));
    this.#registerSharedArena();
    this.#sessionOptions = this.#create((out) => api.createSessionOptions(out));
    this.#check(api.disablePerSessionThreads(this.#sessionOptions));
    this.#check(api.addConfigEntry(this.#sessionOptions, 'session.use_env_allocators', '1'));
    this.#cuda = options.executionProvider === 'cuda' ? this.#bindCuda() : undefined;
    // GroupQueryAttention has no kernel for float on CUDA, and dense products none for bfloat16 on the CPU.
    this.floatTypes = this.#cuda === undefined ? ['float', 'float16'] : ['float16', 'bfloat16'];
  }

  loadSegment(source: SegmentSource): Segment {
    let session: bigint;
    try {
      session = this.#create((out) =>
        this.#api.createSession(this.#env, source.path, this.#sessionOptions, out),
      );
    } catch (error) {
      throw new ClusterError('data_loss', `segment ${source.name}: ${ClusterError.from(error).message}`, {
        cause: error,
      });
    }
    const segment = new CapiSegment(source, session);
    this.#segments.push(segment);
    return segment;
  }

  tensor(data: Float32Array | Int32Array | BigInt64Array, dims: readonly number[]): RuntimeTensor {
    const type = data instanceof Float32Array ? 'float' : data instanceof Int32Array ? 'int32' : 'int64';
    return this.#view(data, dims, type);
  }

  allocate(type: ElementType, length: number): RuntimeMemory {
    const view = (at: TensorData | bigint, dims: readonly number[], of: ElementType): RuntimeTensor =>
      this.#view(at, dims, of);
    return this.#cuda === undefined
      ? new HostMemory(type, length, view)
      : new DeviceMemory(this.#cuda.device, { type, length }, view);
  }

  #view(at: TensorData | bigint, dims: readonly number[], type: ElementType): RuntimeTensor {
    const shape = BigInt64Array.from(dims, BigInt);
    const onDevice = typeof at === 'bigint';
    const bytes = onDevice ? dims.reduce((product, dim) => product * dim, elementBytes[type]) : at.byteLength;
    const memory = onDevice ? this.#cuda?.memory : this.#memory;
    const pointer = this.#create((out) =>
      this.#api.createTensor(memory, at, bytes, shape, dims.length, elementTypes[type], out),
    );
    const tensor = new CapiTensor(onDevice ? undefined : at, pointer, this.#releaseTensor);
    this.#tensors.add(tensor);
    return tensor;
  }

  run(segment: Segment, inputs: readonly RuntimeTensor[], outputs: readonly RuntimeTensor[]): void {
    const target = segment as CapiSegment;
    fillPointers(target.inputPointers, inputs);
    fillPointers(target.outputPointers, outputs);
    const status = this.#api.run(
      target.session,
      this.#cuda?.runOptions ?? null,
      target.inputNames,
      target.inputPointers,
      inputs.length,
      target.outputNames,
      outputs.length,
      target.outputPointers,
    );
    if (status) {
      this.#check(status);
    }
  }

  close(): void {
    if (this.#closed) {
      return;
    }
    this.#closed = true;
    this.#cuda?.device.synchronize();
    for (const tensor of this.#tensors) {
      tensor.release();
    }
    for (const segment of this.#segments) {
      this.#api.releaseSession(segment.session);
    }
    this.#api.releaseSessionOptions(this.#sessionOptions);
    this.#api.releaseMemoryInfo(this.#memory);
    if (this.#cuda !== undefined) {
      this.#api.releaseRunOptions(this.#cuda.runOptions);
      this.#api.releaseMemoryInfo(this.#cuda.memory);
      this.#cuda.device.close();
    }
    this.#api.releaseEnv(this.#env);
  }

  /** All sessions compute in one stream, and no run waits for it. */
  #bindCuda(): CudaBinding {
    const api = this.#api;
    const device = new CudaDevice();
    const cudaOptions = this.#create((out) => api.createCudaOptions(out));
    const options = {
      device_id: '0',
      user_compute_stream: String(device.stream),
      arena_extend_strategy: 'kSameAsRequested',
    };
    const [keys, values] = [Object.keys(options), Object.values(options)].map((texts) =>
      texts.map((text) => Buffer.from(`${text}\0`)),
    ) as [Buffer[], Buffer[]];
    this.#check(api.updateCudaOptions(cudaOptions, addresses(keys), addresses(values), keys.length));
    this.#check(api.appendCuda(this.#sessionOptions, cudaOptions));
    api.releaseCudaOptions(cudaOptions);
    // A node without a CUDA kernel would send its inputs to the host and back in every run.
    this.#check(api.addConfigEntry(this.#sessionOptions, 'session.disable_cpu_ep_fallback', '1'));
    this.#check(
      api.addConfigEntry(this.#sessionOptions, 'session.use_device_allocator_for_initializers', '1'),
    );
    const runOptions = this.#create((out) => api.createRunOptions(out));
    this.#check(api.addRunConfigEntry(runOptions, 'disable_synchronize_execution_providers', '1'));
    const memory = this.#create((out) =>
      api.createMemoryInfo('Cuda', ortDeviceAllocator, 0, ortMemTypeDefault, out),
    );
    return { device, memory, runOptions };
  }

  /** One arena for all sessions: an arena per session keeps the peak of every one of a hundred of them. */
  #registerSharedArena(): void {
    try {
      this.#check(this.#api.createAndRegisterAllocator(this.#env, this.#memory, null));
    } catch (error) {
      // The environment is one per process: another rank's thread has registered it.
      if (!/already been registered|already registered/.test(ClusterError.from(error).message)) {
        throw error;
      }
    }
  }

  #create(make: (out: [Pointer]) => Pointer): bigint {
    const out: [Pointer] = [null];
    this.#check(make(out));
    if (out[0] === null) {
      throw new ClusterError('internal', 'onnxruntime created nothing and reported no error');
    }
    return out[0];
  }

  #check(status: Pointer): void {
    if (status) {
      const message = String(this.#api.errorMessage(status));
      this.#api.releaseStatus(status);
      throw new ClusterError('internal', `onnxruntime: ${message}`);
    }
  }
}

function addresses(texts: readonly Buffer[]): BigUint64Array {
  return BigUint64Array.from(texts, (text) => koffi.address(text));
}

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

/** Throws where koffi or the library cannot be loaded. See `createRuntime`. */
export function createOrtCapiRuntime(options: RuntimeOptions): Runtime {
  return new OrtCapiRuntime(options);
}
