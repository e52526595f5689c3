// grpc-js's own log. It prints to standard error what peers sent, an invalid `authorization` with its key for one, so its
// text is withheld whole: a line of ours says what it was about. Servers and clients withhold it by themselves; a process
// with a log hands that over.

import * as grpc from '@grpc/grpc-js';

import type { Log } from '../process/log.ts';

let log: Log | undefined;

/** What grpc-js reports as errors, by how its texts begin. */
const subjects = new Map([
  ['Failed to add metadata entry', 'a metadata entry of a peer is not valid'],
  ['Failed to set secure context', 'the TLS credentials cannot be used'],
]);

function report(level: 'debug' | 'error', text: unknown): void {
  const known =
    typeof text === 'string' ? [...subjects].find(([begin]) => text.startsWith(begin)) : undefined;
  const about = known?.[1] ?? 'withheld, it may quote what a peer sent';
  log?.[level]({ about }, 'grpc-js reports');
}

/** Silences grpc-js in this process. Idempotent. */
export function withholdGrpcLog(): void {
  grpc.setLogger({
    error: (text: unknown) => report('error', text),
    info: (text: unknown) => report('debug', text),
    debug: (text: unknown) => report('debug', text),
  });
}

/** From here on, what grpc-js reports is a line of this log; its words are not. */
export function reportGrpcTo(target: Log): void {
  log = target;
  withholdGrpcLog();
}
