// Decides whether a step makes drafts: compares the cost of verifying them at this many sequences with the share of
// recent drafts that were right. Owns the estimate; the engine verifies the drafts. Texts do not depend on it.

/** One draft per sequence pays with up to `sequences` decoding, if at least this share of drafts is right. */
export interface DraftCost {
  readonly sequences: number;
  readonly share: number;
}

/** Drafts that the estimate remembers. */
const remembered = 256;
/** While drafts do not pay, one step in this many still makes them, as a probe. */
const probeEvery = 64;

/** Call `pays` once per step, and `observe` with the verified drafts. */
export class DraftPolicy {
  readonly #costs: readonly DraftCost[];
  /** The estimated share of right drafts; starts at 1. */
  #rightShare = 1;
  #stepsWithout = 0;

  /** `costs` by ascending sequences; above the last entry, drafts never pay. */
  constructor(costs: readonly DraftCost[]) {
    this.#costs = costs;
  }

  pays(decodingSequences: number): boolean {
    const cost = this.#costs.find(({ sequences }) => decodingSequences <= sequences);
    if (cost === undefined) {
      return false;
    }
    const isWorth = this.#rightShare >= cost.share;
    this.#stepsWithout = isWorth ? 0 : (this.#stepsWithout + 1) % probeEvery;
    return isWorth || this.#stepsWithout === 0;
  }

  observe({ drafted, right }: { readonly drafted: number; readonly right: number }): void {
    if (drafted > 0) {
      this.#rightShare += (right / drafted - this.#rightShare) * Math.min(1, drafted / remembered);
    }
  }
}
