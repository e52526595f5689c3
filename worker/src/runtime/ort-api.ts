// The function table of ONNX Runtime's C API, by koffi. Owns the slots, the conversion of a status into an error, and
// the native strings; knows no session and no provider.
// Slots of OrtApi are those of onnxruntime_c_api.h up to version 12, which upstream freezes with static asserts.

import { createRequire } from 'node:module';
import * as path from 'node:path';
import koffi from 'koffi';
import { ClusterError } from '@mimo/core/process/errors';
import type { ElementType } from '../shards/element-type.ts';

/** A native address; 0n or null means none. */
export type Pointer = bigint | null;

/** Calls one slot of the OrtApi table. */
type ApiFunction = (...args: readonly unknown[]) => Pointer;

const apiVersion = 12;

/** OrtLoggingLevel, OrtAllocatorType, OrtMemType. */
export const ort = { logLevelError: 3, deviceAllocator: 0, arenaAllocator: 1, memTypeDefault: 0 } as const;

/** ONNXTensorElementDataType. */
export const tensorElementTypes: Readonly<Record<ElementType, number>> = {
  float: 1,
  int32: 6,
  int64: 7,
  float16: 10,
  bfloat16: 16,
};

/** The library that onnxruntime-node bundles. */
export function bundledLibrary(): string {
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
    allocatorAlloc: status(75, ['void *', 'size_t', '_Out_ void **']),
    allocatorFree: status(76, ['void *', 'void *']),
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
    createAllocator: status(131, ['void *', 'void *', '_Out_ void **']),
    releaseAllocator: slot(132, 'void', ['void *']),
    createAndRegisterAllocator: status(144, ['void *', 'void *', 'void *']),
    setGlobalIntraOpThreads: status(147, ['void *', 'int']),
    setGlobalInterOpThreads: status(148, ['void *', 'int']),
    setGlobalSpinControl: status(149, ['void *', 'int']),
    createArenaConfig: status(156, ['size_t', 'int', 'int', 'int', '_Out_ void **']),
    releaseArenaConfig: slot(157, 'void', ['void *']),
    addRunConfigEntry: status(165, ['void *', 'str', 'str']),
    appendCuda: status(204, ['void *', 'void *']),
    createCudaOptions: status(205, ['_Out_ void **']),
    updateCudaOptions: status(206, ['void *', 'void *', 'void *', 'size_t']),
    releaseCudaOptions: slot(208, 'void', ['void *']),
    registerProviderAllocator: status(259, [
      'void *',
      'str',
      'void *',
      'void *',
      'void *',
      'void *',
      'size_t',
    ]),
    appendProvider: status(216, ['void *', 'str', 'void *', 'void *', 'size_t']),
  };
}

type Functions = ReturnType<typeof loadApi>;

const loadedApis = new Map<string, Functions>();

/** The API of one library. */
export class OrtApi {
  readonly functions: Functions;

  /** Throws if koffi cannot load the file. */
  constructor(file: string) {
    const functions = loadedApis.get(file) ?? loadApi(file);
    loadedApis.set(file, functions);
    this.functions = functions;
  }

  /** A function's output value; throws as `check`. */
  create(make: (out: [Pointer]) => Pointer): bigint {
    const out: [Pointer] = [null];
    this.check(make(out));
    if (out[0] === null) {
      throw new ClusterError('internal', 'onnxruntime created nothing and reported no error');
    }
    return out[0];
  }

  /** As `check`; the environment is one per process, and another rank's thread may have registered it. */
  registerOnce(register: () => Pointer): void {
    try {
      this.check(register());
    } catch (error) {
      if (!/already been registered|already registered/.test(ClusterError.from(error).message)) {
        throw error;
      }
    }
  }

  /** Throws `internal` with ONNX Runtime's message. */
  check(status: Pointer): void {
    if (status) {
      const message = String(this.functions.errorMessage(status));
      this.functions.releaseStatus(status);
      throw new ClusterError('internal', `onnxruntime: ${message}`);
    }
  }
}

/** Native keys and values, alive as long as the object is. */
export class NativeOptions {
  readonly keys: BigUint64Array;
  readonly values: BigUint64Array;
  readonly count: number;
  /** Addresses keep no memory alive. */
  readonly texts: readonly Buffer[];

  constructor(options: Readonly<Record<string, string>>) {
    const keys = Object.keys(options).map(nativeText);
    const values = Object.values(options).map(nativeText);
    this.keys = addresses(keys);
    this.values = addresses(values);
    this.count = keys.length;
    this.texts = [...keys, ...values];
  }
}

/** A C string. */
export function nativeText(text: string): Buffer {
  return Buffer.from(`${text}\0`);
}

/** `texts` must outlive the use of the addresses. */
export function addresses(texts: readonly Buffer[]): BigUint64Array {
  return BigUint64Array.from(texts, (text) => koffi.address(text));
}
