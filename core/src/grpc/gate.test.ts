// Over real sockets on loopback: what anybody who connects may cost, and what he may not.

import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import {
  connect,
  constants,
  type ClientHttp2Session,
  type ClientHttp2Stream,
  type IncomingHttpHeaders,
} from 'node:http2';
import { connect as connectSocket, type Socket } from 'node:net';
import { deflateSync, gzipSync } from 'node:zlib';

import * as grpc from '@grpc/grpc-js';
import { HealthClient, HealthService } from '@mimo/proto/health';
import { GenerateRequest, InferenceServiceService, type GenerateResponse } from '@mimo/proto/inference';
import { requestLimits } from '@mimo/proto/limits';
import { afterEach, describe, expect, it, vi } from 'vitest';

import { ClusterError } from '../process/errors.ts';
import { callUnary } from './client.ts';
import type { GateLimits } from './gate.ts';
import { strictDeserializer, streamHandler } from './handlers.ts';
import { startGrpcServer, type GrpcServer } from './server.ts';

const maxReceiveBytes = 2 ** 20;
const limits: GateLimits = {
  maxConnections: 20,
  maxConnectionsPerPeer: 10,
  maxStreamsPerConnection: 100,
  maxHeaderBytes: 16_384,
  maxUnansweredBytes: 2 * maxReceiveBytes,
  bodyTimeoutMs: 60_000,
};
const generatePath = InferenceServiceService.generate.path;
const patience = { timeout: 30_000, interval: 10 };

const sessions: ClientHttp2Session[] = [];
const servers: GrpcServer[] = [];
let handled: number;
let refused: string[];
let unanswered: PromiseWithResolvers<void>;

afterEach(async () => {
  sessions.splice(0).forEach((session) => session.destroy());
  await Promise.all(servers.splice(0).map((server) => server.close(AbortSignal.timeout(100))));
});

/** A server whose only key is `good`, and whose answers wait for `unanswered`. */
async function serve(some: Partial<GateLimits> = {}): Promise<GrpcServer> {
  handled = 0;
  refused = [];
  unanswered = Promise.withResolvers();
  const server = await startGrpcServer({
    listenAddress: '127.0.0.1:0',
    maxReceiveBytes,
    gate: {
      limits: { ...limits, ...some },
      admit: ({ authorization }) => {
        if (authorization !== 'good') {
          throw new ClusterError('unauthenticated', 'unknown API key');
        }
      },
      onRefused: (path, code) => refused.push(`${path.slice(path.lastIndexOf('/') + 1)} ${code}`),
    },
    services: [
      {
        definition: {
          generate: {
            ...InferenceServiceService.generate,
            requestDeserialize: strictDeserializer(GenerateRequest, requestLimits.GenerateRequest),
          },
        },
        implementation: {
          generate: streamHandler<GenerateRequest, GenerateResponse>(async () => {
            handled += 1;
            await unanswered.promise;
          }),
        },
      },
    ],
  });
  servers.push(server);
  return server;
}

function open({ address }: GrpcServer): ClientHttp2Session {
  const session = connect(`http://${address}`);
  session.on('error', () => undefined);
  sessions.push(session);
  return session;
}

function begin(session: ClientHttp2Session, headers: Record<string, string> = {}): ClientHttp2Stream {
  const stream = session.request({
    ':method': 'POST',
    ':path': generatePath,
    'content-type': 'application/grpc',
    te: 'trailers',
    authorization: 'good',
    ...headers,
  });
  stream.on('error', () => undefined);
  return stream;
}

/** The status of a call, or how its stream was reset. */
async function endOf(stream: ClientHttp2Stream): Promise<string> {
  let status: string | undefined;
  const read = (headers: IncomingHttpHeaders): void => {
    status = headers['grpc-status']?.toString() ?? status;
  };
  stream.on('response', read);
  stream.on('trailers', read);
  stream.resume();
  await new Promise((resolve) => stream.once('close', resolve));
  return status ?? `reset ${stream.rstCode}`;
}

function message(bytes: number, { flag = 0, sent = bytes } = {}): Buffer {
  const buffer = Buffer.alloc(5 + sent, 0x78);
  buffer.writeUInt8(flag);
  buffer.writeUInt32BE(bytes, 1);
  return buffer;
}

