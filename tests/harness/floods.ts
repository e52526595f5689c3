// Clients that only cost: connections that idle, headers and bodies that never end, resets, tables, pings. Each flood
// continues until its signal fires, and reconnects when the server closes the connection. Used by the benchmark
// `floods`, in a separate process, and by the hostile corpus, briefly.

import { setTimeout as sleep } from 'node:timers/promises';
import type { Socket } from 'node:net';
import { gzipSync } from 'node:zlib';

import { ChatRequest, Role } from '@mimo/proto/inference';

import {
  callHeaders,
  connectRaw,
  endHeaders,
  endStream,
  frameTypes,
  headerBlock,
  http2Frame,
  openSocket,
  writeAll,
} from './raw-http2.ts';

/** Where to, and with which keys. */
interface FloodTarget {
  readonly address: string;
  /** An accepted key. */
  readonly apiKey: string;
  /** Connections or streams at once; each flood has its own idea of many. */
  readonly scale: number;
  /** Which of this machine's addresses it comes from: another than the honest clients', or theirs. */
  readonly localAddress?: string;
}

type Flood = (target: FloodTarget, signal: AbortSignal) => Promise<void>;

const chatPath = '/mimo.inference.v1.InferenceService/Chat';
const reflectionPath = '/grpc.reflection.v1.ServerReflection/ServerReflectionInfo';
const wrongKey = 'Bearer wrong-key-00000000';
/** node's largest frame. */
const maxFrameBytes = 16_384;

function count(many: number, { scale }: FloodTarget): number {
  return Math.max(1, Math.round(many * scale));
}

/** Runs `talk` on so many connections, again and again: closed ones reconnect, at most ten times a second. */
async function onConnections(
  connections: number,
  { target, signal, ...settings }: { target: FloodTarget; signal: AbortSignal; settings?: Buffer },
  talk: (socket: Socket) => Promise<void>,
): Promise<void> {
  const one = async (): Promise<void> => {
    while (!signal.aborted) {
      const { address, localAddress } = target;
      const socket = connectRaw(address, {
        ...settings,
        ...(localAddress === undefined ? {} : { localAddress }),
      });
      const hangUp = (): void => void socket.destroy();
      signal.addEventListener('abort', hangUp, { once: true });
      await talk(socket);
      socket.destroy();
      signal.removeEventListener('abort', hangUp);
      await sleep(100, undefined, { signal }).catch(() => undefined);
    }
  };
  await Promise.all(Array.from({ length: connections }, one));
}

async function untilClosed(socket: Socket): Promise<void> {
  if (!socket.destroyed) {
    await new Promise((resolve) => socket.once('close', resolve));
  }
}

/** Says the same over and over. */
function repeating(bytes: Buffer): (socket: Socket) => Promise<void> {
  return async (socket) => {
    while (await writeAll(socket, bytes)) {
      await new Promise(setImmediate);
    }
  };
}

/** Opens streams 1, 3, 5, … with these headers; `body` follows each, `batch` streams at a time. */
function streams(
  headers: Readonly<Record<string, string>>,
  { batch, total = Infinity, after }: { batch: number; total?: number; after: (stream: number) => Buffer },
): (socket: Socket) => Promise<void> {
  const block = headerBlock(headers);
  return async (socket) => {
    let stream = 1;
    let isOpen = true;
    while (isOpen && stream < 2 * total) {
      const frames: Buffer[] = [];
      for (let index = 0; index < batch && stream < 2 * total; index += 1) {
        frames.push(
          http2Frame(frameTypes.headers, { flags: endHeaders, stream, payload: block }),
          after(stream),
        );
        stream += 2;
      }
      isOpen = await writeAll(socket, Buffer.concat(frames));
      await new Promise(setImmediate);
    }
    await untilClosed(socket);
  };
}

function messageOf(bytes: Uint8Array, flag = 0): Buffer {
  const prefix = Buffer.alloc(5);
  prefix.writeUInt8(flag);
  prefix.writeUInt32BE(bytes.length, 1);
  return Buffer.concat([prefix, bytes]);
}

/** As DATA frames; the last ends the stream where `end`. */
function dataOf(stream: number, bytes: Buffer, end: boolean): Buffer {
  const frames: Buffer[] = [];
  for (let at = 0; at < bytes.length; at += maxFrameBytes) {
    const payload = bytes.subarray(at, at + maxFrameBytes);
    const flags = end && at + maxFrameBytes >= bytes.length ? endStream : 0;
    frames.push(http2Frame(frameTypes.data, { stream, flags, payload }));
  }
  return Buffer.concat(frames);
}

