// How the ranks of a network group find and check one another before the step thread takes over. Owns the handshake;
// runs on the main thread with ordinary sockets, and ends with one plain descriptor per peer. Knows no tensors.
//
// Each rank listens, and dials the lower ranks until they answer. On a connection, each message being a 4-byte length
// and JSON:   dialler: Hello    listener: Hello or Refusal    dialler: Accepted or Refusal    listener: one byte, `go`.
// Once the listener has its Accepted, both give the connection to their step threads. The dialler detaches the
// connection from its event loop before it sends Accepted, and sends nothing more until `go`. So neither event loop can
// swallow a byte that is meant for a step thread.

import { createHash, timingSafeEqual } from 'node:crypto';
import * as net from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { ClusterError } from '@mimo/core/process/errors';
import {
  connect,
  encodeMessage,
  HandshakeEnd,
  parseAddress,
  type GroupMember,
  type Hello,
  type Message,
} from './handshake.ts';
import { closeDescriptor, writeSome } from './libc.ts';

export interface JoinOptions {
  readonly member: GroupMember;
  /** `host:port` of every rank. */
  readonly addresses: readonly string[];
  readonly listenAddress: string;
  readonly token: string;
  readonly timeoutMs: number;
}

/** A connected peer: a non-blocking socket descriptor, which its owner closes. */
export interface PeerConnection {
  readonly rank: number;
  readonly fd: number;
  /** This side dialled: it must read one byte, the listener's `go`, before it sends anything. */
  readonly dialled: boolean;
}

const protocolVersion = 1;
const redialMs = 100;
const goByte = Uint8Array.of(1);

/**
 * Connects this rank with all others. Errors: `failed_precondition` on both sides, naming both values, if model,
 * precision or world size differ or a rank connects twice; `permission_denied` if the token differs;
 * `deadline_exceeded` naming the missing ranks; `unavailable` if it cannot listen; `canceled` by the signal.
 */
export async function joinGroup(options: JoinOptions, signal: AbortSignal): Promise<PeerConnection[]> {
  const { member, timeoutMs } = options;
  const connections = new Map<number, PeerConnection>();
  const stop = new AbortController();
  const timer = setTimeout(() => {
    const absent = Array.from({ length: member.worldSize }, (_, rank) => rank).filter(
      (rank) => rank !== member.rank && !connections.has(rank),
    );
    const who = absent.map((rank) => `rank ${rank} (${options.addresses[rank]})`).join(', ');
    stop.abort(
      new ClusterError(
        'deadline_exceeded',
        `rank ${member.rank}: ${who} did not connect within ${timeoutMs} ms`,
      ),
    );
  }, timeoutMs);
  const ended = AbortSignal.any([signal, stop.signal]);
  const lower = Array.from({ length: member.rank }, async (_, rank) => {
    connections.set(rank, await dial(options, rank, ended));
  });
  const joined = [...lower, accept(options, connections, ended)];
  try {
    await Promise.all(joined);
    return [...connections.values()].toSorted((a, b) => a.rank - b.rank);
  } catch (error) {
    stop.abort(error);
    await Promise.allSettled(joined);
    for (const { fd } of connections.values()) {
      closeDescriptor(fd);
    }
    throw ClusterError.from(ended.aborted && signal.aborted ? signal.reason : error);
  } finally {
    clearTimeout(timer);
  }
}

/** Listens until every higher rank has connected. */
async function accept(
  options: JoinOptions,
  connections: Map<number, PeerConnection>,
  signal: AbortSignal,
): Promise<void> {
  const { member } = options;
  const expected = member.worldSize - 1 - member.rank;
  if (expected === 0) {
    return;
  }
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  const come = new Set<number>();
  const welcome = async (socket: net.Socket): Promise<void> => {
    try {
      const connection = await receiveDialler(new HandshakeEnd(socket, signal), { options, come });
      if (signal.aborted) {
        closeDescriptor(connection.fd);
        return;
      }
      connections.set(connection.rank, connection);
      writeSome(connection.fd, goByte);
      if (connections.size - countLower(connections, member.rank) === expected) {
        resolve();
      }
    } catch (error) {
      socket.destroySoon();
      // Rejects strangers and broken connections; a member with a different model or setting ends the group.
      if (ClusterError.from(error).code === 'failed_precondition') {
        reject(error);
      }
    }
  };
  const server = net.createServer({ noDelay: true }, (socket) => void welcome(socket));
  const onAbort = (): void => reject(signal.reason);
  signal.addEventListener('abort', onAbort, { once: true });
  server.on('error', (error) => {
    reject(
      new ClusterError(
        'unavailable',
        `rank ${member.rank} cannot listen on ${options.listenAddress}: ${error.message}`,
      ),
    );
  });
  const { host, port } = parseAddress(options.listenAddress);
  server.listen(port, host);
  try {
    signal.throwIfAborted();
    await promise;
  } finally {
    signal.removeEventListener('abort', onAbort);
    server.close();
  }
}

