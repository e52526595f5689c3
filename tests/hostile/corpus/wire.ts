// Bytes that no well-behaved client sends: protobuf, gRPC framing, compression, headers, HTTP/2 itself. Each case
// comes from a separate address, so that none of them slows down another.

import { deflateSync, gzipSync } from 'node:zlib';

import { ChatRequest, CountTokensRequest, GenerateRequest, Role } from '@mimo/proto/inference';

import {
  callHeaders,
  connectRaw,
  frameTypes,
  headerBlock,
  http2Frame,
  openSocket,
} from '../../harness/raw-http2.ts';
import type { HostileSubject } from '../hostile-case.ts';
import { frame, type CallEnd, type RawCall } from '../raw-call.ts';
import type { HostileWorld } from '../world.ts';

type Case = HostileSubject['cases'][number];

const service = '/mimo.inference.v1.InferenceService';
const reflection = '/grpc.reflection.v1.ServerReflection/ServerReflectionInfo';
const health = '/grpc.health.v1.Health/Check';
const maxReceiveBytes = 16 * 2 ** 20;
const question = { role: Role.USER, content: 'What is 47 + 85?' };
const malformed = /^the request is not a valid message: /;

let lastAddress = 0;

function nextAddress(): string {
  lastAddress += 1;
  return `127.0.2.${lastAddress}`;
}

function call(
  name: string,
  sent: Omit<RawCall, 'path'> & { readonly path?: string },
  code: Case['code'],
  message?: RegExp,
): Case {
  const from = nextAddress();
  return {
    name,
    code,
    ...(message === undefined ? {} : { message }),
    send: (world) => world.raw({ path: `${service}/Chat`, from, ...sent }),
  };
}

/** A request of these bytes, framed as it should be. */
function bytes(
  name: string,
  body: Uint8Array | readonly number[],
  message: RegExp,
  path = `${service}/Chat`,
): Case {
  return call(`bytes: ${name}`, { path, body: frame(Uint8Array.from(body)) }, 'invalid_argument', message);
}

function chat(request: Parameters<typeof ChatRequest.fromPartial>[0]): Uint8Array {
  return ChatRequest.encode(ChatRequest.fromPartial({ model: 'mimo-demo', ...request })).finish();
}

function repeat(piece: readonly number[], count: number): Uint8Array {
  return Uint8Array.from({ length: count * piece.length }, (_, at) => piece[at % piece.length]!);
}

function concat(...parts: readonly (Uint8Array | readonly number[])[]): Uint8Array {
  return Buffer.concat(parts.map((part) => Uint8Array.from(part)));
}

function messages(count: number, role: Role, content = ''): Uint8Array {
  return chat({ messages: Array.from({ length: count }, () => ({ role, content })) });
}

const generate = `${service}/Generate`;
const countTokens = `${service}/CountTokens`;
const manyIds = GenerateRequest.encode(
  GenerateRequest.fromPartial({
    model: 'mimo-demo',
    input: { $case: 'tokenIds', value: { ids: Array<number>(2 ** 20 + 1).fill(1) } },
  }),
).finish();
const good = chat({ messages: [question], sampling: { maxTokens: 1 } });

