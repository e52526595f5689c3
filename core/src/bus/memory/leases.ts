// The leases in a Map: held until they are released or the bus is closed.

import { beforeAbort } from '../../process/abort.ts';
import type { Lease, Leases } from '../leases.ts';
import type { MemoryHandle } from './broker.ts';

/** The leases of one bus. */
export class MemoryLeases implements Leases {
  readonly #handle: MemoryHandle;
  readonly #held = new Set<Lease>();

  constructor(handle: MemoryHandle) {
    this.#handle = handle;
  }

  async acquire(model: string, _holder: string, signal: AbortSignal): Promise<Lease> {
    const { broker, closing } = this.#handle;
    const until = AbortSignal.any([signal, closing]);
    const holder = Symbol(model);
    for (let held = broker.leases.get(model); held !== undefined; held = broker.leases.get(model)) {
      await beforeAbort(held.freed, until);
    }
    until.throwIfAborted();
    const { promise: freed, resolve: free } = Promise.withResolvers<void>();
    const lost = new AbortController();
    broker.leases.set(model, { holder, freed });
    const lease: Lease = {
      epoch: broker.nextSequence(),
      lost: lost.signal,
      release: async () => {
        this.#held.delete(lease);
        lost.abort();
        if (broker.leases.get(model)?.holder === holder) {
          broker.leases.delete(model);
          free();
        }
      },
    };
    this.#held.add(lease);
    return lease;
  }

  /** Before the bus is closed. */
  async releaseAll(): Promise<void> {
    await Promise.all([...this.#held].map((lease) => lease.release()));
  }
}
