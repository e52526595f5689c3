// Chooses tokens on a CUDA device from its logits (sampling.cu). Owns the layout of its requests and answers; the rule
// is the engine's (../engines/mimo/sampler.ts), id for id.

import { readFileSync } from 'node:fs';
import { ClusterError } from '@mimo/core/process/errors';
import { compileKernels, CudaKernels } from './cuda-kernels.ts';
import { type CudaDevice, DeviceMemory, PinnedMemory } from './cuda-device.ts';
import type { DrawRequest, SampledToken, SamplerShape, TokenSampler } from './kernel.ts';
import type { RuntimeMemory } from './memory.ts';

/** Also in sampling.cu. */
const threads = 512;
const blocksOfRow = 8;
const mostTop = 20;
const noId = 0xffff_ffff;
const batchBytes = 16;
const requestBytes = 80;
const answerBytes = 16;
const topBytes = 8;

/** The first compute capability with clusters of blocks. */
const firstMajor = 9;

/**
 * Throws `failed_precondition` on a device without clusters or a host without NVRTC. Compiles for some seconds; with a
 * cache directory, only the first time on a machine.
 */
export function createCudaSampler(
  device: CudaDevice,
  shape: SamplerShape,
  cacheDirectory: string | undefined,
): TokenSampler {
  const { major, architecture } = device.capability();
  if (major < firstMajor) {
    throw new ClusterError(
      'failed_precondition',
      `sampling on the device needs sm_${firstMajor}0 or later, is ${architecture}`,
    );
  }
  const text = readFileSync(new URL('sampling.cu', import.meta.url), 'utf8');
  const defines = { VOCABULARY: shape.rowLength, FIRST_ID: shape.firstId };
  return new CudaSampler(device, shape, compileKernels({ text, defines, architecture }, cacheDirectory));
}

/** Buffers of one set of rows. */
class CudaSampler implements TokenSampler {
  readonly #device: CudaDevice;
  readonly #shape: SamplerShape;
  readonly #kernels: CudaKernels;
  readonly #sharedBytes: number;
  /** Batch and requests, and answers with their tops: on the device, and page-locked on the host. */
  readonly #requests: { readonly there: bigint; readonly here: PinnedMemory };
  readonly #answers: { readonly there: bigint; readonly here: PinnedMemory };
  #words: { readonly there: bigint; readonly here: PinnedMemory; readonly length: number } | undefined;
  #asked: readonly (DrawRequest | undefined)[] = [];

  constructor(device: CudaDevice, shape: SamplerShape, code: Uint8Array) {
    this.#device = device;
    this.#shape = shape;
    this.#kernels = new CudaKernels(device, code);
    this.#sharedBytes = this.#kernels.constant('sharedBytes');
    const both = (bytes: number) => ({
      there: device.allocate(bytes),
      here: new PinnedMemory(device, bytes),
    });
    this.#requests = both(batchBytes + requestBytes * shape.maxRows);
    this.#answers = both((answerBytes + topBytes * mostTop) * shape.maxRows);
  }

