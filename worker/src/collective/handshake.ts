// One connection during the handshake of two ranks: they take turns, each message a 4-byte length and JSON, and end
// with the plain descriptor. Owns the socket until then; join-group.ts owns the messages and the choice of peers.

import * as net from 'node:net';
import { ClusterError } from '@mimo/core/process/errors';
import { duplicate } from './libc.ts';

/** Identifies one end of a connection; both ends must agree on shard key, world size and precision. */
export interface GroupMember {
  readonly rank: number;
  readonly worldSize: number;
  /** Of the compiled shards: equal on all ranks of a group. */
  readonly shardKey: string;
  readonly precision: string;
}

/** The first message of both ends. */
export interface Hello extends GroupMember {
  readonly kind: 'hello';
  readonly protocolVersion: number;
  readonly token: string;
}

/** Every message of the handshake. */
export type Message =
  | Hello
  | { readonly kind: 'accepted' }
  | { readonly kind: 'refusal'; readonly code: string; readonly message: string };

const maxMessageBytes = 4096;
const timeoutMs = 5000;

/** One connection during its handshake. */
export class HandshakeEnd {
  readonly #socket: net.Socket;
  readonly #messages: AsyncIterator<Message>;
  readonly #signal: AbortSignal;

  constructor(socket: net.Socket, signal: AbortSignal) {
    this.#socket = socket;
    this.#signal = signal;
    this.#messages = readMessages(socket);
    socket.setTimeout(timeoutMs, () => socket.destroy());
    socket.on('error', () => undefined);
    signal.addEventListener('abort', this.#onAbort, { once: true });
    socket.once('close', () => signal.removeEventListener('abort', this.#onAbort));
  }

  readonly #onAbort = (): void => {
    this.#socket.destroy();
  };

  async read(): Promise<Message> {
    try {
      const next = await this.#messages.next();
      if (next.done !== true) {
        return next.value;
      }
    } catch (error) {
      this.#signal.throwIfAborted();
      if (error instanceof ClusterError) {
        throw error;
      }
      throw new ClusterError('unavailable', `handshake: ${ClusterError.from(error).message}`, {
        cause: error,
      });
    }
    this.#signal.throwIfAborted();
    throw new ClusterError('unavailable', 'handshake: the peer closed the connection');
  }

  send(message: Message): void {
    this.#socket.write(encodeMessage(message));
  }

  /** Detaches the connection from the event loop and returns it as a plain descriptor. */
  detach(): number {
    const handle: unknown = Reflect.get(this.#socket, '_handle');
    const fd: unknown = typeof handle === 'object' && handle !== null ? Reflect.get(handle, 'fd') : undefined;
    if (typeof fd !== 'number' || fd < 0) {
      throw new ClusterError('failed_precondition', `sockets have no descriptors on ${process.platform}`);
    }
    const copy = duplicate(fd);
    this.#socket.destroy();
    return copy;
  }

  destroy(): void {
    this.#socket.destroy();
  }
}

/** Dials `host:port`. Undefined if nothing listens there yet; throws the signal's reason. */
export async function connect(address: string, signal: AbortSignal): Promise<HandshakeEnd | undefined> {
  const { promise, resolve } = Promise.withResolvers<net.Socket | undefined>();
  const socket = net.connect({ ...parseAddress(address), noDelay: true });
  const onAbort = (): void => {
    socket.destroy();
    resolve(undefined);
  };
  signal.addEventListener('abort', onAbort, { once: true });
  socket.once('connect', () => resolve(socket));
  socket.once('error', () => resolve(undefined));
  socket.setTimeout(timeoutMs, onAbort);
  const connected = await promise;
  signal.removeEventListener('abort', onAbort);
  signal.throwIfAborted();
  return connected === undefined ? undefined : new HandshakeEnd(connected, signal);
}

async function* readMessages(socket: net.Socket): AsyncGenerator<Message> {
  let pending = Buffer.alloc(0);
  for await (const chunk of socket) {
    pending = Buffer.concat([pending, chunk as Buffer]);
    while (pending.length >= 4) {
      const bytes = pending.readUInt32LE(0);
      if (bytes > maxMessageBytes) {
        throw new ClusterError(
          'data_loss',
          `handshake: expected a message of at most ${maxMessageBytes} bytes, got ${bytes}`,
        );
      }
      if (pending.length < 4 + bytes) {
        break;
      }
      const text = pending.toString('utf8', 4, 4 + bytes);
      pending = pending.subarray(4 + bytes);
      yield parseMessage(text);
    }
  }
}

function parseMessage(text: string): Message {
  try {
    const message: unknown = JSON.parse(text);
    if (typeof message === 'object' && message !== null && 'kind' in message) {
      return message as Message;
    }
  } catch {
    // Reported like any other invalid message.
  }
  throw new ClusterError('data_loss', 'handshake: the peer does not speak this protocol');
}

/** Encodes a message for the wire. */
export function encodeMessage(message: Message): Buffer {
  const text = Buffer.from(JSON.stringify(message));
  const length = Buffer.alloc(4);
  length.writeUInt32LE(text.length);
  return Buffer.concat([length, text]);
}

/** Splits `host:port`; IPv6 hosts are in brackets. Throws `invalid_argument`. */
export function parseAddress(address: string): { readonly host: string; readonly port: number } {
  const match = /^(?:\[(?<v6>[^\]]+)\]|(?<name>[^:]+)):(?<port>\d+)$/.exec(address);
  const host = match?.groups?.['v6'] ?? match?.groups?.['name'];
  const port = Number(match?.groups?.['port']);
  if (host === undefined || port > 65_535) {
    throw new ClusterError('invalid_argument', `address: must be host:port, is ${address}`);
  }
  return { host, port };
}
