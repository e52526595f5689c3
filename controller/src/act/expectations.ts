// Own writes that the watches have not shown yet. A plan made earlier would see old pods, and would create or delete
// twice. One set for each ModelService. A write counts as seen when the watched object is at least as new, or is
// another one (by uid). A write that never shows is forgotten after a while: acting on an old observation is safe
// because of names and uids, only wasteful.

/** A write to an object: its resource version afterwards; undefined: it was deleted. */
export interface OwnWrite {
  readonly name: string;
  readonly uid: string;
  readonly resourceVersion: string | undefined;
}

/** The watched object of that name, if there is one. */
export type WatchedObject =
  | { readonly uid: string; readonly resourceVersion: string; readonly deleting: boolean }
  | undefined;

/** An object that was created and deleted between two observations never shows. */
const forgetMs = 15_000;

/** Collects own writes; `settle` reports whether all were seen. */
export class Expectations {
  readonly #writes = new Map<string, OwnWrite & { readonly atMs: number }>();

  expect(write: OwnWrite, nowMs: number): void {
    this.#writes.set(write.name, { ...write, atMs: nowMs });
  }

  /** Drops the writes that were seen; true if none is left. */
  settle(find: (name: string) => WatchedObject, nowMs: number): boolean {
    for (const [name, write] of this.#writes) {
      if (nowMs - write.atMs >= forgetMs || hasSeen(write, find(name))) {
        this.#writes.delete(name);
      }
    }
    return this.#writes.size === 0;
  }
}

function hasSeen(write: OwnWrite, found: WatchedObject): boolean {
  if (write.resourceVersion === undefined) {
    return found?.uid !== write.uid || found.deleting;
  }
  return (
    found !== undefined &&
    (found.uid !== write.uid || isAtLeast(found.resourceVersion, write.resourceVersion))
  );
}

/** Whether one version of an object is as new as another: Kubernetes promises decimal numbers that grow. */
export function isAtLeast(version: string, asked: string): boolean {
  return (
    version === asked || (/^\d+$/.test(version) && /^\d+$/.test(asked) && BigInt(version) >= BigInt(asked))
  );
}
