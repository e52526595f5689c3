// A gateway whose NATS server goes down, returns empty or does not exist, and the records of a dead gateway.

import { rm } from 'node:fs/promises';
import { join } from 'node:path';

import { RequestRecord } from '@mimo/proto/queue';
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';

import { begin, collect, generate, generation } from '../harness/client-streams.ts';
import { GatewayStage } from '../harness/gateway-stage.ts';
import { startTestNats } from '../harness/nats.ts';
import { endless } from '../harness/scripted-group.ts';
import { patience, waitFor } from '../harness/wait-for.ts';

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

describe('a gateway', () => {
  it('refuses requests at once while NATS is down, and serves again when it returns; running streams continue', async () => {
    const storeDirectory = join(stage.directory, 'own');
    const own = await startTestNats({ storeDirectory, port: 0 });
    const queue = stage.openQueue(own);
    const gateway = await stage.openGateway({ MIMO_GATEWAY_NATS: own.url });
    await stage.openGroup({ queue, script: endless, stepMs: 5 });
    const client = stage.clientOf(gateway);
    const running = generate(client, generation('x', { maxTokens: 600 }));
    const { tokens } = await begin(running, 3);
    own.child.kill();
    await own.child.exited;
    await vi.waitFor(
      () =>
        expect(collect(generate(client, generation('refused')))).rejects.toMatchObject({
          code: 'unavailable',
          detail: { retryAfterMs: 1_000 },
        }),
      patience,
    );
    let more = 0;
    for await (const { event } of running) {
      more += event?.$case === 'delta' ? event.value.tokenIds.length : 0;
    }
    expect(tokens + more).toBe(600);
    expect(gateway.counts()).toMatchObject({ requests: 0, deletingRecords: 1 });
    const again = await startTestNats({ storeDirectory, port: own.port });
    await vi.waitFor(() => expect(gateway.counts().deletingRecords).toBe(0), patience);
    const result = await collect(generate(client, generation('back', { maxTokens: 2 })));
    expect(result.finish?.completionTokens).toBe(2);
    await stage.closeGateway(gateway);
    await queue.close();
    await again.close();
  });

  it('serves again when NATS returns without its data', async () => {
    const storeDirectory = join(stage.directory, 'emptied');
    const own = await startTestNats({ storeDirectory, port: 0 });
    const queue = stage.openQueue(own);
    const gateway = await stage.openGateway({ MIMO_GATEWAY_NATS: own.url });
    await stage.openGroup({ queue });
    const client = stage.clientOf(gateway);
    for (const text of ['one', 'two', 'three']) {
      expect((await collect(generate(client, generation(text)))).text).toBe(text);
    }
    own.child.kill();
    await own.child.exited;
    await rm(storeDirectory, { recursive: true });
    const again = await startTestNats({ storeDirectory, port: own.port });
    await waitFor('the gateway to serve again', async () => {
      const result = await collect(generate(client, generation('four'), { timeoutMs: 10_000 }));
      return result.text === 'four';
    });
    await stage.closeGateway(gateway);
    await queue.close();
    await again.close();
  });

  it('works without NATS: its queue is in memory, and it polls the leaders for heartbeats', async () => {
    const group = await stage.openGroup({ queue: undefined });
    const gateway = await stage.openGateway({ MIMO_GATEWAY_NATS: '', MIMO_GATEWAY_WORKERS: group.address });
    expect(gateway.queueKind).toBe('memory');
    const texts = Array.from({ length: 20 }, (_, index) => `text ${index}`);
    const client = stage.clientOf(gateway);
    const results = await Promise.all(texts.map((text) => collect(generate(client, generation(text)))));
    expect(results.map((result) => result.text)).toEqual(texts);
  });

  it('deletes the records of a dead gateway', async () => {
    const gateway = await stage.openGateway();
    await stage.bus.records.publish(
      RequestRecord.fromPartial({
        requestId: 'left-behind',
        model: GatewayStage.model,
        gatewayId: 'gone',
        timeLeftMs: 1,
        promptTokenIds: [1],
      }),
    );
    await vi.waitFor(async () => expect(await stage.bus.records.count()).toBe(0), patience);
    expect(gateway.counts().requests).toBe(0);
  });
});
