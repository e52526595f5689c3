// The gateway's own metrics, by name. Times are passed in milliseconds.

import type { Labels, Metrics } from '@mimo/core/process/metrics';
import type { RefusalReason } from '@mimo/core/bus/queue-refusal';
import type { Bus } from '@mimo/core/bus/bus';
import { queueStateFreshMs, type QueueState } from '@mimo/core/bus/signals';
import type { GateCounts } from '@mimo/core/grpc/gate';

/** The gateway's metrics. */
export interface GatewayMetrics {
  /** From the whole request to its first token written to the client. */
  readonly timeToFirstToken: (durationMs: number, labels: { readonly model: string }) => void;
  /** From one write with tokens to the next; a write may hold several. */
  readonly interTokenLatency: (durationMs: number, labels: { readonly model: string }) => void;
  /** From the record to the first attempt. */
  readonly queueWait: (durationMs: number, labels: { readonly model: string }) => void;
  readonly requests: (labels: { readonly code: string; readonly method: string }) => void;
  readonly completionTokens: (labels: { readonly model: string }, count: number) => void;
  readonly requeues: (labels: { readonly model: string }) => void;
  readonly moves: (labels: { readonly model: string; readonly cause: 'broken' | 'handed over' }) => void;
  readonly stalls: (labels: { readonly model: string }) => void;
  readonly parks: (labels: { readonly model: string }) => void;
  readonly queueRefusals: (labels: { readonly reason: RefusalReason }) => void;
  readonly orphans: (labels: { readonly model: string }) => void;
  /** From a prompt's arrival to its token ids, or to its refusal. */
  readonly promptTime: (durationMs: number, labels: { readonly model: string }) => void;
  readonly promptFailures: (labels: { readonly model: string; readonly cause: 'timeout' | 'crash' }) => void;
}

/** Makes the instruments. */
export function createGatewayMetrics(metrics: Metrics): GatewayMetrics {
  return {
    timeToFirstToken: metrics.duration(
      'gateway_time_to_first_token_seconds',
      'From the whole request to the first token written to the client',
    ),
    interTokenLatency: metrics.duration(
      'gateway_inter_token_latency_seconds',
      'From one write with tokens to the next',
    ),
    queueWait: metrics.duration('gateway_queue_wait_seconds', 'From the durable record to the first attempt'),
    requests: metrics.counter('gateway_requests_total', 'Calls that have ended, by code'),
    completionTokens: metrics.counter(
      'gateway_completion_tokens_total',
      'Completion tokens written to clients',
    ),
    requeues: metrics.counter('gateway_requeues_total', 'Attempts that failed before a token was delivered'),
    moves: metrics.counter(
      'gateway_moves_total',
      'Streams that lost their group after some tokens and wait for another, by cause',
    ),
    stalls: metrics.counter(
      'gateway_stalled_streams_total',
      'Streams ended because their client read nothing',
    ),
    parks: metrics.counter(
      'gateway_parks_total',
      'Streams that gave up their slot in a group because their client was slow',
    ),
    promptTime: metrics.duration(
      'gateway_prompt_read_seconds',
      'From a prompt to its token ids: waiting, chat template and tokenizer',
    ),
    promptFailures: metrics.counter(
      'gateway_prompt_failures_total',
      'Prompts whose chat template or tokenizer failed or timed out, by cause',
    ),
    queueRefusals: metrics.counter(
      'gateway_queue_refusals_total',
      'Records that the queue did not store, by reason',
    ),
    orphans: metrics.counter(
      'queue_orphaned_requests_total',
      'Records deleted because their gateway is gone',
    ),
  };
}

/** A dispatcher's state and its time of arrival, by performance.now(). */
export interface ReceivedState {
  readonly state: QueueState;
  readonly receivedMs: number;
}

/** The sources of the gauges, read at each scrape. */
export interface GatewaySources {
  readonly records: Pick<Bus['records'], 'fault'>;
  readonly requests: { counts(): { readonly requests: number } };
  readonly models: { all(): readonly unknown[]; readonly pending: readonly unknown[] };
  readonly gateCounts: () => GateCounts | undefined;
  /** The state that each dispatcher published last, by model. */
  readonly states: ReadonlyMap<string, ReceivedState>;
}

/** Shows the state of the gateway and of the queues. */
export function observeGateway(metrics: Metrics, sources: GatewaySources): void {
  const { records, requests, models, gateCounts, states } = sources;
  metrics.gauge('gateway_running_requests', 'Requests accepted and not ended', () => [
    [requests.counts().requests, {}],
  ]);
  metrics.gauge(
    'gateway_queue_connected',
    '1 while the queue can store requests, tested every second',
    () => [[records.fault === undefined ? 1 : 0, {}]],
  );
  metrics.gauge('gateway_connections', 'Open connections, and whether a call was admitted on them', () => {
    const { provenConnections = 0, unprovenConnections = 0 } = gateCounts() ?? {};
    return [
      [provenConnections, { state: 'proven' }],
      [unprovenConnections, { state: 'unproven' }],
    ];
  });
  metrics.gauge('gateway_unanswered_bytes', 'Bytes of requests that are arriving or not answered yet', () => [
    [gateCounts()?.unansweredBytes ?? 0, {}],
  ]);
  metrics.gauge(
    'gateway_models',
    'Models of this gateway: served, and in the catalogue but not served yet',
    () => [
      [models.all().length, { state: 'served' }],
      [models.pending.length, { state: 'pending' }],
    ],
  );
  observeQueues(metrics, () => states.values());
}

/**
 * Shows the queue states that the dispatchers publish; every gateway shows the same. A model whose dispatcher has
 * been silent for `queueStateFreshMs` has no value: unknown is not zero.
 */
export function observeQueues(metrics: Metrics, states: () => Iterable<ReceivedState>): void {
  const gauge = (
    name: string,
    description: string,
    read: (state: QueueState) => readonly (readonly [number, Labels])[],
  ): void =>
    metrics.gauge(name, description, () =>
      [...states()]
        .filter(({ receivedMs }) => performance.now() - receivedMs < queueStateFreshMs)
        .flatMap(({ state }) =>
          read(state).map(([value, labels]) => [value, { model: state.model, ...labels }] as const),
        ),
    );
  gauge('queue_depth_requests', 'Requests recorded and not ended: waiting and running', (state) => [
    [state.waitingRequests, { state: 'waiting' }],
    [state.runningRequests, { state: 'running' }],
    [state.parkedRequests, { state: 'parked' }],
  ]);
  gauge(
    'queue_backlog_tokens',
    'Waiting and running work, in tokens: prompt plus permitted completion',
    (state) => [
      [state.waitingTokens, { state: 'waiting' }],
      [state.inFlightTokens, { state: 'running' }],
    ],
  );
  gauge('queue_oldest_waiting_seconds', 'Age of the request that has waited longest', (state) => [
    [state.oldestWaitingMs / 1_000, {}],
  ]);
  gauge('queue_ready_groups', 'Groups that requests can be assigned to', (state) => [
    [state.readyGroups, {}],
  ]);
}
