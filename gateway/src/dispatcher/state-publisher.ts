// Publishes a dispatcher's queue state: the backlog and each group, at every change and at a steady pace. Reads the
// dispatcher's view; decides nothing.

import type { MarkedGroups } from '@mimo/core/bus/drain-marks';
import type { QueueState, QueueStates } from '@mimo/core/bus/signals';
import { GroupState } from '@mimo/proto/worker';

import type { Sessions } from '../session.ts';
import { placeKey, type DispatchState } from './dispatch-state.ts';
import { heartbeatQuietMs, type Groups } from './groups.ts';

/** The publisher's dependencies. */
export interface StatePublisherParts {
  readonly model: string;
  readonly dispatcherEpoch: number;
  readonly queueStates: Pick<QueueStates, 'publish'>;
  readonly groups: Groups;
  readonly sessions: Pick<Sessions, 'isRoutable'>;
  readonly state: DispatchState;
  /** Called when a delayed change may be published. */
  readonly onDue: () => void;
}

/** A changed state is published at once, but at most once per `publishMs`; an unchanged one every second. */
const publishMs = 50;
const republishMs = 1_000;

/** Publishes for one term of a dispatcher. Close it. */
export class StatePublisher {
  readonly #parts: StatePublisherParts;
  readonly #beganMs = performance.now();
  #publishedMs = Number.NEGATIVE_INFINITY;
  #published = '';
  #timer: NodeJS.Timeout | undefined;

  constructor(parts: StatePublisherParts) {
    this.#parts = parts;
  }

  /** Publishes the state if it has changed or its last publication is old. */
  publish(drains: MarkedGroups): void {
    const nowMs = performance.now();
    const sinceMs = nowMs - this.#publishedMs;
    // A new gateway may not have a heartbeat of every group yet; the others may still exist.
    const knowsGroups = nowMs - this.#beganMs >= heartbeatQuietMs;
    if (!knowsGroups || this.#timer !== undefined) {
      return;
    }
    if (sinceMs < publishMs) {
      this.#timer = setTimeout(() => {
        this.#timer = undefined;
        this.#parts.onDue();
      }, publishMs - sinceMs);
      return;
    }
    const state = this.#readState(drains);
    const content = JSON.stringify({ ...state, oldestWaitingMs: 0 });
    if (content !== this.#published || sinceMs >= republishMs) {
      this.#published = content;
      this.#publishedMs = nowMs;
      this.#parts.queueStates.publish(state);
    }
  }

  /** Stops publishing. */
  close(): void {
    clearTimeout(this.#timer);
  }

  #readState(drains: MarkedGroups): QueueState {
    const { model, dispatcherEpoch, groups, sessions, state: believed } = this.#parts;
    const nowMs = performance.now();
    const loads = believed.loads();
    const ready = groups.ready(model, nowMs);
    const readyNames = new Set(ready.map(({ group }) => group));
    const alive = groups.alive(model, nowMs).toSorted((a, b) => (a.group < b.group ? -1 : 1));
    return {
      model,
      dispatcherEpoch,
      ...believed.summary(nowMs),
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