const unauthenticated = String(grpc.status.UNAUTHENTICATED);
const exhausted = String(grpc.status.RESOURCE_EXHAUSTED);
const emptyMessage = message(0);

describe('a stream', () => {
  it('with a wrong key, or none, ends before a byte of its body is read', async () => {
    const server = await serve();
    const session = open(server);
    for (const authorization of ['bad', '']) {
      const stream = begin(session, { authorization });
      stream.write(message(maxReceiveBytes));
      expect(await endOf(stream)).toBe(unauthenticated);
    }
    expect(handled).toBe(0);
    expect(server.gateCounts()).toEqual({ provenConnections: 0, unprovenConnections: 1, unansweredBytes: 0 });
    expect(refused).toEqual(['Generate unauthenticated', 'Generate unauthenticated']);
  });

  it.each([
    [
      'an unknown method',
      { ':path': '/mimo.inference.v1.InferenceService/Nothing' },
      grpc.status.UNIMPLEMENTED,
    ],
    ['a path of 10,000 characters', { ':path': `/${'x'.repeat(10_000)}` }, grpc.status.UNIMPLEMENTED],
    ['GET', { ':method': 'GET' }, grpc.status.INVALID_ARGUMENT],
    ['another content type', { 'content-type': 'application/json' }, grpc.status.INVALID_ARGUMENT],
    ['an unknown encoding', { 'grpc-encoding': 'x'.repeat(5_000) }, grpc.status.UNIMPLEMENTED],
  ])('with %s is refused', async (_name, headers, code) => {
    const stream = begin(open(await serve()), headers);
    stream.end();
    expect(await endOf(stream)).toBe(String(code));
    expect(handled).toBe(0);
  });

  it('with more headers than the limit is refused, and reset once the client knows the limit', async () => {
    const session = open(await serve());
    expect(await endOf(begin(session, { 'x-long': 'x'.repeat(20_000) }))).toBe(exhausted);
    await endOf(begin(session, { authorization: 'bad' }));
    const late = begin(session, { 'x-long': 'x'.repeat(20_000) });
    expect(await endOf(late)).toBe(`reset ${constants.NGHTTP2_ENHANCE_YOUR_CALM}`);
  });

  it('is served even on a connection with refused streams', async () => {
    const server = await serve();
    const session = open(server);
    await endOf(begin(session, { authorization: 'bad' }));
    const stream = begin(session);
    stream.end(emptyMessage);
    const end = endOf(stream);
    await vi.waitFor(() => expect(handled).toBe(1), patience);
    unanswered.resolve();
    expect(await end).toBe('0');
    expect(server.gateCounts()).toEqual({ provenConnections: 1, unprovenConnections: 0, unansweredBytes: 0 });
  });
});

