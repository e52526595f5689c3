// Several gateways side by side, and a gateway that drains or closes.

import { setTimeout as sleep } from 'node:timers/promises';

import { ClusterError } from '@mimo/core/process/errors';
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';

import { begin, collect, generate, generation, readToEnd } from '../harness/client-streams.ts';
import { GatewayStage } from '../harness/gateway-stage.ts';
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

describe('gateways', () => {
  it('share the groups: two gateways, each with its own clients', async () => {
    const [one, two] = [await stage.openGateway(), await stage.openGateway()];
    await stage.openGroup({ maxSequences: 2 });
    const texts = Array.from({ length: 20 }, (_, index) => `text ${index}`);
    const results = await Promise.all(
      texts.map((text, index) =>
        collect(generate(stage.clientOf(index % 2 === 0 ? one : two), generation(text))),
      ),
    );
    expect(results.map((result) => result.text)).toEqual(texts);
  });

  it('take over dispatching when the dispatching gateway closes', async () => {
    const first = await stage.openGateway();
    await stage.openGroup();
    await collect(generate(stage.clientOf(first), generation('before')));
    const second = await stage.openGateway();
    const waiting = collect(generate(stage.clientOf(second), generation('between')));
    expect((await waiting).text).toBe('between');
    await stage.closeGateway(first);
    expect((await collect(generate(stage.clientOf(second), generation('after')))).text).toBe('after');
  });
});

describe('a gateway that leaves', () => {
  it('refuses new requests, finishes the running ones, and then closes', async () => {
    const gateway = await stage.openGateway();
    const enough = new AbortController();
    const script = function* () {
      while (!enough.signal.aborted) {
        yield 65;
      }
    };
    await stage.openGroup({ stepMs: 20, script });
    const client = stage.clientOf(gateway);
    const running = generate(client, generation('x'));
    await begin(running, 2);
    let drained = false;
    const draining = gateway.drain(120_000).then(() => (drained = true));
    await waitFor('new requests to be refused', () =>
      collect(generate(client, generation('new', { maxTokens: 1 }))).then(
        () => false,
        (error: unknown) => ClusterError.from(error).code === 'unavailable',
      ),
    );
    expect(drained).toBe(false);
    enough.abort();
    let finished = false;
    for await (const { event } of running) {
      finished ||= event?.$case === 'finish';
    }
    expect(finished).toBe(true);
    await draining;
    expect(gateway.counts()).toMatchObject({ requests: 0, deletingRecords: 0 });
  });

  it('hands dispatching to another gateway at once, while its streams continue, even in another group', async () => {
    const leaving = await stage.openGateway();
    const doomed = await stage.openGroup({ group: 'a', stepMs: 5 });
    const text = 'a rather long prompt that takes its time to be said again, '.repeat(4);
    const running = collect(generate(stage.clientOf(leaving), generation(text)));
    await vi.waitFor(() => expect(doomed.tokens).toBeGreaterThan(10), patience);
    doomed.stall();
    const staying = await stage.openGateway();
    const { states, stop } = await stage.followStates();
    const epoch = states.at(-1)?.dispatcherEpoch ?? 0;
    // The other one is waiting for the lease by then.
    await sleep(500);
    // It drains for as long as the stream runs, which stands still, and would hold the lease meanwhile.
    const draining = leaving.drain(120_000);
    await waitFor('another dispatcher', () => (states.at(-1)?.dispatcherEpoch ?? 0) > epoch);
    await stage.loseGroup(doomed);
    await stage.openGroup({ group: 'b', stepMs: 1 });
    expect((await running).text).toBe(text);
    await draining;
    stop();
    expect(staying.counts().requests).toBe(0);
  });

  it('keeps dispatching for its own requests when it is the only gateway', async () => {
    const gateway = await stage.openGateway();
    const group = await stage.openGroup({ group: 'a', stepMs: 5 });
    const text = 'a rather long prompt that takes its time to be said again, '.repeat(4);
    const running = collect(generate(stage.clientOf(gateway), generation(text)));
    await vi.waitFor(() => expect(group.tokens).toBeGreaterThan(10), patience);
    const draining = gateway.drain(30_000);
    await stage.loseGroup(group);
    await stage.openGroup({ group: 'b', stepMs: 1 });
    expect((await running).text).toBe(text);
    await draining;
  });

  it('ends running requests with UNAVAILABLE when it closes', async () => {
    const gateway = await stage.openGateway();
    const group = await stage.openGroup({ script: endless });
    const stream = generate(stage.clientOf(gateway), generation('x'));
    await begin(stream, 2);
    const ended = readToEnd(stream).then(
      () => 'finish',
      (error: unknown) => ClusterError.from(error).code,
    );
    await stage.closeGateway(gateway);
    expect(await ended).toBe('unavailable');
    await vi.waitFor(() => expect(group.sequences).toBe(0), patience);
  });
});
