// ClusterError <-> gRPC status. Owns the google.rpc details in the binary trailer `grpc-status-details-bin`
// (BadRequest, RetryInfo) and the rule that the text of `internal` and `data_loss` does not leave the process. Codes
// come from the one table in errors.ts.

import * as grpc from '@grpc/grpc-js';

import { BadRequest, RetryInfo } from '@mimo/proto/error-details';
import { Status } from '@mimo/proto/status';

import {
  ClusterError,
  errorTable,
  type ErrorCode,
  type ErrorDetail,
  type FieldViolation,
} from '../process/errors.ts';

const detailsKey = 'grpc-status-details-bin';
const typePrefix = 'type.googleapis.com/google.rpc.';

/** The error type of grpc-js's callbacks and `error` events. */
export interface GrpcStatus {
  readonly code: grpc.status;
  readonly details: string;
  readonly metadata: grpc.Metadata;
}

// Clients end the connection, with all its calls, if the trailers exceed 8 kB; a text travels in them twice, escaped.
const maxTextBytes = 400;
const maxViolations = 16;
const maxViolationsBytes = 2_048;

/**
 * The status that a client gets for an error; anything but a ClusterError is `internal`. It has at most 16 violations
 * and a few hundred bytes of text, and counts the violations that are left out.
 */
export function statusFromError(error: unknown): GrpcStatus {
  const { code, message, detail } = ClusterError.from(error);
  const mapping = errorTable[code];
  const metadata = new grpc.Metadata();
  const details: Status['details'] = [];
  let text = mapping.textLeaves ? message : `${code} error: see the log of the server`;
  if (mapping.textLeaves && detail.fieldViolations !== undefined) {
    const fieldViolations = boundViolations(detail.fieldViolations);
    const value = BadRequest.encode(BadRequest.fromPartial({ fieldViolations }));
    details.push({ typeUrl: `${typePrefix}BadRequest`, value: Buffer.from(value.finish()) });
    const leftOut = detail.fieldViolations.length - fieldViolations.length;
    text =
      leftOut === 0
        ? text
        : `${detail.fieldViolations.length} problems, the first ${fieldViolations.length} in the details: ${text}`;
  }
  if (detail.retryAfterMs !== undefined) {
    const seconds = Math.floor(detail.retryAfterMs / 1_000);
    const nanos = Math.round((detail.retryAfterMs % 1_000) * 1e6);
    const value = RetryInfo.encode({ retryDelay: { seconds, nanos } });
    details.push({ typeUrl: `${typePrefix}RetryInfo`, value: Buffer.from(value.finish()) });
  }
  text = boundText(text);
  if (details.length > 0) {
    const status = Status.encode({ code: mapping.grpcStatus, message: text, details });
    metadata.set(detailsKey, Buffer.from(status.finish()));
  }
  return { code: mapping.grpcStatus, details: text, metadata };
}

/** The first violations, as many as fit. */
function boundViolations(violations: readonly FieldViolation[]): FieldViolation[] {
  const bounded: FieldViolation[] = [];
  let bytes = 0;
  for (const { field, description } of violations.slice(0, maxViolations)) {
    const violation = { field: boundText(field), description: boundText(description) };
    bytes += Buffer.byteLength(violation.field) + Buffer.byteLength(violation.description);
    if (bytes > maxViolationsBytes && bounded.length > 0) {
      break;
    }
    bounded.push(violation);
  }
  return bounded;
}

/** Well-formed text, since grpc-js throws on anything else, cut at a character. */
function boundText(text: string): string {
  if (text.length <= maxTextBytes && Buffer.byteLength(text) <= maxTextBytes) {
    return text.toWellFormed();
  }
  const room = new Uint8Array(maxTextBytes);
  const { written } = new TextEncoder().encodeInto(text.slice(0, maxTextBytes), room);
  return `${new TextDecoder().decode(room.subarray(0, written))}…`;
}

const codeOfStatus = new Map<number, ErrorCode>(
  Object.entries(errorTable).map(([code, { grpcStatus }]) => [grpcStatus, code as ErrorCode]),
);

/** Reads the error of a gRPC call back into a ClusterError, with its details; other errors go through `from`. */
export function errorFromStatus(error: unknown): ClusterError {
  if (!isServiceError(error)) {
    return ClusterError.from(error);
  }
  const code = codeOfStatus.get(error.code) ?? 'internal';
  return new ClusterError(code, error.details, { cause: error, detail: detailOf(error.metadata) });
}

function isServiceError(error: unknown): error is grpc.ServiceError {
  return error instanceof Error && 'code' in error && typeof error.code === 'number' && 'details' in error;
}

function detailOf(metadata: grpc.Metadata | undefined): ErrorDetail {
  const [bytes] = metadata?.get(detailsKey) ?? [];
  const detail: { -readonly [Key in keyof ErrorDetail]: ErrorDetail[Key] } = {};
  if (bytes instanceof Buffer) {
    for (const { typeUrl, value } of Status.decode(bytes).details) {
      if (typeUrl === `${typePrefix}BadRequest`) {
        detail.fieldViolations = BadRequest.decode(value).fieldViolations.map(({ field, description }) => ({
          field,
          description,
        }));
      } else if (typeUrl === `${typePrefix}RetryInfo`) {
        const { seconds, nanos } = RetryInfo.decode(value).retryDelay ?? { seconds: 0, nanos: 0 };
        detail.retryAfterMs = seconds * 1_000 + nanos / 1e6;
      }
    }
  }
  return detail;
}
