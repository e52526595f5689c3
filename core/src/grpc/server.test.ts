// Over real sockets on loopback: what a server of ours promises to any client.

import { once } from 'node:events';
import { connect, createServer, type ServerHttp2Session, type ServerHttp2Stream } from 'node:http2';
import type { AddressInfo } from 'node:net';
import { setImmediate as turn } from 'node:timers/promises';

import * as grpc from '@grpc/grpc-js';
import {
  HealthCheckResponse_ServingStatus as ServingStatus,
  HealthClient,
  HealthService,
} from '@mimo/proto/health';
import {
  GenerateRequest,
  GenerateResponse,
  InferenceServiceClient,
  InferenceServiceService,
  CountTokensRequest,
  type CountTokensResponse,
} from '@mimo/proto/inference';
import { requestLimits } from '@mimo/proto/limits';
import { ServerReflectionClient, type ServerReflectionResponse } from '@mimo/proto/reflection';
import { afterEach, describe, expect, it, vi } from 'vitest';

import { ClusterError } from '../process/errors.ts';
import { callServerStream, callUnary } from './client.ts';
import { keepLivingCalls } from './keepalive.ts';
import { strictDeserializer, streamHandler, unaryHandler } from './handlers.ts';
import { startGrpcServer, type GrpcServer } from './server.ts';

const open: { close(): void }[] = [];
const servers: GrpcServer[] = [];

afterEach(async () => {
  open.splice(0).forEach((client) => client.close());
  await Promise.all(servers.splice(0).map((server) => server.close(AbortSignal.timeout(100))));
});

type Stream = Parameters<typeof streamHandler<GenerateRequest, GenerateResponse>>[0];

async function serve(answer: Stream, maxReceiveBytes = 2 ** 20): Promise<InferenceServiceClient> {
  const server = await startGrpcServer({
    listenAddress: '127.0.0.1:0',
    maxReceiveBytes,
    services: [
      {
        definition: {
          generate: {
            ...InferenceServiceService.generate,
            requestDeserialize: strictDeserializer(GenerateRequest, requestLimits.GenerateRequest),
          },
          countTokens: InferenceServiceService.countTokens,
        },
        implementation: {
          generate: streamHandler(answer),
          countTokens: unaryHandler<CountTokensRequest, CountTokensResponse>(async () => {
            throw new ClusterError('resource_exhausted', 'too many', { detail: { retryAfterMs: 250 } });
          }),
        },
      },
    ],
  });
  servers.push(server);
  const client = new InferenceServiceClient(server.address, grpc.credentials.createInsecure());
  open.push(client);
  return client;
}

function generate(client: grpc.Client, limits: { signal?: AbortSignal; timeoutMs?: number } = {}) {
  const request = GenerateRequest.fromPartial({ model: 'm', input: { $case: 'prompt', value: 'x' } });
  return callServerStream(client, InferenceServiceService.generate, { request, ...limits });
}

const delta = (index: number): GenerateResponse =>
  GenerateResponse.fromPartial({ event: { $case: 'delta', value: { index } } });

/** Writes until its call is cancelled. */
const endless: Stream = async (_request, _context, write) => {
  for (let index = 0; ; index += 1) {
    await write(delta(index));
    await turn();
  }
};