const protobuf: readonly Case[] = [
  bytes('a tag without a value', [0x08], malformed),
  bytes('field number 0', [0x02, 0x00], /field number 0/),
  bytes('a field number of 32 bits', [0xfa, 0xff, 0xff, 0xff, 0x7f, 0x00], /field number/),
  bytes('a tag of eleven bytes', repeat([0xff], 11), /does not end/),
  bytes('a group', [0x0b, 0x0c], /wire type 3/),
  bytes('the end of a group', [0x0c], /wire type 4/),
  bytes('ten thousand groups in one another', repeat([0x0b], 10_000), /wire type 3/),
  bytes('wire type 6', [0x0e], /wire type 6/),
  bytes('wire type 7', [0x0f], /wire type 7/),
  bytes('a length of 4 GB', [0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f], /beyond the end/),
  bytes('a length one beyond the end', [0x0a, 0x02, 0x61], /beyond the end/),
  bytes('a message longer than its parent', [0x12, 0x02, 0x12, 0x04, 0, 0, 0, 0], /beyond the end/),
  bytes('eight bytes where four are left', [0x09, 0, 0, 0, 0], /beyond the end/),
  bytes('a varint that does not end', repeat([0x80], 12), /does not end/),
  bytes('messages as numbers', concat(chat({}), [0x10, 0x01]), /messages/),
  bytes('invalid UTF-8 in the model', [0x0a, 0x02, 0xc3, 0x28], /UTF-8/),
  bytes('an overlong slash in the content', [0x12, 0x04, 0x12, 0x02, 0xc0, 0xaf], /UTF-8/),
  bytes('a surrogate in the content', [0x12, 0x05, 0x12, 0x03, 0xed, 0xa0, 0x80], /UTF-8/),
  bytes('half a character in a stop text', [0x1a, 0x04, 0x4a, 0x02, 0xf0, 0x9f], /UTF-8/),
  bytes(
    'noise',
    Uint8Array.from({ length: 4_096 }, (_, at) => (at * 167 + 91) % 256),
    malformed,
  ),
];

const counts: readonly Case[] = [
  bytes('4,097 messages', messages(4_097, Role.ASSISTANT), /^messages has more than 4096 entries/),
  bytes('10,000 empty messages', messages(10_000, Role.ASSISTANT), /^messages has more than 4096 entries/),
  bytes(
    '8 million empty messages',
    repeat([0x12, 0x00], 2 ** 23 - 10),
    /^messages has more than 4096 entries/,
  ),
  bytes('8 million of no field', repeat([0x7a, 0x00], 2 ** 23 - 10), /more than 256 unknown fields/),
  bytes('8 million samplings', repeat([0x1a, 0x00], 2 ** 23 - 10), /^sampling has more than 16 entries/),
  bytes(
    '17 stop texts',
    chat({ messages: [question], sampling: { stop: Array<string>(17).fill('x') } }),
    /^sampling\.stop has more than 16/,
  ),
  bytes(
    'a stop text of a megabyte',
    chat({ messages: [question], sampling: { stop: ['x'.repeat(2 ** 20)] } }),
    /^sampling\.stop has 1048576 bytes/,
  ),
  bytes(
    '65 stop token ids',
    chat({ messages: [question], sampling: { stopTokenIds: Array<number>(65).fill(7) } }),
    /^sampling\.stop_token_ids has more than 64/,
  ),
  bytes(
    '65 stop token ids, one by one',
    concat(chat({ messages: [question] }), [0x1a, 130, 1], repeat([0x50, 0x07], 65)),
    /^sampling\.stop_token_ids has more than 64/,
  ),
  bytes(
    'a model name of 257 bytes',
    chat({ model: 'm'.repeat(257) }),
    /^model has 257 bytes; the limit is 256/,
  ),
  bytes(
    'a model name of ten megabytes',
    chat({ model: 'm'.repeat(10 * 2 ** 20) }),
    /^model has 10485760 bytes/,
  ),
  bytes('a million token ids and one', manyIds, /^token_ids\.ids has more than 1048576/, generate),
  bytes(
    'a million token ids and one to count',
    CountTokensRequest.encode({
      request: { $case: 'generate', value: GenerateRequest.decode(manyIds) },
    }).finish(),
    /^generate\.token_ids\.ids has more than 1048576/,
    countTokens,
  ),
  bytes('a million inputs', repeat([0x1a, 0x00], 2 ** 20), /^token_ids has more than 16 entries/, generate),
  bytes('seventeen chats to count', repeat([0x0a, 0x00], 17), /^chat has more than 16 entries/, countTokens),
  bytes('4,096 violations', messages(4_096, Role.SYSTEM, ''), /problems/),
  bytes('1,000 violations', messages(1_000, Role.UNSPECIFIED, ''), /problems/),
];

