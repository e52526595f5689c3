// Over real sockets: which deadline a handler sees, for any length, and which error a malformed one gets.

import { connect, type IncomingHttpHeaders } from 'node:http2';

import * as grpc from '@grpc/grpc-js';
import { CountTokensRequest, InferenceServiceService, type CountTokensResponse } from '@mimo/proto/inference';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { ClusterError } from '../process/errors.ts';
import { callUnary } from './client.ts';
import { timeoutMsOf } from './deadline.ts';
import { unaryHandler } from './handlers.ts';
import { startGrpcServer, type GrpcServer } from './server.ts';

const dayMs = 86_400_000;

let server: GrpcServer;
let client: grpc.Client;
/** What was left for the last call when it came, and why it ended. */
let leftMs = Number.NaN;
let reason: unknown;

beforeAll(async () => {
  const countTokens = unaryHandler<CountTokensRequest, CountTokensResponse>(async (_request, context) => {
    leftMs = context.deadlineMs - performance.now();
    if (leftMs < dayMs) {
      const { promise: over, reject } = Promise.withResolvers<never>();
      context.signal.addEventListener('abort', () => reject(context.signal.reason));
      await over.catch((error: unknown) => {
        reason = error;
        throw error;
      });
    }
    return { promptTokens: 1, maxContextTokens: 2 };
  });
  server = await startGrpcServer({
    listenAddress: '127.0.0.1:0',
    maxReceiveBytes: 1_000,
    services: [
      {
        definition: { countTokens: InferenceServiceService.countTokens },
        implementation: { countTokens },
      },
    ],
  });
  client = new grpc.Client(server.address, grpc.credentials.createInsecure());
});
afterAll(async () => {
  client.close();
  await server.close(AbortSignal.timeout(100));
});

const request = CountTokensRequest.fromPartial({});

describe('a deadline', () => {
  it.each([24, 24.8, 24.855, 24.86, 25, 30, 49.7, 49.72, 365, 3_653])(
    'of %d days is honoured in full',
    async (days) => {
      const call = callUnary(client, InferenceServiceService.countTokens, {
        request,
        timeoutMs: days * dayMs,
      });
      await expect(call).resolves.toEqual({ promptTokens: 1, maxContextTokens: 2 });
      // A client rounds up: to seconds from 1.2 days, to minutes from 3.2 years.
      expect(leftMs).toBeGreaterThan(days * dayMs - 60_000);
      expect(leftMs).toBeLessThan(days * dayMs + 60_000);
    },
  );

  it.each([1, 100, 1_000])('of %d ms ends the call for its caller', async (timeoutMs) => {
    const call = callUnary(client, InferenceServiceService.countTokens, { request, timeoutMs });
    await expect(call).rejects.toMatchObject({ code: 'deadline_exceeded' });
  });

  it.each(['100m', '100000u', '99999999n', '1S', '0S', '0n'])(
    'sent as %s, by a client without its own timer, ends the call for both sides',
    async (timeout) => {
      reason = 'never asked';
      expect(await rawStatus(timeout)).toEqual(['4', 'the deadline passed']);
      // One that has passed before the handler begins asks nobody.
      expect(reason).toSatisfy((ended) => ended === 'never asked' || isLate(ended));
    },
  );

  it('is infinite when not set', async () => {
    await callUnary(client, InferenceServiceService.countTokens, { request });
    expect(leftMs).toBe(Number.POSITIVE_INFINITY);
  });

  it('is honoured up to the most that the header can hold, eleven thousand years', async () => {
    expect(await rawStatus('99999999H')).toEqual(['0', 'OK']);
    expect(leftMs / dayMs / 365).toBeGreaterThan(11_000);
  });

  it.each(['x', '5', 'S', '-1S', '+1S', '1.5S', '1e3m', '123456789S', '5 S', '5s', '5SS', 'a5Sb', '0x10S'])(
    'of %j is refused as malformed',
    async (timeout) => {
      expect(timeoutMsOf(timeout)).toBeUndefined();
      const text = `grpc-timeout must be 1 to 8 digits and a unit (H, M, S, m, u or n), not "${timeout}"`;
      expect(await rawStatus(timeout)).toEqual(['3', text]);
    },
  );
});

function isLate(error: unknown): boolean {
  return ClusterError.from(error).code === 'deadline_exceeded';
}

/** The code and the text of a call whose `grpc-timeout` is sent as it is. */
async function rawStatus(timeout: string): Promise<readonly [string, string]> {
  const session = connect(`http://${server.address}`);
  try {
    const stream = session.request({
      ':method': 'POST',
      ':path': InferenceServiceService.countTokens.path,
      'content-type': 'application/grpc',
      te: 'trailers',
      'grpc-timeout': timeout,
    });
    const { promise, resolve, reject } = Promise.withResolvers<readonly [string, string]>();
    const take = (headers: IncomingHttpHeaders): void => {
      const { 'grpc-status': code, 'grpc-message': text } = headers;
      if (typeof code === 'string' && typeof text === 'string') {
        resolve([code, decodeURIComponent(text)]);
      }
    };
    stream.on('response', take);
    stream.on('trailers', take);
    stream.on('error', reject);
    stream.resume();
    // An empty message.
    stream.end(Buffer.alloc(5));
    return await promise;
  } finally {
    session.destroy();
  }
}
