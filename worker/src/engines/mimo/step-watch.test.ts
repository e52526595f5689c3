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
  it('reports nothing while a rank loads, waits or makes progress', () => {
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

  it('reports a long step, then a hung one, and withdraws the report when the rank makes progress', () => {
    const turns = createTurns();
    const watch = new StepWatch(turns);
    beginTurn(turns);
    // The first look notices the start of the step.
    expect(look(watch, 3)).toBe('turning');
    expect(look(watch, 1)).toBe('stalled');
    beginTurn(turns);
    expect(look(watch, looksPerLimit)).toBe('stalled');
    expect(look(watch, 1)).toBe('hung');
    endTurn(turns);
    expect(look(watch, 1)).toBe('turning');
  });

  it('keeps working when the count wraps around', () => {
    const turns = createTurns();
    turns[0] = 2 ** 31 - 1;
    const watch = new StepWatch(turns);
    beginTurn(turns);
    expect(look(watch, 1 + looksPerLimit)).toBe('hung');
    endTurn(turns);
    expect(look(watch, 1 + looksPerLimit)).toBe('turning');
  });
});
