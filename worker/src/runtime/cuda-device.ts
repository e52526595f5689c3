// A CUDA device through libcudart, by koffi: one stream, memory, copies in the order of the stream. Owns device memory;
// knows no session. One device a process: the first that the driver shows (CUDA_VISIBLE_DEVICES chooses).

import koffi, { type LibraryHandle } from 'koffi';
import { ClusterError } from '@mimo/core/process/errors';
import { decodeHalves, elementBytes, type ElementType, encodeHalves } from '../shards/element-type.ts';
import type { MemoryInfo, RuntimeMemory, RuntimeTensor } from './memory.ts';

/** Of CUDA 13, which the provider of onnxruntime-gpu 1.30.0 links to. */
const libraryName = 'libcudart.so.13';
const copyKinds = { hostToDevice: 1, deviceToHost: 2 } as const;

const notReady = 600;

/** cudaDevAttrComputeCapabilityMajor and Minor. */
const capabilityAttributes = [75, 76] as const;
/** cudaDevAttrMultiProcessorCount */
const processorsAttribute = 16;

type Out = [bigint | null];

/** Loaded once per thread and never dropped: koffi unloads a library whose handle is collected. */
function loadCuda() {
  let library: LibraryHandle;
  try {
    library = koffi.load(libraryName);
  } catch (error) {
    throw new ClusterError(
      'failed_precondition',
      `executionProvider cuda: needs ${libraryName} and the CUDA driver on the library path: ${ClusterError.from(error).message}`,
      { cause: error },
    );
  }
  return {
    library,
    errorString: library.func('cudaGetErrorString', 'str', ['int']),
    memGetInfo: library.func('cudaMemGetInfo', 'int', ['_Out_ size_t *', '_Out_ size_t *']),
    streamCreate: library.func('cudaStreamCreateWithFlags', 'int', ['_Out_ void **', 'uint']),
    streamDestroy: library.func('cudaStreamDestroy', 'int', ['void *']),
    streamSynchronize: library.func('cudaStreamSynchronize', 'int', ['void *']),
    malloc: library.func('cudaMalloc', 'int', ['_Out_ void **', 'size_t']),
    free: library.func('cudaFree', 'int', ['void *']),
    mallocHost: library.func('cudaMallocHost', 'int', ['_Out_ void **', 'size_t']),
    freeHost: library.func('cudaFreeHost', 'int', ['void *']),
    memset: library.func('cudaMemsetAsync', 'int', ['void *', 'int', 'size_t', 'void *']),
    getLastError: library.func('cudaGetLastError', 'int', []),
    streamQuery: library.func('cudaStreamQuery', 'int', ['void *']),
    streamBeginCapture: library.func('cudaStreamBeginCapture', 'int', ['void *', 'int']),
    streamEndCapture: library.func('cudaStreamEndCapture', 'int', ['void *', '_Out_ void **']),
    graphInstantiate: library.func('cudaGraphInstantiate', 'int', ['_Out_ void **', 'void *', 'uint64_t']),
    graphLaunch: library.func('cudaGraphLaunch', 'int', ['void *', 'void *']),
    graphDestroy: library.func('cudaGraphDestroy', 'int', ['void *']),
    graphExecDestroy: library.func('cudaGraphExecDestroy', 'int', ['void *']),
    deviceAttribute: library.func('cudaDeviceGetAttribute', 'int', ['_Out_ int *', 'int', 'int']),
    copy: library.func('cudaMemcpyAsync', 'int', ['void *', 'void *', 'size_t', 'int', 'void *']),
  };
}

let loadedCuda: ReturnType<typeof loadCuda> | undefined;

/** Makes a native view of device memory from an address. */
export type CreateDeviceView = (address: bigint, dims: readonly number[], type: ElementType) => RuntimeTensor;

/** The device of this process, with its one stream. The runtime closes it. */
export class CudaDevice {
  readonly api = (loadedCuda ??= loadCuda());
  readonly stream: bigint;
  /** Called during waits for other ranks, which could last forever. */
  watch: ((waitedMs: number) => void) | undefined;

  /** Throws `failed_precondition` without libcudart or a device. */
  constructor() {
    const out: Out = [null];
    const status = this.api.streamCreate(out, 0);
    if (status !== 0 || out[0] === null) {
      throw new ClusterError(
        'failed_precondition',
        `executionProvider cuda: no device: ${this.api.errorString(status)}`,
      );
    }
    this.stream = out[0];
  }

  /** Throws `resource_exhausted` naming the free memory. */
  allocate(bytes: number): bigint {
    const out: Out = [null];
    const status = this.api.malloc(out, bytes);
    if (status !== 0 || out[0] === null) {
      throw new ClusterError(
        'resource_exhausted',
        `device memory: needs ${bytes} bytes, ${this.memoryInfo().freeBytes} are free: ${this.api.errorString(status)}`,
      );
    }
    return out[0];
  }

  memoryInfo(): MemoryInfo {
    const free: [number | bigint] = [0];
    const total: [number | bigint] = [0];
    this.check(this.api.memGetInfo(free, total));
    return { freeBytes: Number(free[0]), totalBytes: Number(total[0]) };
  }

