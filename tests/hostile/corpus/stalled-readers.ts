// Clients that take little or nothing of their streams, in many ways: another one is answered beside them, every time.

import { ChatRequest, Role } from '@mimo/proto/inference';
import type { SamplingParams } from '@mimo/proto/sampling';

import { openSlowReader, type SlowReader } from '../../harness/slow-reader.ts';
import type { HostileSubject } from '../hostile-case.ts';
import type { CallEnd } from '../raw-call.ts';
import type { HostileWorld } from '../world.ts';

interface Stall {
  readonly streams: number;
  /** Bytes of each stream that are taken. */
  readonly windowBytes: number;
  readonly reads?: boolean;
  readonly sampling?: Partial<SamplingParams>;
  /** What the client does after it has asked. */
  readonly afterwards?: (reader: SlowReader) => void;
}

const stalls: Readonly<Record<string, Stall>> = {
  'one without a window': { streams: 1, windowBytes: 0 },
  '16 without a window': { streams: 16, windowBytes: 0 },
  '64 without a window': { streams: 64, windowBytes: 0 },
  '500 without a window': { streams: 500, windowBytes: 0 },
  'one that takes a byte': { streams: 1, windowBytes: 1 },
  '64 that take a byte': { streams: 64, windowBytes: 1 },
  '64 that take the length of a message and not the message': { streams: 64, windowBytes: 5 },
  '64 that take the first message and a byte': { streams: 64, windowBytes: 66 },
  '8 that stop after some tokens': { streams: 8, windowBytes: 600 },
  '8 that stop after some hundred tokens': { streams: 8, windowBytes: 6_000 },
  'one that reads a byte at a time': { streams: 1, windowBytes: 1, reads: true },
  '16 that read a byte at a time': { streams: 16, windowBytes: 1, reads: true, sampling: { maxTokens: 20 } },
  '16 that read seven bytes at a time': {
    streams: 16,
    windowBytes: 7,
    reads: true,
    sampling: { maxTokens: 20 },
  },
  '16 without a window for one token': { streams: 16, windowBytes: 0, sampling: { maxTokens: 1 } },
  '16 without a window for logprobs': { streams: 16, windowBytes: 0, sampling: { logprobs: 20 } },
  '8 that stop among logprobs': { streams: 8, windowBytes: 3_000, sampling: { logprobs: 20 } },
  '16 that close the window once it is open': {
    streams: 16,
    windowBytes: 200,
    afterwards: (reader) => reader.readOn(0),
  },
  '16 that open and close it in turn': {
    streams: 16,
    windowBytes: 0,
    afterwards: (reader) => [1, 0, 10, 0, 100, 0].forEach((bytes) => reader.readOn(bytes)),
  },
  '16 whose connection is frozen': {
    streams: 16,
    windowBytes: 65_535,
    afterwards: (reader) => reader.freeze(),
  },
  '16 without a window that reset': {
    streams: 16,
    windowBytes: 0,
    afterwards: (reader) => reader.leave('reset'),
  },
  '16 in mid-stream that reset': {
    streams: 16,
    windowBytes: 600,
    afterwards: (reader) => reader.leave('reset'),
  },
  '16 without a window that say goodbye': {
    streams: 16,
    windowBytes: 0,
    afterwards: (reader) => reader.leave('goaway'),
  },
  '16 without a window that drop the line': {
    streams: 16,
    windowBytes: 0,
    afterwards: (reader) => reader.close(),
  },
  'the largest window, never read': {
    streams: 16,
    windowBytes: 2 ** 31 - 1,
    afterwards: (reader) => reader.freeze(),
  },
};

const messages = [{ role: Role.USER, content: 'What is 47 + 85?' }];

/** Stalls, and asks beside it. */
async function stall(
  world: HostileWorld,
  { streams, sampling, afterwards, ...window }: Stall,
): Promise<CallEnd> {
  const headers = { authorization: `Bearer ${world.apiKey}` };
  const reader = openSlowReader(world.address, { ...window, headers });
  try {
    const request = ChatRequest.fromPartial({
      model: 'mimo-demo',
      messages,
      sampling: { maxTokens: 400, ignoreEos: true, ...sampling },
    });
    for (let i = 0; i < streams; i++) {
      reader.chat(request);
    }
    await world.chat({ messages, sampling: { maxTokens: 4 } });
    afterwards?.(reader);
    return await world.chat({ messages, sampling: { maxTokens: 8 } });
  } finally {
    reader.close();
  }
}

export const stalledReaders: HostileSubject = {
  name: 'stalled readers',
  cases: Object.entries(stalls).map(([name, how]) => ({
    name,
    send: (world) => stall(world, how),
    code: 'ok',
  })),
};
