import type { StreamInfo } from '@nats-io/jetstream';
import { describe, expect, it } from 'vitest';

import { Room } from './room.ts';

function infoOf(bytes: number, messages: number, limits = { max_bytes: 1_000, max_msgs: 100 }): StreamInfo {
  return { state: { bytes, messages }, config: limits } as StreamInfo;
}

describe('Room', () => {
  it('refuses from nine tenths of a limit, naming both figures', () => {
    const room = new Room({ maxBytes: 1_000, maxRecords: 100 });
    room.look()(infoOf(800, 0));
    room.assertFor(100);
    expect(() => room.assertFor(101)).toThrow('the queue is full: it holds 800 bytes of 1000');
    room.look()(infoOf(0, 90));
    expect(() => room.assertFor(1)).toThrow('the queue is full: it holds 90 requests of 100');
  });

  it('counts records in flight until they are taken back or a later look has seen them', () => {
    const room = new Room({ maxBytes: 1_000, maxRecords: 100 });
    const takeBack = room.add(500);
    expect(() => room.assertFor(401)).toThrow('500 bytes');
    takeBack();
    room.add(300);
    const seen = room.look();
    room.add(200);
    seen(infoOf(300, 1));
    expect(() => room.assertFor(401)).toThrow('500 bytes');
    room.assertFor(400);
  });

  it('uses the limits of the stream; a limit that is not positive means unlimited', () => {
    const room = new Room({ maxBytes: 10, maxRecords: 1 });
    room.look()(infoOf(500, 50, { max_bytes: -1, max_msgs: -1 }));
    room.assertFor(1_000_000);
    expect(() => new Room().assertFor(1_000_000)).not.toThrow();
  });
});
