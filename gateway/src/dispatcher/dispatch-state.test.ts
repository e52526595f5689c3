import type { MarkedGroups } from '@mimo/core/bus/drain-marks';
import type { FollowedRecord } from '@mimo/core/bus/records';
import { Company, Needs, RequestSummary } from '@mimo/proto/queue';
import { GroupState, Heartbeat, type RunningRequest } from '@mimo/proto/worker';
import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { DispatchState } from './dispatch-state.ts';
import type { OpenGroup } from './placement.ts';

const at = 1_000_000;
const unmarked: MarkedGroups = new Map();
const companies = [Company.UNSPECIFIED, Company.PROVEN, Company.NONE];

function stateOf(...requestIds: readonly string[]): DispatchState {
  const state = new DispatchState();
  for (const [index, requestId] of requestIds.entries()) {
    const record = RequestSummary.fromPartial({ requestId, model: 'm', tokens: 13 });
    state.add({ storeId: 's', sequence: index + 1, record, isArrival: true, ageMs: 0 }, at - 5_000);
  }
  return state;
}

function runs(requestId: string, epoch: number, more: Partial<RunningRequest> = {}): RunningRequest {
  return { requestId, epoch, tokens: 0, onTrial: false, ...more };
}

/** An owner's report of an ended attempt. */
function lost(
  requestId: string,
  epoch: number,
  more: { readonly released?: boolean; readonly parked?: boolean; readonly needs?: Partial<Needs> } = {},
): Parameters<DispatchState['requeue']>[0] {
  const { released = false, parked = false, needs = {} } = more;
  return { requestId, epoch, released, parked, needs: Needs.fromPartial(needs) };
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

/** A record that arrives; with `firstSequence` it is a rewritten one. */
function arrival(requestId: string, sequence: number, firstSequence = 0): FollowedRecord {
  const record = RequestSummary.fromPartial({ requestId, tokens: 10, firstSequence });
  return { storeId: 's', sequence, record, isArrival: true, ageMs: 0 };
}

describe('DispatchState', () => {
  it('is rebuilt from records and heartbeats: a request that a group runs does not wait', () => {
    const state = stateOf('a', 'b');
    const running = beat('g', {
      running: [runs('a', 1), runs('unknown', 1)],
    });
    state.reconcile([running], at);
    expect(waitingIn(state)).toEqual(['b']);
    expect(state.openGroups([running], unmarked, at)).toMatchObject([{ group: 'g', slots: 4, usedSlots: 1 }]);
  });

  it('returns a request to the queue when its group does not report it for a while', () => {
    const state = stateOf('a');
    state.place('a', beat('g'), at);
    state.reconcile([beat('g')], at + 2_000);
    expect(waitingIn(state)).toEqual([]);
    state.reconcile([beat('g')], at + 2_001);
    expect(waitingIn(state)).toEqual(['a']);
  });

  it('returns a request to the queue when its group is gone or has restarted', () => {
    const state = stateOf('a', 'b');
    state.place('a', beat('gone'), at);
    state.place('b', beat('g'), at);
    state.reconcile([beat('g', { incarnation: 'g2' })], at + 2_001);
    expect(waitingIn(state)).toEqual(['a', 'b']);
  });

  it('ignores a group that still reports an ended attempt', () => {
    const state = stateOf('a', 'b');
    const stalled = beat('stalled', { running: [runs('a', 1)] });
    state.reconcile([stalled], at);
    state.requeue(lost('a', 1), at);
    state.reconcile([stalled], at + 1);
    expect(waitingIn(state)).toEqual(['a', 'b']);
    state.confirm('a', { group: 'heir', incarnation: 'heir1', epoch: 2 }, at + 2);
    state.requeue(lost('a', 1), at + 3);
    const heir = beat('heir', { running: [runs('a', 2)] });
    state.reconcile([heir, stalled], at + 4);
    expect(waitingIn(state)).toEqual(['b']);
    expect([...state.loads().keys()]).toEqual([JSON.stringify(['heir', 'heir1'])]);
    // A late answer of the owner about an ended attempt does not count either.
    state.requeue(lost('a', 2), at + 5);
    state.confirm('a', { group: 'heir', incarnation: 'heir1', epoch: 2 }, at + 6);
    expect(waitingIn(state)).toEqual(['a', 'b']);
  });

  it('uses the later attempt when two groups report a request that it has not placed', () => {
    const old = beat('old', { running: [runs('a', 1)] });
    const late = beat('new', { running: [runs('a', 2)] });
    for (const groups of [
      [old, late],
      [late, old],
    ]) {
      const state = stateOf('a');
      state.reconcile(groups, at);
      state.reconcile(groups, at + 1);
      expect([...state.loads().keys()]).toEqual([JSON.stringify(['new', 'new1'])]);
    }
  });

  it('offers a declined request according to the needs that its owner reported', () => {
    const state = stateOf('a', 'b', 'c');
    for (const [requestId, needs] of [
      ['a', { identity: 'x' }],
      ['b', { company: Company.NONE }],
    ] as const) {
      state.place(requestId, beat('g'), at);
      state.refuse(requestId, Needs.fromPartial(needs), at);
    }
    expect([...state.waiting()]).toMatchObject([
      { requestId: 'a', identity: 'x', company: Company.UNSPECIFIED },
      { requestId: 'b', identity: '', company: Company.NONE },
      { requestId: 'c', identity: '', company: Company.UNSPECIFIED },
    ]);
    expect([...state.onTrial(at)]).toMatchObject([{ requestId: 'b', company: Company.NONE }]);
    expect([...state.waiting(new Set(['y']))].map(({ requestId }) => requestId)).toEqual(['b', 'c']);
    expect(state.summary(at).waitingFor).toEqual([
      { identity: '', requests: 2, tokens: 26 },
      { identity: 'x', requests: 1, tokens: 13 },
    ]);
    state.place('b', beat('g'), at);
    state.requeue(lost('b', 1), at);
    expect([...state.onTrial(at)]).toEqual([]);
  });

  it('allows a trial among proven requests after a wait for an empty group that grows with each break', () => {
    const state = stateOf('a');
    const companiesOf = (...times: readonly number[]): Company[] =>
      times.flatMap((nowMs) => [...state.onTrial(nowMs)].map(({ company }) => company));
    state.requeue(lost('a', 1, { needs: { company: Company.NONE, breaks: 3 } }), at);
    expect(companiesOf(at, at + 14_999, at + 15_000)).toEqual([Company.NONE, Company.NONE, Company.PROVEN]);
    // A group's rejection changes nothing.
    state.requeue(lost('a', 2, { needs: { company: Company.NONE, breaks: 3 } }), at + 10_000);
    expect(companiesOf(at + 15_000)).toEqual([Company.PROVEN]);
    state.requeue(lost('a', 3, { needs: { company: Company.NONE, breaks: 4 } }), at + 20_000);
    expect(companiesOf(at + 49_999, at + 50_000)).toEqual([Company.NONE, Company.PROVEN]);
  });

  it('reports a group’s company from its heartbeats, and none before it is certain', () => {
    const state = stateOf('a', 'b');
    const companyOf = (heartbeat: Heartbeat, nowMs: number): OpenGroup['company'] | undefined => {
      state.reconcile([heartbeat], nowMs);
      return state.openGroups([heartbeat], unmarked, nowMs)[0]?.company;
    };
    // A newly seen group may hold sequences that it has not reported yet.
    expect(companyOf(beat('g'), at)).toBe(Company.UNSPECIFIED);
    expect(companyOf(beat('g'), at + 2_001)).toBe(Company.NONE);
    state.place('a', beat('g'), at + 2_001);
    expect(companyOf(beat('g'), at + 2_002)).toBe(Company.UNSPECIFIED);
    expect(companyOf(beat('g', { running: [runs('a', 1, { tokens: 7 })] }), at + 2_003)).toBe(
      Company.UNSPECIFIED,
    );
    expect(companyOf(beat('g', { running: [runs('a', 1, { tokens: 8 })] }), at + 2_004)).toBe(Company.PROVEN);
    state.remove('a', false, at + 2_005);
    expect(companyOf(beat('g'), at + 2_006)).toBe(Company.NONE);
    // A request whose client has left may still be there until the group has had time to report its removal.
    state.place('b', beat('g'), at + 2_007);
    state.remove('b', false, at + 2_008);
    expect(companyOf(beat('g'), at + 4_000)).toBe(Company.UNSPECIFIED);
    // It still is: the group stalls and reports it. No gateway knows of it any more.
    expect(companyOf(beat('g', { running: [runs('b', 1)] }), at + 9_000)).toBe(Company.UNSPECIFIED);
    expect(companyOf(beat('g'), at + 9_250)).toBe(Company.NONE);
    state.add(
      {
        storeId: 's',
        sequence: 3,
        record: RequestSummary.fromPartial({ requestId: 'c' }),
        isArrival: true,
        ageMs: 0,
      },
      at,
    );
    state.place('c', beat('g'), at + 9_300);
    state.remove('c', true, at + 9_301);
    expect(companyOf(beat('g'), at + 9_302)).toBe(Company.NONE);
  });

  it('closes a group during a trial, even in a new dispatcher that knows the trial only from heartbeats', () => {
    const trial = runs('a', 3, { onTrial: true, tokens: 7 });
    const slotsOf = (state: DispatchState, heartbeat: Heartbeat): number | undefined =>
      state.openGroups([heartbeat], unmarked, at)[0]?.slots;
    expect(slotsOf(stateOf('a'), beat('g', { running: [trial] }))).toBe(0);
    expect(slotsOf(stateOf('a'), beat('g', { running: [{ ...trial, tokens: 8 }] }))).toBe(4);
    const state = stateOf('a', 'b');
    state.requeue(lost('a', 2, { needs: { company: Company.PROVEN } }), at);
    state.place('a', beat('g'), at);
    expect(slotsOf(state, beat('g'))).toBe(0);
    state.reconcile([beat('g', { running: [{ ...trial, tokens: 9 }] })], at);
    expect(slotsOf(state, beat('g'))).toBe(4);
  });

  it('avoids a group for a while after a failed attempt, but not its next incarnation', () => {
    const state = stateOf('a');
    state.place('a', beat('g'), at);
    state.requeue(lost('a', 1), at);
    const lives = [beat('g'), beat('g', { incarnation: 'g2' })];
    expect(state.openGroups(lives, unmarked, at).map(({ notBeforeMs }) => notBeforeMs)).toEqual([
      at + 2_000,
      0,
    ]);
    state.reconcile([], at + 2_000);
    expect(state.openGroups(lives, unmarked, at).map(({ notBeforeMs }) => notBeforeMs)).toEqual([0, 0]);
  });

  it('gives a silent gateway time, then returns all of its requests as orphaned', () => {
    const state = stateOf('a', 'b');
    const retries = (): number[] => [...state.waiting()].map(({ notBeforeMs }) => notBeforeMs);
    expect(state.unanswered('a', true, at)).toEqual([]);
    expect(retries()).toEqual([at + 1_000, at + 1_000]);
    expect(state.unanswered('b', true, at + 14_999)).toEqual([]);
    expect(state.unanswered('a', true, at + 15_000)).toEqual(['a', 'b']);
    expect(state.unanswered('unknown', true, at)).toEqual([]);
  });

  it('restarts the time until requests are orphaned when their gateway answers or listens again', () => {
    const state = stateOf('a');
    state.unanswered('a', true, at);
    state.heard('');
    expect([...state.waiting()][0]?.notBeforeMs).toBe(0);
    expect(state.unanswered('a', true, at + 15_000)).toEqual([]);
    state.unanswered('a', false, at + 16_000);
    expect(state.unanswered('a', true, at + 40_000)).toEqual([]);
  });

  it('offers no slot of a group that is draining, is starting, or has sequences waiting for room', () => {
    const groups = [
      beat('drains', { state: GroupState.DRAINING }),
      beat('starts', { state: GroupState.STARTING }),
      beat('queues', { waitingSequences: 1, blockedSequences: 1 }),
      beat('busy', { runningSequences: 3 }),
    ];
    expect(stateOf().openGroups(groups, unmarked, at)).toMatchObject([
      { group: 'queues', slots: 0 },
      { group: 'busy', slots: 4, usedSlots: 3 },
    ]);
  });

  it('counts the slot of a sequence that makes room as free, and that of a sequence waiting its turn as used', () => {
    const groups = [
      beat('stalled', { maxSequences: 4, runningSequences: 4, parkableSequences: 3 }),
      beat('turns', { maxSequences: 4, runningSequences: 1, waitingSequences: 2 }),
    ];
    expect(stateOf().openGroups(groups, unmarked, at)).toMatchObject([
      { group: 'stalled', slots: 4, usedSlots: 1 },
      { group: 'turns', slots: 4, usedSlots: 1 },
    ]);
  });

  it('does not offer a parked request until its owner unparks it or has been silent for long', () => {
    const state = stateOf('a', 'b', 'c');
    state.confirm('a', { ...beat('g'), epoch: 3 }, at);
    state.requeue(lost('a', 2, { parked: true, released: true }), at);
    expect(state.loads().size, 'an attempt of the past').toBe(1);
    state.requeue(lost('a', 3, { parked: true, released: true }), at);
    state.park('b', at);
    state.park('unknown', at);
    expect(waitingIn(state)).toEqual(['c']);
    expect(state.summary(at)).toMatchObject({
      waitingRequests: 1,
      runningRequests: 0,
      parkedRequests: 2,
      waitingTokens: 13,
      inFlightTokens: 0,
    });
    const speaksOfThePast = beat('g', { running: [runs('a', 3)] });
    state.reconcile([speaksOfThePast], at + 9_999);
    expect(waitingIn(state)).toEqual(['c']);
    expect(
      state.openGroups([speaksOfThePast], unmarked, at),
      'parking is no fault of the group',
    ).toMatchObject([{ notBeforeMs: 0 }]);
    state.requeue(lost('a', 3, { released: true }), at);
    expect(waitingIn(state)).toEqual(['a', 'c']);
    state.reconcile([], at + 10_000);
    expect(waitingIn(state)).toEqual(['a', 'b', 'c']);
    state.park('c', at);
    state.remove('c', true, at);
    state.place('a', beat('g'), at);
    expect(state.summary(at)).toMatchObject({ waitingTokens: 13, inFlightTokens: 13, parkedRequests: 0 });
  });

  it('offers no slot of a group with a drain mark until the mark is cleared', () => {
    const groups = [beat('a'), beat('b')];
    const marked = stateOf().openGroups(groups, new Map([['a', { sinceUnixMs: at }]]), at);
    expect(marked.map(({ group }) => group)).toEqual(['b']);
    expect(stateOf().openGroups(groups, unmarked, at)).toHaveLength(2);
  });

  it('sums up waiting, running, arrived and completed work', () => {
    const state = stateOf('a', 'b', 'c', 'd');
    const record = RequestSummary.fromPartial({ requestId: 'found', tokens: 1 });
    const found = { storeId: 's', sequence: 9, record, isArrival: false, ageMs: 0 };
    state.add(found, at);
    state.add({ ...found, isArrival: true }, at);
    state.place('a', beat('g'), at);
    state.place('found', beat('g'), at);
    state.place('d', beat('g'), at);
    state.remove('c', true, at);
    state.remove('d', true, at);
    state.remove('unknown', true, at);
    expect(state.summary(at)).toEqual({
      waitingRequests: 1,
      runningRequests: 2,
      parkedRequests: 0,
      waitingTokens: 13,
      inFlightTokens: 14,
      oldestWaitingMs: 5_000,
      arrivedTokens: 52,
      endedTokens: 13,
      waitingFor: [{ identity: '', requests: 1, tokens: 13 }],
    });
    expect([...state.loads().values()]).toEqual([{ requests: 2, tokens: 14 }]);
    expect(stateOf().summary(at)).toEqual({
      waitingRequests: 0,
      runningRequests: 0,
      parkedRequests: 0,
      waitingTokens: 0,
      inFlightTokens: 0,
      oldestWaitingMs: 0,
      arrivedTokens: 0,
      endedTokens: 0,
      waitingFor: [],
    });
  });

  it('counts a record’s age from its time in the store, and its deadline from when it first saw the record', () => {
    const state = new DispatchState();
    const record = RequestSummary.fromPartial({ requestId: 'a', timeLeftMs: 60_000 });
    state.add({ storeId: 's', sequence: 1, record, isArrival: false, ageMs: 20_000 }, at);
    expect(state.summary(at + 1_000).oldestWaitingMs).toBe(21_000);
    expect([...state.waiting()]).toMatchObject([{ requestId: 'a', expiredMs: at + 60_000, notBeforeMs: 0 }]);
  });

  it('keeps the order of acceptance across lost stores, in any order of the rewritten records', () => {
    const accepted = fc.record({ store: fc.nat(2), knownBefore: fc.boolean(), comesBack: fc.nat(100) });
    fc.assert(
      fc.property(fc.array(accepted, { maxLength: 20 }), (requests) => {
        const state = new DispatchState();
        const inOrder = requests.toSorted((a, b) => a.store - b.store);
        const records = inOrder.map(({ store, ...each }, index) => {
          const own = { requestId: `r${index}`, tokens: 1, storesOutlived: 2 - store };
          const record = RequestSummary.fromPartial({
            ...own,
            ...(store < 2 && { firstSequence: 50 + index }),
          });
          return { record, store, ...each, sequence: store < 2 ? 100 + each.comesBack : 50 + index };
        });
        // Some were known from the earlier store, under their place there.
        for (const { record, knownBefore, store, sequence } of records) {
          if (knownBefore && store < 2) {
            const before = { ...record, storesOutlived: 1 - store };
            const place = store === 1 ? record.firstSequence : sequence;
            state.add({ storeId: 's1', sequence: place, record: before, isArrival: false, ageMs: 0 }, at);
          }
        }
        for (const { record, sequence } of records.toSorted((a, b) => a.sequence - b.sequence)) {
          state.add({ storeId: 's2', sequence, record, isArrival: true, ageMs: 0 }, at);
        }
        expect(waitingIn(state)).toEqual(records.map(({ record }) => record.requestId));
        expect(state.summary(at).waitingTokens).toBe(records.length);
      }),
    );
  });

  it('keeps the turn of a rewritten record, and counts it once', () => {
    const state = new DispatchState('s');
    [arrival('a', 1), arrival('b', 2), arrival('a', 3, 1), arrival('c', 4)].forEach((each) =>
      state.add(each, at),
    );
    expect(waitingIn(state)).toEqual(['a', 'b', 'c']);
    expect(state.get('a')?.sequence).toBe(3);
    expect(state.summary(at)).toMatchObject({ waitingTokens: 30, arrivedTokens: 30 });
    // Another dispatcher finds only the rewritten records.
    const next = new DispatchState('s');
    [arrival('b', 2), arrival('a', 3, 1), arrival('c', 4)].forEach((each) => next.add(each, at));
    expect(waitingIn(next)).toEqual(['a', 'b', 'c']);
  });

  it('keeps the place of a request whose lost record is not rewritten yet', () => {
    const state = stateOf('a', 'b', 'c');
    const fresh = RequestSummary.fromPartial({ requestId: 'fresh' });
    state.add({ storeId: 't', sequence: 1, record: fresh, isArrival: true, ageMs: 0 }, at);
    expect(waitingIn(state)).toEqual(['a', 'b', 'c', 'fresh']);
    const restored = RequestSummary.fromPartial({ requestId: 'b', storesOutlived: 1, firstSequence: 2 });
    state.add({ storeId: 't', sequence: 2, record: restored, isArrival: true, ageMs: 0 }, at);
    expect(waitingIn(state)).toEqual(['a', 'b', 'c', 'fresh']);
    expect(state.get('b')).toMatchObject({ storeId: 't', sequence: 2 });
    // New requests wait until the older ones have had time to be recorded again.
    expect([...state.waiting()].map(({ notBeforeMs }) => notBeforeMs)).toEqual([0, 0, 0, at + 2_000]);
  });

  it('treats the first store that it sees as the original one, unless it knows of another', () => {
    const fresh = RequestSummary.fromPartial({ requestId: 'fresh' });
    const queued = { storeId: 't', sequence: 1, record: fresh, isArrival: true, ageMs: 0 };
    const waits = (state: DispatchState): number[] => {
      state.add(queued, at);
      return [...state.waiting()].map(({ notBeforeMs }) => notBeforeMs);
    };
    expect([
      waits(new DispatchState()),
      waits(new DispatchState('t')),
      waits(new DispatchState('s')),
    ]).toEqual([[0], [0], [at + 2_000]]);
  });

  it('keeps correct counts for any sequence of arrivals, moves and ends', () => {
    const step = fc.record({
      act: fc.constantFrom('add', 'place', 'requeue', 'refuse', 'unanswered', 'remove', 'reconcile'),
      request: fc.nat(5),
      group: fc.nat(2),
    });
    fc.assert(
      fc.property(fc.array(step, { maxLength: 60 }), (steps) => {
        const state = new DispatchState();
        const live = new Map<string, number>();
        let nowMs = at;
        for (const { act, request, group } of steps) {
          nowMs += 700;
          const requestId = `r${request}`;
          const heartbeat = beat(`g${group}`);
          if (act === 'add') {
            const record = RequestSummary.fromPartial({ requestId, tokens: request + 1 });
            state.add({ storeId: 's', sequence: nowMs, record, isArrival: true, ageMs: 0 }, nowMs);
            live.set(requestId, request + 1);
          } else if (act === 'place') {
            state.place(requestId, heartbeat, nowMs);
          } else if (act === 'requeue') {
            state.requeue(lost(requestId, 1), nowMs);
          } else if (act === 'refuse') {
            state.refuse(
              requestId,
              Needs.fromPartial({ identity: `i${group}`, company: companies[group] ?? Company.NONE }),
              nowMs,
            );
          } else if (act === 'unanswered') {
            state.unanswered(requestId, false, nowMs);
          } else if (act === 'remove') {
            state.remove(requestId, request % 2 === 0, nowMs);
            live.delete(requestId);
          } else {
            state.reconcile([beat('g0', { running: [runs(requestId, 1)] })], nowMs);
          }
          const waiting = [...state.waiting()].map((each) => each.requestId);
          const tokensOf = (ids: readonly string[]): number =>
            ids.reduce((sum, id) => sum + (live.get(id) ?? Number.NaN), 0);
          const placed = [...live.keys()].filter((id) => !waiting.includes(id));
          expect(state.summary(nowMs)).toMatchObject({
            waitingRequests: waiting.length,
            runningRequests: placed.length,
            waitingTokens: tokensOf(waiting),
            inFlightTokens: tokensOf(placed),
          });
          const { waitingFor } = state.summary(nowMs);
          const byIdentity = Map.groupBy(state.waiting(), ({ identity }) => identity);
          expect(waitingFor).toHaveLength(byIdentity.size);
          for (const { identity, requests, tokens } of waitingFor) {
            const ids = byIdentity.get(identity)?.map((each) => each.requestId) ?? [];
            expect({ requests, tokens }).toEqual({ requests: ids.length, tokens: tokensOf(ids) });
            const fitting = [...state.waiting(new Set([identity]))].map((each) => each.identity);
            expect(fitting.filter((each) => each === identity)).toHaveLength(requests);
          }
          const loads = [...state.loads().values()];
          expect(loads.reduce((sum, load) => sum + load.requests, 0)).toBe(placed.length);
          expect(loads.reduce((sum, load) => sum + load.tokens, 0)).toBe(tokensOf(placed));
        }
      }),
    );
  });
});
