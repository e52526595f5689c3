import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { Allowance, PeerAllowances, peerOf } from './peers.ts';

describe('Allowance', () => {
  it('grants its burst at once, and its rate from then on', () => {
    const allowance = new Allowance({ burst: 3, perSecond: 2 }, 0);
    expect([0, 0, 0, 0, 400, 500, 900, 1_000].map((nowMs) => allowance.take(nowMs))).toEqual([
      true,
      true,
      true,
      false,
      false,
      true,
      false,
      true,
    ]);
  });

  it('never grants more than burst and rate, at any times', () => {
    fc.assert(
      fc.property(fc.array(fc.nat(5_000), { maxLength: 200 }), (waits) => {
        const allowance = new Allowance({ burst: 10, perSecond: 5 }, 0);
        let nowMs = 0;
        let given = 0;
        for (const wait of waits) {
          nowMs += wait;
          given += allowance.take(nowMs) ? 1 : 0;
        }
        expect(given).toBeLessThanOrEqual(10 + (nowMs / 1_000) * 5 + 1e-6);
      }),
    );
  });
});

describe('PeerAllowances', () => {
  it('keeps an allowance per peer, and forgets the peers that were silent for longest', () => {
    const peers = new PeerAllowances({ burst: 1, perSecond: 0 }, 2);
    expect(peers.take('a', 0)).toBe(true);
    expect(peers.take('b', 0)).toBe(true);
    expect(peers.take('a', 0)).toBe(false);
    expect(peers.take('c', 0)).toBe(true);
    expect(peers.take('a', 0)).toBe(false);
    expect(peers.size).toBe(2);
    expect(peers.take('b', 0)).toBe(true);
  });
});

describe('peerOf', () => {
  it.each([
    ['10.1.2.3', '10.1.2.3'],
    ['::ffff:10.1.2.3', '10.1.2.3'],
    ['2001:db8:1:2:3:4:5:6', '2001:db8:1:2::/64'],
    ['2001:db8:1:2::6', '2001:db8:1:2::/64'],
    ['2001:db8::1', '2001:db8:0:0::/64'],
    ['fe80::1%eth0', 'fe80:0:0:0::/64'],
    ['::1', '0:0:0:0::/64'],
    [undefined, 'unknown'],
  ])('of %s is %s', (address, peer) => {
    expect(peerOf(address)).toBe(peer);
  });
});
