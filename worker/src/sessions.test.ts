import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';

import { ClusterError, type ErrorCode } from '@mimo/core/process/errors';
import { createLog } from '@mimo/core/process/log';
import { SamplingParams } from '@mimo/proto/sampling';
import {
  FinishKind,
  Submit,
  type SessionRequest,
  type SessionResponse,
  type StepFrame,
} from '@mimo/proto/worker';

import { idleStats, lastDelta, type SequenceDelta, type SequenceRequest } from './engines/mimo/engine-api.ts';
import { Sessions, type Session } from './sessions.ts';

const stats = idleStats(0);
const completeSampling = SamplingParams.fromPartial({
  temperature: 0,
  topP: 1,
  topK: 0,
  minP: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  seed: 1,
  maxTokens: 10,
  draftTokens: 1,
});
const welcome = { group: 'g', model: 'm', maxContextTokens: 100, draftTokens: 1, identity: 'i' };
const counts = { completionTokens: 0, draftedTokens: 0, acceptedTokens: 0 };

/** The calls of the sessions to the engine, in order. */
class RecordingEngine {
  readonly submitted: SequenceRequest[] = [];
  readonly aborted: number[] = [];
  readonly credited: (readonly [number, number])[] = [];
  submit(request: SequenceRequest): void {
    this.submitted.push(request);
  }
  abort(sequenceId: number): void {
    this.aborted.push(sequenceId);
  }
  addCredit(sequenceId: number, tokens: number): void {
    this.credited.push([sequenceId, tokens]);
  }
}

/** A gateway's end of a session: what it received, and how the stream ended. */
class Peer {
  readonly received: NonNullable<SessionResponse['message']>[] = [];
  full = false;
  ended: { readonly error: ClusterError | undefined } | undefined;
  send(response: SessionResponse): boolean {
    if (response.message !== undefined) {
      this.received.push(response.message);
    }
    return !this.full;
  }
  end(error?: ClusterError): void {
    this.ended = { error };
  }
  get frames(): StepFrame[] {
    return this.received.flatMap((message) => (message.$case === 'frame' ? [message.value] : []));
  }
}

function submitMessage(slot: number, fields: Partial<Submit> = {}): SessionRequest {
  const submit = Submit.fromPartial({
    slot,
    requestId: `request-${slot}`,
    epoch: 1,
    tokenIds: [5, 6],
    creditTokens: 8,
    sampling: completeSampling,
  });
  return { message: { $case: 'submit', value: { ...submit, ...fields } } };
}

function failedDelta(
  sequenceId: number,
  error: { readonly code: ErrorCode; readonly message: string },
): SequenceDelta {
  return lastDelta(sequenceId, 0, { kind: 'error', ...error });
}

