// The ranks of a group as processes, over one TCP connection per pair. Owns the frames and the blocking transfers of
// the step thread; join-group.ts has checked the connections. Knows no model.
//
// A frame is int32 little-endian [operation, sequence number, payload bytes], then the payload. Operation and sequence
// number only guard against ranks that have fallen out of step. Sends and receives of all peers advance together on
// non-blocking descriptors, so two ranks that send more than the sockets buffer cannot block each other.

import { ClusterError } from '@mimo/core/process/errors';
import { assertNotStopped, sumInOrder, type Collective, type StopFlag } from './collective.ts';
import type { PeerConnection } from './join-group.ts';
import { closeDescriptor, readSome, waitReady, writeSome } from './libc.ts';

export interface NetworkOptions {
  readonly rank: number;
  readonly worldSize: number;
  readonly peers: readonly PeerConnection[];
  /** A peer that sends nothing for this long, although something is due, is lost. */
  readonly peerTimeoutMs: number;
  /** The same for its first sign of life: it may still be loading. */
  readonly firstTimeoutMs: number;
  readonly stop: StopFlag;
}

const operations = { allReduce: 1, gather: 2, broadcast: 3 } as const;
const headerWords = 3;
const headerBytes = 4 * headerWords;
/** The longest time between two checks of the stop flag in a wait. */
const pollMs = 50;

/** One peer's transfers in the current operation. */
interface Peer {
  readonly rank: number;
  readonly fd: number;
  heard: boolean;
  /** Staging buffer for received bytes, frame header included. */
  inbox: Uint8Array<ArrayBuffer>;
  received: number;
  receiveBytes: number;
  sent: number;
  sendBytes: number;
}

class NetworkCollective implements Collective {
  readonly rank: number;
  readonly worldSize: number;
  readonly #options: NetworkOptions;
  readonly #peers: readonly Peer[];
  #outbox = new Uint8Array(4096);
  #sequence = 0;
  #closed = false;