const framing: readonly Case[] = [
  call('no message', { body: Buffer.alloc(0) }, ['unimplemented', 'internal', 'invalid_argument', 'reset']),
  call('three bytes of five', { body: Buffer.alloc(3) }, [
    'unimplemented',
    'internal',
    'invalid_argument',
    'reset',
  ]),
  call('half a message', { body: frame(good).subarray(0, -4) }, [
    'unimplemented',
    'internal',
    'invalid_argument',
    'reset',
  ]),
  call('a flag of 2', { body: frame(good, 2) }, 'invalid_argument', /flag/),
  call('a flag of 255', { body: frame(good, 255) }, 'invalid_argument', /flag/),
  call(
    'a length of 4 GB',
    { body: Buffer.from([0, 255, 255, 255, 255]), end: false },
    'resource_exhausted',
    /4294967295 bytes/,
  ),
  call(
    'one byte over the limit',
    { body: frame(Buffer.alloc(maxReceiveBytes + 1)).subarray(0, 100), end: false },
    'resource_exhausted',
    /16777217/,
  ),
  call(
    'two messages',
    { body: Buffer.concat([frame(good), frame(good)]) },
    'invalid_argument',
    /second request/,
  ),
  call('a message, and half a prefix', { body: Buffer.concat([frame(good), Buffer.alloc(2)]) }, [
    'ok',
    'invalid_argument',
  ]),
  call('an honest request after all that', { body: frame(good) }, 'ok'),
];

function zipped(body: Uint8Array, encoding: string): Omit<RawCall, 'path'> {
  return { body: frame(body, 1), headers: { 'grpc-encoding': encoding } };
}

const bomb = gzipSync(Buffer.from(repeat([0x12, 0x00], 2 ** 23 - 10)));

const compression: readonly Case[] = [
  call('gzip', zipped(gzipSync(good), 'gzip'), 'ok'),
  call('deflate', zipped(deflateSync(good), 'deflate'), 'ok'),
  call('gzip that is none', zipped(good, 'gzip'), 'invalid_argument', /not valid gzip/),
  call('gzip cut off', zipped(gzipSync(good).subarray(0, -9), 'gzip'), 'invalid_argument', /not valid gzip/),
  call('gzip in gzip', zipped(gzipSync(gzipSync(good)), 'gzip'), 'invalid_argument', malformed),
  call('deflate called gzip', zipped(deflateSync(good), 'gzip'), 'invalid_argument', /not valid gzip/),
  call('an unknown encoding', zipped(good, 'br'), 'unimplemented', /grpc-encoding/),
  call('an encoding of 5,000 letters', zipped(good, 'x'.repeat(5_000)), 'unimplemented', /grpc-encoding/),
  call('a flag without an encoding', { body: frame(good, 1) }, ['ok', 'invalid_argument', 'internal']),
  call('a bomb', zipped(bomb, 'gzip'), 'resource_exhausted', /unzips to more than/),
  call(
    'a bomb with a wrong key',
    { ...zipped(bomb, 'gzip'), headers: { 'grpc-encoding': 'gzip', authorization: 'Bearer wrong-key-1' } },
    'unauthenticated',
  ),
  call(
    'an empty bomb of a deflate',
    zipped(deflateSync(Buffer.alloc(maxReceiveBytes)), 'deflate'),
    'resource_exhausted',
  ),
];

function withHeaders(name: string, headers: RawCall['headers'], code: Case['code'], message?: RegExp): Case {
  return call(`headers: ${name}`, { body: frame(good), headers: headers ?? {} }, code, message);
}

const key = 'hostile-key-0f3a9c57';