async function receiveDialler(
  end: HandshakeEnd,
  group: { readonly options: JoinOptions; readonly come: Set<number> },
): Promise<PeerConnection> {
  const { options, come } = group;
  const theirs = await end.read();
  if (theirs.kind !== 'hello') {
    throw new ClusterError('data_loss', `expected a hello, got a ${theirs.kind}`);
  }
  const problem = findMismatch(options, theirs, come);
  if (problem !== undefined) {
    end.send({ kind: 'refusal', code: problem.code, message: problem.message });
    throw problem;
  }
  come.add(theirs.rank);
  try {
    end.send(hello(options));
    const verdict = await end.read();
    if (verdict.kind !== 'accepted') {
      throw refusalError(verdict, theirs.rank);
    }
    return { rank: theirs.rank, fd: end.detach(), dialled: false };
  } catch (error) {
    // Its connection broke during the handshake: it may dial again.
    come.delete(theirs.rank);
    throw error;
  }
}

/** Dials a lower rank until it answers. */
async function dial(options: JoinOptions, rank: number, signal: AbortSignal): Promise<PeerConnection> {
  for (;;) {
    signal.throwIfAborted();
    const end = await connect(options.addresses[rank] ?? '', signal);
    if (end !== undefined) {
      try {
        return await greetListener(end, { options, rank });
      } catch (error) {
        end.destroy();
        if (!isWorthRedialling(error)) {
          throw error;
        }
      }
    }
    await sleep(redialMs, undefined, { signal });
  }
}

async function greetListener(
  end: HandshakeEnd,
  group: { readonly options: JoinOptions; readonly rank: number },
): Promise<PeerConnection> {
  const { options, rank } = group;
  end.send(hello(options));
  const theirs = await end.read();
  if (theirs.kind !== 'hello') {
    throw refusalError(theirs, rank);
  }
  const problem =
    theirs.rank === rank
      ? findMismatch(options, theirs, new Set())
      : new ClusterError(
          'failed_precondition',
          `${options.addresses[rank]} is rank ${theirs.rank}, not rank ${rank}`,
        );
  if (problem !== undefined) {
    end.send({ kind: 'refusal', code: problem.code, message: problem.message });
    throw problem;
  }
  const fd = end.detach();
  writeSome(fd, encodeMessage({ kind: 'accepted' }));
  return { rank, fd, dialled: true };
}

function hello({ member, token }: JoinOptions): Hello {
  return { kind: 'hello', protocolVersion, token, ...member };
}

function findMismatch(
  options: JoinOptions,
  theirs: Hello,
  come: ReadonlySet<number>,
): ClusterError | undefined {
  const { member } = options;
  if (!isSameToken(options.token, theirs.token)) {
    return new ClusterError(
      'permission_denied',
      `rank ${member.rank}: the group token of rank ${theirs.rank} differs`,
    );
  }
  const mine = hello(options);
  for (const field of ['protocolVersion', 'worldSize', 'precision', 'shardKey'] as const) {
    if (mine[field] !== theirs[field]) {
      return new ClusterError(
        'failed_precondition',
        `${field}: rank ${member.rank} has ${mine[field]}, rank ${theirs.rank} has ${theirs[field]}`,
      );
    }
  }
  const inRange = Number.isInteger(theirs.rank) && theirs.rank >= 0 && theirs.rank < member.worldSize;
  if (!inRange || theirs.rank === member.rank || come.has(theirs.rank)) {
    return new ClusterError(
      'failed_precondition',
      `rank: rank ${member.rank} of ${member.worldSize} was joined by rank ${theirs.rank}, which is taken or out of range`,
    );
  }
  return undefined;
}

function isSameToken(mine: string, theirs: unknown): boolean {
  return typeof theirs === 'string' && timingSafeEqual(sha256(mine), sha256(theirs));
}

function sha256(text: string): Buffer {
  return createHash('sha256').update(text).digest();
}

function refusalError(message: Message, rank: number): ClusterError {
  if (message.kind !== 'refusal') {
    return new ClusterError('data_loss', `rank ${rank} sent ${message.kind} out of turn`);
  }
  const code = message.code === 'permission_denied' ? 'permission_denied' : 'failed_precondition';
  return new ClusterError(code, `refused by rank ${rank}: ${message.message}`);
}

function isWorthRedialling(error: unknown): boolean {
  return ClusterError.from(error).code === 'unavailable';
}

function countLower(connections: ReadonlyMap<number, PeerConnection>, rank: number): number {
  return [...connections.keys()].filter((other) => other < rank).length;
}
