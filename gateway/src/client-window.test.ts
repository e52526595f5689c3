import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { ClientWindow } from './client-window.ts';

describe('ClientWindow', () => {
  it('begins small, and grows with each token that the client reads, up to a limit', () => {
    const window = new ClientWindow();
    expect(window.openTokens).toBe(16);
    window.add(16);
    expect(window.openTokens).toBe(0);
    window.take(16);
    expect(window.openTokens).toBe(32);
    window.add(1_000);
    window.take(1_000);
    expect(window.openTokens).toBe(256);
  });

  it('is behind while more than half of the window is unread', () => {
    const window = new ClientWindow();
    window.add(8);
    expect(window.isBehind).toBe(false);
    window.add(1);
    expect(window.isBehind).toBe(true);
    window.take(1);
    expect(window.isBehind).toBe(false);
  });

  it('never grants more than the window, and grants in portions that do not stop a reading client', () => {
    const steps = fc.array(fc.record({ sent: fc.nat(64), taken: fc.nat(64) }), { maxLength: 200 });
    fc.assert(
      fc.property(steps, (all) => {
        const window = new ClientWindow();
        let coming = window.openTokens;
        let unread = 0;
        for (const { sent, taken } of all) {
          const tokens = Math.min(sent, coming);
          coming -= tokens;
          unread += tokens;
          window.add(tokens);
          const read = Math.min(taken, unread);
          unread -= read;
          window.take(read);
          const granted = window.grantTo(coming);
          coming += granted;
          expect(unread + coming).toBeLessThanOrEqual(256);
          expect(granted).toBeGreaterThanOrEqual(0);
        }
        // A client that reads everything can always get more.
        window.take(unread);
        coming += window.grantTo(coming);
        expect(coming).toBeGreaterThan(0);
      }),
    );
  });
});
