// The right to dispatch for a model, held by one gateway at a time. Implemented by nats/leases.ts (keys with a TTL) and
// memory/leases.ts.

/** The right to dispatch for one model. Only one process holds it at a time, as far as clocks and the network allow. */
export interface Lease {
  /** Larger than that of every earlier lease of the model in this store: it fences the holder's assignments. */
  readonly epoch: number;
  /** Fires when the lease is no longer held: lost, expired or released. */
  readonly lost: AbortSignal;
  /** Releases the lease at once, so that others need not wait for its expiry. */
  release(): Promise<void>;
}

/** The leases of every model. */
export interface Leases {
  /** Waits until the lease of a model is free and acquires it. Rejects if the signal fires first. */
  acquire(model: string, holder: string, signal: AbortSignal): Promise<Lease>;
}

/** How long a lease outlives its holder: a takeover takes at most this long, and the holder survives shorter pauses. */
export const leaseTtlMs = 5_000;

/** How often a holder renews: it can miss two renewals. */
export const leaseRenewMs = leaseTtlMs / 3;
