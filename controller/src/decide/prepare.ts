// Whether the model of a ModelService is found and prepared, and what the prepare pod has to do with it. Pure. The pod runs
// before any group exists, at min 0 too: it finds or fetches the checkpoint, compiles it where the cache is shared, and
// publishes tokenizer and config to the catalogue, from which gateways learn that the model exists.
//
//   prepared   status.preparedModel is the hash of source, precision and tensorParallel: groups may be created
//   create     not prepared, or the catalogue has lost the model; and no pod of this hash is there
//   delete     pods of another hash; a pod that succeeded, once the status says so; a failed one when it is time to try again
//
// A model that cannot be found (exit code 3) is tried again after five minutes, anything else after 10 s, 20 s ... 5 min,
// and both at once after a change of the spec. A model that was prepared and cannot be found any more keeps its groups and
// gets no others.

import type { Condition } from '../resources/status.ts';
import { preparePodName } from './labels.ts';
import type { PodRef } from './groups.ts';

/** What is known of one prepare pod. */
export interface PreparePod {
  readonly name: string;
  readonly uid: string;
  readonly modelHash: string;
  readonly phase: 'Pending' | 'Running' | 'Succeeded' | 'Failed';
  readonly deleting: boolean;
  readonly exitCode: number | undefined;
  /** When the controller saw that it had failed. */
  readonly failedMs: number | undefined;
  /** Why it does not start: the scheduler's words, or those of an image that cannot be pulled. */
  readonly blocker: string | undefined;
  /** The last words of the container. */
  readonly failure: string | undefined;
}

/** Attempts that failed. Kept in the controller's memory; after a restart it begins with the pod that is there. */
export interface PrepareMemory {
  readonly modelHash: string;
  readonly failures: number;
  readonly lastMs: number;
  /** The model cannot be found, as the last attempt said. */
  readonly notFound: boolean;
  readonly message: string;
  /** Of the spec that was tried. */
  readonly generation: number;
  readonly countedUid: string;
  /** Since when the catalogue has been without a prepared model. */
  readonly unpublishedSinceMs: number | undefined;
}

export const noPreparation: PrepareMemory = {
  modelHash: '',
  failures: 0,
  lastMs: 0,
  notFound: false,
  message: '',
  generation: 0,
  countedUid: '',
  unpublishedSinceMs: undefined,
};

export interface PrepareInput {
  readonly service: string;
  readonly generation: number;
  readonly deleting: boolean;
  readonly modelHash: string;
  readonly pods: readonly PreparePod[];
  /** `status.preparedModel` as observed. */
  readonly preparedModel: string | undefined;
  /** Whether the catalogue has the model. */
  readonly published: boolean | 'unknown';
  /** Another ModelService that serves a model of this name, and is older. */
  readonly nameTakenBy: string | undefined;
  readonly memory: PrepareMemory;
  readonly nowMs: number;
}

export type PrepareAction =
  | { readonly kind: 'createPreparePod'; readonly name: string; readonly modelHash: string }
  | { readonly kind: 'deletePreparePod'; readonly pod: PodRef; readonly reason: string };

export interface Preparation {
  /** Groups may be created. */
  readonly found: boolean;
  readonly condition: Pick<Condition, 'status' | 'reason' | 'message'>;
  /** What keeps the model from being prepared, where something does. */
  readonly blocker: string | undefined;
  /** For the status. */
  readonly preparedModel: string | undefined;
  readonly podsLeft: number;
  readonly actions: readonly PrepareAction[];
  readonly memory: PrepareMemory;
}

/** How a prepare pod says that there is no such model: worker/src/prepare.ts. */
const notFoundExitCode = 3;
const notFoundRetryMs = 300_000;
const firstBackoffMs = 10_000;
const longestBackoffMs = 300_000;
/** The pod's end and the catalogue's news come by different ways. */
const unpublishedGraceMs = 15_000;

