// Leases on a NATS key-value bucket whose keys expire: taken by creating the key, kept by compare-and-set renewals,
// given back by deleting it. The lease's epoch grows with the revision at which it was created, and with each bucket.
// Time is the process's own clock, which can only make a lease shorter.

import type { KV } from '@nats-io/kv';

import { beforeAbort, pause } from '../../process/abort.ts';
import { ClusterError } from '../../process/errors.ts';
import type { Log } from '../../process/log.ts';
import { leaseRenewMs, leaseTtlMs, type Lease, type Leases } from '../leases.ts';
import { isTaken } from './errors.ts';
import type { NatsLink } from './link.ts';
import type { NatsStreams } from './streams.ts';
import { subjects, tokenFromName } from './subjects.ts';

interface Held {
  readonly leases: KV;
  readonly key: string;
  readonly value: string;
  /** Of the creation. */
  readonly revision: number;
  readonly epoch: number;
  /** When the creation was requested: the server counts from then or later. */
  readonly askedMs: number;
}

/** What the leases need. */
export interface NatsLeasesOptions {
  readonly link: NatsLink;
  readonly streams: NatsStreams;
  readonly log: Log;
}

/** The leases of one link, which are given back before it leaves; one that cannot be in that time expires by itself. */
export class NatsLeases implements Leases {
  readonly #link: NatsLink;
  readonly #streams: NatsStreams;
  readonly #log: Log;
  readonly #held = new Set<Lease>();
  readonly #givingBack = new Set<Promise<void>>();

  constructor({ link, streams, log }: NatsLeasesOptions) {
    this.#link = link;
    this.#streams = streams;
    this.#log = log;
    link.beforeLeaving(() => this.#releaseAll());
  }

  async acquire(model: string, holder: string, until: AbortSignal): Promise<Lease> {
    const signal = AbortSignal.any([until, this.#link.closing]);
    const key = tokenFromName(model);
    const value = JSON.stringify({ holder });
    const { leases, connection } = await this.#streams.opened(signal);
    let freed = new AbortController();
    const subject = subjects.leaseFreed(model);
    const subscription = connection.subscribe(subject, { callback: () => freed.abort() });
    try {
      for (;;) {
        signal.throwIfAborted();
        freed = new AbortController();
        const askedMs = performance.now();
        try {
          const revision = await this.#create({ leases, key, value }, signal);
          const epoch = this.#streams.leasesMadeSeconds * epochsPerSecond + revision;
          const lease = hold({ leases, key, value, revision, epoch, askedMs }, (isFree) => {
            this.#held.delete(lease);
            if (isFree && !connection.isClosed()) {
              connection.publish(subject);
            }
          });
          this.#held.add(lease);
          return lease;
        } catch (error) {
          signal.throwIfAborted();
          if (!isTaken(error) && this.#streams.ready) {
            this.#log.warn({ error: ClusterError.from(error), model }, 'cannot take the lease');
          }
        }
        await pause(leaseRenewMs, AbortSignal.any([signal, freed.signal]));
      }
    } finally {
      subscription.unsubscribe();
    }
  }

  async #releaseAll(): Promise<void> {
    await Promise.all([...[...this.#held].map((lease) => lease.release()), ...this.#givingBack]);
  }

  async #create(
    { leases, key, value }: Pick<Held, 'leases' | 'key' | 'value'>,
    signal: AbortSignal,
  ): Promise<number> {
    const creating = leases.create(key, value);
    try {
      return await beforeAbort(creating, signal);
    } catch (error) {
      // Nobody wants the lease if the answer comes after the signal.
      const givingBack = creating
        .then((late) => leases.delete(key, { previousSeq: late }))
        .catch(() => undefined)
        .finally(() => this.#givingBack.delete(givingBack));
      this.#givingBack.add(givingBack);
      throw error;
    }
  }
}

/**
 * Revisions grow by less than this in a second, so a later bucket has larger epochs than any earlier one. A whole
 * number of 53 bits holds them for 200 years.
 */
const epochsPerSecond = 2 ** 20;

/**
 * A lease counts as lost this long after its last renewal was requested: before the server grants it to another
 * process.
 */
const holdMs = 0.9 * leaseTtlMs;
/** Delay after a failed renewal; after a successful one it is `leaseRenewMs`. */
const retryMs = 250;

/** Renews until the lease is lost or released; calls `onReleased` with whether the key is now free. */
function hold(
  { leases, key, value, epoch, askedMs, ...held }: Held,
  onReleased: (isFree: boolean) => void,
): Lease {
  const lost = new AbortController();
  let { revision } = held;
  // A timer instead of a check between renewals: a renewal itself may outlast the lease.
  const expireFrom = (fromMs: number): NodeJS.Timeout =>
    setTimeout(() => lost.abort(), fromMs + holdMs - performance.now());
  let expiry = expireFrom(askedMs);
  const renew = async (): Promise<void> => {
    let pauseMs = leaseRenewMs;
    while (!lost.signal.aborted) {
      await pause(pauseMs, lost.signal);
      const nowMs = performance.now();
      try {
        revision = await leases.update(key, value, revision, leaseRenewMs);
        clearTimeout(expiry);
        expiry = expireFrom(nowMs);
        pauseMs = leaseRenewMs;
      } catch (error) {
        if (isTaken(error)) {
          break;
        }
        pauseMs = retryMs;
      }
    }
    clearTimeout(expiry);
    lost.abort();
  };
  const renewing = renew();
  const release = async (): Promise<void> => {
    const holding = !lost.signal.aborted;
    lost.abort();
    await renewing;
    const isFree =
      holding &&
      (await leases.delete(key, { previousSeq: revision }).then(
        () => true,
        () => false,
      ));
    onReleased(isFree);
  };
  let released: Promise<void> | undefined;
  return {
    epoch,
    lost: lost.signal,
    release: () => {
      released ??= release();
      return released;
    },
  };
}
