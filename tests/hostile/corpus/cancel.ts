// Cancel with ids that are unknown, another tenant's, or invalid: no other tenant's request ends.

import { randomUUID } from 'node:crypto';

import * as grpc from '@grpc/grpc-js';

import { callServerStream } from '@mimo/core/grpc/client';
import { ChatRequest, InferenceServiceService, Role } from '@mimo/proto/inference';

import { createClient } from '../../harness/cluster.ts';
import type { HostileSubject } from '../hostile-case.ts';
import { frame, type CallEnd } from '../raw-call.ts';
import type { HostileWorld } from '../world.ts';

const odd: Readonly<Record<string, string>> = {
  'no id': '',
  'an unknown id': randomUUID(),
  'the id of zeros': '00000000-0000-0000-0000-000000000000',
  'a subject of everything': '>',
  'a wildcard': '*',
  'a wildcard in an id': `${randomUUID().slice(0, 35)}*`,
  dots: 'a.b.c',
  'a subject of the queue': '$JS.API.STREAM.DELETE.REQUESTS',
  'spaces and line ends': ' \r\n PUB x 0 \r\n',
  'a NUL': '\0',
  'an escape of ours': '=2e=2a',
  'upper case': randomUUID().toUpperCase(),
  'an id with a space after it': `${randomUUID()} `,
  'letters of many bytes': '終'.repeat(100),
  'a path': '../../etc/passwd',
  'a megabyte': 'f'.repeat(2 ** 20),
};

/** Cancels a request of the bystander's tenant, which must come to its end all the same. */
async function cancelForeign(world: HostileWorld): Promise<CallEnd> {
  const client = createClient(world.address);
  const metadata = new grpc.Metadata();
  metadata.set('authorization', `Bearer ${world.bystanderKey}`);
  const request = ChatRequest.fromPartial({
    model: 'mimo-demo',
    messages: [{ role: Role.USER, content: 'What is 47 + 85?' }],
    sampling: { maxTokens: 40, ignoreEos: true },
  });
  try {
    let end: CallEnd = { code: 'reset', message: 'the foreign stream did not begin' };
    let finished = false;
    for await (const { event } of callServerStream(client, InferenceServiceService.chat, {
      request,
      metadata,
    })) {
      if (event?.$case === 'started') {
        end = await world.cancel({ requestId: event.value.requestId });
      }
      finished ||= event?.$case === 'finish';
    }
    return finished ? end : { code: 'reset', message: 'the foreign stream did not finish' };
  } finally {
    client.close();
  }
}

export const cancel: HostileSubject = {
  name: 'cancel',
  cases: [
    ...Object.entries(odd).map(([name, requestId]) => ({
      name,
      send: (world: HostileWorld) => world.cancel({ requestId }),
      code: 'ok' as const,
      message: /cancelled false/,
    })),
    {
      name: "another tenant's running request",
      send: cancelForeign,
      code: 'ok',
      message: /cancelled false/,
    },
    {
      name: 'an id that is not UTF-8',
      send: (world) =>
        world.raw({
          path: '/mimo.inference.v1.InferenceService/Cancel',
          body: frame(Uint8Array.of(0x0a, 2, 0xff, 0xfe)),
        }),
      code: 'invalid_argument',
      message: /UTF-8/,
    },
    {
      name: 'an id cut short',
      send: (world) =>
        world.raw({
          path: '/mimo.inference.v1.InferenceService/Cancel',
          body: frame(Uint8Array.of(0x0a, 200, 1, 0x61)),
        }),
      code: 'invalid_argument',
    },
    {
      name: 'one unknown id two hundred times at once',
      send: async (world) => {
        const requestId = randomUUID();
        const ends = await Promise.all(Array.from({ length: 200 }, () => world.cancel({ requestId })));
        return ends.find(({ message }) => message !== 'cancelled false') ?? ends[0]!;
      },
      code: 'ok',
      message: /cancelled false/,
    },
  ],
};
