// Why the queue rejects a record. A refusal is an error with a reason from a closed set, fit for metric labels, and a
// text that names the cause, for clients and the log.

import { JetStreamApiError } from '@nats-io/jetstream';
import { errors } from '@nats-io/transport-node';

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

// The server's codes: insufficient resources, storage resources exceeded, store failed (with a reason in its text).
const fullCodes = new Set([10023, 10047]);
const storeFailedCode = 10077;
/** What operating systems say; the paths around it are the operator's business. */
const diskFailures = /no space left on device|disk quota exceeded|read-only file system|input\/output error/;

/** Turns the error of a publish into a refusal; `text` says what failed. */
export function refusalOf(error: unknown, text = 'the queue did not store the request'): QueueRefusal {
  if (error instanceof QueueRefusal) {
    return error;
  }
  const { message } = ClusterError.from(error);
  if (error instanceof Error && error.cause instanceof errors.RequestError && error.cause.isNoResponders()) {
    return new QueueRefusal('missing', `${text}: its stream is missing`, error);
  }
  if (error instanceof errors.TimeoutError) {
    return new QueueRefusal('unanswered', `${text}: it did not acknowledge in time`, error);
  }
  const diskFailure = diskFailures.exec(message)?.[0];
  if (diskFailure !== undefined) {
    return new QueueRefusal('disk_failed', `${text}: its server cannot write, ${diskFailure}`, error);
  }
  const isFull =
    error instanceof JetStreamApiError &&
    (fullCodes.has(error.code) || (error.code === storeFailedCode && message.startsWith('maximum ')));
  return new QueueRefusal(isFull ? 'full' : 'failed', `${text}: ${message}`, error);
}
