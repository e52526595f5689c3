import { describe, expect, it } from 'vitest';

import { noPreparation, planPrepare, type PrepareInput, type PreparePod } from './prepare.ts';

function podOf(fields: Partial<PreparePod> = {}): PreparePod {
  return {
    name: 'chat-hash-prepare',
    uid: 'u',
    modelHash: 'hash',
    phase: 'Running',
    deleting: false,
    exitCode: undefined,
    failedMs: undefined,
    blocker: undefined,
    failure: undefined,
    ...fields,
  };
}

function inputWith(fields: Partial<PrepareInput> = {}): PrepareInput {
  return {
    service: 'chat',
    generation: 1,
    deleting: false,
    modelHash: 'hash',
    pods: [],
    preparedModel: undefined,
    published: 'unknown',
    nameTakenBy: undefined,
    memory: noPreparation,
    nowMs: 0,
    ...fields,
  };
}

function kindsOf(input: PrepareInput): string[] {
  return planPrepare(input).actions.map(({ kind }) => kind);
}

const notFound = podOf({ phase: 'Failed', exitCode: 3, failedMs: 0, failure: 'no such model' });

describe('planPrepare', () => {
  it('starts a pod for a model that is not prepared, and waits for it', () => {
    expect(planPrepare(inputWith()).actions).toEqual([
      { kind: 'createPreparePod', name: 'chat-hash-prepare', modelHash: 'hash' },
    ]);
    const waiting = planPrepare(inputWith({ pods: [podOf()] }));
    expect(waiting.actions).toEqual([]);
    expect(waiting).toMatchObject({ found: false, condition: { status: 'Unknown', reason: 'Preparing' } });
  });

  it('reports why the pod does not start', () => {
    const blocker = '0/1 nodes are available';
    const { condition, blocker: shown } = planPrepare(inputWith({ pods: [podOf({ blocker })] }));
    expect([condition.message, shown]).toEqual([blocker, blocker]);
  });

  it('deletes the pod once the status records its result, not before', () => {
    const pods = [podOf({ phase: 'Succeeded' })];
    const done = planPrepare(inputWith({ pods }));
    expect(done).toMatchObject({ found: true, preparedModel: 'hash', actions: [] });
    expect(kindsOf(inputWith({ pods, preparedModel: 'hash' }))).toEqual(['deletePreparePod']);
    expect(planPrepare(inputWith({ preparedModel: 'hash' }))).toMatchObject({ found: true, actions: [] });
  });

  it('retries a model that was not found after five minutes, not in a loop', () => {
    let { memory } = planPrepare(inputWith({ pods: [notFound] }));
    for (let nowMs = 0; nowMs < 300_000; nowMs += 1_000) {
      const plan = planPrepare(inputWith({ pods: [notFound], memory, nowMs }));
      expect(plan.actions).toEqual([]);
      expect(plan.condition).toMatchObject({ status: 'False', reason: 'NotFound' });
      expect(plan.condition.message).toContain('no such model');
      memory = plan.memory;
    }
    expect(kindsOf(inputWith({ pods: [notFound], memory, nowMs: 300_000 }))).toEqual(['deletePreparePod']);
    // While the next attempt runs the answer is still the last one.
    const again = planPrepare(inputWith({ pods: [podOf({ uid: 'v' })], memory, nowMs: 301_000 }));
    expect(again.condition.reason).toBe('NotFound');
    const found = planPrepare(inputWith({ pods: [podOf({ uid: 'v', phase: 'Succeeded' })], memory }));
    expect(found.condition.reason).toBe('Prepared');
  });

  it('retries at once when the spec changes', () => {
    const { memory } = planPrepare(inputWith({ pods: [notFound] }));
    expect(kindsOf(inputWith({ pods: [notFound], memory, generation: 2, nowMs: 1 }))).toEqual([
      'deletePreparePod',
    ]);
    expect(kindsOf(inputWith({ pods: [notFound], memory, modelHash: 'other', nowMs: 1 }))).toEqual([
      'deletePreparePod',
      'createPreparePod',
    ]);
  });

  it('retries any other failure after 10 s, 20 s, 40 s', () => {
    let memory = noPreparation;
    let nowMs = 0;
    const waits: number[] = [];
    for (const uid of ['a', 'b', 'c']) {
      const pods = [podOf({ uid, phase: 'Failed', exitCode: 1, failedMs: nowMs, failure: 'hub is away' })];
      const begin = nowMs;
      for (;;) {
        const plan = planPrepare(inputWith({ pods, memory, nowMs }));
        memory = plan.memory;
        expect(plan.condition).toMatchObject({ status: 'Unknown', reason: 'PrepareFailed' });
        if (plan.actions.length > 0) {
          break;
        }
        nowMs += 1_000;
      }
      waits.push((nowMs - begin) / 1000);
    }
    expect(waits).toEqual([10, 20, 40]);
  });

  it('counts from the end of the pod, so that a controller restart does not restart the wait', () => {
    const pods = [{ ...notFound, failedMs: 100_000 }];
    expect(kindsOf(inputWith({ pods, nowMs: 399_999 }))).toEqual([]);
    expect(kindsOf(inputWith({ pods, nowMs: 400_000 }))).toEqual(['deletePreparePod']);
  });

  it('publishes a prepared model again after the catalogue lost it, and permits new groups meanwhile', () => {
    const lost = { preparedModel: 'hash', published: false } as const;
    const first = planPrepare(inputWith(lost));
    expect(first.actions).toEqual([]);
    const later = planPrepare(inputWith({ ...lost, memory: first.memory, nowMs: 15_000 }));
    expect(later.actions.map(({ kind }) => kind)).toEqual(['createPreparePod']);
    expect(later.found).toBe(true);
    const back = planPrepare(inputWith({ preparedModel: 'hash', published: true, memory: later.memory }));
    expect(back.memory.unpublishedSinceMs).toBeUndefined();
  });

  it('blocks new groups for a prepared model that can no longer be found', () => {
    const plan = planPrepare(inputWith({ pods: [notFound], preparedModel: 'hash' }));
    expect(plan).toMatchObject({ found: false, condition: { status: 'False' }, preparedModel: 'hash' });
  });

  it('starts nothing for a deleted service, or for one whose model another service serves', () => {
    const taken = planPrepare(inputWith({ nameTakenBy: 'older' }));
    expect(taken).toMatchObject({ found: false, actions: [], condition: { reason: 'NameTaken' } });
    expect(taken.blocker).toContain('older');
    expect(kindsOf(inputWith({ deleting: true, pods: [podOf()] }))).toEqual(['deletePreparePod']);
    expect(kindsOf(inputWith({ deleting: true }))).toEqual([]);
  });
});
