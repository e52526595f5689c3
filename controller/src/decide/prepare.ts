// Whether the model of a ModelService is found and prepared, and what to do with its prepare pod. Pure. The pod runs
// before any group exists, at min 0 too: it finds or fetches the checkpoint, compiles it if the cache is shared, and
// publishes tokenizer and config to the catalogue, from which gateways learn that the model exists.
//
//   prepared   status.preparedModel equals the hash of source, precision and tensorParallel: groups may be created
//   create     not prepared, or the catalogue has lost the model; and no pod of this hash exists
//   delete     pods of another hash; a pod that succeeded, once the status says so; a failed one when it is time to try again
//
// A model that cannot be found (exit code 3) is retried after five minutes, other failures after 10 s, 20 s ... 5
// min, and both at once after a change of the spec. A prepared model that can no longer be found keeps its groups but
// gets no new ones.

import type { Condition } from '../resources/status.ts';
import { preparePodName } from './labels.ts';
import type { PodRef } from './groups.ts';

/** One prepare pod. */
export interface PreparePod {
  readonly name: string;
  readonly uid: string;
  readonly modelHash: string;
  readonly phase: 'Pending' | 'Running' | 'Succeeded' | 'Failed';
  readonly deleting: boolean;
  readonly exitCode: number | undefined;
  /** When the controller first saw its failure. */
  readonly failedMs: number | undefined;
  /** Why it does not start: the message of the scheduler or of a failed image pull. */
  readonly blocker: string | undefined;
  /** The last words of the container. */
  readonly failure: string | undefined;
}

/** Failed attempts. Kept in the controller's memory; after a restart counting begins with the existing pod. */
export interface PrepareMemory {
  readonly modelHash: string;
  readonly failures: number;
  readonly lastMs: number;
  /** The last attempt reported that the model cannot be found. */
  readonly notFound: boolean;
  readonly message: string;
  /** Hash of the spec of the attempts. */
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
  /** What prevents the preparation, if anything. */
  readonly blocker: string | undefined;
  /** For the status. */
  readonly preparedModel: string | undefined;
  readonly podsLeft: number;
  readonly actions: readonly PrepareAction[];
  readonly memory: PrepareMemory;
}

/** The exit code of a prepare pod for a model that does not exist: worker/src/prepare.ts. */
const notFoundExitCode = 3;
const notFoundRetryMs = 300_000;
const firstBackoffMs = 10_000;
const longestBackoffMs = 300_000;
/** The pod's end and the catalogue's change arrive by different channels. */
const unpublishedGraceMs = 15_000;

/** Plans the preparation of one service's model. The same input always returns the same plan. */
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
    .map((pod) => remove(pod, 'no longer needed'));
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

/** Counts a failed pod once; resets if the model changed or the attempt succeeded. */
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
    message: current.failure ?? 'the prepare pod failed without a message',
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
    const message = `ModelService ${nameTakenBy} already serves a model of this name: requests are queued by name`;
    return { condition: { status: 'False', reason: 'NameTaken', message }, blocker: message };
  }
  const again = new Date(retryAtMs(memory, generation)).toISOString();
  if (memory.notFound) {
    const message = `${memory.message} (next attempt ${again}, or when the spec changes)`;
    return { condition: { status: 'False', reason: 'NotFound', message }, blocker: memory.message };
  }
  if (prepared) {
    const message = 'the checkpoint was found and prepared';
    return { condition: { status: 'True', reason: 'Prepared', message }, blocker: undefined };
  }
  if (memory.failures > 0) {
    const message = `attempt ${memory.failures} failed, next attempt ${again}: ${memory.message}`;
    return { condition: { status: 'Unknown', reason: 'PrepareFailed', message }, blocker: memory.message };
  }
  const blocker = current?.blocker;
  const message = blocker ?? 'looking for the checkpoint and preparing it';
  return { condition: { status: 'Unknown', reason: 'Preparing', message }, blocker };
}
