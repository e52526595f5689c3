// The groups that must finish their requests and accept no new ones. The controller marks and clears; dispatchers
// follow. Implemented by nats/drain-marks.ts (a key a model) and memory/drain-marks.ts.

/** A group's drain mark: dispatchers assign nothing more to the group. */
export interface DrainMark {
  /** For people: nothing decides by it. */
  readonly sinceUnixMs: number;
}

/** The marked groups of a model, by name. */
export type MarkedGroups = ReadonlyMap<string, DrainMark>;

/** The marks of every model. They outlive the process that set them, so that nothing need be repeated. */
export interface DrainMarks {
  /** Marks a group until the mark is cleared. Marking a marked group keeps the older mark. */
  mark(model: string, group: string, mark: DrainMark): Promise<void>;
  /** Clearing an unmarked group changes nothing. */
  clear(model: string, group: string): Promise<void>;
  /** The marks of a model: all of them first, and all again after every change. */
  follow(model: string, signal: AbortSignal): AsyncIterable<MarkedGroups>;
}
