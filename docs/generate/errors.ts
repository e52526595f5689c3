// Every error code with its gRPC and HTTP status, from the one table of them.

import * as grpc from '@grpc/grpc-js';

import { errorTable } from '@mimo/core/process/errors';

import { code, pageOf, tableOf } from './markdown.ts';

/** The page of error codes. */
export function errorsPage(): string {
  const rows = Object.entries(errorTable).map(([name, { grpcStatus, httpStatus, textLeaves }]) => [
    code(name),
    `${grpcStatus} ${grpc.status[grpcStatus]}`,
    String(httpStatus),
    textLeaves ? 'the error' : 'a constant text; the error is in the server’s log',
  ]);
  const parts = [
    'Each error has one of these codes. Its message names the field, the limit and the value. `BadRequest` and ' +
      '`RetryInfo` come as `google.rpc` details.',
    tableOf(['code', 'gRPC status', 'HTTP status', 'what the client reads'], rows),
  ];
  return pageOf({ title: 'Error codes', source: 'core’s error table', parts });
}