  ask(requests: readonly (DrawRequest | undefined)[]): void {
    this.#asked = requests;
    const lists = requests.flatMap((request) =>
      request === undefined ? [] : [wordsOfSeen(request), request.forbidden],
    );
    const words = this.#place(lists);
    const { there, here } = this.#requests;
    const view = new DataView(here.buffer);
    const bytes = batchBytes + requestBytes * requests.length;
    view.setBigUint64(0, words, true);
    view.setUint32(8, this.#shape.usable, true);
    let at = 0;
    let list = 0;
    for (const [row, request] of requests.entries()) {
      const lengths = request === undefined ? [0, 0] : [lists[list++]!.length, lists[list++]!.length];
      writeRequest(view, batchBytes + requestBytes * row, { request, at, lengths });
      at += lengths[0]! + lengths[1]!;
    }
    this.#device.upload(there, here, bytes);
  }

  run(logits: RuntimeMemory): void {
    const { there } = this.#requests;
    const answers = this.#answers.there;
    this.#kernels.launch(
      'sample',
      { blocks: blocksOfRow * this.#asked.length, threads, sharedBytes: this.#sharedBytes },
      [
        (logits as DeviceMemory).address,
        there,
        there + BigInt(batchBytes),
        answers,
        answers + BigInt(answerBytes * this.#shape.maxRows),
      ],
    );
  }

  answers(): readonly SampledToken[] {
    const { maxRows } = this.#shape;
    const { there, here } = this.#answers;
    const rows = this.#asked.length;
    const wantsTops = this.#asked.some((request) => (request?.sampling.logprobs ?? -1) > 0);
    const topsAt = answerBytes * maxRows;
    this.#device.download(here, there, wantsTops ? topsAt + topBytes * mostTop * rows : answerBytes * rows);
    this.#device.synchronize();
    const words = new Uint32Array(here.buffer);
    const floats = new Float32Array(here.buffer);
    return this.#asked.map((request, row) => {
      const answer = (answerBytes / 4) * row;
      const tokenId = words[answer]!;
      const chosen = { tokenId, logit: floats[answer + 1]! };
      const { logprobs } = request?.sampling ?? { logprobs: -1 };
      if (logprobs < 0) {
        return chosen;
      }
      const first = topsAt / 4 + (topBytes / 4) * mostTop * row;
      const top = Array.from({ length: logprobs }, (_, place) => ({
        tokenId: words[first + 2 * place]!,
        logprob: floats[first + 2 * place + 1]!,
      })).filter((each) => each.tokenId !== noId);
      return { ...chosen, logprob: { tokenId, logprob: floats[answer + 2]!, top } };
    });
  }

  release(): void {
    for (const part of [this.#requests, this.#answers, this.#words]) {
      if (part !== undefined) {
        this.#device.free(part.there);
        part.here.release();
      }
    }
    this.#kernels.close();
  }

  /** Uploads the lists, one after another; returns their positions. */
  #place(lists: readonly ArrayLike<number>[]): bigint {
    const length = lists.reduce((sum, list) => sum + list.length, 0);
    if (length === 0) {
      return 0n;
    }
    if (this.#words === undefined || this.#words.length < length) {
      const grown = 2 * length;
      if (this.#words !== undefined) {
        this.#device.free(this.#words.there);
        this.#words.here.release();
      }
      this.#words = {
        there: this.#device.allocate(4 * grown),
        here: new PinnedMemory(this.#device, 4 * grown),
        length: grown,
      };
    }
    const { there, here } = this.#words;
    const words = new Uint32Array(here.buffer);
    let at = 0;
    for (const list of lists) {
      words.set(list, at);
      at += list.length;
    }
    this.#device.upload(there, here, 4 * length);
    return there;
  }
}

/** Pairs of an id and its count. */
function wordsOfSeen({ seen, sampling }: DrawRequest): ArrayLike<number> {
  const { repetitionPenalty, presencePenalty, frequencyPenalty } = sampling;
  if (repetitionPenalty === 1 && presencePenalty === 0 && frequencyPenalty === 0) {
    return [];
  }
  return seen.pairs ?? [...seen].flat();
}

/** One Request of sampling.cu; without a request, the largest logit. */
function writeRequest(
  view: DataView,
  offset: number,
  { request, at, lengths }: { request: DrawRequest | undefined; at: number; lengths: readonly number[] },
): void {
  const sampling = request?.sampling ?? greedy;
  const doubles = [
    sampling.temperature,
    sampling.minP > 0 ? Math.log(sampling.minP) : -Infinity,
    sampling.topP,
    sampling.repetitionPenalty,
    sampling.presencePenalty,
    sampling.frequencyPenalty,
  ];
  const [seen = 0, forbidden = 0] = lengths;
  const words = [
    sampling.topK,
    sampling.seed,
    request?.position ?? 0,
    sampling.logprobs,
    at,
    seen / 2,
    at + seen,
    forbidden,
  ];
  doubles.forEach((value, i) => view.setFloat64(offset + 8 * i, value, true));
  // Unsigned and signed words are written alike; a seed may be either.
  words.forEach((value, i) => view.setInt32(offset + 8 * doubles.length + 4 * i, value, true));
}

const greedy: DrawRequest['sampling'] = {
  temperature: 0,
  topP: 1,
  topK: 0,
  minP: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  seed: 0,
  logprobs: -1,
};