describe('a call', () => {
  it('ends with the error that its handler throws, details included', async () => {
    const client = await serve(endless);
    const call = callUnary(client, InferenceServiceService.countTokens, { request: { request: undefined } });
    await expect(call).rejects.toMatchObject({ code: 'resource_exhausted', detail: { retryAfterMs: 250 } });
  });

  it('ends with the error that a stream throws after some messages', async () => {
    const client = await serve(async (_request, _context, write) => {
      await write(delta(0));
      throw new ClusterError('aborted', 'lost');
    });
    const stream = generate(client);
    expect((await stream.next()).value?.event?.value).toMatchObject({ index: 0 });
    await expect(stream.next()).rejects.toMatchObject({ code: 'aborted', message: 'lost' });
  });

  it('is cancelled for its handler when the client leaves the loop, aborts, or the deadline passes', async () => {
    const ended: string[] = [];
    const client = await serve(async (request, context, write) => {
      try {
        await endless(request, context, write);
      } catch (error) {
        ended.push(ClusterError.from(error).code);
        throw error;
      }
    });
    for await (const _ of generate(client)) {
      break;
    }
    const stop = new AbortController();
    const aborted = generate(client, { signal: stop.signal });
    await aborted.next();
    stop.abort();
    const late = generate(client, { timeoutMs: 2_000 });
    await late.next();
    const rest = (async () => {
      for await (const _ of late) {
        // Until it ends.
      }
    })();
    await expect(rest).rejects.toMatchObject({ code: 'deadline_exceeded' });
    await vi.waitFor(() => expect(ended).toEqual(['canceled', 'canceled', 'deadline_exceeded']), 30_000);
  });

  it('is refused over the size limit', async () => {
    const client = await serve(endless, 1_000);
    const request = GenerateRequest.fromPartial({ input: { $case: 'prompt', value: 'x'.repeat(2_000) } });
    const stream = callServerStream(client, InferenceServiceService.generate, { request });
    await expect(stream.next()).rejects.toMatchObject({ code: 'resource_exhausted' });
  });

  it('survives 3,000 cancelled neighbours on its connection', async () => {
    const client = await serve(endless);
    const survivor = generate(client);
    await survivor.next();
    for (let batch = 0; batch < 30; batch += 1) {
      const streams = Array.from({ length: 100 }, () => generate(client));
      await Promise.all(streams.map((stream) => stream.next()));
      await Promise.all(streams.map((stream) => stream.return()));
    }
    expect((await survivor.next()).done).toBe(false);
    await survivor.return();
  }, 60_000);
});

describe('startGrpcServer', () => {
  it('reports an address in use', async () => {
    await serve(endless);
    const [server] = servers;
    const again = startGrpcServer({ listenAddress: server?.address ?? '', services: [], maxReceiveBytes: 1 });
    await expect(again).rejects.toMatchObject({
      code: 'unavailable',
      message: expect.stringContaining('cannot listen') as string,
    });
  });

  it('waits for running calls until the signal, then cuts them off', async () => {
    const client = await serve(endless);
    const stream = generate(client);
    await stream.next();
    const [server] = servers;
    await server?.close(AbortSignal.timeout(50));
    const rest = (async () => {
      for await (const _ of stream) {
        // Until it ends.
      }
    })();
    await expect(rest).rejects.toBeInstanceOf(ClusterError);
  });

  it('answers health checks and notifies watchers of changes', async () => {
    await serve(endless);
    const [server] = servers;
    const client = new HealthClient(server?.address ?? '', grpc.credentials.createInsecure());
    open.push(client);
    const check = (service: string): Promise<unknown> =>
      callUnary(client, HealthService.check, { request: { service } });
    await expect(check('')).rejects.toMatchObject({ code: 'not_found' });
    server?.health.set('', true);
    expect(await check('')).toEqual({ status: ServingStatus.SERVING });
    const watch = callServerStream(client, HealthService.watch, { request: { service: '' } });
    expect((await watch.next()).value).toEqual({ status: ServingStatus.SERVING });
    server?.health.set('', false);
    expect((await watch.next()).value).toEqual({ status: ServingStatus.NOT_SERVING });
    await watch.return();
  });

  it('describes its services to a client that knows none of our code', async () => {
    await serve(endless);
    const [server] = servers;
    const client = new ServerReflectionClient(server?.address ?? '', grpc.credentials.createInsecure());
    open.push(client);
    const call = client.serverReflectionInfo();
    const answers: ServerReflectionResponse['messageResponse'][] = [];
    call.on('data', (response: ServerReflectionResponse) => answers.push(response.messageResponse));
    const ended = new Promise((resolve) => call.on('end', resolve));
    const ask = (messageRequest: Parameters<typeof call.write>[0]['messageRequest']): void => {
      call.write({ host: '', messageRequest });
    };
    ask({ $case: 'listServices', value: '' });
    ask({ $case: 'fileContainingSymbol', value: 'mimo.inference.v1.InferenceService.Chat' });
    ask({ $case: 'fileByFilename', value: 'mimo/inference/v1/sampling.proto' });
    ask({ $case: 'fileContainingSymbol', value: 'no.such.Symbol' });
    ask({ $case: 'allExtensionNumbersOfType', value: 'x' });
    call.end();
    await ended;
    const [services, chat, sampling, missing, unsupported] = answers;
    expect(services).toEqual({
      $case: 'listServicesResponse',
      value: {
        service: [
          { name: 'mimo.inference.v1.InferenceService' },
          { name: 'grpc.health.v1.Health' },
          { name: 'grpc.reflection.v1.ServerReflection' },
          { name: 'grpc.reflection.v1alpha.ServerReflection' },
        ],
      },
    });
    // The file and its imports.
    expect(chat?.$case === 'fileDescriptorResponse' && chat.value.fileDescriptorProto).toHaveLength(2);
    expect(sampling?.$case === 'fileDescriptorResponse' && sampling.value.fileDescriptorProto).toHaveLength(
      1,
    );
    expect(missing).toMatchObject({ $case: 'errorResponse', value: { errorCode: grpc.status.NOT_FOUND } });
    expect(unsupported).toMatchObject({
      $case: 'errorResponse',
      value: { errorCode: grpc.status.UNIMPLEMENTED },
    });
  });
});

