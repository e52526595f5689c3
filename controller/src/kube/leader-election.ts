// Leader election: of several processes, the holder of a coordination.k8s.io Lease acts. Owns taking, renewing,
// giving up in time and releasing. A contender takes a lease that it has seen unchanged for its whole duration, by
// its own monotonic clock; a holder stops well before that, by its own clock. Clocks are never compared.
//
// Why no library: @kubernetes/client-node has no leader election, and what npm offers is built on its requests and
// watches, which this package does not use (README.md says why): a renewal without its own time limit could
// outlast the lease.

import { randomUUID } from 'node:crypto';

import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';

import { hasReason } from './api-status.ts';
import type { KubeClient } from './client.ts';
import { resourceTypes, type KubeObject } from './resource.ts';

export interface LeaderElectionOptions {
  readonly client: KubeClient;
  readonly leaseName: string;
  /** Such as the pod's name. What is written has a random part too: two processes never take each other's lease. */
  readonly identity: string;
  readonly log: Log;
  readonly timing?: Partial<LeaderElectionTiming>;
}

export interface LeaderElectionTiming {
  /** Others take the lease after they have seen it unchanged for this long. */
  readonly leaseDurationMs: number;
  /** Leadership ends this long after the last renewal was requested; less than the duration. */
  readonly renewDeadlineMs: number;
  /** Interval of renewals, and of checks of another's lease. */
  readonly retryMs: number;
}

const defaultTiming: LeaderElectionTiming = {
  leaseDurationMs: 15_000,
  renewDeadlineMs: 10_000,
  retryMs: 2_000,
};

interface LeaseSpec {
  readonly holderIdentity?: string | null;
  readonly leaseDurationSeconds?: number | null;
  readonly acquireTime?: string | null;
  readonly renewTime?: string | null;
  readonly leaseTransitions?: number | null;
}

/**
 * Contends for the lease until the signal fires, and runs `lead` whenever this process holds it. `lead`'s signal
 * fires as soon as the lease is lost, could not be renewed in time, or the outer signal fires; it should end soon
 * then, since the lease is kept until it has, or contended for again. Resolves at a clean stop, with the lease
 * released; rejects with the error of `lead`. If `lead` returns by itself, the lease is released and this ends too.
 */
export async function runLeading(
  options: LeaderElectionOptions,
  lead: (signal: AbortSignal) => Promise<void>,
  signal: AbortSignal,
): Promise<void> {
  const lease = new LeaseHolder(options);
  while (!signal.aborted) {
    const heldFromMs = await lease.acquire(signal);
    if (heldFromMs === undefined) {
      return;
    }
    options.log.info({ identity: lease.identity }, 'leading');
    const lostBefore = await lease.whileHeld(heldFromMs, lead, signal);
    if (!lostBefore) {
      return;
    }
  }
}

class LeaseHolder {
  readonly identity: string;
  readonly #options: LeaderElectionOptions;
  readonly #timing: LeaderElectionTiming;
  /** The lease as last seen, and since when it is unchanged. */
  #seen: { readonly lease: KubeObject; readonly sinceMs: number } | undefined;

  constructor(options: LeaderElectionOptions) {
    this.#options = options;
    this.#timing = { ...defaultTiming, ...options.timing };
    const { leaseDurationMs, renewDeadlineMs, retryMs } = this.#timing;
    if (renewDeadlineMs >= leaseDurationMs || retryMs >= renewDeadlineMs) {
      const text = `leader election needs retry ${retryMs} ms < renew deadline ${renewDeadlineMs} ms < duration ${leaseDurationMs} ms`;
      throw new ClusterError('invalid_argument', text);
    }
    this.identity = `${options.identity}_${randomUUID()}`;
  }

  /** Waits until the lease is ours and returns the time from which it counts; undefined if the signal fires first. */
  async acquire(signal: AbortSignal): Promise<number | undefined> {
    for (;;) {
      const askedMs = performance.now();
      const taken = await this.#attempt(signal, (limit) => this.#take(limit));
      if (taken) {
        return askedMs;
      }
      await pause(this.#timing.retryMs * (1 + 0.2 * Math.random()), signal);
      if (signal.aborted) {
        return undefined;
      }
    }
  }

  /** Leads and renews. True if the lease was lost before the signal fired. */
  async whileHeld(
    heldFromMs: number,
    lead: (signal: AbortSignal) => Promise<void>,
    outer: AbortSignal,
  ): Promise<boolean> {
    const lost = new AbortController();
    const ended = new AbortController();
    // Renewals continue while `lead` ends, so that no other process begins earlier.
    const renewing = this.#renew(heldFromMs, lost, ended.signal);
    try {
      await lead(AbortSignal.any([outer, lost.signal]));
    } catch (error) {
      if (!lost.signal.aborted && !outer.aborted) {
        throw error;
      }
    } finally {
      ended.abort();
      await renewing;
      if (!lost.signal.aborted) {
        await this.#giveBack();
      }
    }
    if (lost.signal.aborted) {
      this.#options.log.warn({ identity: this.identity }, 'lost the leadership');
    }
    return lost.signal.aborted && !outer.aborted;
  }

  /** Renews until `ended`, or until the lease is lost. Waits for a running renewal. */
  async #renew(heldFromMs: number, lost: AbortController, ended: AbortSignal): Promise<void> {
    const { renewDeadlineMs, retryMs } = this.#timing;
    const lose = (): void => lost.abort(new ClusterError('aborted', 'lost the leadership'));
    // A timer instead of a check between renewals: a renewal itself may outlast the lease.
    const expireFrom = (fromMs: number): NodeJS.Timeout =>
      setTimeout(lose, fromMs + renewDeadlineMs - performance.now());
    let expiry = expireFrom(heldFromMs);
    const over = AbortSignal.any([lost.signal, ended]);
    for (;;) {
      await pause(retryMs, over);
      if (over.aborted) {
        break;
      }
      const askedMs = performance.now();
      const renewed = await this.#attempt(lost.signal, (limit) => this.#take(limit));
      if (lost.signal.aborted) {
        break;
      }
      if (renewed) {
        clearTimeout(expiry);
        expiry = expireFrom(askedMs);
      } else if (this.#heldByOther()) {
        lose();
      }
    }
    clearTimeout(expiry);
  }

