// The dispatcher of one model: while it holds the lease it follows the queue and the heartbeats, plans, and offers each
// planned request to its owning gateway, and publishes the state of its queue. Owns the loop and the carrying out; what to
// do is decided in placement.ts, what is believed is kept in dispatch-state.ts. One is active per model; every gateway has
// one that waits for the lease.

import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';
import type { DrainMarks, Lease, QueueState, RequestQueue } from '@mimo/core/bus/queue';
import { AssignmentOutcome } from '@mimo/proto/queue';
import { GroupState, type Heartbeat } from '@mimo/proto/worker';

import { heartbeatQuietMs, type Groups } from './groups.ts';
import type { GatewayMetrics } from '../metrics.ts';
import type { Sessions } from '../session.ts';
import { DispatchState, placeKey } from './dispatch-state.ts';
import { planAbandoned, planAssignments, type Placement } from './placement.ts';

/** What a dispatcher works with. */
export interface DispatcherParts {
  readonly model: string;
  readonly gatewayId: string;
  readonly queue: RequestQueue;
  readonly groups: Groups;
  readonly sessions: Pick<Sessions, 'hold' | 'isRoutable'>;
  /** So often the store begins another file while records come; Infinity: never. */
  readonly eraseAfterMs: number;
  readonly metrics: GatewayMetrics;
  readonly log: Log;
}

/** Groups that went silent and time-outs are found at this pace; everything else is acted upon as it comes. */
const tickMs = 100;
/** Looking at the whole queue takes milliseconds where it is long. */
const lookMs = 1_000;
/** A changed state is published at once, but not more often than this; one that does not change, every second. */
const publishMs = 50;
const republishMs = 1_000;

/** How long a gateway that stops leaves its lease to others; alone, it goes on after that with what it still holds. */
const resignedMs = 2_000;

/**
 * Dispatches whenever it holds the lease, until the signal fires; resolves once the lease is released. When `resigning`
 * fires the lease is given back for another gateway to take at once.
 */
