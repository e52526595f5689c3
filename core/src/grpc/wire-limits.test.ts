import { BinaryReader, BinaryWriter } from '@bufbuild/protobuf/wire';
import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { ChatRequest, CountTokensRequest, GenerateRequest, Role } from '@mimo/proto/inference';
import { repeatedLimits, requestLimits, stopTextMaxCharacters, type MessageLimits } from '@mimo/proto/limits';

import { ClusterError } from '../process/errors.ts';
import { MalformedRequest, strictDeserializer } from './handlers.ts';
import { assertWithinLimits } from './wire-limits.ts';

function problemOf(message: Uint8Array, limits: MessageLimits): string | undefined {
  try {
    assertWithinLimits(message, limits);
    return undefined;
  } catch (error) {
    const { code, message: text } = ClusterError.from(error);
    return code === 'invalid_argument' ? text : `${code}: ${text}`;
  }
}

function repeat(piece: readonly number[], count: number): Uint8Array {
  return Uint8Array.from({ length: count * piece.length }, (_, at) => piece[at % piece.length]!);
}

function chat(request: Parameters<typeof ChatRequest.fromPartial>[0]): Uint8Array {
  return ChatRequest.encode(ChatRequest.fromPartial(request)).finish();
}

const { messages, stop, stopTokenIds, tokenIds } = repeatedLimits;

describe('assertWithinLimits', () => {
  it.each<[string, MessageLimits, Uint8Array, string | undefined]>([
    ['nothing', requestLimits.ChatRequest, new Uint8Array(), undefined],
    ['as many messages as may be', requestLimits.ChatRequest, repeat([0x12, 0], messages), undefined],
    [
      'one more',
      requestLimits.ChatRequest,
      repeat([0x12, 0], messages + 1),
      'messages has more than 4096 entries, the limit',
    ],
    [
      'eight million',
      requestLimits.ChatRequest,
      repeat([0x12, 0], 2 ** 23),
      'messages has more than 4096 entries, the limit',
    ],
    [
      'as many stop texts as may be',
      requestLimits.ChatRequest,
      chat({ sampling: { stop: Array(stop).fill('x') } }),
      undefined,
    ],
    [
      'one more stop text',
      requestLimits.ChatRequest,
      chat({ sampling: { stop: Array(stop + 1).fill('x') } }),
      'sampling.stop has more than 16 entries, the limit',
    ],
    [
      'the longest stop text of the widest characters',
      requestLimits.ChatRequest,
      chat({ sampling: { stop: ['\uffff'.repeat(stopTextMaxCharacters)] } }),
      undefined,
    ],
    [
      'a stop text of a megabyte',
      requestLimits.ChatRequest,
      chat({ sampling: { stop: ['x'.repeat(2 ** 20)] } }),
      'sampling.stop has 1048576 bytes; the limit is 768',
    ],
    [
      'packed stop token ids',
      requestLimits.ChatRequest,
      chat({ sampling: { stopTokenIds: Array(stopTokenIds + 1).fill(70_000) } }),
      'sampling.stop_token_ids has more than 64 entries, the limit',
    ],
    [
      'stop token ids one by one, over several sampling fields',
      { 1: { name: 'ids', maxCount: 3, packed: true } },
      Uint8Array.from([0x08, 1, 0x0a, 2, 5, 6, 0x08, 1]),
      'ids has more than 3 entries, the limit',
    ],
    [
      'a prompt of too many token ids, inside of CountTokens',
      requestLimits.CountTokensRequest,
      CountTokensRequest.encode({
        request: {
          $case: 'generate',
          value: {
            model: 'm',
            input: { $case: 'tokenIds', value: { ids: Array(tokenIds + 1).fill(1) } },
            sampling: undefined,
          },
        },
      }).finish(),
      'generate.token_ids.ids has more than 1048576 entries, the limit',
    ],
    [
      'a long model name',
      requestLimits.ChatRequest,
      chat({ model: 'm'.repeat(257) }),
      'model has 257 bytes; the limit is 256',
    ],
    [
      'sampling many times',
      requestLimits.ChatRequest,
      repeat([0x1a, 0], 17),
      'sampling has more than 16 entries, the limit',
    ],
    [
      'unknown fields',
      requestLimits.ChatRequest,
      repeat([0x78, 0], 257),
      'request has more than 256 unknown fields, the limit',
    ],
    [
      'unknown fields of different numbers',
      requestLimits.ListModelsRequest,
      Uint8Array.from({ length: 600 }, (_, at) => (at % 2 === 0 ? 8 * (1 + (at % 15)) : 0)),
      'request has more than 256 unknown fields, the limit',
    ],
    [
      'a group',
      requestLimits.ChatRequest,
      Uint8Array.of(0x0b, 0x0c),
      'the request is not a valid message: wire type 3 at byte 1',
    ],
    [
      'field number 0',
      requestLimits.ChatRequest,
      Uint8Array.of(0x00),
      'the request is not a valid message: field number 0 at byte 1',
    ],
    [
      'a field number beyond 29 bits',
      requestLimits.ChatRequest,
      Uint8Array.of(0xf8, 0xff, 0xff, 0xff, 0x7f),
      'the request is not a valid message: field number 4294967295 at byte 5',
    ],
    [
      'a length beyond the end',
      requestLimits.ChatRequest,
      Uint8Array.of(0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f),
      'the request is not a valid message: a length beyond the end at byte 4294967301',
    ],
    [
      'a length beyond the end of its message',
      requestLimits.ChatRequest,
      Uint8Array.of(0x12, 2, 0x12, 4, 0, 0, 0, 0),
      'the request is not a valid message: a length beyond the end at byte 8',
    ],
    [
      'a tag that does not end',
      requestLimits.ChatRequest,
      Uint8Array.of(0xff, 0xff, 0xff, 0xff, 0xff, 0x01),
      'the request is not a valid message: a number that does not end at byte 5',
    ],
    [
      'a tag without its value',
      requestLimits.ChatRequest,
      Uint8Array.of(0x08),
      'the request is not a valid message: a number that does not end at byte 1',
    ],
  ])('%s', (_name, limits, message, problem) => {
    expect(problemOf(message, limits)).toBe(problem);
  });

  it('never counts fewer values than the decoder creates', () => {
    const limits = { 1: { name: 'ids', maxCount: 5, packed: true } } as const;
    const piece = fc.oneof(
      fc.array(fc.nat(2 ** 32 - 1), { maxLength: 4 }).map((ids) => ({ packed: true, ids })),
      fc.nat(2 ** 32 - 1).map((id) => ({ packed: false, ids: [id] })),
    );
    fc.assert(
      fc.property(fc.array(piece, { maxLength: 6 }), (pieces) => {
        const writer = new BinaryWriter();
        for (const { packed, ids } of pieces) {
          if (packed) {
            writer.uint32(10).fork();
            ids.forEach((id) => writer.uint32(id));
            writer.join();
          } else {
            ids.forEach((id) => writer.uint32(8).uint32(id));
          }
        }
        const count = pieces.reduce((sum, { ids }) => sum + ids.length, 0);
        expect(problemOf(writer.finish(), limits) === undefined).toBe(count <= 5);
      }),
    );
  });
});

