// The relay's life of a request, against a scripted session. tests/cluster/gateway-groups.test.ts tests it over real
// gRPC.

import { join } from 'node:path';
import { setImmediate as turn } from 'node:timers/promises';

import { Company, RequestRecord } from '@mimo/proto/queue';
import { FinishReason } from '@mimo/proto/sampling';
import { FinishKind, ParkReason, SequenceDelta, SequenceFinish, type Submit } from '@mimo/proto/worker';
import { loadTokenizer } from '@mimo/tokenizer';
import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { ClusterError } from '@mimo/core/process/errors';

import { Relay, type Offer, type RelayEnd, type RelayEvent } from './relay.ts';
import type { SequenceListener, Session } from './session.ts';
import type { LostAttempt } from './dispatcher/suspicion.ts';

const tokenizer = await loadTokenizer(join(import.meta.dirname, '../../models/mimo-demo'));

interface Attempt {
  readonly submit: Omit<Submit, 'slot'>;
  readonly epoch: number;
  readonly listener: SequenceListener;
  readonly grants: number[];
  aborts: number;
}

/** A relay, the attempts that it began, and its events and callbacks. */
class Rig {
  readonly attempts: Attempt[] = [];
  readonly events: RelayEvent[] = [];
  readonly ends: RelayEnd[] = [];
  readonly lost: LostAttempt[] = [];
  /** Its callbacks about parking, in order. */
  readonly parking: string[] = [];
  readonly relay: Relay;
  readonly #session: Pick<Session, 'submit' | 'target'> = {
    target: { model: 'm', group: 'g', incarnation: 'g1', address: 'nowhere:1' },
    submit: (submit, listener) => {
      const attempt: Attempt = { submit, epoch: submit.epoch, listener, grants: [], aborts: 0 };
      this.attempts.push(attempt);
      return { abort: () => void (attempt.aborts += 1), grant: (tokens) => void attempt.grants.push(tokens) };
    },
  };

  constructor(stop: readonly string[] = [], stallLimitMs = 60_000) {
    const record = RequestRecord.fromPartial({ requestId: 'r', model: 'm', promptTokenIds: [1, 2] });
    const text = { tokenTable: tokenizer, stop, stopInReasoning: false, minTokens: 0, reasoning: undefined };
    this.relay = new Relay(
      record,
      { text, stallLimitMs },
      {
        onRequeued: (attempt) => void this.lost.push(attempt),
        onParked: () => void this.parking.push('parked'),
        onUnparked: () => void this.parking.push('unparked'),
        onStalled: () => void this.parking.push('stalled'),
        onEnded: (end) => void this.ends.push(end),
      },
    );
  }

  begin(offer: Partial<Offer> = {}): Attempt {
    const any: Offer = { identity: '', company: Company.UNSPECIFIED, isAlone: () => true };
    this.relay.begin(this.#session, { ...any, ...offer });
    const attempt = this.attempts.at(-1);
    if (attempt === undefined) {
      throw new Error('nothing was submitted');
    }
    return attempt;
  }

  deliver(): Promise<void> {
    return this.deliverTo(async (event) => void this.events.push(event));
  }

  /** Delivers; the client reads the first message at once. */
  deliverTo(write: (event: RelayEvent) => Promise<void>): Promise<void> {
    return this.relay.deliver(started, async (event) => {
      if (event.$case !== 'started') {
        await write(event);
      }
    });
  }
}

const started = { requestId: 'r', model: 'm', promptTokens: 2, seed: 0 };

const fives = (count: number): number[] => Array<number>(count).fill(5);

function delta(index: number, text: string, finish?: Partial<SequenceFinish>): SequenceDelta {
  const more = finish === undefined ? {} : { finish: SequenceFinish.fromPartial(finish) };
  return SequenceDelta.fromPartial({ index, tokenIds: tokenizer.encode(text), ...more });
}

const handedOver: Partial<SequenceFinish> = {
  kind: FinishKind.ERROR,
  errorCode: 'unavailable',
  errorMessage: 'the group hands over',
};

/** The next token of an engine that depends on all before it, as sampling keyed by position does. */
function nextOf(tokenIds: readonly number[]): number {
  return 65 + (tokenIds.reduce((hash, id) => (hash * 31 + id) % 9973, 7) % 26);
}

const lengthOf = (text: string): number => tokenizer.encode(text).length;

