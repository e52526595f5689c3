// The API server's `Status` objects as ClusterErrors. Owns the table from HTTP status to error code; the server's own
// reason stays readable with `hasReason`, since two of them can share a code.

import { ClusterError, type ErrorCode, type ErrorDetail } from '@mimo/core/process/errors';

/** The API server's answer to a rejected request, or at the end of a watch. */
export interface ApiStatus {
  /** HTTP status. */
  readonly code: number;
  readonly reason?: string;
  readonly message?: string;
  readonly details?: {
    readonly causes?: readonly { readonly field?: string; readonly message?: string }[];
    readonly retryAfterSeconds?: number;
  };
}

/** Reasons that callers distinguish: both `Conflict` and `AlreadyExists` are 409, `Expired` and `Gone` are 410. */
export type StatusReason = 'AlreadyExists' | 'Conflict' | 'Expired' | 'NotFound';

const codes: Readonly<Record<number, ErrorCode>> = {
  400: 'invalid_argument',
  401: 'permission_denied',
  403: 'permission_denied',
  404: 'not_found',
  405: 'invalid_argument',
  408: 'unavailable',
  409: 'aborted',
  410: 'aborted',
  413: 'invalid_argument',
  415: 'invalid_argument',
  422: 'invalid_argument',
  429: 'unavailable',
};

/** The error for a status; `retryAfterMs` from the reply's header wins over the status's own. */
export function statusError(status: ApiStatus, doing: string, retryAfterMs?: number): ClusterError {
  const code = codes[status.code] ?? (status.code >= 500 ? 'unavailable' : 'internal');
  const message = `${doing}: ${status.message || status.reason || `HTTP ${status.code}`}`;
  return new ClusterError(code, message, { cause: status, detail: detailOf(status, retryAfterMs) });
}

/** Whether an error is the API server's, for that reason. */
export function hasReason(error: unknown, reason: StatusReason): boolean {
  const status = statusOf(error);
  // 410 comes as Expired (resource version, continue token) and as Gone (older paths); both mean: list again.
  return reason === 'Expired' ? status?.code === 410 : status?.reason === reason;
}

/** The API server's HTTP status; undefined without one. */
export function httpStatusOf(error: unknown): number | undefined {
  return statusOf(error)?.code;
}

function statusOf(error: unknown): ApiStatus | undefined {
  const cause = error instanceof ClusterError ? error.cause : undefined;
  return isApiStatus(cause) ? cause : undefined;
}

/** Whether a reply's body, or the object of an ERROR event, is a status. */
export function isApiStatus(value: unknown): value is ApiStatus {
  return typeof value === 'object' && value !== null && 'code' in value && typeof value.code === 'number';
}

function detailOf({ code, details }: ApiStatus, retryAfterMs: number | undefined): ErrorDetail {
  const seconds = details?.retryAfterSeconds;
  const waitMs = retryAfterMs ?? (seconds === undefined ? undefined : seconds * 1000);
  const fieldViolations =
    code === 422
      ? (details?.causes ?? []).map((cause) => ({
          field: cause.field ?? '',
          description: cause.message ?? '',
        }))
      : [];
  return {
    ...(fieldViolations.length > 0 && { fieldViolations }),
    ...(waitMs !== undefined && { retryAfterMs: waitMs }),
  };
}
