// Rate limits per peer: a bounded table of token buckets. Pure: the caller passes the time of the monotonic clock. A
// peer is an IPv4 address or an IPv6 network of 64 bits, which usually belongs to one machine.

/** A bucket of `burst` tokens that gains `perSecond`. */
export interface Rate {
  readonly burst: number;
  readonly perSecond: number;
}

/** What is left of one peer's rate. */
export class Allowance {
  readonly #rate: Rate;
  #tokens: number;
  #atMs: number;

  constructor(rate: Rate, nowMs: number) {
    this.#rate = rate;
    this.#tokens = rate.burst;
    this.#atMs = nowMs;
  }

  /** Takes tokens; false if there are too few. */
  take(nowMs: number, tokens = 1): boolean {
    const isThere = this.has(nowMs, tokens);
    this.#tokens -= isThere ? tokens : 0;
    return isThere;
  }

  has(nowMs: number, tokens = 1): boolean {
    const gained = (Math.max(0, nowMs - this.#atMs) / 1_000) * this.#rate.perSecond;
    this.#tokens = Math.min(this.#rate.burst, this.#tokens + gained);
    this.#atMs = nowMs;
    return this.#tokens >= tokens;
  }
}

/** The allowances of peers; beyond `maxPeers`, the longest silent peer is forgotten. */
export class PeerAllowances {
  readonly #rate: Rate;
  readonly #maxPeers: number;
  /** Ordered by last use, the latest at the end. */
  readonly #allowances = new Map<string, Allowance>();

  constructor(rate: Rate, maxPeers: number) {
    this.#rate = rate;
    this.#maxPeers = maxPeers;
  }

  get size(): number {
    return this.#allowances.size;
  }

  /** Takes a token of the peer; false if it has none. */
  take(peer: string, nowMs: number): boolean {
    const allowance = this.#allowances.get(peer) ?? new Allowance(this.#rate, nowMs);
    this.#allowances.delete(peer);
    this.#allowances.set(peer, allowance);
    if (this.#allowances.size > this.#maxPeers) {
      const [oldest = peer] = this.#allowances.keys();
      this.#allowances.delete(oldest);
    }
    return allowance.take(nowMs);
  }

  /** Whether the peer has no token left. */
  isSpent(peer: string, nowMs: number): boolean {
    return this.#allowances.get(peer)?.has(nowMs) === false;
  }
}

/** The peer of an address; undefined addresses, of closed sockets, count as one peer. */
export function peerOf(address: string | undefined): string {
  if (address === undefined) {
    return 'unknown';
  }
  const [, mapped] = /^::ffff:(\d+\.\d+\.\d+\.\d+)$/i.exec(address) ?? [];
  if (mapped !== undefined || !address.includes(':')) {
    return mapped ?? address;
  }
  const [left = '', right] = address.split('%')[0]!.split('::');
  const leading = left === '' ? [] : left.split(':');
  const trailing = right === undefined || right === '' ? [] : right.split(':');
  const zeros = right === undefined ? 0 : Math.max(0, 8 - leading.length - trailing.length);
  const groups = [...leading, ...Array<string>(zeros).fill('0'), ...trailing];
  return `${groups.slice(0, 4).join(':')}::/64`;
}
