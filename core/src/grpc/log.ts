// grpc-js's own log. It prints data from peers to standard error, for example an invalid `authorization` with its
// key. So its text is withheld and replaced by a line of ours about the subject. Servers and clients withhold it by
// themselves; a process with a log passes its log here.

import * as grpc from '@grpc/grpc-js';

import type { Log } from '../process/log.ts';

let log: Log | undefined;

/** The errors that grpc-js reports, by the beginning of their texts. */
const subjects = new Map([
  ['Failed to add metadata entry', 'a peer sent an invalid metadata entry'],
  ['Failed to set secure context', 'the TLS credentials cannot be used'],
]);

function report(level: 'debug' | 'error', text: unknown): void {
  const known =
    typeof text === 'string' ? [...subjects].find(([begin]) => text.startsWith(begin)) : undefined;
  const about = known?.[1] ?? 'withheld, because it may quote data of a peer';
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

/** From now on, each report of grpc-js becomes a line of this log, without its text. */
export function reportGrpcTo(target: Log): void {
  log = target;
  withholdGrpcLog();
}
