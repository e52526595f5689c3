// The drain marks in a Map.

import type { DrainMark, DrainMarks, MarkedGroups } from '../drain-marks.ts';
import { assertOpen, type MemoryHandle } from './broker.ts';

/** The marks of one bus. */
export class MemoryDrainMarks implements DrainMarks {
  readonly #handle: MemoryHandle;

  constructor(handle: MemoryHandle) {
    this.#handle = handle;
  }

  async mark(model: string, group: string, { sinceUnixMs }: DrainMark): Promise<void> {
    this.#change(model, (marks) => marks.set(group, marks.get(group) ?? { sinceUnixMs }));
  }

  async clear(model: string, group: string): Promise<void> {
    this.#change(model, (marks) => marks.delete(group));
  }

  async *follow(model: string, signal: AbortSignal): AsyncGenerator<MarkedGroups, void, undefined> {
    const { broker, closing } = this.#handle;
    const first = { model, marks: broker.drains.get(model) ?? new Map<string, DrainMark>() };
    for await (const change of broker.drainChanges.follow(AbortSignal.any([signal, closing]), [first])) {
      if (change.model === model) {
        yield change.marks;
      }
    }
  }

  #change(model: string, change: (marks: Map<string, DrainMark>) => void): void {
    assertOpen(this.#handle);
    const { broker } = this.#handle;
    const marks = new Map(broker.drains.get(model));
    change(marks);
    broker.drains.set(model, marks);
    broker.drainChanges.publish({ model, marks });
  }
}
