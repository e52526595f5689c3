import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { decodeStepPlan, encodeStepPlan, type PassPlan, type StepPlan } from './step-plan.ts';

const spans = fc.record({
  slot: fc.nat(100),
  start: fc.nat(40_000),
  rows: fc.nat(5),
  headRows: fc.nat(5),
  hiddenRow: fc.nat(200),
  capacityTokens: fc.nat(40_000),
});

const passes = fc
  .tuple(
    fc.constantFrom('forward' as const, 'draft' as const),
    fc.infiniteStream(fc.constantFrom('logits' as const, 'best' as const)),
    fc.array(fc.nat(100), { maxLength: 5 }),
    fc.array(spans, { maxLength: 6 }),
  )
  .map(([kind, wanted, releasedSlots, allSpans]): PassPlan => {
    const headRows = allSpans.reduce((sum, span) => sum + span.headRows, 0);
    const heads = [...wanted.take(headRows)].map((each) => ({ kind: each }));
    const rows = allSpans.reduce((sum, span) => sum + span.rows, 0);
    const tokenIds = Int32Array.from({ length: rows }, (_, i) => i * 31);
    return { kind, heads, releasedSlots, spans: allSpans, tokenIds };
  });

describe('step plans', () => {
  it('survive encoding and decoding unchanged', () => {
    const others: StepPlan[] = [
      { kind: 'ping' },
      { kind: 'stop' },
      ...[[], [3, -1, 0x7fffffff]].map((words): StepPlan => ({
        kind: 'configure',
        kvBlocks: 7,
        maxRows: 128,
        maxHeadRows: 32,
        usableVocab: 151_669,
        deviceGroupId: Int32Array.from(words),
      })),
    ];
    others.forEach((plan) => expect(decodeStepPlan(encodeStepPlan(plan))).toEqual(plan));
    fc.assert(
      fc.property(passes, (plan) => {
        expect(decodeStepPlan(encodeStepPlan(plan))).toEqual(plan);
      }),
    );
  });

  it('are rejected when truncated, lengthened or of an unknown kind', () => {
    fc.assert(
      fc.property(passes, fc.nat(60), (plan, cut) => {
        const frame = encodeStepPlan(plan);
        const wrong = cut < frame.length ? frame.slice(0, cut) : Int32Array.of(...frame, 1);
        expect(() => decodeStepPlan(wrong)).toThrow(/step plan: /);
      }),
    );
    expect(() => decodeStepPlan(Int32Array.of(9))).toThrow('step plan: unknown kind 9');
  });
});
