import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import {
  abandonAfterMs,
  planAbandoned,
  planAssignments,
  type OpenGroup,
  type WaitingRequest,
} from './placement.ts';

const now = 1_000_000;

function waiting(requestId: string, more: Partial<WaitingRequest> = {}): WaitingRequest {
  return { requestId, expiredMs: Number.POSITIVE_INFINITY, notBeforeMs: 0, ...more };
}

function group(name: string, slots: number, usedSlots = 0, notBeforeMs = 0): OpenGroup {
  return { group: name, slots, usedSlots, notBeforeMs };
}

function places(requests: readonly WaitingRequest[], groups: readonly OpenGroup[]): string[] {
  return planAssignments({ waiting: requests, groups }, now).map(
    ({ requestId, group: target }) => `${requestId}>${target}`,
  );
}

describe('planAssignments', () => {
  it('takes requests in order of arrival', () => {
    const requests = [waiting('a'), waiting('b'), waiting('c')];
    expect(places(requests, [group('g', 2)])).toEqual(['a>g', 'b>g']);
  });

  it('takes the group with the smallest share of its slots in use, of equals the first by name', () => {
    const requests = [1, 2, 3, 4].map((number) => waiting(`r${number}`));
    // Shares of large: 2/8, 3/8, then 4/8 as small has, which is behind it by name.
    expect(places(requests, [group('small', 2, 1), group('large', 8, 2)])).toEqual([
      'r1>large',
      'r2>large',
      'r3>large',
      'r4>small',
    ]);
    expect(places([waiting('r')], [group('b', 4), group('a', 4)])).toEqual(['r>a']);
  });

  it('leaves waiting what no group has a slot for', () => {
    expect(places([waiting('a')], [])).toEqual([]);
    expect(places([waiting('a')], [group('g', 4, 4)])).toEqual([]);
    expect(places([waiting('a')], [group('g', 0)])).toEqual([]);
  });

  it('passes over a group that is not trusted yet, and a request whose gateway did not answer', () => {
    expect(places([waiting('a')], [group('a', 4, 0, now + 1), group('b', 4, 3)])).toEqual(['a>b']);
    const silent = waiting('a', { notBeforeMs: now + 1 });
    expect(places([silent, waiting('b')], [group('g', 1)])).toEqual(['b>g']);
  });

  it('gives no group a request whose deadline has passed', () => {
    const late = waiting('late', { expiredMs: now });
    expect(places([late, waiting('in time', { expiredMs: now + 1 })], [group('g', 9)])).toEqual([
      'in time>g',
    ]);
  });

  it('reads no further than there are free slots', () => {
    let read = 0;
    function* endless(): Generator<WaitingRequest> {
      for (; ; read += 1) {
        yield waiting(`r${read}`);
      }
    }
    expect(planAssignments({ waiting: endless(), groups: [group('a', 2), group('b', 3)] }, now)).toHaveLength(
      5,
    );
    expect(read).toBe(4);
    expect(planAssignments({ waiting: endless(), groups: [group('a', 2, 2)] }, now)).toEqual([]);
    expect(read).toBe(4);
  });

  const requests = fc.uniqueArray(
    fc.record({
      requestId: fc.uuid(),
      expiredMs: fc.constantFrom(now - 100_000, now, now + 1, Number.POSITIVE_INFINITY),
      notBeforeMs: fc.constantFrom(0, now, now + 1),
    }),
    { selector: ({ requestId }) => requestId, maxLength: 40 },
  );
  const groups = fc.uniqueArray(
    fc.record({
      group: fc.string({ minLength: 1, maxLength: 3 }),
      slots: fc.nat(8),
      usedSlots: fc.nat(10),
      notBeforeMs: fc.constantFrom(0, now + 1),
    }),
    { selector: ({ group: name }) => name, maxLength: 6 },
  );

  it('keeps its invariants for any state', () => {
    fc.assert(
      fc.property(requests, groups, (held, open) => {
        const assignments = planAssignments({ waiting: held, groups: open }, now);
        const placed = assignments.map(({ requestId }) => requestId);
        for (const { group: name, slots, usedSlots, notBeforeMs } of open) {
          const given = assignments.filter((assignment) => assignment.group === name).length;
          expect(given).toBeLessThanOrEqual(notBeforeMs > now ? 0 : Math.max(0, slots - usedSlots));
        }
        // Nobody overtakes: what may be placed and is not came after all that was placed.
        const mayBePlaced = held.filter(
          ({ expiredMs, notBeforeMs }) => notBeforeMs <= now && expiredMs > now,
        );
        const order = mayBePlaced.map(({ requestId }) => requestId);
        expect(placed).toEqual(order.slice(0, placed.length));
        // Nothing is left undone: either all are placed, or every slot is used.
        const free = open
          .filter(({ notBeforeMs }) => notBeforeMs <= now)
          .reduce((sum, { slots, usedSlots }) => sum + Math.max(0, slots - usedSlots), 0);
        expect(placed).toHaveLength(Math.min(order.length, free));
      }),
    );
  });

  it('has nothing to do after its plan is carried out', () => {
    fc.assert(
      fc.property(requests, groups, (held, open) => {
        const plan = planAssignments({ waiting: held, groups: open }, now);
        const done = new Set(plan.map(({ requestId }) => requestId));
        const next = planAssignments(
          {
            waiting: held.filter(({ requestId }) => !done.has(requestId)),
            groups: open.map((each) => ({
              ...each,
              usedSlots: each.usedSlots + plan.filter((assignment) => assignment.group === each.group).length,
            })),
          },
          now,
        );
        expect(next).toEqual([]);
      }),
    );
  });
});

describe('planAbandoned', () => {
  it('gives a gateway its chance to end its own request', () => {
    const held = [
      waiting('endless'),
      waiting('just', { expiredMs: now - abandonAfterMs + 1 }),
      waiting('long', { expiredMs: now - abandonAfterMs }),
    ];
    expect(planAbandoned(held, now)).toEqual(['long']);
  });
});
