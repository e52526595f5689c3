// ONNX Runtime through its C API: koffi on the library that onnxruntime-node bundles. Owns the function table, the
// environment with one global thread pool, and the pointer arrays of each segment. Knows no model.
// Slots of OrtApi are those of onnxruntime_c_api.h up to version 8, which upstream freezes with static asserts.
// Deliberate difference from the public binding: outputs are written where the caller says and are never copied.

import { createRequire } from 'node:module';
import * as path from 'node:path';
import koffi from 'koffi';
import { ClusterError } from '@mimo/core/errors';
import type {
  Runtime,
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

const apiVersion = 8;
const logLevelError = 3;
const ortArenaAllocator = 1;
const ortMemTypeDefault = 0;

function elementType(data: TensorData): number {
  return data instanceof Float32Array ? 1 : data instanceof Int32Array ? 6 : 7;
}

function libraryPath(): string {
  const root = path.dirname(createRequire(import.meta.url).resolve('onnxruntime-node/package.json'));
  const file = process.platform === 'darwin' ? 'libonnxruntime.1.30.0.dylib' : 'libonnxruntime.so.1';
  return path.join(root, 'bin', 'napi-v6', process.platform, process.arch, file);
}

/** The function table. Loaded once per thread and never dropped: koffi unloads a library whose handle is collected. */
function loadApi() {
  const library = koffi.load(libraryPath());
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
    createTensor: status(49, ['void *', 'void *', 'size_t', 'void *', 'size_t', 'int', '_Out_ void **']),
    createCpuMemoryInfo: status(69, ['int', 'int', '_Out_ void **']),
    releaseEnv: slot(92, 'void', ['void *']),
    releaseStatus: slot(93, 'void', ['void *']),
    releaseMemoryInfo: slot(94, 'void', ['void *']),
    releaseSession: slot(95, 'void', ['void *']),
    releaseValue: slot(96, 'void', ['void *']),
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
  };
}

let loadedApi: ReturnType<typeof loadApi> | undefined;

class CapiTensor implements RuntimeTensor {
  // Nothing on the native side roots JavaScript memory: this reference keeps it alive.
  readonly data: TensorData;
  pointer: bigint;
  readonly #release: (tensor: CapiTensor) => void;

  constructor(data: TensorData, pointer: bigint, release: (tensor: CapiTensor) => void) {
    this.data = data;
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
    this.inputNames = BigUint64Array.from(inputs, (bytes) => koffi.address(bytes));
    this.outputNames = BigUint64Array.from(outputs, (bytes) => koffi.address(bytes));
    this.inputPointers = new BigUint64Array(inputs.length);
    this.outputPointers = new BigUint64Array(outputs.length);
  }
}

class OrtCapiRuntime implements Runtime {
  readonly implementation = 'ort-capi';
  readonly #api: ReturnType<typeof loadApi>;
  readonly #env: bigint;
  readonly #memory: bigint;
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
    this.#api = loadedApi ??= loadApi();
    const api = this.#api;
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

  tensor(data: TensorData, dims: readonly number[]): RuntimeTensor {
    const shape = BigInt64Array.from(dims, BigInt);
    const pointer = this.#create((out) =>
      this.#api.createTensor(this.#memory, data, data.byteLength, shape, dims.length, elementType(data), out),
    );
    const tensor = new CapiTensor(data, pointer, this.#releaseTensor);
    this.#tensors.add(tensor);
    return tensor;
  }

  run(segment: Segment, inputs: readonly RuntimeTensor[], outputs: readonly RuntimeTensor[]): void {
    const target = segment as CapiSegment;
    fillPointers(target.inputPointers, inputs);
    fillPointers(target.outputPointers, outputs);
    const status = this.#api.run(
      target.session,
      null,
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
    for (const tensor of this.#tensors) {
      tensor.release();
    }
    for (const segment of this.#segments) {
      this.#api.releaseSession(segment.session);
    }
    this.#api.releaseSessionOptions(this.#sessionOptions);
    this.#api.releaseMemoryInfo(this.#memory);
    this.#api.releaseEnv(this.#env);
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
