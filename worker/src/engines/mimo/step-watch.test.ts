import { describe, expect, it } from 'vitest';

import { beginTurn, createTurns, endTurn, looksPerLimit, StepWatch } from './step-watch.ts';

function look(watch: StepWatch, times: number): string {
  let health = 'none';
  for (let i = 0; i < times; i += 1) {
    health = watch.look();
  }
  return health;
}

describe('StepWatch', () => {
  it('says nothing of a rank that loads, waits or turns', () => {
    const turns = createTurns();
    const watch = new StepWatch(turns);
    expect(look(watch, 1_000)).toBe('turning');
    for (let i = 0; i < 1_000; i += 1) {
      beginTurn(turns);
      expect(watch.look()).toBe('turning');
    }
    endTurn(turns);
    endTurn(turns);
    expect(look(watch, 1_000)).toBe('turning');
  });

  it('finds a step that is long, then one that hangs, and takes it back when the rank turns', () => {
    const turns = createTurns();
    const watch = new StepWatch(turns);
    beginTurn(turns);
    // The first look sees that the step has begun.
    expect(look(watch, 3)).toBe('turning');
    expect(look(watch, 1)).toBe('stalled');
    beginTurn(turns);
    expect(look(watch, looksPerLimit)).toBe('stalled');
    expect(look(watch, 1)).toBe('hung');
    endTurn(turns);
    expect(look(watch, 1)).toBe('turning');
  });

  it('goes on when the count wraps around', () => {
    const turns = createTurns();
    turns[0] = 2 ** 31 - 1;
    const watch = new StepWatch(turns);
    beginTurn(turns);
    expect(look(watch, 1 + looksPerLimit)).toBe('hung');
    endTurn(turns);
    expect(look(watch, 1 + looksPerLimit)).toBe('turning');
  });
});
