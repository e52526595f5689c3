import { Company } from '@mimo/proto/queue';
import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import {
  abandonAfterMs,
  planAbandoned,
  planAssignments,
  type OpenGroup,
  type Placement,
  type TrialRequest,
  type WaitingRequest,
} from './placement.ts';

const now = 1_000_000;

function waiting(requestId: string, more: Partial<TrialRequest> = {}): TrialRequest {
  return {
    requestId,
    expiredMs: Number.POSITIVE_INFINITY,
    notBeforeMs: 0,
    identity: '',
    company: Company.UNSPECIFIED,
    breaks: 0,
    ...more,
  };
}

function group(name: string, slots: number, usedSlots = 0, more: Partial<OpenGroup> = {}): OpenGroup {
  const company = usedSlots === 0 ? Company.NONE : Company.UNSPECIFIED;
  return { group: name, identity: 'i', slots, usedSlots, notBeforeMs: 0, company, ...more };
}

/** A dispatcher's view: requests on trial are also listed separately. */
function plan(requests: readonly TrialRequest[], groups: readonly OpenGroup[]): Placement[] {
  const onTrial = requests.filter(({ company }) => company !== Company.UNSPECIFIED);
  return planAssignments({ onTrial, waiting: requests, groups }, now);
}

function places(requests: readonly TrialRequest[], groups: readonly OpenGroup[]): string[] {
  return plan(requests, groups).map(({ requestId, group: target }) => `${requestId}>${target}`);
}

const fits = (request: WaitingRequest, { identity }: OpenGroup): boolean =>
  request.identity === '' || request.identity === identity;

const isDue = ({ expiredMs, notBeforeMs }: WaitingRequest): boolean => notBeforeMs <= now && expiredMs > now;

/** The violated invariants of the requests placed in one group. */
function problemsOf(
  target: OpenGroup,
  given: readonly Placement[],
  members: readonly WaitingRequest[],
): string[] {
  const free = target.notBeforeMs > now ? 0 : Math.max(0, target.slots - target.usedSlots);
  const tried = members.find(({ company }) => company !== Company.UNSPECIFIED);
  const isKept =
    tried === undefined ||
    (members.length === 1 && target.company >= tried.company && given[0]?.company === target.company);
  return [
    ...(given.length > free ? ['more than its free slots'] : []),
    ...(members.every((request) => fits(request, target)) ? [] : ['one of another identity']),
    ...(isKept ? [] : ['other company than one on trial needs']),
  ];
}

