// Random lives of sequences: begins, cancels, frames, leaving readers and the loss of the group in any order.

import assert from 'node:assert/strict';

import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { ClusterError } from '@mimo/core/process/errors';
import { SamplingParams } from '@mimo/proto/sampling';
import { Submit, type SequenceDelta as WireDelta } from '@mimo/proto/worker';

import {
  idleStats,
  lastDelta,
  type SequenceDelta,
  type SequenceEnd,
  type SequenceRequest,
} from './engines/mimo/engine-api.ts';
import { LiveSequences, type SequenceReader } from './sequences.ts';

const sampling = SamplingParams.fromPartial({
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

/** Holds each submitted sequence until it ends; rejects every seventh. */
class PretendEngine {
  readonly held = new Map<number, { index: number; aborted: boolean }>();

  submit({ sequenceId, resumedTokens }: SequenceRequest): void {
    if (sequenceId % 7 === 0) {
      throw new ClusterError('unavailable', 'refused');
    }
    assert.ok(!this.held.has(sequenceId), 'an id is used once');
    this.held.set(sequenceId, { index: resumedTokens, aborted: false });
  }

  abort(sequenceId: number): void {
    const held = this.held.get(sequenceId);
    if (held !== undefined) {
      held.aborted = true;
    }
  }

  addCredit(): void {}

  /** One token for each, or its end: always for aborted sequences, else for every `n`th. */
  step(n: number): SequenceDelta[] {
    return [...this.held].map(([sequenceId, held]) => {
      const ends: readonly SequenceEnd[] = [{ kind: 'length' }, { kind: 'parked', reason: 'no credit' }];
      const end = held.aborted ? ({ kind: 'aborted' } as const) : ends[sequenceId % 2]!;
      if (held.aborted || sequenceId % n === 0) {
        this.held.delete(sequenceId);
        return lastDelta(sequenceId, held.index, end);
      }
      held.index += 1;
      return { sequenceId, index: held.index - 1, tokenIds: [sequenceId] };
    });
  }
}

/** Checks the deltas of each slot and epoch: indices without a gap, one end, nothing after it. */
class CheckingReader implements SequenceReader {
  /** By slot and epoch, the next index; undefined once ended. */
  readonly begun = new Map<string, number | undefined>();
  readonly ids: number[] = [];
  hasLeft = false;

  deliver(_step: number, { slot, epoch, index, tokenIds, finish }: WireDelta): void {
    const key = `${slot}/${epoch}`;
    assert.ok(!this.hasLeft, 'a reader that left gets nothing');
    assert.equal(this.begun.get(key), index, 'contiguous, and nothing after the end');
    this.begun.set(key, finish === undefined ? index + tokenIds.length : undefined);
  }

  flush(): void {}

  get live(): number {
    return [...this.begun.values()].filter((next) => next !== undefined).length;
  }
}

const action = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({ do: fc.constant('begin' as const), reader: fc.nat(2), slot: fc.nat(3) }),
  },
  {
    weight: 3,
    arbitrary: fc.record({ do: fc.constant('abort' as const), reader: fc.nat(2), slot: fc.nat(3) }),
  },
  {
    weight: 6,
    arbitrary: fc.record({ do: fc.constant('step' as const), n: fc.integer({ min: 2, max: 5 }) }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('leave' as const), reader: fc.nat(2) }) },
  { weight: 1, arbitrary: fc.constant({ do: 'handOver' as const }) },
);

describe('LiveSequences', () => {
  it.each(['finish', 'lose'] as const)(
    'deliver exactly one end of each sequence and keep none when groups %s',
    (last) => {
      const property = fc.property(fc.array(action, { maxLength: 60 }), (actions) => {
        const engine = new PretendEngine();
        const sequences = new LiveSequences(engine, { group: 'g', identity: '' });
        const readers = Array.from({ length: 3 }, () => new CheckingReader());
        const step = (n: number): void =>
          sequences.onFrame({ step: 1, deltas: engine.step(n), stats: idleStats(0) });
        for (const [epoch, act] of actions.entries()) {
          const reader = 'reader' in act ? readers[act.reader]! : undefined;
          if (act.do === 'begin' && sequences.at(reader!, act.slot) === undefined) {
            reader!.begun.set(`${act.slot}/${epoch}`, 2);
            const fields = { slot: act.slot, epoch, tokenIds: [1, 2, 3], resumedTokens: 2, sampling };
            sequences.begin(reader!, Submit.fromPartial({ ...fields, creditTokens: 8 }));
            reader!.ids.push(sequences.at(reader!, act.slot)?.id ?? 0);
          } else if (act.do === 'abort') {
            const sequence = sequences.at(reader!, act.slot);
            if (sequence !== undefined) {
              sequences.abort(sequence, 'gateway');
            }
          } else if (act.do === 'step') {
            step(act.n);
          } else if (act.do === 'leave') {
            sequences.leave(reader!);
            reader!.hasLeft = true;
            const goesOn = reader!.ids.some((id) => engine.held.get(id)?.aborted === false);
            assert.ok(!goesOn, 'what a reader leaves is aborted');
            readers[act.reader] = new CheckingReader();
          } else if (act.do === 'handOver') {
            sequences.handOver();
          }
          expect(sequences.count).toBe(engine.held.size);
          expect(sequences.running()).toHaveLength(engine.held.size);
          const named = readers.flatMap((each) =>
            [0, 1, 2, 3].flatMap((slot) => sequences.at(each, slot) ?? []),
          );
          expect(named.filter(({ id }) => !engine.held.has(id))).toEqual([]);
        }
        if (last === 'finish') {
          sequences.handOver();
          step(2);
        } else {
          sequences.fail(new ClusterError('aborted', 'lost'));
          step(2);
        }
        expect(sequences.count).toBe(0);
        expect(readers.map(({ live }) => live)).toEqual([0, 0, 0]);
      });
      fc.assert(property, { numRuns: 300 });
    },
  );
});
