import { describe, expect, it } from 'vitest';

import { Expectations, type WatchedObject } from './expectations.ts';

const pod = { name: 'a', uid: 'u' };

function watched(resourceVersion: string, fields: object = {}): WatchedObject {
  return { uid: 'u', resourceVersion, deleting: false, ...fields };
}

function settles(write: { readonly resourceVersion: string | undefined }, found: WatchedObject): boolean {
  const expectations = new Expectations();
  expectations.expect({ ...pod, ...write }, 0);
  return expectations.settle(() => found, 1_000);
}

describe('Expectations', () => {
  it.each([
    ['a creation that the watch has not shown', '7', undefined, false],
    ['a change of which the watch shows an earlier state', '12', watched('9'), false],
    ['a change that the watch shows', '12', watched('12'), true],
    ['a change after which there were others', '9', watched('12'), true],
    ['a change of a pod whose name another one has', '12', watched('3', { uid: 'v' }), true],
    ['a deletion that the watch has not shown', undefined, watched('12'), false],
    ['a deletion that has begun', undefined, watched('12', { deleting: true }), true],
    ['a deletion that is done', undefined, undefined, true],
    ['a deletion after which the name was given again', undefined, watched('12', { uid: 'v' }), true],
  ] as const)('judges %s', (_what, resourceVersion, found, settled) => {
    expect(settles({ resourceVersion }, found)).toBe(settled);
  });

  it('waits for all writes, but only for a limited time', () => {
    const expectations = new Expectations();
    expectations.expect({ ...pod, resourceVersion: '5' }, 0);
    expectations.expect({ name: 'b', uid: 'w', resourceVersion: '6' }, 0);
    expect(expectations.settle((name) => (name === 'a' ? watched('5') : undefined), 14_999)).toBe(false);
    expect(expectations.settle(() => undefined, 15_000)).toBe(true);
  });
});
