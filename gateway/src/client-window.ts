// Decides how far a sequence may be ahead of its client, and its credit. Pure.
//
// The rule. The window begins small and grows by one for each token that the client reads, up to a limit. A group may
// send as many tokens as the window has room for; more credit is granted in portions. A client that leaves more than
// half of its window unread is behind, and gets no group until it has caught up.

/** Tokens that a sequence may be ahead of its client: enough to hide a round trip, small beside a KV cache. */
const windowTokens = 256;
/** At first it may be ahead by this many: a client that stops costs little. Half of it clears a request on trial. */
const firstWindowTokens = 16;
/** Credit is returned in portions of the window, so that it costs an occasional message and not one per token. */
const portionRatio = 1 / 4;
/** A client within this share of its window gets a group: its unread text covers the wait. */
const resumeBelowRatio = 1 / 2;

/** The window of one client. */
export class ClientWindow {
  #takenTokens = 0;
  #unreadTokens = 0;

  /** Notes tokens that arrived for the client. */
  add(tokens: number): void {
    this.#unreadTokens += tokens;
  }

  /** Notes tokens that the client has read. */
  take(tokens: number): void {
    this.#unreadTokens -= tokens;
    this.#takenTokens += tokens;
  }

  /** Whether the client has so much unread text that it needs no more. */
  get isBehind(): boolean {
    return this.#unreadTokens > resumeBelowRatio * this.#tokens;
  }

  /** The credit that a new attempt begins with. */
  get openTokens(): number {
    return this.#tokens - this.#unreadTokens;
  }

  /** The credit to grant to an attempt that may still send `comingTokens`; 0 until it amounts to a portion. */
  grantTo(comingTokens: number): number {
    const owedTokens = this.openTokens - comingTokens;
    return owedTokens >= portionRatio * this.#tokens ? owedTokens : 0;
  }

  get #tokens(): number {
    return Math.min(firstWindowTokens + this.#takenTokens, windowTokens);
  }
}