describe('a body', () => {
  it.each([
    ['larger than the limit', message(maxReceiveBytes + 1, { sent: 10 }), grpc.status.RESOURCE_EXHAUSTED],
    ['of four gigabytes', message(0xffff_ffff, { sent: 0 }), grpc.status.RESOURCE_EXHAUSTED],
    ['with a flag of 2', message(10, { flag: 2 }), grpc.status.INVALID_ARGUMENT],
    ['with a second message', Buffer.concat([emptyMessage, message(1)]), grpc.status.INVALID_ARGUMENT],
  ])('%s is refused', async (_name, body, code) => {
    const server = await serve();
    const stream = begin(open(server));
    stream.write(body);
    expect(await endOf(stream)).toBe(String(code));
    expect(server.gateCounts()?.unansweredBytes).toBe(0);
  });

  it('is refused if it is not complete in time', async () => {
    const stream = begin(open(await serve({ bodyTimeoutMs: 100 })));
    stream.write(message(1_000, { sent: 10 }));
    expect(await endOf(stream)).toBe(String(grpc.status.DEADLINE_EXCEEDED));
  });

  it('is refused if it is the largest, not the newest, when all together exceed the limit', async () => {
    const server = await serve();
    const session = open(server);
    const ends: Promise<string>[] = [];
    let sentBytes = 0;
    for (const bytes of [900_000, 1_000_000, 100]) {
      const stream = begin(session);
      stream.write(message(maxReceiveBytes, { sent: bytes }));
      ends.push(endOf(stream));
      sentBytes += 5 + bytes;
      await vi.waitFor(() => expect(server.gateCounts()?.unansweredBytes).toBe(sentBytes), patience);
    }
    const last = begin(session);
    last.write(message(maxReceiveBytes, { sent: 300_000 }));
    expect(await ends[1]).toBe(exhausted);
    await vi.waitFor(
      () => expect(server.gateCounts()?.unansweredBytes).toBe(900_005 + 105 + 300_005),
      patience,
    );
  });

  it.each([
    ['gzip', gzipSync(GenerateRequest.encode(GenerateRequest.fromPartial({ model: 'm' })).finish()), '0'],
    ['deflate', deflateSync(Buffer.alloc(0)), '0'],
    ['gzip', Buffer.from('not gzip'), String(grpc.status.INVALID_ARGUMENT)],
    ['gzip', gzipSync(Buffer.alloc(maxReceiveBytes)), exhausted],
    ['gzip', gzipSync(randomBytes(maxReceiveBytes + 1)).subarray(0, -1), exhausted],
  ])('in %s ends with the right status (%#)', async (encoding, bytes, end) => {
    const server = await serve();
    unanswered.resolve();
    const stream = begin(open(server), { 'grpc-encoding': encoding });
    stream.end(Buffer.concat([message(bytes.length, { flag: 1, sent: 0 }), bytes]));
    expect(await endOf(stream)).toBe(end);
    await vi.waitFor(() => expect(server.gateCounts()?.unansweredBytes).toBe(0), patience);
  });

  it('of a megabyte arrives whole beside many like it, in turns', async () => {
    const server = await serve({ maxUnansweredBytes: 100 * maxReceiveBytes });
    const request = GenerateRequest.fromPartial({ input: { $case: 'prompt', value: 'x'.repeat(1_000_000) } });
    const body = GenerateRequest.encode(request).finish();
    const session = open(server);
    const ends = Array.from({ length: 20 }, () => {
      const stream = begin(session);
      stream.end(Buffer.concat([message(body.length, { sent: 0 }), body]));
      return endOf(stream);
    });
    await vi.waitFor(() => expect(handled).toBe(20), patience);
    unanswered.resolve();
    expect(new Set(await Promise.all(ends))).toEqual(new Set(['0']));
  });

  it('counts at its possible decompressed size', async () => {
    const server = await serve({ maxUnansweredBytes: maxReceiveBytes + 10_000 });
    const bomb = gzipSync(Buffer.concat([Buffer.alloc(maxReceiveBytes / 2), randomBytes(20_000)]));
    const session = open(server);
    const ends = [1, 2].map(() => {
      const stream = begin(session, { 'grpc-encoding': 'gzip' });
      stream.write(Buffer.concat([message(bomb.length, { flag: 1, sent: 0 }), bomb.subarray(0, -1)]));
      return endOf(stream);
    });
    expect(await Promise.race(ends)).toBe(exhausted);
    expect(server.gateCounts()?.unansweredBytes).toBeLessThanOrEqual(maxReceiveBytes + 10_000);
  });

  it('of a health check is limited to a name, and needs no key', async () => {
    const server = await serve();
    const stream = begin(open(server), { ':path': HealthService.check.path, authorization: '' });
    stream.write(message(5_000));
    expect(await endOf(stream)).toBe(exhausted);
    const client = new HealthClient(server.address, grpc.credentials.createInsecure());
    server.health.set('', true);
    await expect(callUnary(client, HealthService.check, { request: { service: '' } })).resolves.toEqual({
      status: 1,
    });
    const ask = async (): Promise<string> =>
      callUnary(client, HealthService.check, { request: { service: '' } }).then(
        () => 'ok',
        (error: unknown) => ClusterError.from(error).code,
      );
    const answers: string[] = [];
    for (let batch = 0; batch < 10; batch += 1) {
      answers.push(...(await Promise.all(Array.from({ length: 50 }, ask))));
    }
    client.close();
    // In the end the connection goes, as it asks nothing else.
    expect(answers).toContain('resource_exhausted');
    expect(answers.filter((code) => !/^(ok|resource_exhausted|unavailable)$/.test(code))).toEqual([]);
  });
});