  /** How long one exchange may take: two fit before the deadline. */
  get #exchangeMs(): number {
    return this.#timing.renewDeadlineMs / 2;
  }

  /** One exchange; failures are logged and count as no. */
  async #attempt(signal: AbortSignal, exchange: (limit: AbortSignal) => Promise<boolean>): Promise<boolean> {
    const limit = AbortSignal.any([signal, AbortSignal.timeout(this.#exchangeMs)]);
    try {
      return await exchange(limit);
    } catch (error) {
      this.#options.log[signal.aborted ? 'debug' : 'info'](
        { error: ClusterError.from(error), lease: this.#options.leaseName },
        'cannot take or renew the lease',
      );
      return false;
    }
  }

  /** Takes or renews the lease if allowed. A concurrent change by another process wins. */
  async #take(signal: AbortSignal): Promise<boolean> {
    const { client, leaseName } = this.#options;
    let lease: KubeObject;
    try {
      lease = await client.get(resourceTypes.leases, leaseName, signal);
    } catch (error) {
      if (!hasReason(error, 'NotFound')) {
        throw error;
      }
      const { apiVersion, kind } = resourceTypes.leases;
      const created = { apiVersion, kind, metadata: { name: leaseName }, spec: this.#specFrom(undefined) };
      this.#see(await client.create(resourceTypes.leases, created, signal));
      return true;
    }
    this.#see(lease);
    if (this.#heldByOther()) {
      return false;
    }
    const { resourceVersion } = lease.metadata;
    const change = { metadata: { resourceVersion }, spec: this.#specFrom(specOf(lease)) };
    this.#see(await client.patch(resourceTypes.leases, leaseName, change, {}, signal));
    return true;
  }

  #see(lease: KubeObject): void {
    if (this.#seen?.lease.metadata.resourceVersion !== lease.metadata.resourceVersion) {
      this.#seen = { lease, sinceMs: performance.now() };
    }
  }

  /**
   * Whether another process holds the lease, as far as observed: it is named, and has renewed within its own
   * duration.
   */
  #heldByOther(): boolean {
    if (this.#seen === undefined) {
      return false;
    }
    const { holderIdentity, leaseDurationSeconds } = specOf(this.#seen.lease);
    const durationMs = leaseDurationSeconds ? leaseDurationSeconds * 1000 : this.#timing.leaseDurationMs;
    return (
      Boolean(holderIdentity) &&
      holderIdentity !== this.identity &&
      performance.now() - this.#seen.sinceMs < durationMs
    );
  }

  #specFrom(before: LeaseSpec | undefined): LeaseSpec {
    const now = this.#microTime();
    const ours = before?.holderIdentity === this.identity;
    return {
      holderIdentity: this.identity,
      leaseDurationSeconds: Math.ceil(this.#timing.leaseDurationMs / 1000),
      acquireTime: ours ? (before.acquireTime ?? now) : now,
      renewTime: now,
      leaseTransitions: (before?.leaseTransitions ?? 0) + (ours || before === undefined ? 0 : 1),
    };
  }

  /** For people: no decision depends on it. The API's MicroTime wants six digits. */
  #microTime(): string {
    return this.#options.client.clock.now().replace('Z', '000Z');
  }

  /** Lets others take the lease at once. Best effort: it would expire anyway. */
  async #giveBack(): Promise<void> {
    const { client, leaseName, log } = this.#options;
    const seen = this.#seen?.lease;
    if (seen === undefined) {
      return;
    }
    const { resourceVersion } = seen.metadata;
    const spec: LeaseSpec = { holderIdentity: '', leaseDurationSeconds: 1, renewTime: this.#microTime() };
    try {
      const limit = AbortSignal.timeout(this.#exchangeMs);
      await client.patch(resourceTypes.leases, leaseName, { metadata: { resourceVersion }, spec }, {}, limit);
      log.info({ identity: this.identity }, 'released the lease');
    } catch (error) {
      log.info({ error: ClusterError.from(error) }, 'cannot release the lease');
    }
  }
}

function specOf(lease: KubeObject): LeaseSpec {
  return lease.spec ?? {};
}
