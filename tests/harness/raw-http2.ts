// HTTP/2 as bytes, for misbehaving clients: frames of any kind, headers without Huffman or tables, no flow control.
// Owns the formats (RFC 9113, RFC 7541) and one socket; ignores the responses.

import { connect, type Socket } from 'node:net';

export const frameTypes = {
  data: 0,
  headers: 1,
  priority: 2,
  rstStream: 3,
  settings: 4,
  ping: 6,
  windowUpdate: 8,
  continuation: 9,
} as const;

export const endStream = 1;
export const endHeaders = 4;

const preface = 'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n';

interface FrameFields {
  readonly flags?: number;
  readonly stream?: number;
  readonly payload?: Buffer;
}

/** One frame. */
export function http2Frame(
  type: number,
  { flags = 0, stream = 0, payload = Buffer.alloc(0) }: FrameFields,
): Buffer {
  const frame = Buffer.alloc(9 + payload.length);
  frame.writeUIntBE(payload.length, 0, 3);
  frame.writeUInt8(type, 3);
  frame.writeUInt8(flags, 4);
  frame.writeUInt32BE(stream, 5);
  payload.copy(frame, 9);
  return frame;
}

/** A header block: each header literal, without indexing. */
export function headerBlock(headers: Readonly<Record<string, string>>): Buffer {
  return Buffer.concat(
    Object.entries(headers).flatMap(([name, value]) => [Buffer.of(0), headerText(name), headerText(value)]),
  );
}

function headerText(value: string): Buffer {
  return Buffer.concat([integer(value.length, 7), Buffer.from(value, 'latin1')]);
}

/** An integer of HPACK with a prefix of so many bits, the bits above it zero. */
function integer(value: number, prefixBits: number): Buffer {
  const limit = 2 ** prefixBits - 1;
  if (value < limit) {
    return Buffer.of(value);
  }
  const bytes = [limit];
  let rest = value - limit;
  for (; rest >= 128; rest = Math.floor(rest / 128)) {
    bytes.push((rest % 128) + 128);
  }
  return Buffer.from([...bytes, rest]);
}

/** The headers of a gRPC call. */
export function callHeaders(path: string, authorization: string): Record<string, string> {
  return {
    ':method': 'POST',
    ':scheme': 'http',
    ':path': path,
    ':authority': 'localhost',
    'content-type': 'application/grpc',
    te: 'trailers',
    authorization,
  };
}

/** A socket to host:port, from one of this machine's addresses. */
export function openSocket(address: string, localAddress?: string): Socket {
  const colon = address.lastIndexOf(':');
  const [host, port] = [address.slice(0, colon), Number(address.slice(colon + 1))];
  const socket = connect({ host, port, ...(localAddress === undefined ? {} : { localAddress }) });
  socket.on('error', () => undefined);
  return socket;
}

/** A connection that has sent the preface and its SETTINGS, and reads and forgets what comes. */
export function connectRaw(
  address: string,
  { settings = Buffer.alloc(0), localAddress }: { settings?: Buffer; localAddress?: string } = {},
): Socket {
  const socket = openSocket(address, localAddress);
  socket.resume();
  socket.write(preface);
  socket.write(http2Frame(frameTypes.settings, { payload: settings }));
  return socket;
}

/** Writes, and waits until it is sent or the socket is gone. False: gone. */
export async function writeAll(socket: Socket, bytes: Buffer): Promise<boolean> {
  if (!socket.destroyed && !socket.write(bytes)) {
    const { promise, resolve } = Promise.withResolvers<void>();
    socket.once('drain', resolve);
    socket.once('close', resolve);
    await promise;
    socket.off('drain', resolve);
    socket.off('close', resolve);
  }
  return !socket.destroyed;
}