/** A call's body, sent as node:http2 would, within the server's windows, on connections of its own. */
async function callNicely(
  target: FloodTarget,
  {
    calls,
    authorization,
    body,
    encoding,
    end,
  }: {
    readonly calls: number;
    readonly authorization: string;
    readonly body: Buffer;
    readonly encoding?: string;
    readonly end: boolean;
  },
  signal: AbortSignal,
): Promise<void> {
  const { connect } = await import('node:http2');
  const one = async (): Promise<void> => {
    while (!signal.aborted) {
      const { address, localAddress } = target;
      const createConnection = (): Socket => openSocket(address, localAddress);
      const session = connect(`http://${address}`, { createConnection });
      session.on('error', () => undefined);
      const stream = session.request({
        ...callHeaders(chatPath, authorization),
        ...(encoding === undefined ? {} : { 'grpc-encoding': encoding }),
      });
      stream.on('error', () => undefined);
      stream.resume();
      stream.write(body);
      if (end) {
        stream.end();
      }
      const hangUp = (): void => session.destroy();
      signal.addEventListener('abort', hangUp, { once: true });
      await new Promise((resolve) => stream.once('close', resolve));
      session.destroy();
      signal.removeEventListener('abort', hangUp);
      await sleep(100, undefined, { signal }).catch(() => undefined);
    }
  };
  await Promise.all(Array.from({ length: calls }, one));
}

const bombBytes = 16 * 2 ** 20 - 1_024;
/** Millions of empty messages: 16 kB on the wire. */
const bomb = (): Buffer => messageOf(gzipSync(Buffer.alloc(bombBytes, Buffer.of(0x12, 0))), 1);
/** All but the last of 16 MB. */
const unfinished = (): Buffer => messageOf(Buffer.alloc(bombBytes)).subarray(0, -1);

function chatBody(request: Parameters<typeof ChatRequest.fromPartial>[0]): Buffer {
  return messageOf(ChatRequest.encode(ChatRequest.fromPartial({ model: 'mimo-demo', ...request })).finish());
}

const reset = (stream: number): Buffer =>
  http2Frame(frameTypes.rstStream, { stream, payload: Buffer.from([0, 0, 0, 8]) });
/** SETTINGS_INITIAL_WINDOW_SIZE 0: nothing may be answered but headers. */
const noWindow = Buffer.from([0, 4, 0, 0, 0, 0]);

