import { GroupState, Heartbeat } from '@mimo/proto/worker';
import { describe, expect, it } from 'vitest';

import { Groups, heartbeatGoneMs, heartbeatQuietMs } from './groups.ts';

function beat(group: string, sequenceNumber: number, more: Partial<Heartbeat> = {}): Heartbeat {
  const life = { incarnation: 'one', state: GroupState.READY, model: 'm' };
  return Heartbeat.fromPartial({ ...life, group, sequenceNumber, ...more });
}

describe('Groups', () => {
  it('keeps the latest heartbeat of each group of a model', () => {
    const groups = new Groups();
    groups.observe(beat('a', 2, { runningSequences: 2 }), 0);
    groups.observe(beat('a', 1, { runningSequences: 1 }), 1);
    groups.observe(beat('b', 1, { model: 'other' }), 1);
    expect(groups.alive('m', 2)).toMatchObject([{ group: 'a', runningSequences: 2 }]);
    expect(groups.alive('other', 2)).toMatchObject([{ group: 'b' }]);
  });

  it('accepts a new incarnation of a group, whose sequence numbers start again', () => {
    const groups = new Groups();
    groups.observe(beat('a', 90), 0);
    groups.observe(beat('a', 1, { incarnation: 'two' }), 1);
    expect(groups.alive('m', 2)).toMatchObject([{ incarnation: 'two' }]);
  });

  it('forgets a silent group after a while, and a failed one at once', () => {
    const groups = new Groups();
    groups.observe(beat('a', 1), 0);
    groups.observe(beat('b', 1), 500);
    expect(groups.alive('m', heartbeatGoneMs)).toHaveLength(2);
    expect(groups.alive('m', heartbeatGoneMs + 1)).toMatchObject([{ group: 'b' }]);
    groups.observe(beat('b', 2, { state: GroupState.FAILED }), 600);
    expect(groups.alive('m', 601)).toEqual([]);
  });

  it('does not report a group as ready after three missing heartbeats, until the next one', () => {
    const groups = new Groups();
    groups.observe(beat('a', 1), 0);
    expect(groups.ready('m', heartbeatQuietMs)).toHaveLength(1);
    expect(groups.ready('m', heartbeatQuietMs + 1)).toEqual([]);
    expect(groups.alive('m', heartbeatQuietMs + 1)).toHaveLength(1);
    groups.observe(beat('a', 2), heartbeatQuietMs + 2);
    expect(groups.ready('m', heartbeatQuietMs + 2)).toHaveLength(1);
  });

  it('reports as ready only groups that accept requests', () => {
    const groups = new Groups();
    groups.observe(beat('a', 1, { state: GroupState.DRAINING }), 0);
    groups.observe(beat('b', 1), 0);
    expect(groups.ready('m', 1)).toMatchObject([{ group: 'b' }]);
  });
});
