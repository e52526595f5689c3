// Decides which of a model's waiting prompts is read next. Pure: knows neither processes nor time.
//
// The rule. Prompts wait in lanes, one for a tenant's short prompts and one for its long ones, each first come first
// served.
//   1. A lane has at most one prompt being read.
//   2. If several readers are allowed, one of them never reads long prompts: short prompts do not wait for long ones.
//   3. Of the eligible lanes, the one with the earliest tag is next (start-time fair queueing): a lane's tag grows by
//      the cost of its prompts; after an idle time it begins at the current tag.
// So a tenant waits for its own prompts, and for about the same amount of work of each other tenant.

/** The facts about a prompt that the queue needs. */
export interface PromptTurn {
  readonly tenant: string;
  /** In letters, see `promptCost`. */
  readonly cost: number;
}

/** A prompt taken from the queue; call `done` when it has been read. */
export interface TakenPrompt<T> {
  readonly item: T;
  done(this: void): void;
}

/** The number and cost of waiting prompts. */
export interface WaitingPrompts {
  readonly prompts: number;
  readonly cost: number;
}

interface Entry<T> {
  readonly cost: number;
  readonly item: T;
}

interface Lane<T> {
  readonly isLong: boolean;
  readonly waiting: Set<Entry<T>>;
  cost: number;
  tag: number;
  isReading: boolean;
}

/** Shorter prompts take some tens of milliseconds; 32,768 tokens of prose are about as long. */
const shortMaxCost = 131_072;

/** The waiting prompts of one model. */
export class PromptQueue<T> {
  readonly #maxReaders: number;
  readonly #lanes = new Map<string, Lane<T>>();
  #tag = 0;
  #longReading = 0;

  constructor(maxReaders: number) {
    this.#maxReaders = maxReaders;
  }

  /** The number and cost of the waiting prompts of a tenant, or of all. */
  waiting(tenant?: string): WaitingPrompts {
    const lanes =
      tenant === undefined
        ? [...this.#lanes.values()]
        : [false, true]
            .map((isLong) => this.#lanes.get(keyOf(tenant, isLong)))
            .filter((lane) => lane !== undefined);
    return {
      prompts: lanes.reduce((sum, lane) => sum + lane.waiting.size, 0),
      cost: lanes.reduce((sum, lane) => sum + lane.cost, 0),
    };
  }

  /** Adds a prompt at the end of its lane. Call the result to remove it, if it still waits. */
  add({ tenant, cost }: PromptTurn, item: T): () => void {
    const isLong = cost > shortMaxCost;
    const key = keyOf(tenant, isLong);
    const lane: Lane<T> = this.#lanes.get(key) ?? {
      isLong,
      waiting: new Set(),
      cost: 0,
      tag: 0,
      isReading: false,
    };
    this.#lanes.set(key, lane);
    if (lane.waiting.size === 0) {
      lane.tag = Math.max(lane.tag, this.#tag);
    }
    const entry = { cost, item };
    lane.waiting.add(entry);
    lane.cost += cost;
    return () => {
      if (lane.waiting.delete(entry)) {
        lane.cost -= cost;
      }
    };
  }

  /** Whether a prompt could be read if one of `readers` readers were free. */
  hasTurn(readers: number): boolean {
    return this.#next(readers) !== undefined;
  }

  /** The next prompt for a free one of `readers` readers; undefined if none may run. */
  take(readers: number): TakenPrompt<T> | undefined {
    this.#forgetIdle();
    const lane = this.#next(readers);
    const [entry] = lane?.waiting ?? [];
    if (lane === undefined || entry === undefined) {
      return undefined;
    }
    lane.waiting.delete(entry);
    lane.cost -= entry.cost;
    this.#tag = Math.max(this.#tag, lane.tag);
    lane.tag += entry.cost;
    lane.isReading = true;
    this.#longReading += lane.isLong ? 1 : 0;
    return {
      item: entry.item,
      done: () => {
        lane.isReading = false;
        this.#longReading -= lane.isLong ? 1 : 0;
      },
    };
  }

  #next(readers: number): Lane<T> | undefined {
    const longMax = this.#maxReaders === 1 ? 1 : readers - 1;
    let next: Lane<T> | undefined;
    for (const lane of this.#lanes.values()) {
      const mayGo = lane.waiting.size > 0 && !lane.isReading && (!lane.isLong || this.#longReading < longMax);
      if (mayGo && (next === undefined || lane.tag < next.tag)) {
        next = lane;
      }
    }
    return next;
  }

  /** Drops idle lanes that equal a new one. */
  #forgetIdle(): void {
    for (const [key, lane] of this.#lanes) {
      if (lane.waiting.size === 0 && !lane.isReading && lane.tag <= this.#tag) {
        this.#lanes.delete(key);
      }
    }
  }
}

function keyOf(tenant: string, isLong: boolean): string {
  return `${isLong ? 'long' : 'short'} ${tenant}`;
}