describe('Sessions', () => {
  let engine: RecordingEngine;
  let sessions: Sessions;
  let logged: string[];
  beforeEach(() => {
    vi.useFakeTimers();
    engine = new RecordingEngine();
    logged = [];
    const log = createLog({
      process: 'test',
      level: 'info',
      destination: { write: (line: string) => logged.push(line) },
    });
    sessions = new Sessions(engine, welcome, log);
  });
  afterEach(() => {
    vi.useRealTimers();
  });

  function open(): { peer: Peer; session: Session } {
    const peer = new Peer();
    const session = sessions.open(peer);
    session.receive({ message: { $case: 'hello', value: { gatewayId: 'gw', model: 'm' } } });
    return { peer, session };
  }
  function step(number: number, deltas: readonly SequenceDelta[]): void {
    sessions.sequences.onFrame({ step: number, deltas, stats });
  }

  it('logs the cause of a failure that its client does not see, and no mistakes of clients', () => {
    const { peer, session } = open();
    session.receive(submitMessage(0));
    session.receive(submitMessage(1));
    const [first, second] = engine.submitted.map(({ sequenceId }) => sequenceId);
    step(1, [
      failedDelta(first!, { code: 'data_loss', message: 'NaN' }),
      failedDelta(second!, { code: 'invalid_argument', message: 'no' }),
    ]);
    const ends = peer.frames.flatMap(({ deltas }) => deltas.map(({ finish }) => finish?.errorMessage));
    expect(ends).toEqual(['NaN', 'no']);
    expect(logged.map((line) => JSON.parse(line) as unknown)).toMatchObject([
      { msg: 'sequence failed', requestId: 'request-0', error: { code: 'data_loss', message: 'NaN' } },
    ]);
  });

  it('welcomes a gateway, and rejects one that requests another model', () => {
    const { peer } = open();
    expect(peer.received).toEqual([{ $case: 'welcome', value: welcome }]);
    const stranger = new Peer();
    sessions
      .open(stranger)
      .receive({ message: { $case: 'hello', value: { gatewayId: 'x', model: 'other' } } });
    expect(stranger.ended?.error).toMatchObject({
      code: 'not_found',
      message: 'this group serves m, not other',
    });
    expect(sessions.count).toBe(1);
  });

  it('sends each session one frame a step with its own sequences only', () => {
    const one = open();
    const two = open();
    one.session.receive(submitMessage(1));
    one.session.receive(submitMessage(2, { epoch: 4 }));
    two.session.receive(submitMessage(1));
    expect(engine.submitted.map(({ sequenceId }) => sequenceId)).toEqual([1, 2, 3]);
    step(9, [
      { sequenceId: 1, index: 0, tokenIds: [10] },
      { sequenceId: 2, index: 0, tokenIds: [20, 21] },
      { sequenceId: 3, index: 0, tokenIds: [30] },
    ]);
    expect(one.peer.frames).toMatchObject([
      {
        step: 9,
        deltas: [
          { slot: 1, epoch: 1, tokenIds: [10], finish: undefined },
          { slot: 2, epoch: 4, tokenIds: [20, 21], finish: undefined },
        ],
      },
    ]);
    expect(two.peer.frames).toMatchObject([{ deltas: [{ slot: 1, tokenIds: [30] }] }]);
  });

  it('frees the slot with the last delta, so that it can be used again at once', () => {
    const { peer, session } = open();
    session.receive(submitMessage(1));
    step(1, [
      { sequenceId: 1, index: 0, tokenIds: [7], finish: { kind: 'stop', stopTokenId: 2, ...counts } },
    ]);
    expect(peer.frames[0]?.deltas[0]?.finish).toMatchObject({ kind: FinishKind.STOP, stopTokenId: 2 });
    expect(sessions.sequences.count).toBe(0);
    session.receive(submitMessage(1, { epoch: 2 }));
    expect(engine.submitted.at(-1)?.sequenceId).toBe(2);
    expect(peer.ended).toBeUndefined();
  });

  it('distinguishes an abort that the gateway requested from the loss of the group', () => {
    const { peer, session } = open();
    session.receive(submitMessage(1));
    session.receive(submitMessage(2));
    session.receive({ message: { $case: 'abort', value: { slot: 1, epoch: 1 } } });
    expect(engine.aborted).toEqual([1]);
    step(1, [
      { sequenceId: 1, index: 0, tokenIds: [], finish: { kind: 'aborted', ...counts } },
      { sequenceId: 2, index: 0, tokenIds: [], finish: { kind: 'aborted', ...counts } },
    ]);
    expect(peer.frames[0]?.deltas.map(({ finish }) => [finish?.kind, finish?.errorCode])).toEqual([
      [FinishKind.ABORTED, ''],
      [FinishKind.ERROR, 'aborted'],
    ]);
  });

  it('hands over running sequences with their last tokens, their figures, and a code other than group failure', () => {
    const { peer, session } = open();
    session.receive(submitMessage(1));
    session.receive(submitMessage(2));
    session.receive({ message: { $case: 'abort', value: { slot: 2, epoch: 1 } } });
    sessions.sequences.handOver();
    expect(engine.aborted).toEqual([2, 1, 2]);
    step(1, [{ sequenceId: 1, index: 0, tokenIds: [5] }]);
    step(2, [
      { sequenceId: 1, index: 1, tokenIds: [], finish: { kind: 'aborted', ...counts } },
      { sequenceId: 2, index: 0, tokenIds: [], finish: { kind: 'aborted', ...counts } },
    ]);
    const deltas = peer.frames.flatMap((frame) => frame.deltas);
    expect(deltas.map(({ index, tokenIds, finish }) => [index, tokenIds, finish?.errorCode])).toEqual([
      [0, [5], undefined],
      [1, [], 'unavailable'],
      [0, [], ''],
    ]);
    expect(deltas[1]?.finish).toMatchObject({ kind: FinishKind.ERROR, ...counts });
    expect(peer.ended).toBeUndefined();
  });

  it('ignores aborts and credit for another epoch or for an ended sequence', () => {
    const { peer, session } = open();
    session.receive(submitMessage(1, { epoch: 3 }));
    session.receive({ message: { $case: 'abort', value: { slot: 1, epoch: 2 } } });
    session.receive({ message: { $case: 'credit', value: { slot: 1, epoch: 2, tokens: 5 } } });
    session.receive({ message: { $case: 'abort', value: { slot: 9, epoch: 3 } } });
    session.receive({ message: { $case: 'credit', value: { slot: 1, epoch: 3, tokens: 5 } } });
    expect(engine.aborted).toEqual([]);
    expect(engine.credited).toEqual([[1, 5]]);
    expect(peer.ended).toBeUndefined();
  });

  it('ends a sequence at its deadline with deadline_exceeded', () => {
    const { peer, session } = open();
    session.receive(submitMessage(1, { timeLeftMs: 1_000 }));
    vi.advanceTimersByTime(999);
    expect(engine.aborted).toEqual([]);
    vi.advanceTimersByTime(1);
    expect(engine.aborted).toEqual([1]);
    step(3, [{ sequenceId: 1, index: 2, tokenIds: [], finish: { kind: 'aborted', ...counts } }]);
    expect(peer.frames[0]?.deltas[0]?.finish).toMatchObject({
      kind: FinishKind.ERROR,
      errorCode: 'deadline_exceeded',
    });
    expect(vi.getTimerCount()).toBe(0);
  });

  it('waits through deadlines beyond the longest timer', () => {
    const { session } = open();
    const leftMs = 2 ** 31 + 5_000;
    session.receive(submitMessage(1, { timeLeftMs: leftMs }));
    vi.advanceTimersByTime(leftMs - 1);
    expect(engine.aborted).toEqual([]);
    vi.advanceTimersByTime(1);
    expect(engine.aborted).toEqual([1]);
  });

  it('frees every sequence of a closed session, and drops their later deltas', () => {
    const { peer, session } = open();
    session.receive(submitMessage(1, { timeLeftMs: 60_000 }));
    session.receive(submitMessage(2));
    session.close();
    session.close();
    expect(engine.aborted).toEqual([1, 2]);
    expect([sessions.count, vi.getTimerCount()]).toEqual([0, 0]);
    step(1, [{ sequenceId: 1, index: 0, tokenIds: [1] }]);
    expect(peer.frames).toEqual([]);
    expect(sessions.sequences.count).toBe(2);
    step(2, [lastDelta(1, 1, { kind: 'aborted' }), lastDelta(2, 0, { kind: 'aborted' })]);
    expect(peer.frames).toEqual([]);
    expect(sessions.sequences.count).toBe(0);
    session.receive(submitMessage(3));
    expect(engine.submitted).toHaveLength(2);
  });

  it('reports a sequence until the engine has freed it, even after its gateway has left', () => {
    const { session } = open();
    session.receive(submitMessage(1, { resumedTokens: 2, onTrial: true }));
    session.receive(submitMessage(2));
    step(1, [{ sequenceId: 1, index: 2, tokenIds: [7, 8, 9] }]);
    const running = [
      { requestId: 'request-1', epoch: 1, tokens: 3, onTrial: true },
      { requestId: 'request-2', epoch: 1, tokens: 0, onTrial: false },
    ];
    expect(sessions.sequences.running()).toEqual(running);
    session.receive({ message: { $case: 'abort', value: { slot: 1, epoch: 1 } } });
    session.close();
    expect(sessions.sequences.running()).toEqual(running);
    step(2, [{ sequenceId: 1, index: 5, tokenIds: [], finish: { kind: 'aborted', ...counts } }]);
    expect(sessions.sequences.running()).toEqual(running.slice(1));
    step(3, [{ sequenceId: 2, index: 0, tokenIds: [], finish: { kind: 'aborted', ...counts } }]);
    expect(sessions.sequences.running()).toEqual([]);
  });

  it('rejects a sequence bound to another identity, so that its gateway can try elsewhere', () => {
    const { peer, session } = open();
    session.receive(submitMessage(1, { identity: 'i' }));
    session.receive(submitMessage(2, { identity: 'another' }));
    expect(engine.submitted).toHaveLength(1);
    expect(peer.frames[0]?.deltas[0]?.finish).toMatchObject({
      kind: FinishKind.ERROR,
      errorCode: 'unavailable',
      errorMessage: 'group g has model identity i, not another',
    });
  });

  it('merges deltas while the stream is full, without losing or repeating an index', () => {
    const { peer, session } = open();
    session.receive(submitMessage(1));
    session.receive(submitMessage(2));
    peer.full = true;
    step(1, [{ sequenceId: 1, index: 0, tokenIds: [10] }]);
    for (let at = 2; at < 50; at++) {
      step(at, [
        { sequenceId: 1, index: at - 1, tokenIds: [10 + at] },
        { sequenceId: 2, index: at - 2, tokenIds: [90 + at] },
      ]);
    }
    step(50, [{ sequenceId: 2, index: 48, tokenIds: [], finish: { kind: 'length', ...counts } }]);
    expect(peer.frames).toHaveLength(1);
    peer.full = false;
    session.drained();
    expect(peer.frames).toHaveLength(2);
    const [first, second] = peer.frames[1]?.deltas ?? [];
    expect([peer.frames[1]?.step, first?.index, first?.tokenIds.length]).toEqual([50, 1, 48]);
    expect([second?.index, second?.tokenIds.length, second?.finish?.kind]).toEqual([
      0,
      48,
      FinishKind.LENGTH,
    ]);
  });

  it('never merges the end of one sequence with the beginning of the next in its slot', () => {
    const { peer, session } = open();
    session.receive(submitMessage(1));
    peer.full = true;
    step(1, [{ sequenceId: 1, index: 0, tokenIds: [1] }]);
    step(2, [{ sequenceId: 1, index: 1, tokenIds: [2], finish: { kind: 'length', ...counts } }]);
    // The gateway uses a slot again only once it has seen the end, so this is a message in the wrong order.
    session.receive(submitMessage(1, { epoch: 2 }));
    step(3, [{ sequenceId: 2, index: 0, tokenIds: [3] }]);
    peer.full = false;
    session.drained();
    expect(peer.frames[1]?.deltas.map(({ epoch, tokenIds }) => [epoch, tokenIds])).toEqual([
      [1, [2]],
      [2, [3]],
    ]);
  });

  it('rejects incomplete sampling, and all sequences while refusing, with an error delta and keeps the session', () => {
    const { peer, session } = open();
    session.receive(submitMessage(1, { sampling: SamplingParams.fromPartial({ temperature: 1 }) }));
    sessions.sequences.refuse(new ClusterError('unavailable', 'group g is draining'));
    session.receive(submitMessage(2, { resumedTokens: 1 }));
    expect(peer.frames.flatMap(({ deltas }) => deltas)).toMatchObject([
      { slot: 1, finish: { kind: FinishKind.ERROR, errorCode: 'invalid_argument' } },
      { slot: 2, index: 1, finish: { kind: FinishKind.ERROR, errorCode: 'unavailable' } },
    ]);
    expect(engine.submitted).toEqual([]);
    expect(peer.ended).toBeUndefined();
  });

  it.each([
    ['a submit before hello', [submitMessage(1)], 'failed_precondition'],
    ['a message without content', [{ message: undefined }], 'invalid_argument'],
    [
      'a slot in use',
      [
        { message: { $case: 'hello', value: { gatewayId: 'gw', model: 'm' } } },
        submitMessage(1),
        submitMessage(1, { epoch: 2 }),
      ],
      'failed_precondition',
    ],
  ] satisfies [string, SessionRequest[], string][])(
    'ends a session for %s, and frees its sequences',
    (_, messages, code) => {
      const peer = new Peer();
      const session = sessions.open(peer);
      for (const message of messages) {
        session.receive(message);
      }
      expect(peer.ended?.error?.code).toBe(code);
      expect(sessions.count).toBe(0);
      expect(engine.aborted).toEqual(engine.submitted.map(({ sequenceId }) => sequenceId));
    },
  );

  it('fails as a whole: each sequence gets its last delta, then each session its status', () => {
    const { peer, session } = open();
    session.receive(submitMessage(1));
    session.receive(submitMessage(2));
    step(1, [{ sequenceId: 1, index: 0, tokenIds: [4, 5] }]);
    peer.full = true;
    sessions.fail(new ClusterError('aborted', 'group g was lost'));
    expect(peer.frames.at(-1)?.deltas).toMatchObject([
      { slot: 1, index: 2, finish: { kind: FinishKind.ERROR, errorCode: 'aborted', completionTokens: 2 } },
      { slot: 2, index: 0, finish: { kind: FinishKind.ERROR, errorCode: 'aborted' } },
    ]);
    expect(peer.ended?.error?.code).toBe('aborted');
    expect([sessions.count, sessions.sequences.count]).toEqual([0, 0]);
  });

  it('reports nothing more after the group failed, even of sequences whose gateway had left', async () => {
    const { peer, session } = open();
    const left = open();
    session.receive(submitMessage(1, { timeLeftMs: 60_000 }));
    left.session.receive(submitMessage(1));
    left.session.close();
    sessions.fail(new ClusterError('aborted', 'group g was lost'));
    step(1, [{ sequenceId: 1, index: 0, tokenIds: [1] }, lastDelta(2, 0, { kind: 'aborted' })]);
    expect([sessions.sequences.running(), vi.getTimerCount()]).toEqual([[], 0]);
    expect(peer.frames.flatMap(({ deltas }) => deltas)).toHaveLength(1);
    await sessions.sequences.drained(AbortSignal.abort());
  });

  it('drains: waits until the engine has freed the last sequence, however it ends', async () => {
    const { session } = open();
    const { sequences } = sessions;
    await sequences.drained(AbortSignal.abort());
    session.receive(submitMessage(1));
    session.receive(submitMessage(2));
    const onDrained = vi.fn<() => void>();
    const drained = sequences.drained(new AbortController().signal).then(onDrained);
    const hasty = sequences.drained(AbortSignal.abort(new ClusterError('deadline_exceeded', 'too long')));
    await expect(hasty).rejects.toMatchObject({ code: 'deadline_exceeded' });
    step(1, [lastDelta(1, 0, { kind: 'parked', reason: 'no credit' })]);
    session.close();
    await vi.advanceTimersByTimeAsync(0);
    expect(onDrained).not.toHaveBeenCalled();
    step(2, [lastDelta(2, 0, { kind: 'aborted' })]);
    await drained;
  });

  it('answers pings', () => {
    const { peer, session } = open();
    session.receive({ message: { $case: 'ping', value: { nonce: 7 } } });
    expect(peer.received.at(-1)).toEqual({ $case: 'pong', value: { nonce: 7 } });
  });
});
