// Passes that a CUDA device repeats without launching their kernels one at a time: recorded as graphs under a key. Owns
// the graphs; knows no segment. Launching takes the host 150 us a layer, a graph 5 us a pass.

import { ClusterError } from '@mimo/core/process/errors';
import type { CudaDevice } from './cuda-device.ts';

/** Each some hundred kernels; the least recently used goes first. */
const maxGraphs = 64;
/** Other effects of `work`, such as growing an arena, happen immediately and are not part of a graph. */
const captureModeRelaxed = 2;

type Out = [bigint | null];

/** Graphs of one device's stream. `close` frees them. */
export class CudaReplays {
  readonly #device: CudaDevice;
  /** By key, oldest use first; undefined after the first, warming run of the work. */
  readonly #graphs = new Map<string, bigint | undefined>();
  #isRecording = true;

  constructor(device: CudaDevice) {
    this.#device = device;
  }

  /** Runs the work; from the third time on, replays the launches of the second time. */
  run(key: string, work: () => void): void {
    const isKnown = this.#graphs.has(key);
    let graph = this.#graphs.get(key);
    if (isKnown && graph === undefined && this.#isRecording) {
      graph = this.#record(work);
    }
    this.#graphs.delete(key);
    this.#graphs.set(key, graph);
    if (graph === undefined) {
      work();
    } else {
      this.#device.check(this.#device.api.graphLaunch(graph, this.#device.stream));
    }
    const [oldest] = this.#graphs.keys();
    if (this.#graphs.size > maxGraphs && oldest !== undefined) {
      this.#destroy(this.#graphs.get(oldest));
      this.#graphs.delete(oldest);
    }
  }

  close(): void {
    this.#graphs.forEach((graph) => this.#destroy(graph));
    this.#graphs.clear();
  }

  /** Undefined if the work cannot be recorded; recording is then not tried again. */
  #record(work: () => void): bigint | undefined {
    const { api, stream } = this.#device;
    const graph: Out = [null];
    const executable: Out = [null];
    try {
      this.#device.check(api.streamBeginCapture(stream, captureModeRelaxed));
      try {
        work();
      } finally {
        this.#device.check(api.streamEndCapture(stream, graph));
      }
      this.#device.check(api.graphInstantiate(executable, graph[0], 0));
      this.#device.check(api.graphDestroy(graph[0]));
      return executable[0] ?? undefined;
    } catch (error) {
      api.getLastError();
      this.#isRecording = false;
      process.emitWarning(`cuda: kernels are launched one at a time: ${ClusterError.from(error).message}`);
      return undefined;
    }
  }

  #destroy(graph: bigint | undefined): void {
    if (graph !== undefined) {
      this.#device.check(this.#device.api.graphExecDestroy(graph));
    }
  }
}