describe('wrong keys', () => {
  it('are answered slowly after a few, and end a connection that sends nothing else', async () => {
    const session = open(await serve());
    const ends = new Map<string, number>();
    for (let batch = 0; batch < 30 && !session.closed; batch += 1) {
      const streams = [1, 2, 3, 4, 5].map(() => begin(session, { authorization: 'bad' }));
      for (const end of await Promise.all(streams.slice(0, batch < 4 ? 5 : 0).map(endOf))) {
        ends.set(end, (ends.get(end) ?? 0) + 1);
      }
    }
    await once(session, 'close');
    expect(ends).toEqual(new Map([[unauthenticated, 20]]));
  });
});

describe('connections', () => {
  it('are forgotten once they are closed, even with unread data', async () => {
    const server = await serve();
    for (let time = 0; time < 4; time += 1) {
      const session = open(server);
      const stream = begin(session);
      stream.write(Buffer.from([0, 255, 255, 255, 255]));
      expect(await endOf(stream)).toBe(String(grpc.status.RESOURCE_EXHAUSTED));
      session.destroy();
    }
    for (const headers of [{}, { authorization: 'bad' }, { ':path': HealthService.watch.path }]) {
      const session = open(server);
      const stream = begin(session, headers);
      stream.write(message(maxReceiveBytes, { sent: 900_000 }));
      await once(session, 'remoteSettings');
      session.destroy();
    }
    await vi.waitFor(
      () =>
        expect(server.gateCounts()).toEqual({
          provenConnections: 0,
          unprovenConnections: 0,
          unansweredBytes: 0,
        }),
      patience,
    );
  });

  it('beyond the limit of a peer replace its oldest unproven ones', async () => {
    const server = await serve();
    const proven = open(server);
    const stream = begin(proven);
    stream.end(emptyMessage);
    await vi.waitFor(() => expect(handled).toBe(1), patience);
    const idle: ClientHttp2Session[] = [];
    for (let index = 0; index < 12; index += 1) {
      const session = open(server);
      idle.push(session);
      await once(session, 'remoteSettings');
    }
    await vi.waitFor(() => expect(idle.filter(({ closed }) => closed)).toEqual(idle.slice(0, 3)), patience);
    expect(proven.closed).toBe(false);
    expect(server.gateCounts()).toMatchObject({ provenConnections: 1, unprovenConnections: 9 });
    unanswered.resolve();
    expect(await endOf(stream)).toBe('0');
  });
});

/** A connection that has said hello; `frame` is sent over and over. */
async function flood({ port }: GrpcServer, frame: Buffer): Promise<Socket> {
  const socket = connectSocket(port, '127.0.0.1');
  socket.on('error', () => undefined);
  socket.resume();
  socket.write('PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n');
  socket.write(Buffer.from([0, 0, 0, 4, 0, 0, 0, 0, 0]));
  const frames = Buffer.concat(Array.from({ length: 1_000 }, () => frame));
  for (let burst = 0; burst < 100 && !socket.closed; burst += 1) {
    if (!socket.write(frames)) {
      await new Promise((resolve) => socket.once('drain', resolve).once('close', resolve));
    }
  }
  return socket;
}

function frameOf(type: number, { flags = 0, stream = 0, payload = Buffer.alloc(0) } = {}): Buffer {
  const header = Buffer.alloc(9);
  header.writeUIntBE(payload.length, 0, 3);
  header.writeUInt8(type, 3);
  header.writeUInt8(flags, 4);
  header.writeUInt32BE(stream, 5);
  return Buffer.concat([header, payload]);
}

describe('a flood', () => {
  it.each([
    ['PING', frameOf(6, { payload: Buffer.alloc(8) })],
    ['SETTINGS', frameOf(4)],
    ['SETTINGS with entries', frameOf(4, { payload: Buffer.from([0, 3, 0, 0, 0, 1]) })],
    ['CONTINUATION', frameOf(9, { stream: 1, payload: Buffer.alloc(10) })],
  ])('of %s ends its connection', async (_name, frame) => {
    const server = await serve();
    const socket = await flood(server, frame);
    if (!socket.closed) {
      await new Promise((resolve) => socket.once('close', resolve));
    }
    await vi.waitFor(() => expect(server.gateCounts()?.unprovenConnections).toBe(0), patience);
  });
});
