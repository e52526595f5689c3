// Deadlines of the calls to our servers. A client sends the time left as `grpc-timeout`. grpc-js converts it to a
// 32-bit number, so that 25 days or more end the call at once, and to a point in time on the wall clock, which moves
// when the clock is set. Here every length works, on the monotonic clock, and a malformed header is rejected.

import { BaseServerInterceptingCall } from '@grpc/grpc-js/build/src/server-interceptors.js';
import { status, type StatusObject } from '@grpc/grpc-js';

import { ClusterError } from '../process/errors.ts';
import { startTimer } from '../process/timer.ts';

/** gRPC over HTTP/2, "Timeout": at most eight digits and a unit. */
const timeoutPattern = /^(\d{1,8})([HMSmun])$/;
const unitMs: Readonly<Record<string, number>> = {
  H: 3_600_000,
  M: 60_000,
  S: 1_000,
  m: 1,
  u: 1e-3,
  n: 1e-6,
};

/** The milliseconds of a `grpc-timeout` header; undefined if it is malformed. */
export function timeoutMsOf(header: string): number | undefined {
  const [, digits, unit] = timeoutPattern.exec(header) ?? [];
  const factor = unitMs[unit ?? ''];
  return factor === undefined ? undefined : Number(digits) * factor;
}

/** What of a call of grpc-js is used; server.test.ts notices when a release keeps it elsewhere. */
interface DeadlineCall {
  deadline: number;
  readonly stream: { once(event: 'close', listener: () => void): unknown };
  sendStatus(status: Pick<StatusObject, 'code' | 'details'>): void;
}

const hook = 'handleTimeoutHeader';

/** Makes the servers of this process read deadlines this way from now on. Idempotent. */
export function keepLongDeadlines(): void {
  if (typeof Reflect.get(BaseServerInterceptingCall.prototype, hook) !== 'function') {
    throw new ClusterError('internal', `this version of grpc-js does not read deadlines in ${hook}`);
  }
  Reflect.set(BaseServerInterceptingCall.prototype, hook, takeTimeout);
}

function takeTimeout(this: DeadlineCall, header: string): void {
  const timeoutMs = timeoutMsOf(header);
  if (timeoutMs === undefined) {
    const shown = JSON.stringify(header.slice(0, 40));
    const details = `grpc-timeout must be 1 to 8 digits and a unit (H, M, S, m, u or n), not ${shown}`;
    // The call is incomplete until its constructor has ended.
    process.nextTick(() => this.sendStatus({ code: status.INVALID_ARGUMENT, details }));
    return;
  }
  this.deadline = performance.now() + timeoutMs;
  const timer = startTimer(timeoutMs, () =>
    this.sendStatus({ code: status.DEADLINE_EXCEEDED, details: 'the deadline passed' }),
  );
  this.stream.once('close', () => timer.clear());
}
