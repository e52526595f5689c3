// A leader's heartbeats: their content (pure) and their sending. A heartbeat that cannot be sent is dropped, since the
// next one supersedes it.

import { createNatsHeartbeats } from '@mimo/core/bus/nats/bus';
import type { NatsLink } from '@mimo/core/bus/nats/link';
import type { Log } from '@mimo/core/process/log';
import type { Heartbeat } from '@mimo/proto/worker';

import type { EngineStats } from './engines/mimo/engine-api.ts';

/** The window of the throughput, in time during which the group had work. */
const throughputWindowMs = 5_000;

/** Completion tokens per second over the last seconds with work. Fed at each heartbeat; pure except for its state. */
export class Throughput {
  readonly #samples: { readonly busyMs: number; readonly tokens: number }[] = [];
  #lastMs: number | undefined;
  #lastTokens = 0;

  /** Adds the counters as of `nowMs`, by performance.now(). An interval without a token is idle and is ignored. */
  observe(stats: Pick<EngineStats, 'completionTokens'>, nowMs: number): void {
    const tokens = stats.completionTokens - this.#lastTokens;
    if (this.#lastMs !== undefined && tokens > 0) {
      this.#samples.push({ busyMs: nowMs - this.#lastMs, tokens });
      let busyMs = this.#sum('busyMs');
      while (this.#samples.length > 1 && busyMs > throughputWindowMs) {
        busyMs -= this.#samples.shift()?.busyMs ?? 0;
      }
    }
    this.#lastMs = nowMs;
    this.#lastTokens = stats.completionTokens;
  }

  /** 0: not measured yet. */
  get completionTokensPerSecond(): number {
    const busyMs = this.#sum('busyMs');
    return busyMs === 0 ? 0 : (this.#sum('tokens') * 1000) / busyMs;
  }

  #sum(field: 'busyMs' | 'tokens'): number {
    return this.#samples.reduce((total, sample) => total + sample[field], 0);
  }
}

/** Sends heartbeats until closed. */
export interface HeartbeatSender {
  /** Sends an extra heartbeat at once, after a change of state. */
  beat(): void;
  /** Sends a last heartbeat. Closing the link afterwards flushes it. */
  close(): void;
}

/** The dependencies of the sender. */
export interface HeartbeatOptions {
  readonly link: NatsLink;
  readonly intervalMs: number;
  /** Called for each heartbeat. */
  readonly read: () => Heartbeat;
  readonly log: Log;
}

/** Starts sending: at a steady pace, and at once after each connection to the server. */
export function startHeartbeats({ link, intervalMs, read, log }: HeartbeatOptions): HeartbeatSender {
  const heartbeats = createNatsHeartbeats(link, log);
  const beat = (): void => heartbeats.publish(read());
  const greet = async (): Promise<void> => {
    for await (const _connection of link.connections()) {
      beat();
    }
  };
  void greet();
  const timer = setInterval(beat, intervalMs);
  return {
    beat,
    close: () => {
      clearInterval(timer);
      beat();
    },
  };
}