  constructor(options: NetworkOptions) {
    this.rank = options.rank;
    this.worldSize = options.worldSize;
    this.#options = options;
    this.#peers = options.peers.map(({ rank, fd }) => ({
      rank,
      fd,
      heard: false,
      inbox: new Uint8Array(4096),
      received: 0,
      receiveBytes: 0,
      sent: 0,
      sendBytes: 0,
    }));
    for (const [i, { dialled }] of options.peers.entries()) {
      if (dialled) {
        this.#peers[i]!.receiveBytes = 1;
      }
    }
    this.#transfer();
  }

  allReduce(values: Float32Array): void {
    this.#stage(operations.allReduce, values);
    for (const peer of this.#peers) {
      this.#expect(peer, values.byteLength);
      peer.sendBytes = headerBytes + values.byteLength;
    }
    this.#transfer();
    const parts = Array.from({ length: this.worldSize }, () => values);
    for (const peer of this.#peers) {
      this.#checkHeader(peer, operations.allReduce, values.byteLength);
      parts[peer.rank] = new Float32Array(peer.inbox.buffer, headerBytes, values.length);
    }
    sumInOrder(values, parts);
  }

  gather(values: Float32Array, lengths: readonly number[], parts: readonly Float32Array[] = []): void {
    if (this.rank !== 0) {
      this.#stage(operations.gather, values);
      this.#peerOf(0).sendBytes = headerBytes + values.byteLength;
      this.#transfer();
      return;
    }
    this.#sequence += 1;
    for (const peer of this.#peers) {
      this.#expect(peer, 4 * lengths[peer.rank]!);
    }
    this.#transfer();
    parts[0]?.set(values);
    for (const peer of this.#peers) {
      const length = lengths[peer.rank]!;
      this.#checkHeader(peer, operations.gather, 4 * length);
      parts[peer.rank]?.set(new Float32Array(peer.inbox.buffer, headerBytes, length));
    }
  }

  broadcast(frame: Int32Array): void {
    this.#stage(operations.broadcast, frame);
    for (const peer of this.#peers) {
      peer.sendBytes = headerBytes + frame.byteLength;
    }
    this.#transfer();
  }

  receive(): Int32Array {
    this.#sequence += 1;
    const leader = this.#peerOf(0);
    this.#expect(leader, 0);
    this.#transfer();
    const bytes = new Int32Array(leader.inbox.buffer, 0, headerWords)[2]!;
    this.#checkHeader(leader, operations.broadcast, bytes);
    leader.receiveBytes = bytes;
    this.#reserve(leader, bytes);
    this.#transfer();
    return new Int32Array(leader.inbox.buffer, 0, bytes / 4).slice();
  }

  watch(waitedMs: number): void {
    assertNotStopped(this.#options.stop);
    this.#assertInTime(this.#peers, waitedMs);
  }

  close(): void {
    if (!this.#closed) {
      this.#closed = true;
      this.#peers.forEach(({ fd }) => closeDescriptor(fd));
    }
  }

  #peerOf(rank: number): Peer {
    const peer = this.#peers.find((other) => other.rank === rank);
    if (peer === undefined) {
      throw new ClusterError('internal', `rank ${this.rank} has no connection to rank ${rank}`);
    }
    return peer;
  }

  /** Puts a frame into the outbox and counts the operation. */
  #stage(operation: number, payload: Float32Array | Int32Array): void {
    const bytes = headerBytes + payload.byteLength;
    if (this.#outbox.length < bytes) {
      this.#outbox = new Uint8Array(roomFor(bytes));
    }
    this.#sequence += 1;
    new Int32Array(this.#outbox.buffer, 0, headerWords).set([operation, this.#sequence, payload.byteLength]);
    this.#outbox.set(new Uint8Array(payload.buffer, payload.byteOffset, payload.byteLength), headerBytes);
  }

  #expect(peer: Peer, payloadBytes: number): void {
    peer.receiveBytes = headerBytes + payloadBytes;
    this.#reserve(peer, peer.receiveBytes);
  }

  #reserve(peer: Peer, bytes: number): void {
    if (peer.inbox.length < bytes) {
      peer.inbox = new Uint8Array(roomFor(bytes));
    }
  }

  #checkHeader(peer: Peer, operation: number, payloadBytes: number): void {
    const header = new Int32Array(peer.inbox.buffer, 0, headerWords);
    if (header[0] !== operation || header[1] !== this.#sequence || header[2] !== payloadBytes) {
      throw new ClusterError(
        'data_loss',
        `rank ${this.rank} is at ${[operation, this.#sequence, payloadBytes].join(', ')}; rank ${peer.rank} sent ${header.join(', ')}`,
      );
    }
  }

  /** Sends and receives all bytes of this operation, with all peers. */
  #transfer(): void {
    let quietSince = 0;
    for (;;) {
      let isDone = true;
      let moved = false;
      for (const peer of this.#peers) {
        moved = this.#advance(peer) || moved;
        isDone &&= peer.sent === peer.sendBytes && peer.received === peer.receiveBytes;
      }
      if (isDone) {
        break;
      }
      if (moved) {
        quietSince = 0;
        continue;
      }
      const waiting = this.#peers.filter(
        (peer) => peer.sent < peer.sendBytes || peer.received < peer.receiveBytes,
      );
      const interests = waiting.map(({ fd, received, receiveBytes, sent, sendBytes }) => ({
        fd,
        read: received < receiveBytes,
        write: sent < sendBytes,
      }));
      if (!waitReady(interests, pollMs)) {
        assertNotStopped(this.#options.stop);
        quietSince ||= performance.now();
        this.#assertInTime(waiting, performance.now() - quietSince);
      }
    }
    for (const peer of this.#peers) {
      peer.sent = peer.sendBytes = peer.received = peer.receiveBytes = 0;
    }
  }

  #advance(peer: Peer): boolean {
    try {
      let moved = 0;
      if (peer.sent < peer.sendBytes) {
        const count = writeSome(peer.fd, this.#outbox.subarray(peer.sent, peer.sendBytes));
        peer.sent += count;
        moved += count;
      }
      if (peer.received < peer.receiveBytes) {
        const count = readSome(peer.fd, peer.inbox.subarray(peer.received, peer.receiveBytes));
        peer.received += count;
        peer.heard ||= count > 0;
        moved += count;
      }
      return moved > 0;
    } catch (error) {
      throw new ClusterError(
        'unavailable',
        `rank ${peer.rank} is lost: ${ClusterError.from(error).message}`,
        {
          cause: error,
        },
      );
    }
  }

  #assertInTime(waiting: readonly Peer[], quietMs: number): void {
    for (const peer of waiting) {
      const limitMs = peer.heard ? this.#options.peerTimeoutMs : this.#options.firstTimeoutMs;
      if (quietMs > limitMs) {
        throw new ClusterError(
          'deadline_exceeded',
          `rank ${peer.rank} is lost: silent for more than ${limitMs} ms`,
        );
      }
    }
  }
}

function roomFor(bytes: number): number {
  return 2 ** Math.ceil(Math.log2(bytes));
}

/** Takes over the connections; `close` closes them. Blocks until every listener's `go` has arrived. */
export function createNetworkCollective(options: NetworkOptions): Collective {
  return new NetworkCollective(options);
}
