// The thread that computes: entry point of a worker_thread that runs one rank, leader or follower. Owns the loop and
// the order of messages; all work is synchronous, and the event loop turns only while there is nothing to do. Started
// and stopped by engine-host.ts; communicates with it through `parentPort`.

import { parentPort, receiveMessageOnPort, workerData, type MessagePort } from 'node:worker_threads';
import { ClusterError } from '@mimo/core/process/errors';
import { createSingleRankCollective, type Collective } from '../../collective/collective.ts';
import { createInProcessCollective, type InProcessGroup } from '../../collective/in-process.ts';
import { createNetworkCollective, type NetworkOptions } from '../../collective/network.ts';
import { pageTokens, type ShardManifest } from '../../shards/shard.ts';
import { createRuntime } from '../../runtime/create-runtime.ts';
import type { MemoryInfo } from '../../runtime/memory.ts';
import type { Runtime, RuntimeOptions } from '../../runtime/runtime.ts';
import { Engine, type EngineLimits } from './engine.ts';
import type { EngineFrame, SequenceRequest } from './engine-api.ts';
import { slackPages } from './attention.ts';
import { kvBlockBytes } from './engine-options.ts';
import type { HeadRow } from './head-rows.ts';
import { kvBlockTokens } from './kv-cache.ts';
import { assertWeightsFit, fitKvBlocks, gatherMemories } from './memory-budget.ts';
import { createGroupId } from './reduce.ts';
import { ShardRunner } from './shard-runner.ts';
import { decodeStepPlan, encodeStepPlan, type PassPlan } from './step-plan.ts';
import { beginTurn, endTurn } from './step-watch.ts';

/** How this rank reaches the others. */
export type CollectiveSource =
  | { readonly kind: 'single' }
  | { readonly kind: 'in-process'; readonly group: InProcessGroup; readonly rank: number }
  | { readonly kind: 'network'; readonly options: NetworkOptions };

/** `workerData` of the thread. */
export interface StepThreadOptions {
  readonly directory: string;
  readonly manifest: ShardManifest;
  readonly runtime: RuntimeOptions;
  readonly collective: CollectiveSource;
  /** The leader's limits; followers receive theirs with `configure`. */
  readonly limits: EngineLimits;
  /** The limits' KV blocks are an upper bound; the thread determines how many fit. */
  readonly isKvAuto: boolean;
  /** The ranks ping one another at this interval, with or without work. */
  readonly pingMs: number;
  /** Shared: not zero once this rank has been asked to end. */
  readonly leaving: Int32Array;
  /** Shared: incremented by each step (step-watch.ts). */
  readonly turns: Int32Array;
}

/** From the main thread. */
export type StepThreadRequest =
  | { readonly kind: 'submit'; readonly request: SequenceRequest }
  | { readonly kind: 'abort'; readonly sequenceId: number }
  | { readonly kind: 'credit'; readonly sequenceId: number; readonly tokens: number }
  | { readonly kind: 'close' };

/** To the main thread. `leaving`: another rank has been asked to end. `ended`: the leader has shut down the group. */
export type StepThreadResponse =
  | {
      readonly kind: 'ready';
      readonly runtime: 'ort-capi' | 'ort-node';
      /** The leader's limits, with the KV cache that fits. */
      readonly limits?: EngineLimits;
    }
  | { readonly kind: 'frame'; readonly frame: EngineFrame }
  | { readonly kind: 'leaving' }
  | { readonly kind: 'ended' }
  | { readonly kind: 'failed'; readonly code: ClusterError['code']; readonly message: string };

function openCollective(source: CollectiveSource): Collective {
  if (source.kind === 'single') {
    return createSingleRankCollective();
  }
  return source.kind === 'network'
    ? createNetworkCollective(source.options)
    : createInProcessCollective(source.group, source.rank);
}

/** Runs one rank to its end and reports to the main thread how it ended. */
async function runRank(options: StepThreadOptions, port: MessagePort): Promise<void> {
  const respond = (response: StepThreadResponse): void => port.postMessage(response);
  let collective: Collective | undefined;
  let runtime: Runtime | undefined;
  try {
    // Connections first: a failure below closes them, so that the peers notice at once.
    collective = openCollective(options.collective);
    runtime = await createRuntime(options.runtime);
    const { directory, manifest, pingMs, leaving, turns } = options;
    const { implementation } = runtime;
    const weightBytes = Object.values(manifest.files).reduce((sum, bytes) => sum + bytes, 0);
    assertWeightsFit(weightBytes, runtime.memoryInfo());
    const runner = new ShardRunner({ runtime, directory, manifest, collective });
    const memories = gatherMemories(runtime.memoryInfo(), collective);
    if (collective.rank === 0) {
      const limits = fitLimits(options, { memories, runtime });
      const onReady = (): void => respond({ kind: 'ready', runtime: implementation, limits });
      await lead({ runtime, limits, pingMs, runner, collective, port, turns, onReady });
    } else {
      const onReady = (): void => respond({ kind: 'ready', runtime: implementation });
      follow({ runner, collective, leaving, turns, onReady });
      respond({ kind: 'ended' });
    }
    runner.close();
  } catch (error) {
    // Before leaving the group, so that the cause is reported before its consequences on other ranks.
    const { code, message } = ClusterError.from(error);
    respond({ kind: 'failed', code, message });
  } finally {
    collective?.close();
    runtime?.close();
    port.close();
  }
}

