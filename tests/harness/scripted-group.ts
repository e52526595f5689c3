// A replica group without a model, for tests of the gateway: the real WorkerService and session protocol over an
// engine that follows a script. By default a completion repeats its prompt. A test can make it stall, refuse and
// vanish, at moments that it could not choose with a real engine.

import { randomUUID } from 'node:crypto';

import { ClusterError } from '@mimo/core/process/errors';
import { startGrpcServer, type GrpcServer } from '@mimo/core/grpc/server';
import type { Bus } from '@mimo/core/bus/bus';
import { GroupState, Heartbeat } from '@mimo/proto/worker';
import type {
  EngineStats,
  SequenceDelta,
  SequenceEnd,
  SequenceRequest,
} from '@mimo/worker/engines/mimo/engine-api';
import { Sessions } from '@mimo/worker/sessions';
import { createWorkerService } from '@mimo/worker/worker-service';

export interface ScriptedGroupOptions {
  readonly model: string;
  readonly group: string;
  /** Heartbeats go here; undefined sends none. */
  readonly queue: Bus | undefined;
  readonly stepMs?: number;
  readonly maxSequences?: number;
  readonly maxContextTokens?: number;
  /** What it says that it computes with; default: nothing. */
  readonly identity?: string;
  /** What a prompt is answered with; the end of the script is an end-of-text. */
  readonly script?: (request: SequenceRequest) => Iterable<number>;
}

/** A running group. Close it. */
export interface ScriptedGroup {
  readonly address: string;
  readonly incarnation: string;
  /** Sequences that hold memory. */
  readonly sequences: number;
  /** How many sequences were ever begun, and how many were aborted. */
  readonly begun: number;
  readonly aborted: number;
  /** Tokens that were produced. */
  readonly tokens: number;
  /** Every prompt that came, in order. */
  readonly prompts: readonly (readonly number[])[];
  /** No step is made until `resume`. */
  stall(): void;
  /** As `stall`, and what is aborted is not let go of either: an engine that stands still in the middle of a step. */
  hang(): void;
  resume(): void;
  /** Refuses new sequences from now on, without saying so in heartbeats. */
  refuse(error: ClusterError): void;
  /** Changes the state in its heartbeats. */
  become(state: GroupState): void;
  /** Heartbeats stop; nothing else does. */
  fallSilent(): void;
  /** The sockets are closed without a word, as after kill -9; heartbeats stop. */
  vanish(): Promise<void>;
  close(): Promise<void>;
}

interface Live {
  readonly request: SequenceRequest;
  readonly tokens: Iterator<number>;
  index: number;
  creditTokens: number;
}

/** A script that never ends by itself. */
export function* endless(): Generator<number> {
  for (let id = 0; ; id = (id + 1) % 20) {
    yield 65 + id;
  }
}

/** `<|im_end|>` of models/mimo-demo. */
const endOfText = 606;

/** The script from where an earlier attempt left it; one that delivered something else has gone astray. */
function resume(
  request: SequenceRequest,
  script: NonNullable<ScriptedGroupOptions['script']>,
): Iterator<number> {
  const promptTokens = request.tokenIds.length - request.resumedTokens;
  const tokens = script({ ...request, tokenIds: request.tokenIds.slice(0, promptTokens) })[Symbol.iterator]();
  for (const tokenId of request.tokenIds.slice(promptTokens)) {
    const said = tokens.next();
    if (said.done === true || said.value !== tokenId) {
      throw new ClusterError('data_loss', `resumed with token ${tokenId} where ${said.value} was said`);
    }
  }
  return tokens;
}