export async function runDispatcher(
  parts: DispatcherParts,
  signal: AbortSignal,
  resigning: AbortSignal,
): Promise<void> {
  const log = parts.log.child({ model: parts.model });
  // Known from before the lease: a store that is lost takes the leases with it.
  let storeId = '';
  while (!signal.aborted) {
    storeId ||= parts.queue.storeId;
    const term = resigning.aborted ? signal : AbortSignal.any([signal, resigning]);
    try {
      const lease = await parts.queue.acquireLease(parts.model, parts.gatewayId, term);
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

/** One term of office. */
class Dispatcher {
  readonly #parts: DispatcherParts;
  readonly #epoch: number;
  readonly #stop = new AbortController();
  readonly #until: AbortSignal;
  readonly #state: DispatchState;
  readonly #beganMs = performance.now();
  #planning = false;
  #lookedMs = 0;
  #turnedMs = performance.now();
  /** Records came since the file was begun. */
  #isFileUsed = false;
  /** What lay in the queue at the beginning is known; before that its state would be told too small. */
  #replayed = false;
  /** Undefined until they are known: before that nothing is assigned. */
  #drains: DrainMarks | undefined;
  #publishedMs = Number.NEGATIVE_INFINITY;
  #published = '';
  #publishTimer: NodeJS.Timeout | undefined;

  constructor(
    parts: DispatcherParts,
    { lease, state }: { readonly lease: Lease; readonly state: DispatchState },
    signal: AbortSignal,
  ) {
    this.#parts = parts;
    this.#state = state;
    this.#epoch = lease.epoch;
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
      clearTimeout(this.#publishTimer);
    }
  }

  async #followRecords(): Promise<void> {
    const { queue, model } = this.#parts;
    const onReplayed = (): void => {
      this.#reconcile();
      this.#replayed = true;
      this.#planSoon();
    };
    for await (const queued of queue.follow(model, this.#until, onReplayed)) {
      this.#state.add(queued, performance.now());
      this.#isFileUsed = true;
      this.#planSoon();
    }
  }

  async #followDrains(): Promise<void> {
    for await (const marks of this.#parts.queue.followDrains(this.#parts.model, this.#until)) {
      this.#drains = marks;
      this.#planSoon();
    }
  }

  async #followEnded(): Promise<void> {
    for await (const ended of this.#parts.queue.followEnded(this.#parts.model, this.#until)) {
      if (ended.requeued) {
        this.#state.requeue(ended, performance.now());
      } else {
        this.#state.remove(ended.requestId, ended.released, performance.now());
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

  /** What ends from now on lies in a file that the store will remove: owners write again what lives for longer. */
  async #turnFile(): Promise<void> {
    const { queue, log } = this.#parts;
    this.#isFileUsed = false;
    this.#turnedMs = performance.now();
    await queue.turnFile().catch((error: unknown) => {
      this.#isFileUsed = true;
      log.debug({ error: ClusterError.from(error) }, 'no new file of the queue begun');
    });
  }

  #reconcile(): void {
    const { groups, model } = this.#parts;
    this.#state.reconcile(groups.alive(model, performance.now()), performance.now());
  }

  /** Sessions are opened before anything is sent on them, so that a group that is called routable is. */
  #holdSessions(): void {
    const { groups, model, sessions, log } = this.#parts;
    for (const { group, incarnation, address } of groups.ready(model, performance.now())) {
      try {
        sessions.hold({ model, group, incarnation, address });
      } catch (error) {
        log.debug({ error: ClusterError.from(error), group }, 'session not opened');
      }
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
    if (this.#drains !== undefined) {
      this.#assignAll(this.#drains);
      this.#publishSoon(this.#drains);
    }
  }

  #assignAll(drains: DrainMarks): void {
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
        // Believed at once, so that the next plan does not place it again.
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
    const { model, queue, log } = this.#parts;
    const queued = this.#state.get(requestId);
    if (queued === undefined) {
      return;
    }
    const { group, incarnation, address, identity } = target;
    const { gatewayId } = queued.record;
    try {
      const reply = await queue.assign(gatewayId, {
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
        log.warn({ dispatcherEpoch: this.#epoch, gatewayId }, 'dispatcher is stale');
        this.#stop.abort();
      } else {
        this.#state.remove(requestId, false, performance.now());
        await queue.delete(queued);
      }
    } catch (error) {
      if (this.#until.aborted) {
        return;
      }
      const { code } = ClusterError.from(error);
      log.debug({ code, requestId, gatewayId }, 'assignment not answered');
      for (const orphan of this.#state.unanswered(requestId, code === 'not_found', performance.now())) {
        this.#orphan(orphan);
      }
    }
  }

  /** Deletes the record of a request that nobody holds any more. */
  #orphan(requestId: string): void {
    const queued = this.#state.get(requestId);
    if (queued !== undefined) {
      const { model, queue, metrics, log } = this.#parts;
      this.#state.remove(requestId, false, performance.now());
      metrics.orphans({ model });
      log.warn({ requestId, gatewayId: queued.record.gatewayId }, 'orphaned record deleted');
      queue.delete(queued).catch((error: unknown) => {
        log.debug({ error: ClusterError.from(error), requestId }, 'orphaned record not deleted');
      });
    }
  }

  #publishSoon(drains: DrainMarks): void {
    const nowMs = performance.now();
    const sinceMs = nowMs - this.#publishedMs;
    // A gateway that has just come may not have heard of every group yet, which is not their absence.
    const knowsGroups = nowMs - this.#beganMs >= heartbeatQuietMs;
    if (!this.#replayed || !knowsGroups || this.#publishTimer !== undefined) {
      return;
    }
    if (sinceMs < publishMs) {
      this.#publishTimer = setTimeout(() => {
        this.#publishTimer = undefined;
        this.#planSoon();
      }, publishMs - sinceMs);
      return;
    }
    const state = this.#readState(drains);
    const content = JSON.stringify({ ...state, oldestWaitingMs: 0 });
    if (content !== this.#published || sinceMs >= republishMs) {
      this.#published = content;
      this.#publishedMs = nowMs;
      this.#parts.queue.publishState(state);
    }
  }

  #readState(drains: DrainMarks): QueueState {
    const { model, groups, sessions } = this.#parts;
    const nowMs = performance.now();
    const loads = this.#state.loads();
    const ready = groups.ready(model, nowMs);
    const readyNames = new Set(ready.map(({ group }) => group));
    const alive = groups.alive(model, nowMs).toSorted((a, b) => (a.group < b.group ? -1 : 1));
    return {
      model,
      dispatcherEpoch: this.#epoch,
      ...this.#state.summary(nowMs),
      readyGroups: ready.length,
      slots: ready
        .filter(({ group }) => !drains.has(group))
        .reduce((sum, { maxSequences }) => sum + maxSequences, 0),
      groups: alive.map((heartbeat) => {
        const load = loads.get(placeKey(heartbeat));
        return {
          group: heartbeat.group,
          incarnation: heartbeat.incarnation,
          revision: heartbeat.revision,
          identity: heartbeat.identity,
          routable: readyNames.has(heartbeat.group) && sessions.isRoutable(heartbeat),
          draining: drains.has(heartbeat.group) || heartbeat.state === GroupState.DRAINING,
          slots: heartbeat.maxSequences,
          inFlightRequests: load?.requests ?? 0,
          inFlightTokens: load?.tokens ?? 0,
        };
      }),
    };
  }
}
