// What the processes of a cluster say to one another through NATS, as ports by concern: a process takes the ports that
// it uses. nats/bus.ts implements all of them over one connection, memory/bus.ts in one process;
// tests/cluster/queue.test.ts holds both to the promises in the ports' comments. Tokens never travel here.

import type { DrainMarks } from './drain-marks.ts';
import type { Leases } from './leases.ts';
import type { Records } from './records.ts';
import type { Heartbeats, QueueStates, Signals } from './signals.ts';

/**
 * The ports of one connection. Methods fail with `unavailable` (and `retryAfterMs`) while the server cannot be reached;
 * the connection is retried forever. Iterations end without an error when their signal fires or the bus is closed.
 */
export interface Bus {
  /** `memory` is not durable and lives in one process: a process that uses it warns. */
  readonly kind: 'nats' | 'memory';
  /** The stores can be used at this moment. */
  readonly connected: boolean;
  readonly records: Records;
  readonly leases: Leases;
  readonly signals: Signals;
  readonly heartbeats: Heartbeats;
  readonly queueStates: QueueStates;
  readonly drainMarks: DrainMarks;
  /** Waits until the stores can be used for the first time. Rejects with the signal's reason if that fires first. */
  opened(signal: AbortSignal): Promise<void>;
  /** Ends the iterations, releases the leases and leaves the server. */
  close(): Promise<void>;
}
