// The layers of a model on a CUDA device, without attention: products and the operations between them (layers.cu,
// cuBLAS). Owns the layers' weights on the device and the scratch memory of a layer.

import { closeSync, openSync, readFileSync, readSync } from 'node:fs';
import { ClusterError } from '@mimo/core/process/errors';
import { CudaBlas } from './cuda-blas.ts';
import { type CudaDevice, type DeviceMemory, PinnedMemory } from './cuda-device.ts';
import { compileKernels, CudaKernels } from './cuda-kernels.ts';
import { elementBytes } from '../shards/element-type.ts';
import type { DeviceLayers, LayerRows, LayersShape, LayerWeights, WeightPlace } from './kernel.ts';
import type { RuntimeMemory } from './memory.ts';

/**
 * Warps of a block, of which each multiprocessor has one, and stages of a warp's ring. Measured on an H200 (2026-11): a
 * layer without its attention takes 90 us for one row; 94 with 8 warps, 99 with 4.
 */
const warps = 16;
const stages = 5;
/** Also in layers.cu. */
const stageBytes = 2048;
const tileRows = 16;
const sharedBytes = warps * stages * stageBytes + elementBytes.float * (2 * warps * 8 * (tileRows + 1) + 8);

/** The most rows for our own products; above, cuBLAS is faster. */
const mostFewRows = 8;
/** Of a block of the plain kernels. */
const plainThreads = 256;

/** The first compute capability that can start a kernel before the previous one has ended. */
const firstMajor = 9;
/** Columns that a warp processes at once. */
const grain = 64;
const bytes = elementBytes.bfloat16;
/** Read at once from a file of weights. */
const chunkBytes = 64 * 2 ** 20;

interface Weights {
  readonly inputNorm: bigint;
  readonly qkv: bigint;
  readonly qkvBias: bigint;
  readonly output: bigint;
  readonly postNorm: bigint;
  /** Gate, then up. */
  readonly expand: bigint;
  readonly down: bigint;
}

/** Throws `failed_precondition` for unsupported shapes or devices, and without NVRTC or cuBLAS. */
export function createCudaLayers(
  device: CudaDevice,
  shape: LayersShape,
  cacheDirectory: string | undefined,
): DeviceLayers {
  const { major, architecture } = device.capability();
  const widths = [shape.hidden, shape.attended, shape.qkv, shape.feedForward];
  if (major < firstMajor || shape.floatType !== 'bfloat16' || widths.some((width) => width % grain !== 0)) {
    throw new ClusterError(
      'failed_precondition',
      `layers are bfloat16, of widths that ${grain} divides, on sm_${firstMajor}0 and later; ` +
        `these are ${shape.floatType} of ${widths.join(', ')} on ${architecture}`,
    );
  }
  const text = readFileSync(new URL('layers.cu', import.meta.url), 'utf8');
  const defines = {
    HIDDEN: shape.hidden,
    QKV: shape.qkv,
    ATTENDED: shape.attended,
    FF: shape.feedForward,
    EPSILON: shape.epsilon,
    WARPS: warps,
    STAGES: stages,
  };
  const code = compileKernels({ text, defines, architecture }, cacheDirectory);
  return new CudaLayers(device, shape, { code, blas: new CudaBlas(device) });
}

function addressOf(memory: RuntimeMemory): bigint {
  return (memory as DeviceMemory).address;
}

class CudaLayers implements DeviceLayers {
  readonly #device: CudaDevice;
  readonly #shape: LayersShape;
  readonly #kernels: CudaKernels;
  readonly #processors: number;
  readonly #blas: CudaBlas;
  readonly #allocated: bigint[] = [];
  readonly #layers: readonly Weights[];
  /** x with its norm, [rows, H]; of few rows with the norm's gain alone. */
  #normed = 0n;
  /** Few rows: sums of squares of x over 16 columns each, float [rows, H / 16]. */
  #squares = 0n;
  /** Many rows: gate and up, [rows, 2 F]. */
  #both = 0n;
  /** SiLU(gate) up, [rows, F] */
  #product = 0n;

  constructor(
    device: CudaDevice,
    shape: LayersShape,
    { code, blas }: { readonly code: Uint8Array; readonly blas: CudaBlas },
  ) {
    this.#device = device;
    this.#shape = shape;
    this.#blas = blas;
    this.#kernels = new CudaKernels(device, code);
    this.#processors = device.processors();
    const staging = new PinnedMemory(device, chunkBytes);
    try {
      this.#layers = shape.layers.map((weights) => this.#load(weights, staging));
    } finally {
      staging.release();
    }
  }

  reserve(maxRows: number): void {
    const { hidden, feedForward } = this.#shape;
    this.#normed = this.#allocate(maxRows * hidden * bytes);
    this.#squares = this.#allocate((mostFewRows * hidden * elementBytes.float) / 16);
    this.#both = this.#allocate(2 * maxRows * feedForward * bytes);
    this.#product = this.#allocate(maxRows * feedForward * bytes);
  }

