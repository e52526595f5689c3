// The one error class and its closed set of codes. Owns the table from code to gRPC status and HTTP status; knows no
// transport. Everything that a `catch` receives enters through `ClusterError.from`.

/** The codes of Connect that the cluster uses. A new one is a decision. */
export type ErrorCode =
  | 'invalid_argument'
  | 'unauthenticated'
  | 'permission_denied'
  | 'not_found'
  | 'resource_exhausted'
  | 'failed_precondition'
  | 'canceled'
  | 'deadline_exceeded'
  | 'unavailable'
  | 'aborted'
  | 'data_loss'
  | 'unimplemented'
  | 'internal';

/** A code's meaning outside: its gRPC status number, its HTTP status, and whether its text may leave the process. */
export interface ErrorMapping {
  readonly grpcStatus: number;
  readonly httpStatus: number;
  /** False: clients get a constant text, and the log gets the real one. */
  readonly textLeaves: boolean;
}

export const errorTable: Readonly<Record<ErrorCode, ErrorMapping>> = {
  canceled: { grpcStatus: 1, httpStatus: 499, textLeaves: true },
  invalid_argument: { grpcStatus: 3, httpStatus: 400, textLeaves: true },
  deadline_exceeded: { grpcStatus: 4, httpStatus: 504, textLeaves: true },
  not_found: { grpcStatus: 5, httpStatus: 404, textLeaves: true },
  permission_denied: { grpcStatus: 7, httpStatus: 403, textLeaves: true },
  resource_exhausted: { grpcStatus: 8, httpStatus: 429, textLeaves: true },
  failed_precondition: { grpcStatus: 9, httpStatus: 409, textLeaves: true },
  aborted: { grpcStatus: 10, httpStatus: 503, textLeaves: true },
  unimplemented: { grpcStatus: 12, httpStatus: 501, textLeaves: true },
  internal: { grpcStatus: 13, httpStatus: 500, textLeaves: false },
  unavailable: { grpcStatus: 14, httpStatus: 503, textLeaves: true },
  data_loss: { grpcStatus: 15, httpStatus: 500, textLeaves: false },
  unauthenticated: { grpcStatus: 16, httpStatus: 401, textLeaves: true },
};

/** Whether a text, for example from the network, is a code of the closed set. */
export function isErrorCode(text: string): text is ErrorCode {
  return Object.hasOwn(errorTable, text);
}

/** One invalid field of a request; the message names the limit and the value. */
export interface FieldViolation {
  /** Path in the request, such as `sampling.temperature`. */
  readonly field: string;
  readonly description: string;
}

/** Facts for the client's program, sent as google.rpc details. */
export interface ErrorDetail {
  readonly fieldViolations?: readonly FieldViolation[];
  /** When the client should retry. */
  readonly retryAfterMs?: number;
}

/** Options of a new error: its cause, and details for the client. */
export interface ClusterErrorOptions {
  readonly cause?: unknown;
  readonly detail?: ErrorDetail;
}

/** The only error that leaves a package. The message names the field, the limit and the value. */
export class ClusterError extends Error {
  readonly code: ErrorCode;
  readonly detail: ErrorDetail;

  constructor(code: ErrorCode, message: string, options: ClusterErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.name = 'ClusterError';
    this.code = code;
    this.detail = options.detail ?? {};
  }

  /**
   * Turns a caught value into a ClusterError. An abort becomes `canceled`, a time-out `deadline_exceeded`,
   * anything unknown `internal`; a ClusterError stays itself. Texts that may quote input are withheld, see `textOf`.
   */
  static from(error: unknown): ClusterError {
    if (error instanceof ClusterError) {
      return error;
    }
    if (error instanceof Error) {
      if (error.name === 'TimeoutError') {
        return new ClusterError('deadline_exceeded', error.message, { cause: error });
      }
      if (error.name === 'AbortError') {
        return error.cause === undefined
          ? new ClusterError('canceled', error.message, { cause: error })
          : ClusterError.from(error.cause);
      }
      return new ClusterError('internal', textOf(error), { cause: error });
    }
    return new ClusterError('internal', withheldTextOf(error));
  }
}

/**
 * Parsers quote what they read; a TypeError quotes values: "Cannot create property 'x' on string '…'", "Received
 * '…'".
 */
const quotingErrors = new Set(['SyntaxError', 'ZodError', '$ZodError', 'YAMLException', 'TypeError']);

/** The message of an error, unless it is of a kind that quotes what was being read: a key, a prompt, a template. */
export function textOf(error: Error): string {
  return quotingErrors.has(error.name) ? withheldTextOf(error) : error.message;
}

/** The kind of an error and its place in the code, for errors whose message may quote anything. */
export function withheldTextOf(error: unknown): string {
  if (!(error instanceof Error)) {
    return `a value of type ${typeof error} was thrown, which is not an Error`;
  }
  // The first in a file: the engine's own functions have none.
  const [, place] = /([\w.-]+:\d+:\d+)\)?$/m.exec(placesOf(error).join('\n')) ?? [];
  const at = place === undefined ? '' : ` at ${place}`;
  return `${error.name}${at}: withheld, because it may quote the input`;
}

/**
 * The lines of a stack that name places in the code; its first lines repeat the message, which may look like such
 * lines.
 */
export function placesOf({ stack = '', message }: Error): readonly string[] {
  const at = stack.indexOf(message);
  return (at < 0 ? stack : stack.slice(at + message.length))
    .split('\n')
    .filter((line) => /^ +at /.test(line));
}
