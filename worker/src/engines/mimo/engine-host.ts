// Runs the engine of this process. Owns the step threads of its local ranks, the messages to and from the leader's
// thread, and the handling of a lost thread. The main thread never runs a model. Knows no arithmetic, no queue, no gRPC
// and no Kubernetes.

import { Worker } from 'node:worker_threads';
import { ClusterError } from '@mimo/core/process/errors';
import { exitAtOnce } from '../../collective/libc.ts';
import {
  idleStats,
  type EngineFrame,
  type EngineHost,
  type EngineInfo,
  type EngineStats,
  type SequenceRequest,
} from './engine-api.ts';
import type { EngineLimits } from './engine.ts';
import { completeOptions, type CompleteOptions, type EngineOptions } from './engine-options.ts';
import { kvBlockTokens } from './kv-cache.ts';
import { openGroup, type LocalRanks } from './local-ranks.ts';
import type { StepThreadOptions, StepThreadRequest, StepThreadResponse } from './step-thread.ts';
import { createTurns, looksPerLimit, StepWatch } from './step-watch.ts';

export type * from './engine-api.ts';
export type { EngineOptions, GroupOptions } from './engine-options.ts';

/** Time for a closing step thread to finish its step; a blocked thread is stopped afterwards. */
const closeGraceMs = 1000;

/**
 * Loads the shards, joins the group and starts the step loop; resolves when the group is ready. Errors:
 * `invalid_argument` (options), `failed_precondition` (mismatched shards, runtime missing), `deadline_exceeded`
 * (missing peers), `canceled` (signal). The caller closes the host.
 */
export async function startEngine(options: EngineOptions, signal?: AbortSignal): Promise<EngineHost> {
  const complete = await completeOptions(options);
  const ranks = await openGroup(options, complete, signal ?? new AbortController().signal);
  const engine = new RunningEngine(complete, ranks);
  try {
    await engine.ready(signal);
    return engine;
  } catch (error) {
    await engine.close();
    throw ClusterError.from(error);
  }
}

class RunningEngine implements EngineHost {
  readonly failed: Promise<ClusterError>;
  readonly leaving: Promise<void>;
  readonly #resolveFailed: (error: ClusterError) => void;
  readonly #resolveLeaving: () => void;
  readonly #complete: CompleteOptions;
  /** With the KV cache that fits, once the leader has determined it. */
  #limits: EngineLimits;
  readonly #ranks: LocalRanks;
  readonly #threads: readonly Worker[];
  readonly #exits: readonly Promise<void>[];
  readonly #watches: StepWatch[] = [];
  readonly #looking: NodeJS.Timeout;
  #isStalled = false;
  /** Resolves when a step hangs: `close` cannot wait for its thread. */
  readonly #hung = Promise.withResolvers<void>();
  readonly #listeners = new Set<(frame: EngineFrame) => void>();
  readonly #ready = Promise.withResolvers<void>();
  #readyThreads = 0;
  #runtime: EngineInfo['runtime'] = 'ort-capi';
  #stats: EngineStats;
  #state: 'open' | 'closing' | 'failed' = 'open';

  constructor(complete: CompleteOptions, ranks: LocalRanks) {
    const { promise, resolve } = Promise.withResolvers<ClusterError>();
    this.failed = promise;
    this.#resolveFailed = resolve;
    const leaving = Promise.withResolvers<void>();
    this.leaving = leaving.promise;
    this.#resolveLeaving = leaving.resolve;
    this.#complete = complete;
    this.#limits = complete.limits;
    this.#ranks = ranks;
    this.#stats = idleStats(complete.limits.kvBlocks);
    this.#threads = complete.manifests.map((_, i) => this.#startThread(i));
    this.#exits = this.#threads.map((thread) => new Promise((done) => thread.once('exit', () => done())));
    this.#ready.promise.catch(() => undefined);
    this.#looking = setInterval(() => this.#look(), complete.stepTimeoutMs / looksPerLimit).unref();
  }

  get info(): EngineInfo {
    const { manifests } = this.#complete;
    const limits = this.#limits;
    const manifest = manifests[0]!;
    return {
      rank: manifest.rank,
      worldSize: manifest.tensorParallel,
      runtime: this.#runtime,
      shardKey: manifest.key,
      precision: manifest.profile.weights,
      config: manifest.config,
      maxContextTokens: limits.maxContextTokens,
      draftTokens: limits.draftTokens,
      maxSequences: limits.maxSequences,
      kvBlocks: limits.kvBlocks,
      kvBlockTokens,
      sizes: this.#complete.sizes,
    };
  }

