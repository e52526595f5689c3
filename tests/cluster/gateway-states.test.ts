// The states that the dispatcher publishes about its queue and groups, for the controller and for people.

import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';

import type { TestGateway } from '../harness/in-process.ts';
import { collect, generate, generation, readToEnd } from '../harness/client-streams.ts';
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

async function askFour(gateway: TestGateway): Promise<void> {
  const client = stage.clientOf(gateway);
  await Promise.all(Array.from({ length: 4 }, () => collect(generate(client, generation('hello')))));
}

describe('the published state', () => {
  it('shows the first request after idle at once, where requests run, and the tokens that arrived and ended', async () => {
    const gateway = await stage.openGateway();
    const { states, timesMs, stop } = await stage.followStates();
    expect(states.at(-1)).toMatchObject({ waitingRequests: 0, runningRequests: 0, slots: 0, groups: [] });
    const stream = generate(stage.clientOf(gateway), generation('abc', { maxTokens: 100 }));
    const running = collect(stream);
    await waitFor('the request in a published state', () => states.at(-1)?.waitingRequests === 1);
    const cost = stage.tokenizer.encode('abc').length + 100;
    expect(states.at(-1)).toMatchObject({ waitingTokens: cost, arrivedTokens: cost, endedTokens: 0 });
    const group = await stage.openGroup({ group: 'a', maxSequences: 5, script: endless });
    group.stall();
    await vi.waitFor(
      () =>
        expect(states.at(-1)).toMatchObject({
          waitingRequests: 0,
          runningRequests: 1,
          inFlightTokens: cost,
          slots: 5,
          groups: [
            {
              group: 'a',
              incarnation: group.incarnation,
              routable: true,
              draining: false,
              inFlightRequests: 1,
              inFlightTokens: cost,
            },
          ],
        }),
      patience,
    );
    group.resume();
    await running;
    await vi.waitFor(
      () =>
        expect(states.at(-1)).toMatchObject({
          runningRequests: 0,
          inFlightTokens: 0,
          arrivedTokens: cost,
          endedTokens: cost,
        }),
      patience,
    );
    stop();
    // Publishing only once a second would leave a second between any two states; a stalled machine does so between
    // some of them.
    const pausesMs = timesMs.slice(1).map((timeMs, index) => timeMs - (timesMs[index] ?? 0));
    expect(Math.min(...pausesMs)).toBeLessThan(800);
  });

  it('calls a group routable before it gets a request, and no longer once its heartbeats stop', async () => {
    await stage.openGateway();
    const group = await stage.openGroup({ group: 'a' });
    const { states, stop } = await stage.followStates();
    const isRoutable = (): boolean | undefined => states.at(-1)?.groups[0]?.routable;
    await waitFor('the group to be routable', () => isRoutable() === true);
    expect(group.begun).toBe(0);
    group.fallSilent();
    await waitFor('the group to be out of rotation', () => isRoutable() !== true);
    expect(states.at(-1)).toMatchObject({ readyGroups: 0, slots: 0 });
    await waitFor('the group to be forgotten', () => states.at(-1)?.groups.length === 0);
    stop();
  });

  it('shows a drain mark once nothing more is assigned to the group, also from the next dispatcher', async () => {
    const first = await stage.openGateway();
    const [a, b] = [await stage.openGroup({ group: 'a' }), await stage.openGroup({ group: 'b' })];
    const { states, stop } = await stage.followStates();
    const drainingIn = (): string[] | undefined =>
      states
        .at(-1)
        ?.groups.filter(({ draining }) => draining)
        .map(({ group }) => group);
    await waitFor('both groups', () => states.at(-1)?.groups.length === 2);
    await stage.bus.drainMarks.mark(GatewayStage.model, 'a', { sinceUnixMs: Date.now() });
    await vi.waitFor(() => {
      expect(drainingIn()).toEqual(['a']);
      expect(states.at(-1)).toMatchObject({ readyGroups: 2, slots: 8 });
    }, patience);
    await askFour(first);
    expect([a.begun, b.begun]).toEqual([0, 4]);
    const second = await stage.openGateway();
    await stage.closeGateway(first);
    await askFour(second);
    expect([a.begun, b.begun]).toEqual([0, 8]);
    await stage.bus.drainMarks.clear(GatewayStage.model, 'a');
    await waitFor('no mark', () => states.at(-1)?.groups.length === 2 && drainingIn()?.length === 0);
    await waitFor('something to go there again', async () => {
      await askFour(second);
      return a.begun > 0;
    });
    stop();
  });

  it('counts no existing record as an arrival after a takeover, and reports no smaller queue while reading', async () => {
    const first = await stage.openGateway();
    const { states, stop } = await stage.followStates();
    const second = await stage.openGateway();
    const leave = new AbortController();
    const waiting = Array.from({ length: 30 }, () =>
      readToEnd(generate(stage.clientOf(second), generation('x'), { signal: leave.signal })).catch(
        () => undefined,
      ),
    );
    await waitFor('all requests in a published state', () => states.at(-1)?.waitingRequests === 30);
    const epoch = states.at(-1)?.dispatcherEpoch ?? 0;
    await stage.closeGateway(first);
    await waitFor('the second to publish', () => (states.at(-1)?.dispatcherEpoch ?? 0) > epoch);
    const firstOfSecond = states.find(({ dispatcherEpoch }) => dispatcherEpoch > epoch);
    expect(firstOfSecond).toMatchObject({ waitingRequests: 30, arrivedTokens: 0, endedTokens: 0 });
    leave.abort();
    await Promise.all(waiting);
    stop();
  });
});
