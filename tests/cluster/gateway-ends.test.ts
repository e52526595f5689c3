// Requests that end before their completion: the client leaves, a Cancel, a deadline, the longest wait.

import { randomUUID } from 'node:crypto';

import { callUnary } from '@mimo/core/grpc/client';
import { InferenceServiceService } from '@mimo/proto/inference';
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';

import { begin, collect, generate, generation, readToEnd } from '../harness/client-streams.ts';
import { GatewayStage } from '../harness/gateway-stage.ts';
import { endless } from '../harness/scripted-group.ts';
import { patience } from '../harness/wait-for.ts';

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

describe('a request ends early', () => {
  it('when its client leaves: the engine frees the sequence and the record is deleted', async () => {
    const gateway = await stage.openGateway();
    const group = await stage.openGroup({ script: endless });
    const leave = new AbortController();
    const stream = generate(stage.clientOf(gateway), generation('x'), { signal: leave.signal });
    await begin(stream, 5);
    // Else it may have said all it can before the queue answers.
    group.stall();
    expect(await stage.bus.records.count()).toBe(1);
    leave.abort();
    await expect(readToEnd(stream)).rejects.toMatchObject({ code: 'canceled' });
    await vi.waitFor(() => expect(group).toMatchObject({ sequences: 0, aborted: 1 }), patience);
  });

  it('when its gateway gets a Cancel: its stream ends with CANCELLED', async () => {
    const gateway = await stage.openGateway();
    await stage.openGroup({ script: endless });
    const client = stage.clientOf(gateway);
    const stream = generate(client, generation('x'));
    const { requestId } = await begin(stream, 5);
    const cancel = (id: string): Promise<unknown> =>
      callUnary(client, InferenceServiceService.cancel, { request: { requestId: id } });
    expect(await cancel('another')).toEqual({ cancelled: false });
    expect(await cancel(requestId)).toEqual({ cancelled: true });
    await expect(readToEnd(stream)).rejects.toMatchObject({ code: 'canceled' });
    expect(await cancel(requestId)).toEqual({ cancelled: false });
  });

  it('when another gateway gets a Cancel, while it runs and while it waits', async () => {
    const [owner, other] = [await stage.openGateway(), await stage.openGateway()];
    const group = await stage.openGroup({ script: endless, maxSequences: 1 });
    const running = generate(stage.clientOf(owner), generation('runs'));
    const { requestId } = await begin(running, 5);
    const waiting = generate(stage.clientOf(owner), generation('waits'));
    const { value } = await waiting.next();
    const waitingId = value?.event?.$case === 'started' ? value.event.value.requestId : '';
    const elsewhere = stage.clientOf(other);
    const cancel = (id: string): Promise<unknown> =>
      callUnary(elsewhere, InferenceServiceService.cancel, { request: { requestId: id } });
    expect(await cancel(waitingId)).toEqual({ cancelled: true });
    await expect(readToEnd(waiting)).rejects.toMatchObject({ code: 'canceled' });
    expect(group.begun).toBe(1);
    expect(await cancel(requestId)).toEqual({ cancelled: true });
    await expect(readToEnd(running)).rejects.toMatchObject({ code: 'canceled' });
    expect(await cancel(requestId)).toEqual({ cancelled: false });
    for (const id of ['', 'another', '*', 'requests.>', 'ab'.repeat(4_000), randomUUID()]) {
      expect(await cancel(id)).toEqual({ cancelled: false });
    }
  });

  it('at its deadline while it runs', async () => {
    const gateway = await stage.openGateway();
    await stage.openGroup({ script: endless, stepMs: 10 });
    const stream = generate(stage.clientOf(gateway), generation('x'), { timeoutMs: 500 });
    await expect(collect(stream)).rejects.toMatchObject({ code: 'deadline_exceeded' });
  });

  it('at its deadline while it waits, without ever reaching a group', async () => {
    const gateway = await stage.openGateway();
    const group = await stage.openGroup({ maxSequences: 1, script: endless });
    const client = stage.clientOf(gateway);
    const first = generate(client, generation('first'));
    await begin(first, 3);
    const second = generate(client, generation('second'), { timeoutMs: 400 });
    await expect(collect(second)).rejects.toMatchObject({ code: 'deadline_exceeded' });
    expect(group.begun).toBe(1);
    await first.return(undefined);
  });

  it('after the longest wait, with a retry delay', async () => {
    const gateway = await stage.openGateway({ MIMO_GATEWAY_MAX_WAIT: '300ms' });
    const waiting = collect(generate(stage.clientOf(gateway), generation('x')));
    await expect(waiting).rejects.toMatchObject({
      code: 'deadline_exceeded',
      message: expect.stringContaining('300 ms') as string,
      detail: { retryAfterMs: 5_000 },
    });
  });
});
