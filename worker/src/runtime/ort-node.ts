// ONNX Runtime through onnxruntime-node's own binding. Owns the sessions and the feeds of each run. Knows no model.
// The binding's `run` is synchronous; the package's public `InferenceSession.run` only wraps it in a promise and a turn
// of the event loop, so the binding is called directly. It copies every output once more: the cost of a run grows with
// the size of its outputs, which for attention is the KV capacity.

import { createRequire } from 'node:module';
import { Tensor, type InferenceSession } from 'onnxruntime-node';
import { ClusterError } from '@mimo/core/process/errors';
import type { ElementType } from '../shards/element-type.ts';
import { HostMemory, hostMemoryInfo } from './host-memory.ts';
import type { Segment, SegmentSource } from './kernel.ts';
import type { MemoryInfo, RuntimeMemory, RuntimeTensor, TensorData } from './memory.ts';
import type { Runtime, RuntimeOptions } from './runtime.ts';

/** The part of `onnxruntime-node/dist/binding.js` that is used (version 1.30.0). */
interface Binding {
  readonly initOrt: () => void;
  readonly binding: { readonly InferenceSession: new () => BindingSession };
}

interface BindingSession {
  loadModel(modelPath: string, options: InferenceSession.SessionOptions): void;
  run(
    feeds: Record<string, Tensor>,
    fetches: Record<string, Tensor>,
    options: InferenceSession.RunOptions,
  ): unknown;
  dispose(): void;
}

class NodeTensor implements RuntimeTensor {
  readonly data: TensorData;
  readonly value: Tensor;

  constructor(data: TensorData, dims: readonly number[]) {
    this.data = data;
    this.value =
      data instanceof Float32Array
        ? new Tensor('float32', data, dims)
        : data instanceof Int32Array
          ? new Tensor('int32', data, dims)
          : new Tensor('int64', data, dims);
  }

  release(): void {
    this.value.dispose();
  }
}

class NodeSegment implements Segment {
  readonly name: string;
  readonly session: BindingSession;
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];

  constructor(source: SegmentSource, session: BindingSession) {
    this.name = source.name;
    this.session = session;
    this.inputs = source.inputs;
    this.outputs = source.outputs;
  }
}

class OrtNodeRuntime implements Runtime {
  readonly implementation = 'ort-node';
  // The binding takes Float16Array for float16 and finds its elements 0 bytes wide.
  readonly floatTypes = ['float'] as const;
  readonly kernels = { pagedAttention: false, topK: false };
  readonly #binding: Binding;
  readonly #options: InferenceSession.SessionOptions;
  readonly #segments: NodeSegment[] = [];

  constructor(options: RuntimeOptions) {
    this.#binding = createRequire(import.meta.url)('onnxruntime-node/dist/binding.js') as Binding;
    this.#binding.initOrt();
    this.#options = {
      executionProviders: ['cpu'],
      intraOpNumThreads: options.intraOpThreads,
      interOpNumThreads: 1,
      logSeverityLevel: 3,
      // Each session has its own pool: a hundred pools that spin between runs cost ten times the computation.
      extra: { session: { intra_op: { allow_spinning: '0' } } },
    };
  }

  loadSegment(source: SegmentSource): Segment {
    const session = new this.#binding.binding.InferenceSession();
    try {
      session.loadModel(source.path, this.#options);
    } catch (error) {
      throw new ClusterError('data_loss', `segment ${source.name}: ${ClusterError.from(error).message}`, {
        cause: error,
      });
    }
    const segment = new NodeSegment(source, session);
    this.#segments.push(segment);
    return segment;
  }

  tensor(data: TensorData, dims: readonly number[]): RuntimeTensor {
    return new NodeTensor(data, dims);
  }

  allocate(type: ElementType, length: number): RuntimeMemory {
    return new HostMemory(type, length, (data, dims) => new NodeTensor(data, dims));
  }

  memoryInfo(): MemoryInfo | undefined {
    return hostMemoryInfo();
  }

  replay(_key: string, work: () => void): void {
    work();
  }

  run(segment: Segment, inputs: readonly RuntimeTensor[], outputs: readonly RuntimeTensor[]): void {
    const target = segment as NodeSegment;
    target.session.run(byName(target.inputs, inputs), byName(target.outputs, outputs), {});
  }

  close(): void {
    for (const segment of this.#segments.splice(0)) {
      segment.session.dispose();
    }
  }
}

function byName(names: readonly string[], tensors: readonly RuntimeTensor[]): Record<string, Tensor> {
  if (tensors.length !== names.length) {
    throw new ClusterError(
      'internal',
      `segment takes ${names.length} tensors here, was given ${tensors.length}`,
    );
  }
  const record: Record<string, Tensor> = {};
  for (const [i, name] of names.entries()) {
    record[name] = (tensors[i] as NodeTensor).value;
  }
  return record;
}

/** Throws if the package's native part cannot be loaded. See `createRuntime`. */
export function createOrtNodeRuntime(options: RuntimeOptions): Runtime {
  return new OrtNodeRuntime(options);
}
