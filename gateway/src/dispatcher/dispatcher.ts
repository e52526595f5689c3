// The dispatcher of one model: while it holds the lease it follows the queue and the heartbeats, plans, and offers each
// planned request to its owning gateway. Owns the loop and the execution of plans: placement.ts decides,
// dispatch-state.ts keeps the dispatcher's view, state-publisher.ts publishes it. One dispatcher per model is active;
// every gateway has one that waits for the lease.

import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';
import type { Bus } from '@mimo/core/bus/bus';
import type { MarkedGroups } from '@mimo/core/bus/drain-marks';
import type { Lease } from '@mimo/core/bus/leases';
import { AssignmentOutcome } from '@mimo/proto/queue';
import type { Heartbeat } from '@mimo/proto/worker';

import type { GatewayMetrics } from '../metrics.ts';
import type { Sessions } from '../session.ts';
import { DispatchState } from './dispatch-state.ts';
import type { Groups } from './groups.ts';
import { planAbandoned, planAssignments, type Placement } from './placement.ts';
import { StatePublisher } from './state-publisher.ts';

/** A dispatcher's dependencies. */
export interface DispatcherParts {
  readonly model: string;
  readonly gatewayId: string;
  readonly bus: Omit<Bus, 'kind' | 'connected' | 'opened' | 'close'>;
  readonly groups: Groups;
  readonly sessions: Pick<Sessions, 'hold' | 'isRoutable'>;
  /** How often the store begins another file while records arrive; Infinity: never. */
  readonly eraseAfterMs: number;
  readonly metrics: GatewayMetrics;
  readonly log: Log;
}

/** How often to check for silent groups and time-outs; everything else is handled at once. */
const tickMs = 100;
/** How often to look for abandoned requests: checking a long queue takes milliseconds. */
const lookMs = 1_000;

/**
 * How long a stopping gateway waits for others to take its lease; if none does, it continues to dispatch its
 * remaining requests.
 */
const resignedMs = 2_000;

/**
 * Dispatches while it holds the lease, until the signal fires; resolves once the lease is released. When `resigning`
 * fires it releases the lease, so that another gateway can acquire it at once.
 */
export async function runDispatcher(
  parts: DispatcherParts,
  signal: AbortSignal,
  resigning: AbortSignal,
): Promise<void> {
  const log = parts.log.child({ model: parts.model });
  // Kept from one term to the next: losing the store also loses the leases.
  let storeId = '';
  while (!signal.aborted) {
    storeId ||= parts.bus.records.storeId;
    const term = resigning.aborted ? signal : AbortSignal.any([signal, resigning]);
    try {
      const lease = await parts.bus.leases.acquire(parts.model, parts.gatewayId, term);
      log.info({ dispatcherEpoch: lease.epoch }, 'dispatching');
      const state = new DispatchState(storeId);
      await new Dispatcher({ ...parts, log }, { lease, state }, term).run();
      ({ storeId } = state);
      await lease.release();
      log.info({ dispatcherEpoch: lease.epoch }, 'dispatching ended');
    } catch (error) {
      if (!term.aborted) {
        log.error({ error: ClusterError.from(error) }, 'dispatcher failed');
        await pause(lookMs, term);
      }
    }
    if (resigning.aborted) {
      await pause(resignedMs, signal);
    }
  }
}

/** One term: the time for which it holds the lease. */
class Dispatcher {
  readonly #parts: DispatcherParts;
  readonly #epoch: number;
  readonly #stop = new AbortController();
  readonly #until: AbortSignal;
  readonly #state: DispatchState;
  readonly #publisher: StatePublisher;
  #planning = false;
  #lookedMs = 0;
  #turnedMs = performance.now();
  /** Whether records have arrived since the file was begun. */
  #isFileUsed = false;
  /** Whether the initial replay is complete; until then, queue depth would be under-reported. */
  #replayed = false;
  /** Undefined until the drain marks are known: before that nothing is assigned. */
  #drains: MarkedGroups | undefined;

