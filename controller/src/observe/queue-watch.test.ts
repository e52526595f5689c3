import { setTimeout as sleep } from 'node:timers/promises';

import { createLog } from '@mimo/core/process/log';
import type { Bus } from '@mimo/core/bus/bus';
import { createMemoryBus } from '@mimo/core/bus/memory/bus';
import type { CatalogModel } from '@mimo/core/bus/model-catalog';
import type { QueueState } from '@mimo/core/bus/signals';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';

import { QueueWatch } from './queue-watch.ts';

const model = 'mimo';

function stateWith(fields: Partial<QueueState>): QueueState {
  return {
    model,
    dispatcherEpoch: 1,
    waitingRequests: 0,
    runningRequests: 0,
    parkedRequests: 0,
    waitingTokens: 0,
    inFlightTokens: 0,
    oldestWaitingMs: 0,
    readyGroups: 0,
    slots: 0,
    arrivedTokens: 0,
    endedTokens: 0,
    waitingFor: [],
    groups: [],
    ...fields,
  };
}

/** A catalogue that holds one model. */
const catalog = {
  async *follow(signal: AbortSignal): AsyncGenerator<readonly CatalogModel[]> {
    yield [
      { name: model, digest: '', identity: '', isStored: true },
      { name: 'lost', digest: '', identity: '', isStored: false },
    ];
    await sleep(60_000, undefined, { signal }).catch(() => undefined);
  },
};

describe('QueueWatch', () => {
  let queue: Bus;
  let watch: QueueWatch;
  let changes: string[];
  beforeEach(async () => {
    // A state is as old as a test says, and not as long as the test was stopped.
    vi.useFakeTimers({ toFake: ['performance'] });
    queue = createMemoryBus();
    changes = [];
    watch = new QueueWatch({
      bus: queue,
      catalog,
      log: createLog({ process: 'test', level: 'silent' }),
      onChange: (name) => changes.push(name),
    });
    watch.follow([model]);
    await sleep(20);
  });
  afterEach(async () => {
    await watch.close();
    await queue.close();
    vi.useRealTimers();
  });

  const waiting = (): number | 'unknown' => {
    const { queue: reading } = watch.observe(model, performance.now());
    return reading === 'unknown' ? reading : reading.waitingRequests;
  };

  it('reports nothing before the first state from a dispatcher, nor for a model that it does not follow', () => {
    expect(waiting()).toBe('unknown');
    expect(watch.observe('other', performance.now())).toMatchObject({
      queue: 'unknown',
      loadsComplete: false,
    });
  });

  it('shows a burst as a whole: keeps the previous state for a moment while it arrives', async () => {
    queue.queueStates.publish(stateWith({}));
    await sleep(20);
    changes = [];
    for (let request = 1; request <= 40; request++) {
      queue.queueStates.publish(stateWith({ waitingRequests: request, waitingTokens: request * 100 }));
    }
    await sleep(50);
    // A round at this moment would decide for a part of it.
    expect(waiting()).toBe(0);
    expect(changes).toEqual([]);
    await sleep(400);
    expect(waiting()).toBe(40);
    expect(changes).toEqual([model]);
  });

  it('shows a burst that is already under way in the first state', async () => {
    queue.queueStates.publish(stateWith({ waitingRequests: 40, waitingTokens: 4000 }));
    await sleep(50);
    expect(waiting()).toBe(0);
    await sleep(400);
    expect(waiting()).toBe(40);
  });

  it('reports a newly reachable group at once, and drops a state after five seconds', async () => {
    queue.queueStates.publish(stateWith({}));
    await sleep(20);
    changes = [];
    const group = {
      group: 'chat-new-0',
      incarnation: '1',
      revision: 'new',
      identity: '',
      routable: true,
      draining: false,
      slots: 16,
      inFlightRequests: 0,
      inFlightTokens: 0,
    };
    queue.queueStates.publish(stateWith({ groups: [group] }));
    await sleep(20);
    expect(changes).toEqual([model]);
    expect([...watch.observe(model, performance.now()).loads.keys()]).toEqual(['chat-new-0']);
    expect(watch.observe(model, performance.now() + 6_000)).toMatchObject({
      queue: 'unknown',
      loadsComplete: false,
    });
  });

  it('ignores a dispatcher that has lost its lease', async () => {
    queue.queueStates.publish(stateWith({ dispatcherEpoch: 2, runningRequests: 5 }));
    queue.queueStates.publish(stateWith({ dispatcherEpoch: 1, runningRequests: 9 }));
    await sleep(20);
    const { queue: reading } = watch.observe(model, performance.now());
    expect(reading).toMatchObject({ inFlightRequests: 5, countersEpoch: 2 });
  });

  it('follows drain marks and the catalogue, and forgets a model that is no longer served', async () => {
    await queue.drainMarks.mark(model, 'chat-new-0', { sinceUnixMs: 5 });
    await sleep(20);
    const seen = watch.observe(model, performance.now());
    expect(seen.marks).toEqual(new Map([['chat-new-0', { sinceUnixMs: 5 }]]));
    expect(seen.published).toBe(true);
    expect(watch.observe('other', performance.now()).published).toBe(false);
    expect(watch.observe('lost', performance.now()).published).toBe(false);
    watch.follow([]);
    expect(watch.observe(model, performance.now()).marks).toBe('unknown');
  });
});