/** The limits with the KV cache that fits all ranks. Throws the errors of `fitKvBlocks`. */
function fitLimits(
  { limits, isKvAuto, manifest }: StepThreadOptions,
  {
    memories,
    runtime,
  }: { readonly memories: readonly (MemoryInfo | undefined)[]; readonly runtime: Runtime },
): EngineLimits {
  const blockBytes = kvBlockBytes(manifest);
  const kvBlocks = fitKvBlocks(
    {
      kind: isKvAuto ? 'auto' : 'given',
      blocks: limits.kvBlocks,
      blockBytes,
      slackBytes: (slackPages(headRowsOf(limits), runtime) * pageTokens * blockBytes) / kvBlockTokens,
    },
    memories,
  );
  const maxContextTokens = Math.min(limits.maxContextTokens, kvBlocks * kvBlockTokens);
  return { ...limits, kvBlocks, maxContextTokens };
}

/** Head rows of a step: every sequence's last, and its draft's. */
function headRowsOf(limits: EngineLimits): number {
  return 2 * limits.maxSequences;
}

interface Leading {
  readonly limits: EngineLimits;
  readonly pingMs: number;
  readonly runtime: Runtime;
  readonly runner: ShardRunner;
  readonly collective: Collective;
  readonly port: MessagePort;
  readonly turns: Int32Array;
  readonly onReady: () => void;
}

/** Returns when asked to close, after stopping the other ranks. */
async function lead({
  runtime,
  runner,
  collective,
  port,
  limits,
  pingMs,
  turns,
  onReady,
}: Leading): Promise<void> {
  const configure = {
    kind: 'configure',
    kvBlocks: limits.kvBlocks,
    maxRows: limits.maxBatchTokens,
    maxHeadRows: headRowsOf(limits),
    usableVocab: limits.usableVocab,
    deviceGroupId: createGroupId(runtime, collective),
  } as const;
  collective.broadcast(encodeStepPlan(configure));
  runner.configure(configure, kvBlockTokens);
  meet(collective);
  onReady();

  const executor = {
    run: (plan: PassPlan): readonly HeadRow[] => {
      collective.broadcast(encodeStepPlan(plan));
      return runner.run(plan);
    },
  };
  const engine = new Engine(executor, limits);
  const inbox = new Inbox(port);
  let metMs = performance.now();
  for (;;) {
    beginTurn(turns);
    for (let request = inbox.next(); request !== undefined; request = inbox.next()) {
      if (request.kind === 'close') {
        collective.broadcast(encodeStepPlan({ kind: 'stop' }));
        return;
      }
      apply(engine, request);
    }
    const startedMs = performance.now();
    const frame = engine.step();
    if (frame !== undefined) {
      const stepMs = performance.now() - startedMs;
      port.postMessage({ kind: 'frame', frame: { ...frame, stepMs } } satisfies StepThreadResponse);
    } else {
      endTurn(turns);
      await inbox.wait(Math.min(metMs + pingMs - performance.now(), engine.idleMs));
      beginTurn(turns);
    }
    if (performance.now() - metMs >= pingMs) {
      metMs = performance.now();
      collective.broadcast(encodeStepPlan({ kind: 'ping' }));
      if (meet(collective) > 0) {
        port.postMessage({ kind: 'leaving' } satisfies StepThreadResponse);
      }
    }
  }
}

/** Returns when the leader shuts down the group. */
function follow({
  runner,
  collective,
  leaving,
  turns,
  onReady,
}: Pick<Leading, 'runner' | 'collective' | 'turns' | 'onReady'> & Pick<StepThreadOptions, 'leaving'>): void {
  for (;;) {
    endTurn(turns);
    const plan = decodeStepPlan(collective.receive());
    beginTurn(turns);
    switch (plan.kind) {
      case 'configure':
        runner.configure(plan, kvBlockTokens);
        meet(collective);
        onReady();
        break;
      case 'forward':
      case 'draft':
        runner.run(plan);
        break;
      case 'ping':
        meet(collective, Atomics.load(leaving, 0));
        break;
      case 'stop':
        return;
    }
  }
}

/** All ranks exchange a ping: each learns that the others are alive, and how many were asked to end. */
function meet(collective: Collective, leaving = 0): number {
  const values = Float32Array.of(leaving);
  collective.allReduce(values);
  return values[0] ?? 0;
}

function apply(engine: Engine, request: Exclude<StepThreadRequest, { kind: 'close' }>): void {
  switch (request.kind) {
    case 'submit':
      engine.submit(request.request);
      break;
    case 'abort':
      engine.abort(request.sequenceId);
      break;
    case 'credit':
      engine.addCredit(request.sequenceId, request.tokens);
      break;
  }
}

/** The port's messages, in order: read without the event loop while there is work, awaited otherwise. */
class Inbox {
  readonly #port: MessagePort;
  readonly #arrived: StepThreadRequest[] = [];
  #wake: (() => void) | undefined;

  constructor(port: MessagePort) {
    this.#port = port;
    port.on('message', (request: StepThreadRequest) => {
      this.#arrived.push(request);
      this.#wake?.();
    });
  }

  next(): StepThreadRequest | undefined {
    return (
      this.#arrived.shift() ?? (receiveMessageOnPort(this.#port)?.message as StepThreadRequest | undefined)
    );
  }

  /** Waits for a message, but no longer than `timeoutMs`. */
  async wait(timeoutMs: number): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    const timer = setTimeout(resolve, timeoutMs);
    this.#wake = resolve;
    await promise;
    clearTimeout(timer);
    this.#wake = undefined;
  }
}

if (parentPort !== null) {
  void runRank(workerData as StepThreadOptions, parentPort);
}
