import { describe, expect, it } from 'vitest';

import { assertPlace, mayUse, type Places } from './permit.ts';

/** A table that holds `requests`; `stalled` of them can give way. */
function tableOf(requests: number, stalled = 0): Places & { readonly ended: number } {
  let ended = 0;
  return {
    counts: () => ({ requests: requests - ended }),
    makeRoom: () => {
      const gives = ended < stalled;
      ended += gives ? 1 : 0;
      return gives;
    },
    get ended() {
      return ended;
    },
  };
}

const rules = { maxRequests: 2, stopping: new AbortController().signal };

describe('assertPlace', () => {
  it('accepts a request below the limit without ending another', () => {
    const table = tableOf(1, 1);
    assertPlace(table, rules);
    expect(table.ended).toBe(0);
  });

  it('ends a request whose client reads nothing when the gateway is full', () => {
    const table = tableOf(2, 1);
    assertPlace(table, rules);
    expect(table.ended).toBe(1);
  });

  it('refuses with count and limit when the gateway is full and every client reads', () => {
    expect(() => assertPlace(tableOf(2), rules)).toThrow(
      expect.objectContaining({
        code: 'resource_exhausted',
        message: 'this gateway holds 2 requests; the limit is 2',
        detail: { retryAfterMs: 1_000 },
      }),
    );
  });

  it('refuses while the gateway stops, without ending another request', () => {
    const table = tableOf(2, 1);
    expect(() => assertPlace(table, { ...rules, stopping: AbortSignal.abort() })).toThrow(
      expect.objectContaining({ code: 'unavailable' }),
    );
    expect(table.ended).toBe(0);
  });
});

describe('mayUse', () => {
  it('allows a caller its listed models, or every model without a list', () => {
    const some = { tenant: 't', models: new Set(['m']) };
    const all = { tenant: 't', models: undefined };
    expect([mayUse(some, 'm'), mayUse(some, 'n'), mayUse(all, 'n')]).toEqual([true, false, true]);
  });
});