const headers: readonly Case[] = [
  withHeaders('JSON', { 'content-type': 'application/json' }, 'invalid_argument', /content-type/),
  withHeaders('no content type', { 'content-type': '' }, 'invalid_argument', /content-type/),
  withHeaders('GET', { ':method': 'GET' }, ['invalid_argument', 'reset']),
  withHeaders('DELETE', { ':method': 'DELETE' }, ['invalid_argument', 'reset']),
  withHeaders('20,000 letters', { 'x-long': 'x'.repeat(20_000) }, ['resource_exhausted', 'reset']),
  withHeaders(
    'a hundred',
    Object.fromEntries(Array.from({ length: 100 }, (_, at) => [`x-${at}`, 'x'])),
    'reset',
  ),
  withHeaders('no key', { authorization: '' }, 'unauthenticated', /Bearer/),
  withHeaders('a tab before the key', { authorization: `Bearer\t${key}` }, 'unauthenticated'),
  withHeaders('two keys', { authorization: `Bearer ${key} ${key}` }, 'unauthenticated'),
  withHeaders(
    'another scheme',
    { authorization: `Basic ${Buffer.from(`x:${key}`).toString('base64')}` },
    'unauthenticated',
  ),
  withHeaders('half a key', { authorization: `Bearer ${key.slice(0, -1)}` }, 'unauthenticated'),
  withHeaders('a key and more', { authorization: `Bearer ${key}0` }, 'unauthenticated'),
  withHeaders('a key in capitals', { authorization: `Bearer ${key.toUpperCase()}` }, 'unauthenticated'),
  withHeaders('a key of 8,000 letters', { authorization: `Bearer ${'k'.repeat(8_000)}` }, 'unauthenticated'),
  withHeaders('a key that is not ASCII', { authorization: 'Bearer \u00e4\u00f6\u00fc\u00df' }, [
    'unauthenticated',
    'reset',
  ]),
  withHeaders('binary metadata that is not base64', { 'x-trace-bin': '***' }, 'ok'),
  withHeaders('metadata that is not ASCII', { 'x-name': 'Zo\u00eb' }, 'ok'),
  call(
    'headers: 16 MB behind a wrong key',
    {
      body: frame(Buffer.alloc(maxReceiveBytes)).subarray(0, 2 ** 20),
      headers: { authorization: 'Bearer wrong-key-2' },
      end: false,
    },
    'unauthenticated',
  ),
  call('path: unknown', { path: `${service}/Nothing`, body: frame(good) }, 'unimplemented'),
  call('path: of 10,000 letters', { path: `/${'x'.repeat(10_000)}`, body: frame(good) }, 'unimplemented'),
  call('path: without a slash', { path: 'x', body: frame(good) }, ['unimplemented', 'reset']),
  call('path: __proto__', { path: '/__proto__/constructor', body: frame(good) }, 'unimplemented'),
  call(
    'health: a name of 5,000 letters',
    {
      path: health,
      body: frame(concat([0x0a, 0x88, 0x27], repeat([0x61], 5_000))),
      headers: { authorization: '' },
    },
    'resource_exhausted',
    /4096/,
  ),
  call(
    'health: an unknown name',
    { path: health, body: frame(Uint8Array.of(0x0a, 0x01, 0x78)), headers: { authorization: '' } },
    'not_found',
  ),
  call(
    'reflection: a question of 16 MB',
    {
      path: reflection,
      body: frame(Buffer.alloc(maxReceiveBytes)).subarray(0, 1_000),
      headers: { authorization: '' },
      end: false,
    },
    'resource_exhausted',
  ),
  call(
    'reflection: noise',
    { path: reflection, body: frame(Buffer.from([0xff, 0xff])), headers: { authorization: '' } },
    ['internal', 'invalid_argument'],
  ),
];

/** A connection that the server must end: writes until it does. */
function connection(name: string, bytesOf: () => Buffer, { hello = true, times = 1_000 } = {}): Case {
  const from = nextAddress();
  const send = async ({ address }: HostileWorld): Promise<CallEnd> => {
    const socket = hello ? connectRaw(address, { localAddress: from }) : openSocket(address, from);
    socket.resume();
    const closed = new Promise((resolve) => socket.once('close', resolve));
    const piece = bytesOf();
    for (let time = 0; time < times && !socket.destroyed; time += 1) {
      if (!socket.write(piece)) {
        await Promise.race([closed, new Promise((resolve) => socket.once('drain', resolve))]);
      }
    }
    await closed;
    return { code: 'reset', message: 'the connection was ended' };
  };
  return { name: `connection: ${name}`, send, code: 'reset' };
}

function many(piece: Buffer, count = 1_000): Buffer {
  return Buffer.concat(Array.from({ length: count }, () => piece));
}