describe('Relay', () => {
  it('relays up to the finish with usage and speculation, and merges pending deltas', async () => {
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

  it('drops frames of an ended attempt', () => {
    const rig = new Rig();
    const first = rig.begin();
    first.listener.onLost(new ClusterError('unavailable', 'gone'), true);
    const second = rig.begin();
    expect([first.epoch, second.epoch]).toEqual([1, 2]);
    expect(rig.lost).toEqual([{ broke: true, tokens: 0, alone: false }]);
    first.listener.onDelta(delta(0, 'late'));
    first.listener.onLost(new ClusterError('unavailable', 'again'), true);
    expect(rig.relay.completionTokens).toBe(0);
    second.listener.onDelta(delta(0, 'x'));
    expect(rig.relay.completionTokens).toBe(lengthOf('x'));
  });

  it('fails when an index is missing: a gap is never delivered', async () => {
    const rig = new Rig();
    const { listener } = rig.begin();
    listener.onDelta(delta(1, 'x'));
    await expect(rig.deliver()).rejects.toMatchObject({ code: 'internal' });
    expect(rig.attempts[0]?.aborts).toBe(1);
  });

  it('fails alone when a token is unknown to the tokenizer', () => {
    const rig = new Rig();
    const { listener } = rig.begin();
    listener.onDelta(SequenceDelta.fromPartial({ index: 0, tokenIds: [1.5] }));
    expect(rig.ends).toMatchObject([{ kind: 'error', error: { code: 'internal' } }]);
  });

  it('aborts the sequence at a stop text, ignores later tokens, and finishes with the engine’s figures', async () => {
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

  it('finishes at a stop text even if the group is lost before its last delta', async () => {
    const rig = new Rig(['two']);
    const { listener } = rig.begin();
    listener.onDelta(delta(0, 'one two'));
    listener.onLost(new ClusterError('unavailable', 'gone'), true);
    await rig.deliver();
    expect(rig.ends.map(({ kind }) => kind)).toEqual(['finish']);
  });

  it('continues in another group from the delivered tokens, with contiguous indices and complete text', async () => {
    const rig = new Rig();
    const prompt = [1, 2];
    const first = rig.begin();
    expect(first.submit).toMatchObject({ tokenIds: prompt, resumedTokens: 0, creditTokens: 16 });
    const [one, two] = [tokenizer.encode('größer '), tokenizer.encode('終 🙂')];
    first.listener.onDelta(delta(0, 'größer '));
    first.listener.onLost(new ClusterError('unavailable', 'gone'), true);
    expect(rig.relay.place).toBeUndefined();
    const second = rig.begin();
    expect(second.submit).toMatchObject({
      epoch: 2,
      tokenIds: [...prompt, ...one],
      resumedTokens: one.length,
      // The client's unread tokens are still in the window.
      creditTokens: 16 - one.length,
    });
    first.listener.onDelta(delta(one.length, 'late'));
    second.listener.onDelta(delta(one.length, '終 🙂'));
    const total = one.length + two.length;
    second.listener.onDelta(delta(total, '', { kind: FinishKind.LENGTH }));
    await rig.deliver();
    expect(rig.events).toEqual([
      {
        $case: 'delta',
        value: { index: 0, tokenIds: [...one, ...two], logprobs: [], text: 'größer 終 🙂', reasoning: '' },
      },
      {
        $case: 'finish',
        value: expect.objectContaining({ usage: { promptTokens: 2, completionTokens: total } }) as unknown,
      },
    ]);
  });

  it('finds a stop text that begins in one group and ends in the next', async () => {
    const rig = new Rig(['two']);
    const first = rig.begin();
    first.listener.onDelta(delta(0, 'one t'));
    first.listener.onLost(new ClusterError('unavailable', 'gone'), true);
    const second = rig.begin();
    second.listener.onDelta(delta(lengthOf('one t'), 'wo three'));
    second.listener.onDelta(delta(99, '', { kind: FinishKind.ABORTED }));
    await rig.deliver();
    expect(rig.events[0]?.value).toMatchObject({ text: 'one ' });
    expect(rig.events[1]?.value).toMatchObject({ reason: FinishReason.STOP, matchedStop: 'two' });
  });

  it('sums up the figures of speculation over its attempts', async () => {
    const rig = new Rig();
    rig.begin().listener.onDelta(delta(0, 'x', { ...handedOver, draftedTokens: 5, acceptedTokens: 3 }));
    const { listener } = rig.begin();
    listener.onDelta({ ...delta(1, 'x'), draftedTokens: 1 });
    listener.onDelta({ ...delta(2, 'x'), draftedTokens: 20, acceptedTokens: 10 });
    // The last delta of a broken group has no figures, or is missing.
    listener.onDelta(delta(3, '', { kind: FinishKind.ERROR, errorCode: 'aborted' }));
    rig
      .begin()
      .listener.onDelta(delta(3, 'x', { kind: FinishKind.LENGTH, draftedTokens: 4, acceptedTokens: 1 }));
    await rig.deliver();
    expect(rig.events.at(-1)?.value).toMatchObject({
      speculation: { draftedTokens: 29, acceptedTokens: 14 },
    });
  });

  it('waits again after every rejection or hand-over', () => {
    const rig = new Rig();
    for (let attempt = 0; attempt < 10; attempt += 1) {
      rig.begin().listener.onDelta(delta(0, '', handedOver));
      rig.begin().listener.onLost(new ClusterError('unavailable', 'not there'), false);
    }
    expect(rig.lost).toHaveLength(20);
    expect(rig.lost.every(({ broke }) => !broke)).toBe(true);
    expect(rig.ends).toEqual([]);
  });

  it('aborts when three groups in a row break with it before it makes progress, and it was alone in the last', () => {
    const rig = new Rig();
    const broken = new ClusterError('unavailable', 'broke');
    let index = 0;
    const attempt = (tokens: number, offer: Partial<Offer> = {}): void => {
      const { listener } = rig.begin(offer);
      if (tokens > 0) {
        listener.onDelta(SequenceDelta.fromPartial({ index, tokenIds: Array<number>(tokens).fill(5) }));
        index += tokens;
      }
      listener.onLost(broken, true);
    };
    // It makes progress in every third group, so any number of groups may break.
    for (let round = 0; round < 10; round += 1) {
      for (const tokens of [8, 0, 7]) {
        attempt(tokens);
      }
    }
    expect(rig.lost).toHaveLength(30);
    attempt(8);
    attempt(1);
    // A rejection or hand-over in between neither counts nor clears.
    rig.begin().listener.onDelta(delta(index, '', handedOver));
    expect(rig.relay.needs.company).toBe(Company.UNSPECIFIED);
    attempt(0);
    expect(rig.relay.needs.company).toBe(Company.PROVEN);
    attempt(7, { company: Company.PROVEN });
    expect(rig.relay.needs.company).toBe(Company.NONE);
    // Another request joined despite the promise.
    attempt(7, { company: Company.NONE, isAlone: () => false });
    expect(rig.ends).toEqual([]);
    attempt(7, { company: Company.NONE });
    expect(rig.ends).toMatchObject([
      {
        kind: 'error',
        error: {
          code: 'aborted',
          message: expect.stringMatching(
            /given up after \d+ completion tokens, because 5 groups in a row broke .* nothing else in it: broke/,
          ) as unknown,
        },
      },
    ]);
  });

  it('stays parked while its client is far behind, and gets enough credit on trial to be cleared', () => {
    const rig = new Rig();
    const broke = new ClusterError('unavailable', 'broke');
    const { listener } = rig.begin();
    listener.onDelta(SequenceDelta.fromPartial({ index: 0, tokenIds: fives(8) }));
    listener.onLost(broke, true);
    expect(rig.relay.isParked).toBe(false);
    const trial = rig.begin({ company: Company.PROVEN });
    expect(trial.submit).toMatchObject({ onTrial: true, creditTokens: 8 });
    trial.listener.onDelta(SequenceDelta.fromPartial({ index: 8, tokenIds: [5] }));
    trial.listener.onLost(broke, true);
    expect(rig.relay.isParked).toBe(true);
  });

  it('is bound to a group’s identity once it has tokens from it, and not before', () => {
    const rig = new Rig();
    rig.begin({ identity: 'x' }).listener.onDelta(delta(0, '', handedOver));
    expect(rig.relay.needs.identity).toBe('');
    rig.begin({ identity: 'y' }).listener.onDelta(delta(0, 'a'));
    expect(rig.relay.needs.identity).toBe('y');
    rig.attempts.at(-1)?.listener.onLost(new ClusterError('unavailable', 'broke'), true);
    expect(rig.begin({ identity: 'y' }).submit.identity).toBe('y');
  });

  it('reports whether its group has released it', () => {
    const rig = new Rig();
    expect(rig.relay.released).toBe(true);
    rig.begin().listener.onLost(new ClusterError('unavailable', 'broke'), true);
    expect(rig.relay.released).toBe(false);
    rig.begin().listener.onDelta(delta(0, '', handedOver));
    expect(rig.relay.released).toBe(true);
    rig.begin();
    rig.relay.fail(new ClusterError('canceled', 'left'));
    expect(rig.relay.released).toBe(false);
  });

  it('ends with the engine’s own error when a retry would not help', () => {
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

  it('returns credit in portions as the client reads the tokens', async () => {
    const rig = new Rig();
    const { listener, grants } = rig.begin();
    const written: (() => void)[] = [];
    const delivering = rig.deliverTo(() => new Promise((resolve) => written.push(resolve)));
    const eight = SequenceDelta.fromPartial({ tokenIds: fives(8) });
    listener.onDelta({ ...eight, index: 0 });
    await turn();
    listener.onDelta({ ...eight, index: 8 });
    await turn();
    expect([written.length, grants]).toEqual([1, []]);
    written.shift()?.();
    await turn();
    expect(grants, '16 and the 8 that it took, less the 8 that it has not').toEqual([16]);
    written.shift()?.();
    await turn();
    expect(grants).toEqual([16, 16]);
    listener.onDelta(SequenceDelta.fromPartial({ index: 16, tokenIds: fives(3) }));
    await turn();
    written.shift()?.();
    await turn();
    expect(grants, 'a portion of it').toEqual([16, 16]);
    for (let index = 19; index < 239; index += 20) {
      listener.onDelta(SequenceDelta.fromPartial({ index, tokenIds: fives(20) }));
      await turn();
      written.shift()?.();
      await turn();
    }
    const mayHave = 16 + grants.reduce((sum, tokens) => sum + tokens, 0);
    expect(mayHave - 239, 'never more than the largest window').toBeGreaterThan(256 - 64);
    expect(mayHave - 239).toBeLessThanOrEqual(256);
    rig.relay.fail(new ClusterError('canceled', 'enough'));
    await expect(delivering).rejects.toMatchObject({ code: 'canceled' });
  });

  it('is parked until its client has read the first message', async () => {
    const rig = new Rig();
    expect(rig.relay.isParked).toBe(true);
    const { promise: taken, resolve: take } = Promise.withResolvers<void>();
    const delivering = rig.relay.deliver(started, () => taken);
    await turn();
    expect([rig.relay.isParked, rig.parking]).toEqual([true, []]);
    take();
    await turn();
    expect([rig.relay.isParked, rig.parking]).toEqual([false, ['unparked']]);
    rig.relay.fail(new ClusterError('canceled', 'enough'));
    await expect(delivering).rejects.toMatchObject({ code: 'canceled' });
  });

  it('is parked while its client is behind, and continues from its tokens once the client has caught up', async () => {
    const rig = new Rig();
    const take: (() => void)[] = [];
    const delivering = rig.deliverTo(async (event) => {
      rig.events.push(event);
      await new Promise<void>((resolve) => take.push(resolve));
    });
    await turn();
    const { submit, listener } = rig.begin();
    expect(submit.creditTokens).toBe(16);
    listener.onDelta(SequenceDelta.fromPartial({ index: 0, tokenIds: fives(4) }));
    await turn();
    listener.onDelta(SequenceDelta.fromPartial({ index: 4, tokenIds: fives(12) }));
    const parked = { kind: FinishKind.PARKED, parkReason: ParkReason.NO_CREDIT, draftedTokens: 7 };
    listener.onDelta(delta(16, '', parked));
    expect([rig.relay.isParked, rig.relay.place, rig.lost]).toEqual([true, undefined, []]);
    take.shift()?.();
    await turn();
    expect([rig.relay.isParked, rig.parking], '12 are left').toEqual([true, ['unparked', 'parked']]);
    take.shift()?.();
    await turn();
    expect([rig.relay.isParked, rig.parking]).toEqual([false, ['unparked', 'parked', 'unparked']]);
    const again = rig.begin();
    expect(again.submit).toMatchObject({ resumedTokens: 16, creditTokens: 32, epoch: 2 });
    expect(again.submit.tokenIds).toEqual([1, 2, ...fives(16)]);
    listener.onDelta(SequenceDelta.fromPartial({ index: 16, tokenIds: [9] }));
    again.listener.onDelta(delta(16, '', { kind: FinishKind.LENGTH, draftedTokens: 3 }));
    await turn();
    take.shift()?.();
    await delivering;
    expect(rig.ends).toMatchObject([
      { finish: { usage: { completionTokens: 16 }, speculation: { draftedTokens: 10 } } },
    ]);
  });

  it('continues at once if its client caught up during parking, and parks when lost while behind', async () => {
    const rig = new Rig();
    const delivering = rig.deliver();
    await turn();
    rig.begin().listener.onDelta(delta(0, '', { kind: FinishKind.PARKED }));
    expect([rig.relay.isParked, rig.parking.slice(1)]).toEqual([false, ['parked', 'unparked']]);
    rig.relay.fail(new ClusterError('canceled', 'enough'));
    await expect(delivering).rejects.toMatchObject({ code: 'canceled' });

    const behind = new Rig();
    const { listener } = behind.begin();
    listener.onDelta(SequenceDelta.fromPartial({ index: 0, tokenIds: fives(17) }));
    listener.onLost(new ClusterError('unavailable', 'gone'), true);
    expect([behind.relay.isParked, behind.lost.length]).toEqual([true, 1]);
  });

  it('ends with a status that names the setting when the client leaves a message unread for too long', async () => {
    const never = new Promise<void>(() => undefined);
    const stalled = new Rig([], 20);
    const delivering = stalled.relay.deliver(started, () => never);
    await expect(delivering).rejects.toMatchObject({
      code: 'deadline_exceeded',
      message: 'the client read nothing for 20 ms (MIMO_GATEWAY_CLIENT_STALL)',
    });
    expect([stalled.ends.length, stalled.parking]).toEqual([1, ['stalled']]);
  });

  it('ends once, however often it is ended', () => {
    const rig = new Rig();
    const { listener } = rig.begin();
    rig.relay.fail(new ClusterError('canceled', 'left'));
    rig.relay.fail(new ClusterError('deadline_exceeded', 'late'));
    listener.onDelta(delta(0, 'x', { kind: FinishKind.LENGTH }));
    listener.onLost(new ClusterError('unavailable', 'gone'), true);
    expect(rig.ends).toMatchObject([{ kind: 'error', error: { code: 'canceled' } }]);
    expect(rig.attempts[0]?.aborts).toBe(1);
  });

  it('writes the same tokens as an undisturbed run, however often it is moved', async () => {
    const loss = fc.record({
      afterTokens: fc.nat(40),
      how: fc.constantFrom('broken', 'handed over', 'refused', 'not greeted'),
      /** Tokens in one frame. */
      stride: fc.integer({ min: 1, max: 3 }),
    });
    await fc.assert(
      fc.asyncProperty(
        fc.array(loss, { maxLength: 8 }),
        fc.integer({ min: 1, max: 120 }),
        fc.boolean(),
        async (losses, maxTokens, slow) => {
          const rig = new Rig();
          const delivering = rig.deliverTo(async (event) => {
            if (slow) {
              await turn();
            }
            rig.events.push(event);
          });
          const run = async (stride: number, tokens: number): Promise<boolean> => {
            const { submit, listener } = rig.begin();
            const all = [...submit.tokenIds];
            let index = submit.resumedTokens;
            expect(index).toBe(all.length - rig.relay.record.promptTokenIds.length);
            for (let sent = 0; sent < tokens && index < maxTokens;) {
              const tokenIds: number[] = [];
              while (tokenIds.length < stride && index + tokenIds.length < maxTokens) {
                const next = nextOf([...all]);
                all.push(next);
                tokenIds.push(next);
              }
              listener.onDelta(SequenceDelta.fromPartial({ index, tokenIds }));
              index += tokenIds.length;
              sent += tokenIds.length;
              await turn();
            }
            if (index >= maxTokens) {
              listener.onDelta(delta(index, '', { kind: FinishKind.LENGTH }));
            }
            return index >= maxTokens;
          };
          let ended = false;
          for (const { how, afterTokens, stride } of losses) {
            if (!ended && rig.ends.length === 0) {
              ended = await run(stride, how === 'refused' || how === 'not greeted' ? 0 : 8 + afterTokens);
              const last = rig.attempts.at(-1);
              if (how === 'handed over' || how === 'refused') {
                last?.listener.onDelta(delta(rig.relay.completionTokens, '', handedOver));
              } else {
                last?.listener.onLost(new ClusterError('unavailable', 'gone'), how === 'broken');
              }
            }
          }
          if (!ended) {
            await run(1, Number.POSITIVE_INFINITY);
          }
          await delivering;
          const undisturbed = [...rig.relay.record.promptTokenIds];
          while (undisturbed.length < 2 + maxTokens) {
            undisturbed.push(nextOf(undisturbed));
          }
          const deltas = rig.events.flatMap((event) => (event.$case === 'delta' ? [event.value] : []));
          const written = deltas.flatMap(({ tokenIds }) => tokenIds);
          const text = deltas.map((each) => each.text).join('');
          let next = 0;
          for (const { index, tokenIds } of deltas) {
            expect(index).toBe(next);
            next += tokenIds.length;
          }
          expect(written).toEqual(undisturbed.slice(2));
          expect(text).toBe(tokenizer.decode(written));
          expect(rig.ends.map(({ kind }) => kind)).toEqual(['finish']);
          expect(rig.attempts.map(({ epoch }) => epoch)).toEqual(rig.attempts.map((_, index) => index + 1));
        },
      ),
      { numRuns: 60 },
    );
  });
});
