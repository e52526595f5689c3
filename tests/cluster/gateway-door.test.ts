// The requests that the gateway rejects at its door, and its error messages.

import { createHash } from 'node:crypto';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';

import * as grpc from '@grpc/grpc-js';
import { ClusterError } from '@mimo/core/process/errors';
import { callUnary, type CallLimits } from '@mimo/core/grpc/client';
import { GenerateRequest, InferenceServiceService } from '@mimo/proto/inference';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';

import { begin, collect, generate, generation, readToEnd } from '../harness/client-streams.ts';
import { GatewayStage } from '../harness/gateway-stage.ts';
import { endless } from '../harness/scripted-group.ts';

const { model } = GatewayStage;

let stage: GatewayStage;
beforeAll(async () => {
  stage = await GatewayStage.open();
});
afterEach(async () => {
  await stage.clear();
});
afterAll(async () => {
  await stage.close();
});

function withKey(key: string): CallLimits {
  const metadata = new grpc.Metadata();
  metadata.set('authorization', `Bearer ${key}`);
  return { metadata };
}

describe('the door', () => {
  it('reports every problem of a request, with field, limit and value', async () => {
    const gateway = await stage.openGateway();
    const request = GenerateRequest.fromPartial({
      model,
      sampling: { temperature: -1, topP: 0, stop: [''], logprobs: 21 },
    });
    const failure = await collect(generate(stage.clientOf(gateway), request)).then(
      () => undefined,
      (error: unknown) => ClusterError.from(error),
    );
    expect(failure?.code).toBe('invalid_argument');
    expect(failure?.detail.fieldViolations?.map(({ field }) => field).toSorted()).toEqual([
      'input',
      'sampling.logprobs',
      'sampling.stop[0]',
      'sampling.temperature',
      'sampling.top_p',
    ]);
    const unknown = GenerateRequest.fromPartial({ ...generation('x'), model: 'nope' });
    await expect(collect(generate(stage.clientOf(gateway), unknown))).rejects.toMatchObject({
      code: 'not_found',
    });
  });

  it('rejects text that is not UTF-8 and bytes that are not a message', async () => {
    const gateway = await stage.openGateway();
    const client = stage.clientOf(gateway);
    const send = async (bytes: Buffer): Promise<void> => {
      const { path, responseDeserialize } = InferenceServiceService.generate;
      const raw = client.makeServerStreamRequest(path, (value: Buffer) => value, responseDeserialize, bytes);
      for await (const _ of raw) {
        throw new Error('an answer to garbage');
      }
    };
    const good = Buffer.from(GenerateRequest.encode(generation('abcdef')).finish());
    const at = good.indexOf('abcdef');
    const bad = Buffer.from(good);
    bad.set([0xff, 0xfe], at);
    await expect(send(bad)).rejects.toMatchObject({
      code: grpc.status.INVALID_ARGUMENT,
      details: expect.stringContaining('UTF-8'),
    });
    await expect(send(good.subarray(0, good.length - 3))).rejects.toMatchObject({
      code: grpc.status.INVALID_ARGUMENT,
    });
    expect(gateway.counts().requests).toBe(0);
  });

  it('rejects a message over the limit and names both sizes', async () => {
    const gateway = await stage.openGateway({ MIMO_GATEWAY_MAX_RECEIVE: '64Ki' });
    const failure = collect(generate(stage.clientOf(gateway), generation('x'.repeat(100_000))));
    await expect(failure).rejects.toMatchObject({
      code: 'resource_exhausted',
      message: expect.stringMatching(/65536/) as string,
    });
  });

  it('admits a caller with a key to the models of that key only', async () => {
    const keysFile = join(stage.directory, 'keys.json');
    const sha256 = createHash('sha256').update('secret-of-b').digest('hex');
    const keys = [
      { key: 'secret-of-a', tenant: 'a' },
      { sha256, tenant: 'b', models: ['another'] },
    ];
    await writeFile(keysFile, JSON.stringify({ keys }));
    const gateway = await stage.openGateway({ MIMO_GATEWAY_KEYS_FILE: keysFile });
    await stage.openGroup({ script: endless });
    const client = stage.clientOf(gateway);
    const ask = (limits: CallLimits): Promise<unknown> =>
      collect(generate(client, generation('x', { maxTokens: 2 }), limits));
    await expect(ask({})).rejects.toMatchObject({ code: 'unauthenticated' });
    await expect(ask(withKey('guessed'))).rejects.toMatchObject({ code: 'unauthenticated' });
    await expect(ask(withKey('secret-of-b'))).rejects.toMatchObject({ code: 'permission_denied' });
    await ask(withKey('secret-of-a'));
    const stream = generate(client, generation('x'), withKey('secret-of-a'));
    const { requestId } = await begin(stream, 1);
    const other = stage.clientOf(await stage.openGateway({ MIMO_GATEWAY_KEYS_FILE: keysFile }));
    for (const each of [client, other]) {
      const cancel = { request: { requestId }, ...withKey('secret-of-b') };
      expect(await callUnary(each, InferenceServiceService.cancel, cancel)).toEqual({ cancelled: false });
    }
    const cancel = { request: { requestId }, ...withKey('secret-of-a') };
    expect(await callUnary(other, InferenceServiceService.cancel, cancel)).toEqual({ cancelled: true });
    await expect(readToEnd(stream)).rejects.toMatchObject({ code: 'canceled' });
  });

  it('counts tokens as the model reads them', async () => {
    const gateway = await stage.openGateway();
    const client = stage.clientOf(gateway);
    const text = 'What is 47 + 85?';
    const counted = await callUnary(client, InferenceServiceService.countTokens, {
      request: { request: { $case: 'generate', value: generation(text) } },
    });
    expect(counted.promptTokens).toBe(stage.tokenizer.encode(text).length);
  });
});
