// The dispatcher of one model: while it holds the lease it follows the queue and the heartbeats, plans, and offers each
// planned request to its owning gateway. Owns the loop and the carrying out; what to do is decided in placement.ts, what is
// believed is kept in dispatch-state.ts. One is active per model; every gateway has one that waits for the lease.

import { pause } from '@mimo/core/abort';
import { ClusterError } from '@mimo/core/errors';
import type { Log } from '@mimo/core/log';
import type { Lease, RequestQueue } from '@mimo/core/queue';
import { AssignmentOutcome } from '@mimo/proto/queue';
import type { Heartbeat } from '@mimo/proto/worker';

import type { Groups } from '../groups.ts';
import type { GatewayMetrics } from '../metrics.ts';
import { DispatchState } from './dispatch-state.ts';
import { planAbandoned, planAssignments } from './placement.ts';

/** What a dispatcher works with. */
export interface DispatcherParts {
  readonly model: string;
  readonly gatewayId: string;
  readonly queue: RequestQueue;
  readonly groups: Groups;
  readonly metrics: GatewayMetrics;
  readonly log: Log;
}

/** Groups that went silent and time-outs are found at this pace; everything else is acted upon as it comes. */
const tickMs = 250;
/** Looking at the whole queue takes milliseconds where it is long. */
const lookMs = 1_000;

/** Dispatches whenever it holds the lease, until the signal fires; resolves once the lease is released. */
export async function runDispatcher(parts: DispatcherParts, signal: AbortSignal): Promise<void> {
  const log = parts.log.child({ model: parts.model });
  while (!signal.aborted) {
    try {
      const lease = await parts.queue.acquireLease(parts.model, parts.gatewayId, signal);
      log.info({ dispatcherEpoch: lease.epoch }, 'dispatching');
      await new Dispatcher({ ...parts, log }, lease, signal).run();
      await lease.release();
      log.info({ dispatcherEpoch: lease.epoch }, 'dispatching ended');
    } catch (error) {
      if (!signal.aborted) {
        log.error({ error: ClusterError.from(error) }, 'dispatcher failed');
        await pause(lookMs, signal);
      }
    }
  }
}

/** One term of office. */
class Dispatcher {
  readonly #parts: DispatcherParts;
  readonly #epoch: number;
  readonly #stop = new AbortController();
  readonly #until: AbortSignal;
  readonly #state = new DispatchState();
  #planning = false;
  #lookedMs = 0;

  constructor(parts: DispatcherParts, lease: Lease, signal: AbortSignal) {
    this.#parts = parts;
    this.#epoch = lease.epoch;
    this.#until = AbortSignal.any([signal, lease.lost, this.#stop.signal]);
  }

  async run(): Promise<void> {
    try {
      await Promise.all([this.#followRecords(), this.#followEnded(), this.#followHeartbeats(), this.#tick()]);
    } finally {
      this.#stop.abort();
    }
  }

  async #followRecords(): Promise<void> {
    for await (const queued of this.#parts.queue.follow(this.#parts.model, this.#until)) {
      this.#state.add(queued);
      this.#planSoon();
    }
  }

  async #followEnded(): Promise<void> {
    for await (const { requestId, requeued } of this.#parts.queue.followEnded(
      this.#parts.model,
      this.#until,
    )) {
      if (requeued) {
        this.#state.requeue(requestId, Date.now());
      } else {
        this.#state.remove(requestId);
      }
      this.#planSoon();
    }
  }

  async #followHeartbeats(): Promise<void> {
    for await (const heartbeat of this.#parts.queue.followHeartbeats(this.#until)) {
      if (heartbeat.model === this.#parts.model) {
        this.#planSoon();
      }
    }
  }

  async #tick(): Promise<void> {
    const { groups, model } = this.#parts;
    while (!this.#until.aborted) {
      this.#state.reconcile(groups.alive(model, performance.now()), Date.now());
      this.#planSoon();
      if (performance.now() - this.#lookedMs >= lookMs) {
        this.#lookedMs = performance.now();
        planAbandoned(this.#state.waiting(), Date.now()).forEach((requestId) => this.#orphan(requestId));
        this.#publishState();
      }
      await pause(tickMs, this.#until);
    }
  }

  /** Plans once for whatever arrives in the same turn of the event loop. */
  #planSoon(): void {
    if (!this.#planning) {
      this.#planning = true;
      setImmediate(() => {
        this.#planning = false;
        if (!this.#until.aborted) {
          this.#plan();
        }
      });
    }
  }

  #plan(): void {
    const nowUnixMs = Date.now();
    const groups = this.#parts.groups.alive(this.#parts.model, performance.now());
    const plan = planAssignments(
      { waiting: this.#state.waiting(), groups: this.#state.openGroups(groups) },
      nowUnixMs,
    );
    for (const { requestId, group } of plan) {
      const target = groups.find((each) => each.group === group);
      if (target !== undefined) {
        // Believed at once, so that the next plan does not place it again.
        this.#state.place(requestId, target, nowUnixMs);
        void this.#assign(requestId, target);
      }
    }
  }

  async #assign(requestId: string, target: Heartbeat): Promise<void> {
    const { model, queue, log } = this.#parts;
    const queued = this.#state.get(requestId);
    if (queued === undefined) {
      return;
    }
    const { group, incarnation, address } = target;
    const { gatewayId } = queued.record;
    try {
      const reply = await queue.assign(gatewayId, {
        requestId,
        model,
        group,
        incarnation,
        address,
        dispatcherEpoch: this.#epoch,
      });
      this.#state.heard(gatewayId);
      if (reply.outcome === AssignmentOutcome.ALREADY_ASSIGNED) {
        this.#state.place(requestId, reply, Date.now());
      } else if (reply.outcome === AssignmentOutcome.STALE_DISPATCHER) {
        log.warn({ dispatcherEpoch: this.#epoch, gatewayId }, 'dispatcher is stale');
        this.#stop.abort();
      } else if (reply.outcome !== AssignmentOutcome.ACCEPTED) {
        this.#state.remove(requestId);
        await queue.delete(queued);
      }
    } catch (error) {
      if (this.#until.aborted) {
        return;
      }
      const { code } = ClusterError.from(error);
      log.debug({ code, requestId, gatewayId }, 'assignment not answered');
      for (const orphan of this.#state.unanswered(requestId, code === 'not_found', Date.now())) {
        this.#orphan(orphan);
      }
    }
  }

  /** Deletes the record of a request that nobody holds any more. */
  #orphan(requestId: string): void {
    const queued = this.#state.get(requestId);
    if (queued !== undefined) {
      const { model, queue, metrics, log } = this.#parts;
      this.#state.remove(requestId);
      metrics.orphans({ model });
      log.warn({ requestId, gatewayId: queued.record.gatewayId }, 'orphaned record deleted');
      queue.delete(queued).catch((error: unknown) => {
        log.debug({ error: ClusterError.from(error), requestId }, 'orphaned record not deleted');
      });
    }
  }

  #publishState(): void {
    const { model, queue, groups } = this.#parts;
    const nowUnixMs = Date.now();
    queue.publishState({
      model,
      atUnixMs: nowUnixMs,
      dispatcherEpoch: this.#epoch,
      readyGroups: groups.ready(model, performance.now()).length,
      ...this.#state.summary(nowUnixMs),
    });
  }
}
