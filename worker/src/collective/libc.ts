// The few system calls that bypass the event loop: those on a connected socket, since the step thread runs no event
// loop while it computes, and the exit of a process whose step thread hangs. Owns the binding to libc; descriptors are
// non-blocking, as libuv leaves them. Knows no protocol. Node ignores SIGPIPE, so writing to a closed connection
// returns an error code.

import { constants } from 'node:os';
import koffi from 'koffi';
import { ClusterError } from '@mimo/core/process/errors';

const libc = koffi.load(process.platform === 'darwin' ? 'libSystem.B.dylib' : 'libc.so.6');
const readCall: (fd: number, into: Uint8Array, bytes: number) => number = libc.func('read', 'long', [
  'int',
  'void *',
  'size_t',
]);
const writeCall: (fd: number, from: Uint8Array, bytes: number) => number = libc.func('write', 'long', [
  'int',
  'void *',
  'size_t',
]);
const pollCall: (entries: Int32Array, count: number, timeoutMs: number) => number = libc.func('poll', 'int', [
  'void *',
  'unsigned long',
  'int',
]);
const dupCall: (fd: number) => number = libc.func('dup', 'int', ['int']);
const closeCall: (fd: number) => number = libc.func('close', 'int', ['int']);
const exitCall: (code: number) => void = libc.func('_exit', 'void', ['int']);

const readable = 1;
const writable = 4;

/** The events to wait for on a descriptor. */
export interface PollInterest {
  readonly fd: number;
  readonly read: boolean;
  readonly write: boolean;
}

/** Bytes read, 0 if none have arrived yet. Throws `unavailable` when the peer has closed or the connection broke. */
export function readSome(fd: number, into: Uint8Array): number {
  const count = readCall(fd, into, into.byteLength);
  if (count === 0) {
    throw new ClusterError('unavailable', 'the peer closed the connection');
  }
  return count > 0 ? count : throwUnlessLater('read');
}

/** Bytes written, 0 if the peer must read first. Throws `unavailable` when the connection broke. */
export function writeSome(fd: number, from: Uint8Array): number {
  const count = writeCall(fd, from, from.byteLength);
  return count >= 0 ? count : throwUnlessLater('write');
}

/** Waits until a descriptor is ready; false after a timeout or an interrupting signal. */
export function waitReady(interests: readonly PollInterest[], timeoutMs: number): boolean {
  // struct pollfd { int fd; short events; short revents; }, little-endian.
  const entries = new Int32Array(2 * interests.length);
  for (const [i, { fd, read, write }] of interests.entries()) {
    entries[2 * i] = fd;
    entries[2 * i + 1] = (read ? readable : 0) | (write ? writable : 0);
  }
  return pollCall(entries, interests.length, timeoutMs) > 0;
}

/** A second descriptor of the same connection. The caller closes it. */
export function duplicate(fd: number): number {
  const copy = dupCall(fd);
  if (copy < 0) {
    throw new ClusterError('resource_exhausted', `dup of descriptor ${fd} failed: errno ${koffi.errno()}`);
  }
  return copy;
}

/** Closes the descriptor; closing the last one of a connection ends it for the peer. */
export function closeDescriptor(fd: number): void {
  closeCall(fd);
}

/**
 * Ends the process at once. Node's own exit waits for its threads, and a thread that hangs in native code never ends.
 */
export function exitAtOnce(code: number): void {
  exitCall(code);
}

function throwUnlessLater(call: string): 0 {
  const errno = koffi.errno();
  const { EAGAIN, EINTR, EWOULDBLOCK } = constants.errno;
  if (errno === EAGAIN || errno === EWOULDBLOCK || errno === EINTR) {
    return 0;
  }
  const name = Object.entries(constants.errno).find(([, value]) => value === errno)?.[0] ?? String(errno);
  throw new ClusterError('unavailable', `${call}: ${name}`);
}