export async function startScriptedGroup(options: ScriptedGroupOptions): Promise<ScriptedGroup> {
  const { model, group, queue } = options;
  const incarnation = randomUUID();
  const { identity = '' } = options;
  const live = new Map<number, Live>();
  const prompts: number[][] = [];
  let begun = 0;
  let aborted = 0;
  let tokens = 0;
  let step = 0;
  let stalled = false;
  let hung = false;
  const aborts: number[] = [];
  let state: GroupState = GroupState.READY;
  let sequenceNumber = 0;
  const script = options.script ?? (({ tokenIds }) => tokenIds);

  const end = (sequence: Live, ended: SequenceEnd): NonNullable<SequenceDelta['finish']> => ({
    ...ended,
    completionTokens: sequence.index,
    draftedTokens: sequence.index,
    acceptedTokens: Math.floor(sequence.index / 2),
  });
  const emit = (deltas: readonly SequenceDelta[]): void => {
    step += 1;
    if (deltas.length > 0) {
      sessions.sequences.onFrame({ step, deltas, stats: statsOf() });
    }
  };
  const statsOf = (): EngineStats => ({
    steps: step,
    promptTokens: 0,
    completionTokens: tokens,
    draftedTokens: 0,
    acceptedTokens: 0,
    parkedSequences: 0,
    runningSequences: live.size,
    waitingSequences: 0,
    blockedSequences: 0,
    parkableSequences: 0,
    kvBlocks: 0,
    kvBlocksUsed: 0,
  });
  const abort = (sequenceId: number): void => {
    const sequence = live.get(sequenceId);
    if (sequence !== undefined) {
      aborted += 1;
      live.delete(sequenceId);
      setImmediate(() =>
        emit([
          { sequenceId, index: sequence.index, tokenIds: [], finish: end(sequence, { kind: 'aborted' }) },
        ]),
      );
    }
  };
  const sessions = new Sessions(
    {
      submit: (request) => {
        begun += 1;
        prompts.push([...request.tokenIds]);
        live.set(request.sequenceId, {
          request,
          tokens: resume(request, script),
          index: request.resumedTokens,
          creditTokens: request.creditTokens,
        });
      },
      abort: (sequenceId) => {
        if (hung) {
          aborts.push(sequenceId);
        } else {
          abort(sequenceId);
        }
      },
      addCredit: (sequenceId, credit) => {
        const sequence = live.get(sequenceId);
        if (sequence !== undefined) {
          sequence.creditTokens += credit;
        }
      },
    },
    { model, group, maxContextTokens: options.maxContextTokens ?? 4_096, draftTokens: 1, identity },
  );
  const advance = (sequence: Live): SequenceDelta | undefined => {
    const { sequenceId, sampling } = sequence.request;
    if (sequence.creditTokens <= 0) {
      return undefined;
    }
    const { index } = sequence;
    const next = sequence.tokens.next();
    if (next.done === true) {
      live.delete(sequenceId);
      return {
        sequenceId,
        index,
        tokenIds: [],
        finish: end(sequence, { kind: 'stop', stopTokenId: endOfText }),
      };
    }
    sequence.index += 1;
    sequence.creditTokens -= 1;
    tokens += 1;
    const top = Array.from({ length: Math.max(0, sampling.logprobs) }, (_, rank) => ({
      tokenId: rank,
      logprob: -1 - rank,
    }));
    const said = {
      sequenceId,
      index,
      tokenIds: [next.value],
      ...(sampling.logprobs < 0 ? {} : { logprobs: [{ tokenId: next.value, logprob: -0.5, top }] }),
    };
    if (sequence.index < sampling.maxTokens) {
      return said;
    }
    live.delete(sequenceId);
    return { ...said, finish: end(sequence, { kind: 'length' }) };
  };
  const stepping = setInterval(() => {
    if (!stalled) {
      emit([...live.values()].map(advance).filter((delta) => delta !== undefined));
    }
  }, options.stepMs ?? 1);

  const server: GrpcServer = await startGrpcServer({
    listenAddress: '127.0.0.1:0',
    maxReceiveBytes: 16 * 2 ** 20,
    services: [
      createWorkerService({
        sessions,
        drain: () => Promise.resolve(0),
        stats: () => ({
          heartbeat: heartbeat(),
          sessions: sessions.count,
          steps: step,
          promptTokens: 0,
          completionTokens: tokens,
          draftedTokens: 0,
          acceptedTokens: 0,
        }),
      }),
    ],
  });
  const heartbeat = (): Heartbeat => {
    sequenceNumber += 1;
    return Heartbeat.fromPartial({
      model,
      group,
      incarnation,
      address: server.address,
      state,
      sequenceNumber,
      worldSize: 1,
      maxSequences: options.maxSequences ?? 8,
      runningSequences: live.size,
      maxContextTokens: options.maxContextTokens ?? 4_096,
      draftTokens: 1,
      identity,
      running: sessions.sequences.running(),
    });
  };
  const beating = setInterval(() => queue?.heartbeats.publish(heartbeat()), 100);
  queue?.heartbeats.publish(heartbeat());

  const stop = async (): Promise<void> => {
    clearInterval(stepping);
    clearInterval(beating);
    await server.close(AbortSignal.abort());
  };
  return {
    address: server.address,
    incarnation,
    get sequences() {
      return live.size;
    },
    get begun() {
      return begun;
    },
    get aborted() {
      return aborted;
    },
    get tokens() {
      return tokens;
    },
    prompts,
    stall: () => {
      stalled = true;
    },
    hang: () => {
      stalled = true;
      hung = true;
    },
    resume: () => {
      stalled = false;
      hung = false;
      aborts.splice(0).forEach(abort);
    },
    refuse: (error) => sessions.sequences.refuse(error),
    become: (next) => {
      state = next;
      queue?.heartbeats.publish(heartbeat());
    },
    fallSilent: () => clearInterval(beating),
    vanish: stop,
    close: async () => {
      sessions.fail(new ClusterError('unavailable', `group ${group} has ended`));
      await stop();
    },
  };
}
