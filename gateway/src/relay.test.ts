// The relay's life of a request, against a session that does what each test says. What it does over real gRPC is in
// tests/cluster/gateway.test.ts.

import { join } from 'node:path';
import { setImmediate as turn } from 'node:timers/promises';

import { RequestRecord } from '@mimo/proto/queue';
import { FinishReason } from '@mimo/proto/sampling';
import { FinishKind, SequenceDelta, SequenceFinish } from '@mimo/proto/worker';
import { loadTokenizer } from '@mimo/tokenizer';
import { describe, expect, it } from 'vitest';

import { ClusterError } from '@mimo/core/errors';

import { Relay, type RelayEnd, type RelayEvent } from './relay.ts';
import type { SequenceListener, Session } from './session.ts';

const tokenizer = await loadTokenizer(join(import.meta.dirname, '../../models/mimo-demo'));

interface Attempt {
  readonly epoch: number;
  readonly listener: SequenceListener;
  readonly grants: number[];
  aborts: number;
}

/** A relay, the attempts it began, and everything that it said. */
class Rig {
  readonly attempts: Attempt[] = [];
  readonly events: RelayEvent[] = [];
  readonly ends: RelayEnd[] = [];
  requeues = 0;
  readonly relay: Relay;
  readonly #session: Pick<Session, 'submit' | 'target'> = {
    target: { model: 'm', group: 'g', incarnation: 'g1', address: 'nowhere:1' },
    submit: ({ epoch }, listener) => {
      const attempt: Attempt = { epoch, listener, grants: [], aborts: 0 };
      this.attempts.push(attempt);
      return { abort: () => void (attempt.aborts += 1), grant: (tokens) => void attempt.grants.push(tokens) };
    },
  };

  constructor(stop: readonly string[] = []) {
    const record = RequestRecord.fromPartial({ requestId: 'r', model: 'm', promptTokenIds: [1, 2] });
    const text = { tokenizer, stop, minTokens: 0, splitReasoning: false };
    this.relay = new Relay(record, text, {
      onRequeued: () => void (this.requeues += 1),
      onEnded: (end) => void this.ends.push(end),
    });
  }

  begin(): Attempt {
    this.relay.begin(this.#session);
    const attempt = this.attempts.at(-1);
    if (attempt === undefined) {
      throw new Error('nothing was submitted');
    }
    return attempt;
  }

  deliver(): Promise<void> {
    return this.relay.deliver(async (event) => void this.events.push(event));
  }
}

function delta(index: number, text: string, finish?: Partial<SequenceFinish>): SequenceDelta {
  const more = finish === undefined ? {} : { finish: SequenceFinish.fromPartial(finish) };
  return SequenceDelta.fromPartial({ index, tokenIds: tokenizer.encode(text), ...more });
}

const lengthOf = (text: string): number => tokenizer.encode(text).length;