const openStream = (stream: number, authorization: string): Buffer =>
  http2Frame(frameTypes.headers, {
    flags: 4,
    stream,
    payload: headerBlock(callHeaders(`${service}/Chat`, authorization)),
  });

const connections: readonly Case[] = [
  connection('HTTP/1.1', () => Buffer.from('GET / HTTP/1.1\r\nHost: x\r\n\r\n'), { hello: false, times: 1 }),
  connection(
    'a TLS hello',
    () => Buffer.from([22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3, ...Array<number>(64).fill(7)]),
    { hello: false, times: 1 },
  ),
  connection('a preface with one letter wrong', () => Buffer.from('PRI * HTTP/2.0\r\n\r\nSX\r\n\r\n'), {
    hello: false,
    times: 1,
  }),
  connection('pings', () => many(http2Frame(frameTypes.ping, { payload: Buffer.alloc(8) }))),
  connection('settings', () =>
    many(http2Frame(frameTypes.settings, { payload: Buffer.from([0, 3, 0, 0, 1, 0]) })),
  ),
  connection('a ping of seven bytes', () => http2Frame(frameTypes.ping, { payload: Buffer.alloc(7) }), {
    times: 1,
  }),
  connection('a frame of 16 MB', () => Buffer.from([255, 255, 255, 0, 0, 0, 0, 0, 1]), { times: 1 }),
  connection('data on no stream', () =>
    many(http2Frame(frameTypes.data, { stream: 1, payload: Buffer.alloc(100) }), 10),
  ),
  connection('continuations without an end', () =>
    Buffer.concat([
      http2Frame(frameTypes.headers, { stream: 1, payload: headerBlock({ ':method': 'POST' }) }),
      many(http2Frame(frameTypes.continuation, { stream: 1 })),
    ]),
  ),
  connection('headers that cannot be unpacked', () =>
    http2Frame(frameTypes.headers, {
      flags: 4,
      stream: 1,
      payload: Buffer.from([0xff, 0xff, 0xff, 0xff, 0xff]),
    }),
  ),
  connection('a window beyond 2^31', () =>
    many(http2Frame(frameTypes.windowUpdate, { payload: Buffer.from([0x7f, 0xff, 0xff, 0xff]) }), 10),
  ),
  connection('window updates of nothing', () =>
    http2Frame(frameTypes.windowUpdate, { payload: Buffer.alloc(4) }),
  ),
  connection('priorities', () =>
    many(http2Frame(frameTypes.priority, { stream: 1, payload: Buffer.from([0, 0, 0, 3, 1]) })),
  ),
  connection(
    'two hundred wrong keys',
    () => Buffer.concat(Array.from({ length: 200 }, (_, at) => openStream(2 * at + 1, 'Bearer wrong-key-3'))),
    { times: 1 },
  ),
  connection(
    'streams reset at once, without a key',
    () =>
      Buffer.concat(
        Array.from({ length: 500 }, (_, at) =>
          Buffer.concat([
            openStream(2 * at + 1, ''),
            http2Frame(frameTypes.rstStream, { stream: 2 * at + 1, payload: Buffer.from([0, 0, 0, 8]) }),
          ]),
        ),
      ),
    { times: 1 },
  ),
  connection('a table unpacked thousands of times', () => {
    const name = Buffer.from('x-table');
    const stored = Buffer.concat([
      headerBlock(callHeaders(`${service}/Chat`, '')),
      Buffer.concat([
        Buffer.of(0x40, name.length),
        name,
        Buffer.from([0x7f, 0xa1, 0x1e]),
        Buffer.alloc(4_000, 0x61),
      ]),
    ]);
    const again = Buffer.concat([headerBlock(callHeaders(`${service}/Chat`, '')), Buffer.alloc(4_000, 0xbe)]);
    return Buffer.concat(
      Array.from({ length: 64 }, (_, at) =>
        http2Frame(frameTypes.headers, { flags: 5, stream: 2 * at + 1, payload: at === 0 ? stored : again }),
      ),
    );
  }),
];

export const wire: HostileSubject = {
  name: 'wire',
  cases: [...protobuf, ...counts, ...framing, ...compression, ...headers, ...connections],
};
