// The actions of one round, in their order. Owns which actions a failure skips, which run side by side, and the growing
// pause before a rejected creation is retried.

import { ClusterError } from '@mimo/core/process/errors';

import type { Action } from '../decide/plan.ts';
import type { Actor, ActOn } from './act.ts';

/** Creations that the API server rejected: not retried before `untilMs`, by performance.now(). */
export interface Refusal {
  readonly count: number;
  readonly untilMs: number;
  readonly message: string;
}

/** A rejected creation is retried after 2 s, 4 s ... 2 min. */
const firstRefusalMs = 2_000;
const longestRefusalMs = 120_000;

/**
 * Carries out all actions in order. A failure skips only the actions that depend on it; gives the first one, and the
 * refusal that holds from now on. Rejects with the signal's reason.
 */
export async function actInOrder(
  actor: Actor,
  actions: readonly Action[],
  on: ActOn,
  refusedBefore: Refusal | undefined,
): Promise<{ readonly failure: ClusterError | undefined; readonly refused: Refusal | undefined }> {
  let failure: ClusterError | undefined;
  let refusal: ClusterError | undefined;
  let refused = refusedBefore;
  for (const batch of batchesOf(actions)) {
    on.signal.throwIfAborted();
    const { kind } = batch[0];
    const creates = kind === 'createGroup' || kind === 'createPreparePod';
    if (creates && (refusal !== undefined || performance.now() < (refused?.untilMs ?? 0))) {
      continue;
    }
    const results = await Promise.allSettled(batch.map((action) => actor.act(action, on)));
    const errors = results.flatMap((result) =>
      result.status === 'rejected' ? [ClusterError.from(result.reason)] : [],
    );
    failure ??= errors[0];
    if (creates) {
      refusal = errors.find(({ code }) => code !== 'unavailable' && code !== 'canceled');
      refused = errors.length === 0 ? undefined : refused;
    }
    if (errors.length > 0 && (kind === 'addFinalizer' || kind === 'removeModel')) {
      break;
    }
  }
  if (refusal !== undefined) {
    const count = (refused?.count ?? 0) + 1;
    const untilMs = performance.now() + Math.min(longestRefusalMs, firstRefusalMs * 2 ** (count - 1));
    refused = { count, untilMs, message: refusal.message };
  }
  return { failure, refused };
}

/** Parallel requests for one service. */
const batchMax = 16;

/** Successive actions of one kind are independent. */
function batchesOf(actions: readonly Action[]): readonly (readonly [Action, ...Action[]])[] {
  const batches: [Action, ...Action[]][] = [];
  for (const action of actions) {
    const last = batches.at(-1);
    if (last?.[0].kind === action.kind && last.length < batchMax) {
      last.push(action);
    } else {
      batches.push([action]);
    }
  }
  return batches;
}