/** Plans the preparation of one service's model. The same input always gives the same plan. */
export function planPrepare(input: PrepareInput): Preparation {
  const { service, modelHash, pods, nameTakenBy, nowMs } = input;
  const current = pods.find((pod) => pod.modelHash === modelHash);
  const stale = pods.filter(
    (pod) => pod.modelHash !== modelHash || input.deleting || nameTakenBy !== undefined,
  );
  const memory = remember(input, current);

  const wasPrepared = input.preparedModel === modelHash;
  const prepared = wasPrepared || (current?.phase === 'Succeeded' && !current.deleting);
  const lost =
    memory.unpublishedSinceMs !== undefined && nowMs - memory.unpublishedSinceMs >= unpublishedGraceMs;

  const actions: PrepareAction[] = stale
    .filter(({ deleting }) => !deleting)
    .map((pod) => remove(pod, 'of no use any more'));
  if (!input.deleting && nameTakenBy === undefined) {
    const due = nowMs >= retryAtMs(memory, input.generation);
    if (current === undefined) {
      if ((!prepared || lost) && due) {
        actions.push({ kind: 'createPreparePod', name: preparePodName(service, modelHash), modelHash });
      }
    } else if (!current.deleting) {
      if (current.phase === 'Succeeded' && wasPrepared) {
        actions.push(remove(current, 'done'));
      } else if (current.phase === 'Failed' && due) {
        actions.push(remove(current, 'to be tried again'));
      }
    }
  }
  const judged = judge(input, { memory, prepared, current });
  return {
    found: judged.condition.status === 'True',
    ...judged,
    preparedModel: prepared ? modelHash : input.preparedModel,
    podsLeft: pods.length,
    actions,
    memory,
  };
}

function remove({ name, uid }: PreparePod, reason: string): PrepareAction {
  return { kind: 'deletePreparePod', pod: { name, uid }, reason };
}

/** Counts a failed pod once; forgets all where the model is another one, or the attempt succeeded. */
function remember(input: PrepareInput, current: PreparePod | undefined): PrepareMemory {
  const { modelHash, memory, nowMs } = input;
  const known = memory.modelHash === modelHash ? memory : { ...noPreparation, modelHash };
  const unpublished = input.preparedModel === modelHash && input.published === false;
  const unpublishedSinceMs = unpublished ? (known.unpublishedSinceMs ?? nowMs) : undefined;
  if (current?.phase === 'Succeeded') {
    return { ...noPreparation, modelHash, unpublishedSinceMs };
  }
  if (current?.phase !== 'Failed' || current.uid === known.countedUid) {
    return { ...known, unpublishedSinceMs };
  }
  return {
    modelHash,
    failures: known.failures + 1,
    lastMs: current.failedMs ?? nowMs,
    notFound: current.exitCode === notFoundExitCode,
    message: current.failure ?? 'the prepare pod failed without a word',
    generation: input.generation,
    countedUid: current.uid,
    unpublishedSinceMs,
  };
}

function retryAtMs({ failures, lastMs, notFound, generation }: PrepareMemory, current: number): number {
  if (failures === 0 || generation !== current) {
    return 0;
  }
  return (
    lastMs + (notFound ? notFoundRetryMs : Math.min(longestBackoffMs, firstBackoffMs * 2 ** (failures - 1)))
  );
}

interface Known {
  readonly memory: PrepareMemory;
  readonly prepared: boolean;
  readonly current: PreparePod | undefined;
}

function judge(
  { nameTakenBy, generation }: PrepareInput,
  { memory, prepared, current }: Known,
): Pick<Preparation, 'condition' | 'blocker'> {
  if (nameTakenBy !== undefined) {
    const message = `ModelService ${nameTakenBy} serves a model of this name already: requests are queued by name`;
    return { condition: { status: 'False', reason: 'NameTaken', message }, blocker: message };
  }
  const again = new Date(retryAtMs(memory, generation)).toISOString();
  if (memory.notFound) {
    const message = `${memory.message} (tried again ${again}, or when the spec changes)`;
    return { condition: { status: 'False', reason: 'NotFound', message }, blocker: memory.message };
  }
  if (prepared) {
    const message = 'the checkpoint was found and prepared';
    return { condition: { status: 'True', reason: 'Prepared', message }, blocker: undefined };
  }
  if (memory.failures > 0) {
    const message = `attempt ${memory.failures} failed, tried again ${again}: ${memory.message}`;
    return { condition: { status: 'Unknown', reason: 'PrepareFailed', message }, blocker: memory.message };
  }
  const blocker = current?.blocker;
  const message = blocker ?? 'the checkpoint is looked for and prepared';
  return { condition: { status: 'Unknown', reason: 'Preparing', message }, blocker };
}
