import { expect, it } from 'vitest';

import { lostAfterLooks, PeerWatch } from './keepalive.ts';

it.each(['server', 'client'] as const)(
  'reports a %s as lost at the last of many silent checks, and as heard at the first byte',
  (peer) => {
    const watch = new PeerWatch(100, peer);
    const looks = Array.from({ length: lostAfterLooks[peer] }, () => watch.look(100));
    expect(looks).toEqual([...Array<string>(lostAfterLooks[peer] - 1).fill('silent'), 'lost']);
    const other = new PeerWatch(100, peer);
    expect([other.look(100), other.look(101)]).toEqual(['silent', 'heard']);
  },
);
