// Whether a step makes drafts: what verifying them costs at this many sequences, against how many were right lately.
// Owns the estimate; whether a draft is right is the engine's to find out. Texts do not depend on it.

/** A draft a sequence pays with up to `sequences` decoding, where at least this share of drafts is right. */
export interface DraftCost {
  readonly sequences: number;
  readonly share: number;
}

/** Drafts that the estimate remembers. */
const remembered = 256;
/** Where drafts do not pay, one step in so many makes them all the same, to see whether they would. */
const probeEvery = 64;

/** Ask `pays` once a step, and `observe` what was verified. */
export class DraftPolicy {
  readonly #costs: readonly DraftCost[];
  /** Of the drafts, those that were right; at first all are thought to be. */
  #rightShare = 1;
  #stepsWithout = 0;

  /** `costs` by ascending sequences; with more than the last has, drafts never pay. */
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
