// Whether a rank's step thread still turns, as seen from its process's main thread. A thread that hangs in a step says
// nothing, and a group of one rank has no peer that would notice. The thread counts its turns in shared memory; the
// main thread looks at the count. Looks are what is counted and not time, so that a process which is stopped or
// starved, and does not look either, does not blame its step. Knows no timer and no engine.

/** So many looks within the limit for a step, at an even pace: a step is found to hang a look late at most. */
export const looksPerLimit = 24;
/** After so many looks at the same step the group takes nothing new: an eighth of the limit. */
const stalledLooks = 3;

/**
 * Turns of one rank, shared between its threads: odd while it works, even while it waits for something to do, or
 * loads.
 */
export function createTurns(): Int32Array {
  return new Int32Array(new SharedArrayBuffer(4));
}

/** The step thread begins a turn with work in it, which a step is part of. */
export function beginTurn(turns: Int32Array): void {
  const count = Atomics.load(turns, 0);
  Atomics.store(turns, 0, count + (isWork(count) ? 2 : 1));
}

/** The step thread has nothing to do until something comes from outside. */
export function endTurn(turns: Int32Array): void {
  const count = Atomics.load(turns, 0);
  Atomics.store(turns, 0, count + (isWork(count) ? 1 : 0));
}

/** How a rank looks: `stalled` in a turn that is long, `hung` in one beyond the limit. */
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