  /** Resolves when all local ranks have met the whole group; rejects with the first failure or the signal's reason. */
  async ready(signal: AbortSignal | undefined): Promise<void> {
    const { promise, reject } = Promise.withResolvers<never>();
    const onAbort = (): void => reject(signal?.reason);
    signal?.addEventListener('abort', onAbort, { once: true });
    try {
      signal?.throwIfAborted();
      await Promise.race([this.#ready.promise, promise]);
    } finally {
      signal?.removeEventListener('abort', onAbort);
    }
  }

  get isStalled(): boolean {
    return this.#isStalled;
  }

  leave(): void {
    Atomics.store(this.#ranks.leaving, 0, 1);
  }

  submit(request: SequenceRequest): void {
    if (this.info.rank !== 0) {
      throw new ClusterError('failed_precondition', `rank ${this.info.rank} follows: submit to rank 0`);
    }
    if (this.#state !== 'open') {
      throw new ClusterError('unavailable', `the engine is ${this.#state}`);
    }
    this.#send({ kind: 'submit', request });
  }

  abort(sequenceId: number): void {
    this.#send({ kind: 'abort', sequenceId });
  }

  addCredit(sequenceId: number, tokens: number): void {
    this.#send({ kind: 'credit', sequenceId, tokens });
  }

  onFrame(listener: (frame: EngineFrame) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  stats(): EngineStats {
    return this.#stats;
  }

  async close(): Promise<void> {
    if (this.#state === 'open') {
      this.#end('closing');
    }
    if (this.info.rank === 0) {
      this.#send({ kind: 'close' });
    } else {
      this.#ranks.stop();
    }
    const timer = setTimeout(() => this.#ranks.stop(), closeGraceMs);
    await Promise.race([Promise.all(this.#exits), this.#hung.promise]);
    clearTimeout(timer);
    clearInterval(this.#looking);
  }

  /** Checks every step thread; ends the group when one hangs. */
  #look(): void {
    const health = this.#watches.map((watch) => watch.look());
    this.#isStalled = health.some((each) => each !== 'turning');
    const index = health.indexOf('hung');
    if (index >= 0) {
      clearInterval(this.#looking);
      const { manifests, stepTimeoutMs } = this.#complete;
      const text = `rank ${manifests[index]!.rank} has been in one step for ${stepTimeoutMs / 1000} s`;
      // Node's exit would wait for the thread.
      process.once('exit', exitAtOnce);
      this.#fail(new ClusterError('deadline_exceeded', text));
      this.#hung.resolve();
    }
  }

  #startThread(index: number): Worker {
    const { manifests, directories, runtime, threads, limits, isKvAuto } = this.#complete;
    const turns = createTurns();
    this.#watches.push(new StepWatch(turns));
    const workerData: StepThreadOptions = {
      directory: directories[index]!,
      manifest: manifests[index]!,
      // The ranks of one process share one pool: each rank's own thread computes too.
      runtime: { ...runtime, intraOpThreads: 1 + manifests.length * (threads - 1) },
      collective: this.#ranks.sources[index]!,
      limits,
      isKvAuto,
      pingMs: this.#ranks.pingMs,
      leaving: this.#ranks.leaving,
      turns,
    };
    const thread = new Worker(new URL(import.meta.resolve('@mimo/worker/engines/mimo/step-thread')), {
      workerData,
      name: `rank-${manifests[index]!.rank}`,
    });
    thread.on('message', (response: StepThreadResponse) => this.#receive(response));
    thread.on('error', (error) => this.#fail(ClusterError.from(error)));
    thread.on('exit', () => this.#fail(new ClusterError('unavailable', 'a step thread ended')));
    return thread;
  }

  #receive(response: StepThreadResponse): void {
    switch (response.kind) {
      case 'ready':
        this.#runtime = response.runtime;
        if (response.limits !== undefined) {
          this.#limits = response.limits;
          this.#stats = idleStats(response.limits.kvBlocks);
        }
        this.#readyThreads += 1;
        if (this.#readyThreads === this.#threads.length) {
          this.#ready.resolve();
        }
        break;
      case 'frame':
        this.#deliver(response.frame);
        break;
      case 'leaving':
        this.#resolveLeaving();
        break;
      case 'ended':
        this.#fail(new ClusterError('canceled', 'the leader has dissolved the group'));
        break;
      case 'failed':
        // This rank was stopped by `close`, or by another rank's failure, which is reported separately.
        if (response.code !== 'canceled') {
          this.#fail(new ClusterError(response.code, response.message));
        }
        break;
    }
  }

  #deliver(frame: EngineFrame): void {
    if (this.#state === 'open') {
      this.#stats = frame.stats;
      this.#listeners.forEach((listener) => listener(frame));
    }
  }

  /** The first failure counts; later ones are its consequences, as are those after `close`. */
  #fail(error: ClusterError): void {
    if (this.#state === 'open') {
      this.#end('failed');
      this.#ranks.stop();
      this.#ready.reject(error);
      this.#resolveFailed(error);
    }
  }

  /** From now on the engine accepts no requests and reports no frames. */
  #end(state: 'closing' | 'failed'): void {
    this.#state = state;
    this.#stats = {
      ...this.#stats,
      runningSequences: 0,
      waitingSequences: 0,
      blockedSequences: 0,
      parkableSequences: 0,
      kvBlocksUsed: 0,
    };
  }

  #send(request: StepThreadRequest): void {
    this.#threads[0]?.postMessage(request);
  }
}