  attend(
    layer: number,
    { residual, qkv }: Pick<LayerRows, 'residual' | 'qkv'>,
    { rows, isFirst }: { rows: number; isFirst: boolean },
  ): void {
    const { inputNorm, qkv: weight, qkvBias } = this.#layers[layer]!;
    const { hidden, qkv: outputs } = this.#shape;
    const [x, y] = [addressOf(residual), addressOf(qkv)];
    if (rows > mostFewRows) {
      this.#plain('normalize', rows, [x, inputNorm, this.#normed, qkvBias, y]);
      this.#blas.multiply({ x: this.#normed, weight, y, rows, columns: hidden, outputs, adds: true });
      return;
    }
    if (isFirst) {
      this.#plain('begin', rows, [x, inputNorm, this.#normed, this.#squares]);
    }
    this.#few('attend', outputs / tileRows, [weight, qkvBias, this.#normed, this.#squares, BigInt(rows), y]);
  }

  finish(
    layer: number,
    { residual, attended }: Pick<LayerRows, 'residual' | 'attended'>,
    rows: number,
  ): void {
    const { output, postNorm, expand, down } = this.#layers[layer]!;
    const { hidden, attended: width, feedForward } = this.#shape;
    const [sum, x] = [addressOf(residual), addressOf(attended)];
    const [normed, both, product] = [this.#normed, this.#both, this.#product];
    if (rows > mostFewRows) {
      this.#blas.multiply({ x, weight: output, y: sum, rows, columns: width, outputs: hidden, adds: true });
      this.#plain('normalize', rows, [sum, postNorm, normed, 0n, 0n]);
      const outputs = 2 * feedForward;
      this.#blas.multiply({
        x: normed,
        weight: expand,
        y: both,
        rows,
        columns: hidden,
        outputs,
        adds: false,
      });
      const blocks = Math.ceil((rows * feedForward) / 8 / plainThreads);
      this.#plain('activate', blocks, [both, product, BigInt(rows)]);
      this.#blas.multiply({
        x: product,
        weight: down,
        y: sum,
        rows,
        columns: feedForward,
        outputs: hidden,
        adds: true,
      });
      return;
    }
    // After the last layer, nothing reads the product with the next layer's gain.
    const { inputNorm: nextNorm } = this.#layers[Math.min(layer + 1, this.#layers.length - 1)]!;
    const count = BigInt(rows);
    this.#few('addAttended', hidden / tileRows, [output, x, sum, postNorm, count, normed, this.#squares]);
    this.#few('expand', (2 * feedForward) / tileRows, [expand, normed, this.#squares, count, product]);
    this.#few('addProduct', hidden / tileRows, [down, product, sum, nextNorm, count, normed, this.#squares]);
  }

  release(): void {
    this.#kernels.close();
    this.#blas.close();
    this.#allocated.forEach((address) => this.#device.free(address));
  }

  #plain(name: string, blocks: number, args: readonly bigint[]): void {
    this.#kernels.launch(name, { blocks, threads: plainThreads, sharedBytes: 0, overlaps: true }, args);
  }

  /** By the tiles of its matrix; a block's last warp reads the norms' factors. */
  #few(name: string, tiles: number, args: readonly bigint[]): void {
    const blocks = Math.min(tiles, this.#processors);
    this.#kernels.launch(name, { blocks, threads: 32 * (warps + 1), sharedBytes, overlaps: true }, args);
  }

  #allocate(size: number): bigint {
    const address = this.#device.allocate(size);
    this.#allocated.push(address);
    return address;
  }

  #load(weights: LayerWeights, staging: PinnedMemory): Weights {
    const load = (...places: readonly WeightPlace[]): bigint => {
      const address = this.#allocate(places.reduce((sum, place) => sum + place.bytes, 0));
      let at = address;
      for (const place of places) {
        upload(this.#device, { ...place, to: at, staging });
        at += BigInt(place.bytes);
      }
      return address;
    };
    return {
      inputNorm: load(weights.inputNorm),
      qkv: load(weights.qkv),
      qkvBias: load(weights.qkvBias),
      output: load(weights.output),
      postNorm: load(weights.postNorm),
      expand: load(weights.gate, weights.up),
      down: load(weights.down),
    };
  }
}

/** Copies from a file to the device. Throws `data_loss` if the file is too short. */
function upload(
  device: CudaDevice,
  {
    path,
    offset,
    bytes: size,
    to,
    staging,
  }: WeightPlace & { readonly to: bigint; readonly staging: PinnedMemory },
): void {
  const file = openSync(path, 'r');
  try {
    for (let done = 0; done < size;) {
      const count = readSync(
        file,
        new Uint8Array(staging.buffer),
        0,
        Math.min(chunkBytes, size - done),
        offset + done,
      );
      if (count === 0) {
        throw new ClusterError(
          'data_loss',
          `${path}: ends at ${offset + done}, must have ${offset + size} bytes`,
        );
      }
      device.upload(to + BigInt(done), staging, count);
      device.synchronize();
      done += count;
    }
  } finally {
    closeSync(file);
  }
}
