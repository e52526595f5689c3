// Why the queue rejects a record. A refusal is an error with a reason from a closed set, fit for metric labels, and a
// text that names the cause, for clients and the log. nats/errors.ts reads the reason from what a server answers.

import { ClusterError, type ErrorCode } from '../process/errors.ts';

/**
 * `disconnected`: no server can be reached. `missing`: the server has no such stream. `unanswered`: the stream does
 * not acknowledge. `disk_failed`: the server cannot write, for example because its disk is full. `full`: a limit of
 * the stream or of the server
 * is reached, or nearly. `too_large`: this one record is over the server's limit. `failed`: anything else.
 */
export type RefusalReason =
  | 'disconnected'
  | 'missing'
  | 'unanswered'
  | 'disk_failed'
  | 'full'
  | 'too_large'
  | 'failed';

const codes: Readonly<Record<RefusalReason, ErrorCode>> = {
  disconnected: 'unavailable',
  missing: 'unavailable',
  unanswered: 'unavailable',
  disk_failed: 'unavailable',
  full: 'resource_exhausted',
  too_large: 'invalid_argument',
  failed: 'unavailable',
};

const retryAfterMs = 1_000;
/** A full queue gets room as requests end, which takes seconds. */
const retryFullAfterMs = 5_000;

/** The error for a record that was not stored. */
export class QueueRefusal extends ClusterError {
  readonly reason: RefusalReason;

  constructor(reason: RefusalReason, message: string, cause?: unknown) {
    const detail =
      reason === 'too_large' ? {} : { retryAfterMs: reason === 'full' ? retryFullAfterMs : retryAfterMs };
    super(codes[reason], message, { cause, detail });
    this.reason = reason;
  }
}
