import { RequestRecord } from '@mimo/proto/queue';
import { GroupState, Heartbeat } from '@mimo/proto/worker';
import { describe, expect, it } from 'vitest';

import { DispatchState } from './dispatch-state.ts';

const at = 1_000_000;

function stateOf(...requestIds: readonly string[]): DispatchState {
  const state = new DispatchState();
  for (const [index, requestId] of requestIds.entries()) {
    const record = RequestRecord.fromPartial({
      requestId,
      model: 'm',
      acceptedUnixMs: at - 5_000,
      promptTokenIds: [1, 2, 3],
      sampling: { maxTokens: 10 },
    });
    state.add({ storeId: 's', sequence: index + 1, record });
  }
  return state;
}

function beat(group: string, more: Partial<Heartbeat> = {}): Heartbeat {
  return Heartbeat.fromPartial({
    model: 'm',
    group,
    incarnation: `${group}1`,
    state: GroupState.READY,
    maxSequences: 4,
    ...more,
  });
}

const waitingIn = (state: DispatchState): string[] => [...state.waiting()].map(({ requestId }) => requestId);

describe('DispatchState', () => {
  it('is rebuilt from records and heartbeats: what a group runs does not wait', () => {
    const state = stateOf('a', 'b');
    const running = beat('g', {
      running: [
        { requestId: 'a', epoch: 1 },
        { requestId: 'unknown', epoch: 1 },
      ],
    });
    state.reconcile([running], at);
    expect(waitingIn(state)).toEqual(['b']);
    expect(state.openGroups([running])).toMatchObject([{ group: 'g', slots: 4, usedSlots: 1 }]);
  });

  it('lets a request wait again that its group does not speak of for long', () => {
    const state = stateOf('a');
    state.place('a', beat('g'), at);
    state.reconcile([beat('g')], at + 2_000);
    expect(waitingIn(state)).toEqual([]);
    state.reconcile([beat('g')], at + 2_001);
    expect(waitingIn(state)).toEqual(['a']);
  });

  it('lets a request wait again whose group is gone, or lives another life', () => {
    const state = stateOf('a', 'b');
    state.place('a', beat('gone'), at);
    state.place('b', beat('g'), at);
    state.reconcile([beat('g', { incarnation: 'g2' })], at + 2_001);
    expect(waitingIn(state)).toEqual(['a', 'b']);
  });

  it('does not trust a group for a while on which an attempt failed, but its next life at once', () => {
    const state = stateOf('a');
    state.place('a', beat('g'), at);
    state.requeue('a', at);
    const lives = [beat('g'), beat('g', { incarnation: 'g2' })];
    expect(state.openGroups(lives).map(({ notBeforeUnixMs }) => notBeforeUnixMs)).toEqual([at + 2_000, 0]);
    state.reconcile([], at + 2_000);
    expect(state.openGroups(lives).map(({ notBeforeUnixMs }) => notBeforeUnixMs)).toEqual([0, 0]);
  });

  it('gives a silent gateway time, then calls all of its requests nobody’s', () => {
    const state = stateOf('a', 'b');
    const retries = (): number[] => [...state.waiting()].map(({ notBeforeUnixMs }) => notBeforeUnixMs);
    expect(state.unanswered('a', true, at)).toEqual([]);
    expect(retries()).toEqual([at + 1_000, at + 1_000]);
    expect(state.unanswered('b', true, at + 14_999)).toEqual([]);
    expect(state.unanswered('a', true, at + 15_000)).toEqual(['a', 'b']);
    expect(state.unanswered('unknown', true, at)).toEqual([]);
  });

  it('begins to count anew after a word from the gateway, or where somebody listens in its name', () => {
    const state = stateOf('a');
    state.unanswered('a', true, at);
    state.heard('');
    expect([...state.waiting()][0]?.notBeforeUnixMs).toBe(0);
    expect(state.unanswered('a', true, at + 15_000)).toEqual([]);
    state.unanswered('a', false, at + 16_000);
    expect(state.unanswered('a', true, at + 40_000)).toEqual([]);
  });

  it('gives no slot of a group that drains, starts, or queues by itself', () => {
    const groups = [
      beat('drains', { state: GroupState.DRAINING }),
      beat('starts', { state: GroupState.STARTING }),
      beat('queues', { waitingSequences: 1 }),
      beat('busy', { runningSequences: 3 }),
    ];
    expect(stateOf().openGroups(groups)).toMatchObject([
      { group: 'queues', slots: 0 },
      { group: 'busy', slots: 4, usedSlots: 3 },
    ]);
  });

  it('sums up what waits and what runs', () => {
    const state = stateOf('a', 'b', 'c');
    state.place('a', beat('g'), at);
    state.remove('c');
    expect(state.summary(at)).toEqual({
      waitingRequests: 1,
      runningRequests: 1,
      waitingTokens: 13,
      oldestWaitingMs: 5_000,
    });
    expect(stateOf().summary(at)).toEqual({
      waitingRequests: 0,
      runningRequests: 0,
      waitingTokens: 0,
      oldestWaitingMs: 0,
    });
  });
});
