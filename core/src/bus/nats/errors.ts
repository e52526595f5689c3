// What a NATS server's errors mean. Owns the server's error codes; the ports throw ClusterErrors alone.

import { JetStreamApiError } from '@nats-io/jetstream';
import { errors } from '@nats-io/transport-node';

import { ClusterError } from '../../process/errors.ts';
import { QueueRefusal } from '../queue-refusal.ts';

const streamNotFoundCode = 10059;
/** More bytes than the server has for streams. */
const storageExceededCode = 10047;
/** Insufficient resources. */
const noResourcesCode = 10023;
/** A store that failed, with its reason. */
const storeFailedCode = 10077;
/** "The last sequence of this key is a different one". */
const wrongLastSequenceCodes = new Set([10071, 10164]);
// A message that is not there. The last one is also any other trouble with a deletion.
const noMessageCodes = new Set([10037, 10043]);
const deletionFailedCode = 10057;
/** What operating systems say; the paths around it are the operator's business. */
const diskFailures = /no space left on device|disk quota exceeded|read-only file system|input\/output error/;

/** The error without a connection, or without an answer. */
export function unavailable(message: string, cause?: unknown): ClusterError {
  return new ClusterError('unavailable', message, { cause, detail: { retryAfterMs: 1_000 } });
}

/** Another process has written the key, or the subject, since it was read. */
export function isTaken(error: unknown): boolean {
  return error instanceof JetStreamApiError && wrongLastSequenceCodes.has(error.code);
}

/** The server has no such stream, and so no such bucket. */
export function isStreamMissing(error: unknown): boolean {
  return error instanceof JetStreamApiError && error.code === streamNotFoundCode;
}

/** The server has less room than a stream needs. */
export function isTooLarge(error: unknown): boolean {
  return error instanceof JetStreamApiError && error.code === storageExceededCode;
}

/** The stream has no such message. */
export function isNoMessage(error: unknown): boolean {
  return (
    error instanceof JetStreamApiError &&
    (noMessageCodes.has(error.code) ||
      (error.code === deletionFailedCode && /no message|store EOF|deleted message/.test(error.message)))
  );
}

/** Nobody listens on the subject of a request. */
export function isNobodyThere(error: unknown): boolean {
  return (
    error instanceof errors.NoRespondersError ||
    (error instanceof Error && error.cause instanceof errors.NoRespondersError)
  );
}

/** Reads why a write failed; `text` names the failed action. */
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
  return new QueueRefusal(isFull(error, message) ? 'full' : 'failed', `${text}: ${message}`, error);
}

function isFull(error: unknown, message: string): boolean {
  return (
    error instanceof JetStreamApiError &&
    (error.code === noResourcesCode ||
      error.code === storageExceededCode ||
      (error.code === storeFailedCode && message.startsWith('maximum ')))
  );
}