  /** Waits for the stream. Throws the errors of `watch`. */
  synchronize(): void {
    if (this.watch === undefined) {
      this.check(this.api.streamSynchronize(this.stream));
      return;
    }
    const startedMs = performance.now();
    let status: number = this.api.streamQuery(this.stream);
    while (status === notReady) {
      this.watch(performance.now() - startedMs);
      status = this.api.streamQuery(this.stream);
    }
    this.check(status);
  }

  /** The compute capability, and its name for the compiler. */
  capability(): { readonly major: number; readonly architecture: string } {
    const [major = 0, minor = 0] = capabilityAttributes.map((attribute) => this.#attribute(attribute));
    return { major, architecture: `sm_${major}${minor}` };
  }

  /** Its multiprocessors. */
  processors(): number {
    return this.#attribute(processorsAttribute);
  }

  /** As `allocate`, filled with zeros. */
  allocateZero(bytes: number): bigint {
    const address = this.allocate(bytes);
    this.check(this.api.memset(address, 0, bytes, this.stream));
    return address;
  }

  /**
   * Copies in the stream, from the first byte of both. Pinned memory must not change until the stream has reached the
   * copy.
   */
  upload(there: bigint, here: PinnedMemory, bytes: number): void {
    this.check(this.api.copy(there, here.address, bytes, copyKinds.hostToDevice, this.stream));
  }

  download(here: PinnedMemory, there: bigint, bytes: number): void {
    this.check(this.api.copy(here.address, there, bytes, copyKinds.deviceToHost, this.stream));
  }

  /** Waits for the stream. */
  readInt(address: bigint): number {
    const value = new Int32Array(1);
    this.check(this.api.copy(value, address, value.byteLength, copyKinds.deviceToHost, this.stream));
    this.synchronize();
    return value[0]!;
  }

  free(address: bigint): void {
    this.check(this.api.free(address));
  }

  check(status: number): void {
    if (status !== 0) {
      throw new ClusterError('internal', `cuda: ${this.api.errorString(status)}`);
    }
  }

  close(): void {
    this.api.streamSynchronize(this.stream);
    this.api.streamDestroy(this.stream);
  }

  #attribute(attribute: number): number {
    const value: [number] = [0];
    this.check(this.api.deviceAttribute(value, attribute, 0));
    return value[0];
  }
}

/** Page-locked memory of the host, which devices copy from and to directly. */
export class PinnedMemory {
  readonly address: bigint;
  readonly buffer: ArrayBuffer;
  readonly #device: CudaDevice;

  constructor(device: CudaDevice, bytes: number) {
    const out: Out = [null];
    device.check(device.api.mallocHost(out, bytes));
    this.#device = device;
    this.address = out[0]!;
    this.buffer = koffi.view(out[0]!, bytes);
  }

  release(): void {
    this.#device.check(this.#device.api.freeHost(this.address));
  }
}

/** Memory of the device; reads pass through a page-locked copy, made at the first of them. */
export class DeviceMemory implements RuntimeMemory {
  readonly type: ElementType;
  readonly #device: CudaDevice;
  readonly address: bigint;
  readonly #bytes: number;
  readonly #createView: CreateDeviceView;
  #mirror: PinnedMemory | undefined;
  #released = false;

  constructor(
    device: CudaDevice,
    shape: { type: ElementType; length: number },
    createView: CreateDeviceView,
  ) {
    this.type = shape.type;
    this.#device = device;
    this.#bytes = Math.max(1, shape.length) * elementBytes[shape.type];
    this.address = device.allocateZero(this.#bytes);
    this.#createView = createView;
  }

  tensor(start: number, dims: readonly number[]): RuntimeTensor {
    return this.#createView(this.#at(start), dims, this.type);
  }

  write(start: number, values: Float32Array | Int32Array | BigInt64Array): void {
    const encoded =
      this.type === 'float16' || this.type === 'bfloat16'
        ? encodeHalves(values as Float32Array, this.type)
        : values;
    // From pageable memory the call returns once the bytes are staged, so `encoded` may be dropped.
    this.#copy(this.#at(start), encoded, encoded.byteLength, copyKinds.hostToDevice);
  }

  read(start: number, count: number): Float32Array {
    const { address, buffer } = (this.#mirror ??= new PinnedMemory(this.#device, this.#bytes));
    const offset = start * elementBytes[this.type];
    const bytes = count * elementBytes[this.type];
    this.#copy(address + BigInt(offset), this.#at(start), bytes, copyKinds.deviceToHost);
    this.#device.synchronize();
    return this.type === 'float16' || this.type === 'bfloat16'
      ? decodeHalves(new Uint16Array(buffer, offset, count), this.type)
      : new Float32Array(buffer, offset, count);
  }

  release(): void {
    if (!this.#released) {
      this.#released = true;
      this.#device.free(this.address);
      this.#mirror?.release();
    }
  }

  #at(element: number): bigint {
    return this.address + BigInt(element * elementBytes[this.type]);
  }

  #copy(to: bigint, from: bigint | ArrayBufferView, bytes: number, kind: number): void {
    this.#device.check(this.#device.api.copy(to, from, bytes, kind, this.#device.stream));
  }
}
