// Checks a caller's permissions: the models of its tenant, and room for one more request in this gateway. The request's
// content is checked in check.ts.

import { ClusterError } from '@mimo/core/process/errors';

import type { Caller } from './auth.ts';

/** The table of held requests, as far as room for a new one depends on it. */
export interface Places {
  counts(): { readonly requests: number };
  /** Ends a request whose client reads nothing, to make room; false if every client reads. */
  makeRoom(): boolean;
}

/** The limits of this gateway. `stopping` fires when new requests must be refused. */
export interface PlaceRules {
  readonly maxRequests: number;
  readonly stopping: AbortSignal;
}

/** Whether the caller may use a model. */
export function mayUse({ models }: Caller, model: string): boolean {
  return models?.has(model) !== false;
}

/** Fails with `permission_denied` if the caller may not use the model. */
export function assertMayUse(caller: Caller, model: string): void {
  if (!mayUse(caller, model)) {
    throw new ClusterError('permission_denied', `tenant ${caller.tenant} may not use model ${model}`);
  }
}

/**
 * Fails with `unavailable` while the gateway stops, with `resource_exhausted` if it is full of clients that read.
 */
export function assertPlace(places: Places, { maxRequests, stopping }: PlaceRules): void {
  if (stopping.aborted) {
    throw new ClusterError('unavailable', 'this gateway is stopping', { detail: { retryAfterMs: 500 } });
  }
  const { requests } = places.counts();
  if (requests >= maxRequests && !places.makeRoom()) {
    const text = `this gateway holds ${requests} requests; the limit is ${maxRequests}`;
    throw new ClusterError('resource_exhausted', text, { detail: { retryAfterMs: 1_000 } });
  }
}
