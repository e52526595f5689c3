import { expect, it } from 'vitest';

import { lostAfterLooks, PeerWatch } from './keepalive.ts';

it('calls a peer lost at the last of many silent looks, and heard at the first byte', () => {
  const watch = new PeerWatch(100);
  const looks = Array.from({ length: lostAfterLooks }, () => watch.look(100));
  expect(looks).toEqual([...Array<string>(lostAfterLooks - 1).fill('silent'), 'lost']);
  const other = new PeerWatch(100);
  expect([other.look(100), other.look(101)]).toEqual(['silent', 'heard']);
});