  constructor(
    parts: DispatcherParts,
    { lease, state }: { readonly lease: Lease; readonly state: DispatchState },
    signal: AbortSignal,
  ) {
    this.#parts = parts;
    this.#state = state;
    this.#epoch = lease.epoch;
    const { model, groups, sessions } = parts;
    this.#publisher = new StatePublisher({
      model,
      dispatcherEpoch: lease.epoch,
      queueStates: parts.bus.queueStates,
      groups,
      sessions,
      state,
      onDue: () => this.#planSoon(),
    });
    this.#until = AbortSignal.any([signal, lease.lost, this.#stop.signal]);
  }

  async run(): Promise<void> {
    try {
      await Promise.all([
        this.#followRecords(),
        this.#followEnded(),
        this.#followHeartbeats(),
        this.#followDrains(),
        this.#tick(),
      ]);
    } finally {
      this.#stop.abort();
      this.#publisher.close();
    }
  }

  async #followRecords(): Promise<void> {
    const { bus, model } = this.#parts;
    const onReplayed = (): void => {
      this.#reconcile();
      this.#replayed = true;
      this.#planSoon();
    };
    for await (const queued of bus.records.follow(model, this.#until, onReplayed)) {
      this.#state.add(queued, performance.now());
      this.#isFileUsed = true;
      this.#planSoon();
    }
  }

  async #followDrains(): Promise<void> {
    for await (const marks of this.#parts.bus.drainMarks.follow(this.#parts.model, this.#until)) {
      this.#drains = marks;
      this.#planSoon();
    }
  }

  async #followEnded(): Promise<void> {
    for await (const ended of this.#parts.bus.signals.followEnded(this.#parts.model, this.#until)) {
      if (ended.requeued) {
        this.#state.requeue(ended, performance.now());
      } else {
        this.#state.remove(ended.requestId, ended.released, performance.now());
      }
      this.#planSoon();
    }
  }

  async #followHeartbeats(): Promise<void> {
    for await (const heartbeat of this.#parts.bus.heartbeats.follow(this.#until)) {
      if (heartbeat.model === this.#parts.model) {
        this.#planSoon();
      }
    }
  }

  async #tick(): Promise<void> {
    while (!this.#until.aborted) {
      this.#reconcile();
      this.#holdSessions();
      this.#planSoon();
      if (performance.now() - this.#lookedMs >= lookMs) {
        this.#lookedMs = performance.now();
        planAbandoned(this.#state.waiting(), performance.now()).forEach((requestId) =>
          this.#orphan(requestId),
        );
      }
      if (this.#isFileUsed && performance.now() - this.#turnedMs >= this.#parts.eraseAfterMs) {
        void this.#turnFile();
      }
      await pause(tickMs, this.#until);
    }
  }

  /** Begins another file: the store removes the old one once the owners have rewritten its live records. */
  async #turnFile(): Promise<void> {
    const { bus, log } = this.#parts;
    this.#isFileUsed = false;
    this.#turnedMs = performance.now();
    await bus.records.turnFile().catch((error: unknown) => {
      this.#isFileUsed = true;
      log.debug({ error: ClusterError.from(error) }, 'no new file of the queue begun');
    });
  }

  #reconcile(): void {
    const { groups, model } = this.#parts;
    this.#state.reconcile(groups.alive(model, performance.now()), performance.now());
  }

  /** Opens the sessions with all ready groups ahead of need, so that the published state knows which are routable. */
  #holdSessions(): void {
    const { groups, model, sessions, log } = this.#parts;
    for (const { group, incarnation, address } of groups.ready(model, performance.now())) {
      try {
        sessions.hold({ model, group, incarnation, address });
      } catch (error) {
        log.debug({ error: ClusterError.from(error), group }, 'cannot open the session');
      }
    }
  }

  /** Plans once for all events in the same turn of the event loop. */
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
    if (this.#drains !== undefined) {
      this.#assignAll(this.#drains);
      if (this.#replayed) {
        this.#publisher.publish(this.#drains);
      }
    }
  }

  #assignAll(drains: MarkedGroups): void {
    const nowMs = performance.now();
    const groups = this.#parts.groups.ready(this.#parts.model, nowMs);
    const open = this.#state.openGroups(groups, drains, nowMs);
    const plan = planAssignments(
      {
        onTrial: this.#state.onTrial(nowMs),
        waiting: this.#state.waiting(new Set(open.map(({ identity }) => identity))),
        groups: open,
      },
      nowMs,
    );
    for (const { requestId, group, company, breaks } of plan) {
      const target = groups.find((each) => each.group === group);
      if (target !== undefined) {
        // Noted before the owner answers, so that the next plan does not place it again.
        this.#state.place(requestId, target, nowMs);
        void this.#assign(requestId, target, { company, breaks });
      }
    }
  }

  async #assign(
    requestId: string,
    target: Heartbeat,
    trial: Pick<Placement, 'company' | 'breaks'>,
  ): Promise<void> {
    const { model, bus, log } = this.#parts;
    const queued = this.#state.get(requestId);
    if (queued === undefined) {
      return;
    }
    const { group, incarnation, address, identity } = target;
    const { gatewayId } = queued.record;
    try {
      const reply = await bus.signals.assign(gatewayId, {
        requestId,
        model,
        group,
        incarnation,
        address,
        dispatcherEpoch: this.#epoch,
        identity,
        ...trial,
      });
      this.#state.heard(gatewayId);
      if (
        reply.outcome === AssignmentOutcome.ACCEPTED ||
        reply.outcome === AssignmentOutcome.ALREADY_ASSIGNED
      ) {
        this.#state.confirm(requestId, reply, performance.now());
      } else if (reply.outcome === AssignmentOutcome.UNFIT) {
        this.#state.refuse(requestId, reply.needs, performance.now());
        this.#planSoon();
      } else if (reply.outcome === AssignmentOutcome.PARKED) {
        this.#state.park(requestId, performance.now());
        this.#planSoon();
      } else if (reply.outcome === AssignmentOutcome.STALE_DISPATCHER) {
        log.warn({ dispatcherEpoch: this.#epoch, gatewayId }, 'stale dispatcher');
        this.#stop.abort();
      } else {
        this.#state.remove(requestId, false, performance.now());
        await bus.records.erase(queued);
      }
    } catch (error) {
      if (this.#until.aborted) {
        return;
      }
      const { code } = ClusterError.from(error);
      log.debug({ code, requestId, gatewayId }, 'no answer to an assignment');
      for (const orphan of this.#state.unanswered(requestId, code === 'not_found', performance.now())) {
        this.#orphan(orphan);
      }
    }
  }

  /** Deletes the record of a request without an owner. */
  #orphan(requestId: string): void {
    const queued = this.#state.get(requestId);
    if (queued !== undefined) {
      const { model, bus, metrics, log } = this.#parts;
      this.#state.remove(requestId, false, performance.now());
      metrics.orphans({ model });
      log.warn({ requestId, gatewayId: queued.record.gatewayId }, 'deleted an orphaned record');
      bus.records.erase(queued).catch((error: unknown) => {
        log.debug({ error: ClusterError.from(error), requestId }, 'cannot delete an orphaned record');
      });
    }
  }
}