describe('keep-alive pings', () => {
  it('end no call of a process whose event loop blocks for longer than the ping time-out', async () => {
    const release = Promise.withResolvers<void>();
    const client = await serve(async (_request, _context, write) => {
      await write(delta(0));
      await release.promise;
      await write(delta(1));
    });
    const pinging = new InferenceServiceClient(
      client.getChannel().getTarget().replace('dns:', ''),
      grpc.credentials.createInsecure(),
      { 'grpc.keepalive_time_ms': 100, 'grpc.keepalive_timeout_ms': 50 },
    );
    open.push(pinging);
    const stream = generate(pinging);
    await stream.next();
    // Client and server are starved alike: each answer comes a turn later, and the timers of a turn run first.
    for (let turns = 0; turns < 12; turns += 1) {
      const untilMs = performance.now() + 150;
      while (performance.now() < untilMs) {
        // Busy.
      }
      await turn();
    }
    release.resolve();
    expect((await stream.next()).value).toEqual(delta(1));
    await stream.return(undefined);
  });
});

describe('a server that asks its clients to go away', () => {
  it('finishes their calls, whatever pings they send, and accepts the next over new connections', async () => {
    const release = Promise.withResolvers<void>();
    const client = await serve(async (_request, _context, write) => {
      await write(delta(0));
      await release.promise;
      await write(delta(1));
    });
    const [server] = servers;
    const pinging = new InferenceServiceClient(server?.address ?? '', grpc.credentials.createInsecure(), {
      'grpc.keepalive_time_ms': 50,
      'grpc.keepalive_timeout_ms': 10_000,
      'grpc.use_local_subchannel_pool': 1,
    });
    open.push(pinging);
    const running = [client, pinging].map(async (each) => {
      const indices: number[] = [];
      for await (const { event } of generate(each)) {
        indices.push(event?.$case === 'delta' ? event.value.index : -1);
      }
      return indices;
    });
    const begun = generate(pinging);
    await begun.next();
    server?.goAway();
    // Several keep-alive intervals; a ping that is refused ends the calls at once.
    await new Promise((resolve) => setTimeout(resolve, 500));
    const late = generate(pinging);
    expect((await late.next()).value).toEqual(delta(0));
    release.resolve();
    expect(await Promise.all(running)).toEqual([
      [0, 1],
      [0, 1],
    ]);
    expect((await begun.next()).value).toEqual(delta(1));
    expect((await late.next()).value).toEqual(delta(1));
    await Promise.all([begun.return(undefined), late.return(undefined)]);
  });

  it('keeps a draining session from failing its own pings, on both sides', async () => {
    keepLivingCalls();
    const sessions: ServerHttp2Session[] = [];
    const server = createServer();
    server.on('session', (session) => sessions.push(session));
    const ended = Promise.withResolvers<void>();
    server.on('stream', (stream: ServerHttp2Stream) => {
      stream.respond({ ':status': 200 });
      void ended.promise.then(() => stream.end('rest'));
    });
    server.listen(0, '127.0.0.1');
    await once(server, 'listening');
    const { port } = server.address() as AddressInfo;
    const client = connect(`http://127.0.0.1:${port}`);
    const request = client.request({ ':path': '/' });
    await once(request, 'response');
    sessions[0]?.close();
    await vi.waitFor(() => expect(client.closed).toBe(true), 30_000);
    for (const session of [client, sessions[0]]) {
      const { promise, resolve } = Promise.withResolvers<unknown>();
      expect(session?.ping((error: Error | null) => resolve(error))).toBe(true);
      expect(await promise).toBeNull();
    }
    ended.resolve();
    expect(String(await request.toArray().then((parts) => Buffer.concat(parts as Buffer[])))).toBe('rest');
    server.close();
  });
});
