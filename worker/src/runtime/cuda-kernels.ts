// CUDA C++ compiled at run time: NVRTC and the driver, by koffi. Owns the cache of compiled code, and the launches;
// knows no kernel.

import { createHash, randomUUID } from 'node:crypto';
import { mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import * as path from 'node:path';
import koffi, { type LibraryHandle } from 'koffi';
import { ClusterError } from '@mimo/core/process/errors';
import type { CudaDevice } from './cuda-device.ts';
import { addresses, nativeText } from './ort-api.ts';

/** Of CUDA 13, as libcudart. */
const compilerName = 'libnvrtc.so.13';
const driverName = 'libcuda.so.1';

/** CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES */
const sharedBytesAttribute = 8;
/** CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, and the words of a CUlaunchAttribute. */
const overlapsAttribute = 6;
const attributeWords = 18;
/** Of 8 bytes, of a CUlaunchConfig: dimensions, shared bytes, stream, attributes, and their number. */
const launchConfigWords = 7;

type Out = [bigint | null];
type Size = [number | bigint];

function bindCompiler(library: LibraryHandle) {
  return {
    library,
    errorString: library.func('nvrtcGetErrorString', 'str', ['int']),
    create: library.func('nvrtcCreateProgram', 'int', [
      '_Out_ void **',
      'str',
      'str',
      'int',
      'void *',
      'void *',
    ]),
    compile: library.func('nvrtcCompileProgram', 'int', ['void *', 'int', 'void *']),
    logSize: library.func('nvrtcGetProgramLogSize', 'int', ['void *', '_Out_ size_t *']),
    log: library.func('nvrtcGetProgramLog', 'int', ['void *', 'void *']),
    codeSize: library.func('nvrtcGetCUBINSize', 'int', ['void *', '_Out_ size_t *']),
    code: library.func('nvrtcGetCUBIN', 'int', ['void *', 'void *']),
    destroy: library.func('nvrtcDestroyProgram', 'int', ['_Inout_ void **']),
  };
}

function bindDriver(library: LibraryHandle) {
  return {
    library,
    errorName: library.func('cuGetErrorName', 'int', ['int', '_Out_ const char **']),
    moduleLoad: library.func('cuModuleLoadData', 'int', ['_Out_ void **', 'void *']),
    moduleUnload: library.func('cuModuleUnload', 'int', ['void *']),
    moduleFunction: library.func('cuModuleGetFunction', 'int', ['_Out_ void **', 'void *', 'str']),
    moduleGlobal: library.func('cuModuleGetGlobal_v2', 'int', [
      '_Out_ void **',
      '_Out_ size_t *',
      'void *',
      'str',
    ]),
    setAttribute: library.func('cuFuncSetAttribute', 'int', ['void *', 'int', 'int']),
    launch: library.func('cuLaunchKernelEx', 'int', ['void *', 'void *', 'void *', 'void *']),
  };
}

/** Loaded once per thread and never dropped: koffi unloads a library whose handle is collected. */
let loadedCompiler: ReturnType<typeof bindCompiler> | undefined;
let loadedDriver: ReturnType<typeof bindDriver> | undefined;

/** What to compile. */
export interface KernelSource {
  /** CUDA C++ without headers. */
  readonly text: string;
  readonly defines: Readonly<Record<string, number>>;
  /** As `sm_90`. */
  readonly architecture: string;
}

/**
 * The device code of a source: from the cache directory, or compiled and then stored there, if a directory is given.
 * Throws `failed_precondition` without NVRTC, and `internal` with its log if the source does not compile.
 */
export function compileKernels(source: KernelSource, cacheDirectory?: string): Uint8Array {
  const options = [
    `--gpu-architecture=${source.architecture}`,
    '--std=c++17',
    '-default-device',
    ...Object.entries(source.defines).map(([name, value]) => `-D${name}=${value}`),
  ];
  if (cacheDirectory === undefined) {
    return compile(source.text, options);
  }
  const key = createHash('sha256')
    .update(JSON.stringify([source.text, options]))
    .digest('hex');
  const file = path.join(cacheDirectory, `${key}.cubin`);
  try {
    return readFileSync(file);
  } catch {
    const code = compile(source.text, options);
    keep(file, code);
    return code;
  }
}

/** Renames into place atomically, since other ranks may read. A read-only cache costs the next start some seconds. */
function keep(file: string, code: Uint8Array): void {
  try {
    mkdirSync(path.dirname(file), { recursive: true });
    const partial = `${file}.${randomUUID()}`;
    writeFileSync(partial, code);
    renameSync(partial, file);
  } catch (error) {
    process.emitWarning(`cuda: cannot cache compiled kernels: ${ClusterError.from(error).message}`);
  }
}

function compile(text: string, options: readonly string[]): Uint8Array {
  const compiler = loadCompiler();
  const check = (status: number): void => {
    if (status !== 0) {
      throw new ClusterError('internal', `nvrtc: ${compiler.errorString(status)}`);
    }
  };
  const made: Out = [null];
  check(compiler.create(made, text, 'kernels.cu', 0, null, null));
  const program = made[0];
  try {
    const texts = options.map(nativeText);
    const status: number = compiler.compile(program, texts.length, addresses(texts));
    if (status !== 0) {
      const size: Size = [0];
      check(compiler.logSize(program, size));
      const log = Buffer.alloc(Number(size[0]));
      check(compiler.log(program, log));
      throw new ClusterError('internal', `nvrtc: ${compiler.errorString(status)}: ${log.toString()}`);
    }
    const size: Size = [0];
    check(compiler.codeSize(program, size));
    const code = new Uint8Array(Number(size[0]));
    check(compiler.code(program, code));
    return code;
  } finally {
    compiler.destroy([program]);
  }
}

function loadCompiler(): ReturnType<typeof bindCompiler> {
  try {
    loadedCompiler ??= bindCompiler(koffi.load(compilerName));
    return loadedCompiler;
  } catch (error) {
    throw new ClusterError(
      'failed_precondition',
      `kernels of our own need ${compilerName} on the library path: ${ClusterError.from(error).message}`,
      { cause: error },
    );
  }
}

/** How a kernel runs. */
export interface LaunchShape {
  readonly blocks: number;
  readonly threads: number;
  readonly sharedBytes: number;
  /** It may start before the previous kernel has ended, and waits for that kernel itself (griddepcontrol, sm_90). */
  readonly overlaps?: boolean;
}

/** Compiled code on the device. `close` unloads it; no kernel may be running. */
export class CudaKernels {
  readonly #driver = (loadedDriver ??= bindDriver(koffi.load(driverName)));
  readonly #device: CudaDevice;
  readonly #module: bigint;
  readonly #functions = new Map<string, bigint>();

  constructor(device: CudaDevice, code: Uint8Array) {
    this.#device = device;
    const out: Out = [null];
    this.#check(this.#driver.moduleLoad(out, code));
    this.#module = out[0]!;
  }

  /** An integer that the source defines for its host. */
  constant(name: string): number {
    const out: Out = [null];
    const size: Size = [0];
    this.#check(this.#driver.moduleGlobal(out, size, this.#module, name));
    return this.#device.readInt(out[0]!);
  }

  /**
   * Launches in the stream. Arguments are addresses and integers in 8 bytes each; a kernel reads the declared width.
   */
  launch(name: string, shape: LaunchShape, args: readonly bigint[]): void {
    const { blocks, threads, sharedBytes, overlaps = false } = shape;
    const values = BigUint64Array.from(args);
    const first = koffi.address(values);
    const places = BigUint64Array.from(args, (_, i) => first + BigInt(8 * i));
    const kernel = this.#function(name, sharedBytes);
    const attribute = new Int32Array(attributeWords);
    attribute.set([overlapsAttribute, 0, 1]);
    const config = new BigUint64Array(launchConfigWords);
    new Uint32Array(config.buffer).set([blocks, 1, 1, threads, 1, 1, sharedBytes]);
    config.set([this.#device.stream, koffi.address(attribute), overlaps ? 1n : 0n], 4);
    this.#check(this.#driver.launch(config, kernel, places, null));
    // Addresses keep no memory alive; the driver has read the arguments by now.
    values.fill(0n);
    attribute.fill(0);
  }

  #function(name: string, sharedBytes: number): bigint {
    const known = this.#functions.get(name);
    if (known !== undefined) {
      return known;
    }
    const out: Out = [null];
    this.#check(this.#driver.moduleFunction(out, this.#module, name));
    const kernel = out[0]!;
    this.#check(this.#driver.setAttribute(kernel, sharedBytesAttribute, sharedBytes));
    this.#functions.set(name, kernel);
    return kernel;
  }

  close(): void {
    this.#check(this.#driver.moduleUnload(this.#module));
  }

  #check(status: number): void {
    if (status !== 0) {
      const name: [string | null] = [null];
      this.#driver.errorName(status, name);
      throw new ClusterError('internal', `cuda: ${name[0] ?? status}`);
    }
  }
}
