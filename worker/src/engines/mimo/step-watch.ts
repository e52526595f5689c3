// Detects a hung step thread from its process's main thread. A thread that hangs in a step cannot report it, and a
// group of one rank has no peer to notice. The thread counts its turns in shared memory, and the main thread polls the
// count. The limit is a number of polls and not a time: a stopped or starved process does not poll either, and so does
// not blame its step. Knows no timer and no engine.

/** Polls within the time limit of a step, at an even pace: a hung step is reported at most one poll late. */
export const looksPerLimit = 24;
/** After this many polls in the same step the group accepts no new sequences: an eighth of the limit. */
const stalledLooks = 3;

/**
 * Turns of one rank, shared between its threads: odd while it works, even while it waits for something to do, or
 * loads.
 */
export function createTurns(): Int32Array {
  return new Int32Array(new SharedArrayBuffer(4));
}

/** The step thread begins a turn with work: a step is part of it. */
export function beginTurn(turns: Int32Array): void {
  const count = Atomics.load(turns, 0);
  Atomics.store(turns, 0, count + (isWork(count) ? 2 : 1));
}

/** The step thread is idle until a message arrives. */
export function endTurn(turns: Int32Array): void {
  const count = Atomics.load(turns, 0);
  Atomics.store(turns, 0, count + (isWork(count) ? 1 : 0));
}

/** The state of a rank: `stalled` in a long turn, `hung` in a turn beyond the limit. */
export type StepHealth = 'turning' | 'stalled' | 'hung';

/** The main thread's side. `look` is called `looksPerLimit` times within the limit. */
export class StepWatch {
  readonly #turns: Int32Array;
  #seen = 0;
  #looks = 0;

  constructor(turns: Int32Array) {
    this.#turns = turns;
  }

  look(): StepHealth {
    const count = Atomics.load(this.#turns, 0);
    this.#looks = isWork(count) && count === this.#seen ? this.#looks + 1 : 0;
    this.#seen = count;
    return this.#looks >= looksPerLimit ? 'hung' : this.#looks >= stalledLooks ? 'stalled' : 'turning';
  }
}

function isWork(count: number): boolean {
  return (count & 1) === 1;
}