describe('Relay', () => {
  it('relays to a finish with usage and speculation, merging what waits to be written', async () => {
    const rig = new Rig();
    const { listener } = rig.begin();
    listener.onDelta(delta(0, 'one '));
    listener.onDelta(delta(lengthOf('one '), 'two'));
    const index = lengthOf('one ') + lengthOf('two');
    listener.onDelta(delta(index, '', { kind: FinishKind.LENGTH, draftedTokens: 5, acceptedTokens: 3 }));
    await rig.deliver();
    expect(rig.events).toEqual([
      { $case: 'delta', value: expect.objectContaining({ index: 0, text: 'one two' }) as unknown },
      {
        $case: 'finish',
        value: {
          reason: FinishReason.LENGTH,
          matchedStop: '',
          usage: { promptTokens: 2, completionTokens: index },
          speculation: { draftedTokens: 5, acceptedTokens: 3 },
        },
      },
    ]);
    expect(rig.ends.map(({ kind }) => kind)).toEqual(['finish']);
  });

  it('drops what comes from an attempt that is over', () => {
    const rig = new Rig();
    const first = rig.begin();
    first.listener.onLost(new ClusterError('unavailable', 'gone'), true);
    const second = rig.begin();
    expect([first.epoch, second.epoch, rig.requeues]).toEqual([1, 2, 1]);
    first.listener.onDelta(delta(0, 'late'));
    first.listener.onLost(new ClusterError('unavailable', 'again'), true);
    expect(rig.relay.completionTokens).toBe(0);
    second.listener.onDelta(delta(0, 'x'));
    expect(rig.relay.completionTokens).toBe(lengthOf('x'));
  });

  it('fails where an index is missing: a hole is never delivered', async () => {
    const rig = new Rig();
    const { listener } = rig.begin();
    listener.onDelta(delta(1, 'x'));
    await expect(rig.deliver()).rejects.toMatchObject({ code: 'internal' });
    expect(rig.attempts[0]?.aborts).toBe(1);
  });

  it('fails alone where a token is none of the tokenizer’s', () => {
    const rig = new Rig();
    const { listener } = rig.begin();
    listener.onDelta(SequenceDelta.fromPartial({ index: 0, tokenIds: [1.5] }));
    expect(rig.ends).toMatchObject([{ kind: 'error', error: { code: 'internal' } }]);
  });

  it('at a stop text: asks the engine to stop, ignores what it still says, and finishes with its figures', async () => {
    const rig = new Rig(['two']);
    const { listener } = rig.begin();
    listener.onDelta(delta(0, 'one two three'));
    expect(rig.attempts[0]?.aborts).toBe(1);
    expect(rig.ends).toEqual([]);
    const tokens = rig.relay.completionTokens;
    listener.onDelta(delta(lengthOf('one two three'), 'four'));
    listener.onDelta(delta(0, '', { kind: FinishKind.ABORTED, draftedTokens: 9 }));
    await rig.deliver();
    expect(rig.events[0]?.value).toMatchObject({ text: 'one ' });
    expect(rig.events[1]?.value).toMatchObject({
      reason: FinishReason.STOP,
      matchedStop: 'two',
      usage: { completionTokens: tokens },
      speculation: { draftedTokens: 9 },
    });
  });

  it('finishes at a stop text also where the group is lost before its last word', async () => {
    const rig = new Rig(['two']);
    const { listener } = rig.begin();
    listener.onDelta(delta(0, 'one two'));
    listener.onLost(new ClusterError('unavailable', 'gone'), true);
    await rig.deliver();
    expect(rig.ends.map(({ kind }) => kind)).toEqual(['finish']);
  });

  it('waits again after a refusal as often as it takes, but breaks no third group', () => {
    const rig = new Rig();
    const refusal = { kind: FinishKind.ERROR, errorCode: 'unavailable', errorMessage: 'draining' };
    for (let attempt = 0; attempt < 5; attempt += 1) {
      rig.begin().listener.onDelta(delta(0, '', refusal));
    }
    rig.begin().listener.onLost(new ClusterError('unavailable', 'not there'), false);
    expect(rig.requeues).toBe(6);
    rig.begin().listener.onLost(new ClusterError('unavailable', 'broke'), true);
    expect(rig.requeues).toBe(7);
    rig.begin().listener.onLost(new ClusterError('unavailable', 'broke'), true);
    expect(rig.ends).toMatchObject([{ kind: 'error', error: { code: 'aborted' } }]);
  });

  it('ends with ABORTED where tokens had been delivered, saying how many', async () => {
    const rig = new Rig();
    const { listener } = rig.begin();
    listener.onDelta(delta(0, 'x'));
    listener.onLost(new ClusterError('unavailable', 'gone'), true);
    await expect(rig.deliver()).rejects.toMatchObject({
      code: 'aborted',
      message: expect.stringContaining('lost after 1 completion tokens') as unknown,
    });
    expect(rig.events).toHaveLength(1);
    expect(rig.requeues).toBe(0);
  });

  it('ends with the engine’s own error where trying again would not help', () => {
    const rig = new Rig();
    const error = { kind: FinishKind.ERROR, errorCode: 'invalid_argument', errorMessage: 'too long' };
    rig.begin().listener.onDelta(delta(0, '', error));
    expect(rig.ends).toMatchObject([
      { kind: 'error', error: { code: 'invalid_argument', message: 'group g: too long' } },
    ]);
    const strange = new Rig();
    strange.begin().listener.onDelta(delta(0, '', { ...error, errorCode: 'no-such-code' }));
    expect(strange.ends).toMatchObject([{ kind: 'error', error: { code: 'internal' } }]);
  });

  it('gives credit back in portions, as the client takes the tokens', async () => {
    const rig = new Rig();
    const { listener, grants } = rig.begin();
    const written: (() => void)[] = [];
    const delivering = rig.relay.deliver(() => new Promise((resolve) => written.push(resolve)));
    const forty = SequenceDelta.fromPartial({ tokenIds: Array<number>(40).fill(5) });
    listener.onDelta({ ...forty, index: 0 });
    await turn();
    listener.onDelta({ ...forty, index: 40 });
    listener.onDelta({ ...forty, index: 80 });
    await turn();
    expect([written.length, grants]).toEqual([1, []]);
    written.shift()?.();
    await turn();
    expect(grants).toEqual([]);
    written.shift()?.();
    await turn();
    expect(grants).toEqual([120]);
    rig.relay.fail(new ClusterError('canceled', 'enough'));
    await expect(delivering).rejects.toMatchObject({ code: 'canceled' });
  });

  it('ends once, however often it is told to', () => {
    const rig = new Rig();
    const { listener } = rig.begin();
    rig.relay.fail(new ClusterError('canceled', 'left'));
    rig.relay.fail(new ClusterError('deadline_exceeded', 'late'));
    listener.onDelta(delta(0, 'x', { kind: FinishKind.LENGTH }));
    listener.onLost(new ClusterError('unavailable', 'gone'), true);
    expect(rig.ends).toMatchObject([{ kind: 'error', error: { code: 'canceled' } }]);
    expect(rig.attempts[0]?.aborts).toBe(1);
  });
});
