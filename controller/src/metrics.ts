// The controller's own metrics, by name. Times are handed over in milliseconds.

import type { Metrics } from '@mimo/core/process/metrics';

/** What the controller measures. */
export interface ControllerMetrics {
  readonly rounds: (labels: { readonly result: string }) => void;
  readonly roundTime: (durationMs: number) => void;
  readonly decisions: (labels: { readonly service: string; readonly reason: string }) => void;
}

/** Makes the instruments. */
export function createControllerMetrics(metrics: Metrics): ControllerMetrics {
  return {
    rounds: metrics.counter('controller_reconcile_total', 'Rounds of services, by outcome.'),
    roundTime: metrics.duration('controller_reconcile_seconds', 'How long a round of a service took.'),
    decisions: metrics.counter(
      'controller_scale_decisions_total',
      'Decisions that changed the number of groups of a service, by reason.',
    ),
  };
}

/** What the gauges read when the page is read. */
export interface ControllerSources {
  readonly isLeading: () => boolean;
  /** Services waiting for a round. */
  readonly waitingRounds: () => number;
  readonly groups: () => Iterable<{
    readonly service: string;
    readonly wanted: number;
    readonly ready: number;
  }>;
  readonly watches: Iterable<readonly [resource: string, { readonly lastEventAgeMs: number }]>;
}

/** Shows the state of the controller and of its services. */
export function observeController(metrics: Metrics, sources: ControllerSources): void {
  metrics.gauge('controller_leader', '1 if this controller is the leader.', () => [
    [sources.isLeading() ? 1 : 0, {}],
  ]);
  metrics.gauge('controller_work_queue_keys', 'Services waiting for a round.', () => [
    [sources.waitingRounds(), {}],
  ]);
  metrics.gauge(
    'controller_last_event_age_seconds',
    'Time since the API server last sent anything about a resource.',
    () => [...sources.watches].map(([resource, { lastEventAgeMs }]) => [lastEventAgeMs / 1000, { resource }]),
  );
  metrics.gauge('controller_wanted_groups', 'Groups that a service should have.', () =>
    [...sources.groups()].map(({ service, wanted }) => [wanted, { service }]),
  );
  metrics.gauge('controller_ready_groups', 'Groups of a service that are ready.', () =>
    [...sources.groups()].map(({ service, ready }) => [ready, { service }]),
  );
}