/** By name, in the order of the benchmark's table. */
export const floods: Readonly<Record<string, Flood>> = {
  'idle connections': (target, signal) =>
    onConnections(count(2_000, target), { target, signal }, untilClosed),
  'slow headers': (target, signal) =>
    onConnections(count(200, target), { target, signal }, async (socket) => {
      const block = headerBlock(callHeaders(chatPath, wrongKey));
      let isOpen = await writeAll(socket, http2Frame(frameTypes.headers, { stream: 1, payload: block }));
      while (isOpen) {
        await sleep(500);
        const payload = headerBlock({ 'x-more': 'x' });
        isOpen = await writeAll(socket, http2Frame(frameTypes.continuation, { stream: 1, payload }));
      }
    }),
  'unfinished 16 MB, no key': (target, signal) =>
    callNicely(
      target,
      { calls: count(60, target), authorization: '', body: unfinished(), end: false },
      signal,
    ),
  'unfinished 16 MB, a key': (target, signal) => {
    const authorization = `Bearer ${target.apiKey}`;
    return callNicely(
      target,
      { calls: count(60, target), authorization, body: unfinished(), end: false },
      signal,
    );
  },
  'gzip bombs, wrong key': (target, signal) =>
    callNicely(
      target,
      { calls: count(20, target), authorization: wrongKey, body: bomb(), encoding: 'gzip', end: true },
      signal,
    ),
  'gzip bombs, a key': (target, signal) => {
    const authorization = `Bearer ${target.apiKey}`;
    return callNicely(
      target,
      { calls: count(20, target), authorization, body: bomb(), encoding: 'gzip', end: true },
      signal,
    );
  },
  'wrong keys': (target, signal) =>
    onConnections(
      count(20, target),
      { target, signal },
      streams(callHeaders(chatPath, wrongKey), {
        batch: 20,
        after: (stream) => dataOf(stream, chatBody({}), true),
      }),
    ),
  'rapid resets, no key': (target, signal) =>
    onConnections(
      count(20, target),
      { target, signal },
      streams(callHeaders(chatPath, ''), { batch: 200, after: reset }),
    ),
  'rapid resets, a key': (target, signal) =>
    onConnections(
      count(2, target),
      { target, signal },
      streams(callHeaders(chatPath, `Bearer ${target.apiKey}`), { batch: 200, after: reset }),
    ),
  'HPACK tables': (target, signal) =>
    onConnections(count(20, target), { target, signal }, async (socket) => {
      // One header of 4,000 bytes goes into the table, and each stream names it 4,000 times in a byte each.
      const name = Buffer.from('x-table');
      const entry = Buffer.concat([Buffer.of(0x40, name.length), name, Buffer.from([0x7f, 0xa1, 0x1e])]);
      const stored = Buffer.concat([entry, Buffer.alloc(4_000, 0x61)]);
      const block = headerBlock(callHeaders(chatPath, wrongKey));
      const first = Buffer.concat([block, stored]);
      const again = Buffer.concat([block, Buffer.alloc(4_000, 0xbe)]);
      let stream = 1;
      while (
        await writeAll(
          socket,
          http2Frame(frameTypes.headers, {
            flags: endHeaders | endStream,
            stream,
            payload: stream === 1 ? first : again,
          }),
        )
      ) {
        stream += 2;
        await new Promise(setImmediate);
      }
    }),
  CONTINUATION: (target, signal) =>
    onConnections(count(20, target), { target, signal }, async (socket) => {
      const block = headerBlock(callHeaders(chatPath, wrongKey));
      await writeAll(socket, http2Frame(frameTypes.headers, { stream: 1, payload: block }));
      await repeating(
        Buffer.concat(Array.from({ length: 500 }, () => http2Frame(frameTypes.continuation, { stream: 1 }))),
      )(socket);
    }),
  PING: (target, signal) =>
    onConnections(
      count(20, target),
      { target, signal },
      repeating(
        Buffer.concat(
          Array.from({ length: 1_000 }, () => http2Frame(frameTypes.ping, { payload: Buffer.alloc(8) })),
        ),
      ),
    ),
  SETTINGS: (target, signal) =>
    onConnections(
      count(20, target),
      { target, signal },
      repeating(
        Buffer.concat(
          Array.from({ length: 1_000 }, () =>
            http2Frame(frameTypes.settings, { payload: Buffer.from([0, 3, 0, 0, 1, 0]) }),
          ),
        ),
      ),
    ),
  'empty DATA': (target, signal) =>
    onConnections(count(20, target), { target, signal }, async (socket) => {
      const payload = headerBlock(callHeaders(chatPath, `Bearer ${target.apiKey}`));
      await writeAll(socket, http2Frame(frameTypes.headers, { flags: endHeaders, stream: 1, payload }));
      await repeating(
        Buffer.concat(Array.from({ length: 1_000 }, () => http2Frame(frameTypes.data, { stream: 1 }))),
      )(socket);
    }),
  'unread answers of reflection': (target, signal) =>
    onConnections(count(20, target), { target, signal, settings: noWindow }, async (socket) => {
      const payload = headerBlock(callHeaders(reflectionPath, ''));
      // Which file holds a symbol: 24 bytes of question for kilobytes of answer.
      const symbol = Buffer.from('mimo.inference.v1.Message');
      const question = messageOf(Buffer.concat([Buffer.of(0x22, symbol.length), symbol]));
      await writeAll(socket, http2Frame(frameTypes.headers, { flags: endHeaders, stream: 1, payload }));
      await repeating(dataOf(1, Buffer.concat(Array.from({ length: 100 }, () => question)), false))(socket);
    }),
  '10,000 empty messages': (target, signal) => {
    const messages = Array.from({ length: 10_000 }, (_, index) => ({
      role: index === 9_999 ? Role.USER : Role.ASSISTANT,
      content: index === 9_999 ? 'x' : '',
    }));
    const authorization = `Bearer ${target.apiKey}`;
    return callNicely(
      target,
      { calls: count(4, target), authorization, body: chatBody({ messages }), end: true },
      signal,
    );
  },
};
