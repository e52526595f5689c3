// The gateway's own metrics, by name. Times are handed over in milliseconds.

import type { Metrics } from '@mimo/core/metrics';

/** What the gateway measures. */
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
  readonly orphans: (labels: { readonly model: string }) => void;
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
    orphans: metrics.counter(
      'queue_orphaned_requests_total',
      'Records deleted because their gateway is gone',
    ),
  };
}
