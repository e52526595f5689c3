// Products of many rows on a CUDA device, by cuBLAS through koffi. Owns its handle and its work space.

import koffi, { type LibraryHandle } from 'koffi';
import { ClusterError } from '@mimo/core/process/errors';
import type { CudaDevice } from './cuda-device.ts';

/** Of CUDA 13, which the provider of onnxruntime-gpu 1.30.0 also links to. */
const libraryName = 'libcublas.so.13';
/** NVIDIA's recommended size for Hopper; CUDA graphs can be recorded only with a preallocated work space. */
const workspaceBytes = 32 * 2 ** 20;
const operations = { none: 0, transposed: 1 } as const;
/** CUDA_R_16BF, CUBLAS_COMPUTE_32F and CUBLAS_GEMM_DEFAULT */
const [bfloat16, computeFloat, anyAlgorithm] = [14, 68, -1];

type Out = [bigint | null];

/**
 * Handle, operations, sizes and alpha; a, b and c with their types and widths, beta before c; compute type, algorithm.
 */
const gemmTypes = [
  ['void *', 'int', 'int', 'int', 'int', 'int', 'void *'],
  ['void *', 'int', 'int', 'void *', 'int', 'int', 'void *', 'void *', 'int', 'int', 'int', 'int'],
].flat();

function bind(library: LibraryHandle) {
  const [pointer, int] = ['void *', 'int'];
  return {
    library,
    statusName: library.func('cublasGetStatusName', 'str', [int]),
    create: library.func('cublasCreate_v2', int, ['_Out_ void **']),
    destroy: library.func('cublasDestroy_v2', int, [pointer]),
    setStream: library.func('cublasSetStream_v2', int, [pointer, pointer]),
    setWorkspace: library.func('cublasSetWorkspace_v2', int, [pointer, pointer, 'size_t']),
    gemm: library.func('cublasGemmEx', int, gemmTypes),
  };
}

/** Loaded once per thread and never dropped: koffi unloads a library whose handle is collected. */
let loadedBlas: ReturnType<typeof bind> | undefined;

function load(): ReturnType<typeof bind> {
  try {
    return (loadedBlas ??= bind(koffi.load(libraryName)));
  } catch (error) {
    throw new ClusterError(
      'failed_precondition',
      `layers of our own need ${libraryName} on the library path: ${ClusterError.from(error).message}`,
      { cause: error },
    );
  }
}

/** Addresses of bfloat16: x [rows, columns], weight [outputs, columns] and y [rows, outputs]. */
export interface Product {
  readonly x: bigint;
  readonly weight: bigint;
  readonly y: bigint;
  readonly rows: number;
  readonly columns: number;
  readonly outputs: number;
  /** Adds to the content of y instead of replacing it. */
  readonly adds: boolean;
}

/** cuBLAS in the device's stream. Throws `failed_precondition` without the library. */
export class CudaBlas {
  readonly #device: CudaDevice;
  readonly #blas = load();
  readonly #handle: bigint;
  readonly #workspace: bigint;
  readonly #one = Float32Array.of(1);
  readonly #zero = Float32Array.of(0);

  constructor(device: CudaDevice) {
    this.#device = device;
    const out: Out = [null];
    this.#check(this.#blas.create(out));
    this.#handle = out[0]!;
    this.#workspace = device.allocate(workspaceBytes);
    this.#check(this.#blas.setStream(this.#handle, device.stream));
    this.#check(this.#blas.setWorkspace(this.#handle, this.#workspace, workspaceBytes));
  }

  /** y = x weight^T. cuBLAS is column-major: it sees y as [outputs, rows] = weight x^T. */
  multiply({ x, weight, y, rows, columns, outputs, adds }: Product): void {
    this.#check(
      this.#blas.gemm(
        this.#handle,
        operations.transposed,
        operations.none,
        outputs,
        rows,
        columns,
        this.#one,
        weight,
        bfloat16,
        columns,
        x,
        bfloat16,
        columns,
        adds ? this.#one : this.#zero,
        y,
        bfloat16,
        outputs,
        computeFloat,
        anyAlgorithm,
      ),
    );
  }

  close(): void {
    this.#check(this.#blas.destroy(this.#handle));
    this.#device.free(this.#workspace);
  }

  #check(status: number): void {
    if (status !== 0) {
      throw new ClusterError('internal', `cublas: ${this.#blas.statusName(status)}`);
    }
  }
}