describe('planAssignments', () => {
  it('places requests in order of arrival', () => {
    const requests = [waiting('a'), waiting('b'), waiting('c')];
    expect(places(requests, [group('g', 2)])).toEqual(['a>g', 'b>g']);
  });

  it('chooses the group with the smallest share of its slots in use, and of equals the first by name', () => {
    const requests = [1, 2, 3, 4].map((number) => waiting(`r${number}`));
    // Shares of large: 2/8, 3/8, then 4/8, equal to small, which comes after it by name.
    expect(places(requests, [group('small', 2, 1), group('large', 8, 2)])).toEqual([
      'r1>large',
      'r2>large',
      'r3>large',
      'r4>small',
    ]);
    expect(places([waiting('r')], [group('b', 4), group('a', 4)])).toEqual(['r>a']);
  });

  it('leaves requests waiting while no group has a free slot', () => {
    expect(places([waiting('a')], [])).toEqual([]);
    expect(places([waiting('a')], [group('g', 4, 4)])).toEqual([]);
    expect(places([waiting('a')], [group('g', 0)])).toEqual([]);
  });

  it('skips a group after a failed attempt, and a request whose gateway did not answer', () => {
    expect(places([waiting('a')], [group('a', 4, 0, { notBeforeMs: now + 1 }), group('b', 4, 3)])).toEqual([
      'a>b',
    ]);
    const silent = waiting('a', { notBeforeMs: now + 1 });
    expect(places([silent, waiting('b')], [group('g', 1)])).toEqual(['b>g']);
  });

  it('does not place a request whose deadline has passed', () => {
    const late = waiting('late', { expiredMs: now });
    expect(places([late, waiting('in time', { expiredMs: now + 1 })], [group('g', 9)])).toEqual([
      'in time>g',
    ]);
  });

  it('stops reading the queue when no slot is free', () => {
    let read = 0;
    function* endless(): Generator<WaitingRequest> {
      for (; ; read += 1) {
        yield waiting(`r${read}`);
      }
    }
    const free = [group('a', 2), group('b', 3)];
    expect(planAssignments({ onTrial: [], waiting: endless(), groups: free }, now)).toHaveLength(5);
    expect(read).toBe(4);
    expect(planAssignments({ onTrial: [], waiting: endless(), groups: [group('a', 2, 2)] }, now)).toEqual([]);
    expect(read).toBe(4);
  });

  it('places a request only in groups of its identity, past earlier requests that wait for another identity', () => {
    const groups = [group('a', 1, 0, { identity: 'x' }), group('b', 2, 1, { identity: 'y' })];
    const requests = [
      waiting('none', { identity: 'z' }),
      waiting('first', { identity: 'y' }),
      waiting('second', { identity: 'y' }),
      waiting('any'),
    ];
    expect(places(requests, groups)).toEqual(['first>b', 'any>a']);
  });

  it('places a request on trial first, in a group with suitable company, and closes the group', () => {
    const alone = waiting('alone', { company: Company.NONE });
    const tried = waiting('tried', { company: Company.PROVEN });
    const groups = [
      group('busy', 8, 1),
      group('proven', 8, 2, { company: Company.PROVEN }),
      group('empty', 8, 0),
    ];
    expect(plan([waiting('a'), alone, tried], groups)).toEqual([
      { requestId: 'alone', group: 'empty', company: Company.NONE, breaks: 0 },
      { requestId: 'tried', group: 'proven', company: Company.PROVEN, breaks: 0 },
      { requestId: 'a', group: 'busy', company: Company.UNSPECIFIED, breaks: 0 },
    ]);
    // The company of an empty group is better than it needs, and the placement promises that.
    expect(plan([tried], [group('empty', 8, 0)])).toMatchObject([{ company: Company.NONE }]);
  });

  it('tries the requests with the most breaks first', () => {
    const requests = [3, 5, 4].map((breaks) => waiting(`r${breaks}`, { company: Company.NONE, breaks }));
    expect(places(requests, [group('a', 8), group('b', 8)])).toEqual(['r5>a', 'r4>b']);
  });

  it('clears the group with the fewest requests when no group has suitable company for a trial', () => {
    const alone = waiting('alone', { company: Company.NONE });
    expect(places([alone, waiting('a')], [group('g', 8, 3), group('h', 8, 4)])).toEqual(['a>h']);
    expect(places([alone, waiting('a')], [group('g', 8, 3)])).toEqual([]);
    // The group may be full, or closed because another request is tried there.
    expect(places([alone, waiting('a')], [group('g', 4, 4), group('h', 8, 5)])).toEqual(['a>h']);
    expect(places([alone, waiting('a')], [group('g', 0, 1), group('h', 8, 5)])).toEqual(['a>h']);
    // One group is cleared for all requests of an identity.
    const other = waiting('other', { company: Company.PROVEN });
    expect(places([alone, other, waiting('a')], [group('g', 8, 3), group('h', 8, 4)])).toEqual(['a>h']);
    // A group that has just started will soon be known to be empty.
    const unsure = group('g', 8, 0, { company: Company.UNSPECIFIED });
    expect(places([alone, waiting('a')], [unsure])).toEqual([]);
    const late = waiting('late', { company: Company.NONE, expiredMs: now });
    expect(places([late, waiting('a')], [unsure])).toEqual(['a>g']);
  });

  const companies = fc.constantFrom(Company.UNSPECIFIED, Company.PROVEN, Company.NONE);
  const requests = fc.uniqueArray(
    fc.record({
      requestId: fc.uuid(),
      expiredMs: fc.constantFrom(now - 100_000, now, now + 1, Number.POSITIVE_INFINITY),
      notBeforeMs: fc.constantFrom(0, now, now + 1),
      identity: fc.constantFrom('', 'x', 'y'),
      company: fc.oneof({ weight: 4, arbitrary: fc.constant(Company.UNSPECIFIED) }, companies),
      breaks: fc.nat(6),
    }),
    { selector: ({ requestId }) => requestId, maxLength: 40 },
  );
  const groups = fc.uniqueArray(
    fc.record({
      group: fc.string({ minLength: 1, maxLength: 3 }),
      identity: fc.constantFrom('x', 'y', 'z'),
      slots: fc.nat(8),
      usedSlots: fc.nat(10),
      notBeforeMs: fc.constantFrom(0, now + 1),
      company: companies,
    }),
    { selector: ({ group: name }) => name, maxLength: 6 },
  );
  it('keeps its invariants for any state', () => {
    fc.assert(
      fc.property(requests, groups, (held, open) => {
        const placements = plan(held, open);
        const byId = new Map(held.map((each) => [each.requestId, each]));
        expect(new Set(placements.map(({ requestId }) => requestId)).size).toBe(placements.length);
        for (const each of open) {
          const given = placements.filter(({ group: name }) => name === each.group);
          const members = given.map(({ requestId }) => byId.get(requestId)!);
          expect(problemsOf(each, given, members)).toEqual([]);
        }
        // No overtaking: of one identity, each placed request came before every placeable request that was not placed.
        const ordinary = held.filter((request) => isDue(request) && request.company === Company.UNSPECIFIED);
        const placed = new Set(placements.map(({ requestId }) => requestId));
        for (const identity of ['', 'x', 'y']) {
          const order = ordinary.filter((request) => request.identity === identity);
          const count = order.filter(({ requestId }) => placed.has(requestId)).length;
          expect(order.slice(0, count).every(({ requestId }) => placed.has(requestId))).toBe(true);
        }
        // Without trials, the plan uses every free slot that it can.
        const isOrdinary = held.every(
          (request) => !isDue(request) || request.company === Company.UNSPECIFIED,
        );
        const idle = open.filter((each) => {
          const given = placements.filter(({ group: name }) => name === each.group).length;
          const isFull = each.notBeforeMs > now || each.usedSlots + given >= each.slots;
          return !isFull && ordinary.some((request) => fits(request, each) && !placed.has(request.requestId));
        });
        expect(isOrdinary ? idle : []).toEqual([]);
      }),
    );
  });

  it('plans nothing after its plan is carried out', () => {
    fc.assert(
      fc.property(requests, groups, (held, open) => {
        const first = plan(held, open);
        const done = new Map(first.map((placement) => [placement.requestId, placement]));
        const next = plan(
          held.filter(({ requestId }) => !done.has(requestId)),
          open.map((each) => {
            const given = first.filter(({ group: name }) => name === each.group);
            const isClosed = given.some(({ company }) => company !== Company.UNSPECIFIED);
            return {
              ...each,
              usedSlots: each.usedSlots + given.length,
              slots: isClosed ? 0 : each.slots,
              company: given.length > 0 ? Company.UNSPECIFIED : each.company,
            };
          }),
        );
        expect(next.filter(({ company }) => company !== Company.UNSPECIFIED)).toEqual([]);
      }),
    );
  });
});

describe('planAbandoned', () => {
  it('gives a gateway time to end its own request', () => {
    const held = [
      waiting('endless'),
      waiting('just', { expiredMs: now - abandonAfterMs + 1 }),
      waiting('long', { expiredMs: now - abandonAfterMs }),
    ];
    expect(planAbandoned(held, now)).toEqual(['long']);
  });
});