describe('strictDeserializer, fuzzed', () => {
  const decodeChat = strictDeserializer(ChatRequest, requestLimits.ChatRequest);
  const decodeGenerate = strictDeserializer(GenerateRequest, requestLimits.GenerateRequest);
  const decodeCount = strictDeserializer(CountTokensRequest, requestLimits.CountTokensRequest);

  const sampling = fc.record(
    {
      temperature: fc.float(),
      topK: fc.nat(),
      seed: fc.nat(),
      ignoreEos: fc.boolean(),
      stop: fc.array(fc.string({ maxLength: 20 }), { maxLength: 16 }),
      stopTokenIds: fc.array(fc.nat(), { maxLength: 64 }),
    },
    { requiredKeys: [] },
  );
  const request = fc.record(
    {
      model: fc.string({ maxLength: 60 }),
      messages: fc.array(
        fc.record({
          role: fc.constantFrom(Role.SYSTEM, Role.USER, Role.ASSISTANT),
          content: fc.string({ unit: 'binary' }),
        }),
        {
          maxLength: 30,
        },
      ),
      sampling,
    },
    { requiredKeys: [] },
  );
  const encoded = request.map((partial) => chat(partial));

  it('reads every request within the limits as the decoder does', () => {
    fc.assert(
      fc.property(encoded, (bytes) => {
        expect(decodeChat(Buffer.from(bytes))).toEqual(ChatRequest.decode(new BinaryReader(bytes)));
      }),
    );
  });

  it('returns a request within the limits or throws one coded error, for any bytes', () => {
    const changes = fc.array(fc.tuple(fc.nat(), fc.nat(255)), { maxLength: 8 });
    const changed = fc.tuple(encoded, changes).map(([bytes, places]) => {
      const copy = Uint8Array.from(bytes);
      for (const [at, byte] of places) {
        copy[at % Math.max(1, copy.length)] = byte;
      }
      return copy;
    });
    fc.assert(
      fc.property(fc.oneof(changed, fc.uint8Array({ maxLength: 400 })), (bytes) => {
        for (const decode of [decodeChat, decodeGenerate, decodeCount]) {
          const seen = decode(Buffer.from(bytes));
          expect(seen instanceof MalformedRequest ? seen.error.code : 'a request').toMatch(
            /^(invalid_argument|a request)$/,
          );
        }
      }),
      { numRuns: 2_000 },
    );
  });
});
