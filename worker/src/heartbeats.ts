// A leader's heartbeats: what they say (pure, from what it is told) and their sending over core NATS. Owns the connection,
// which is made again for ever; a heartbeat that cannot be sent is dropped, since the next one says more.

import type { NatsConnection } from '@nats-io/transport-node';

import { beforeAbort } from '@mimo/core/process/abort';
import type { Log } from '@mimo/core/process/log';
import { connectNats, type NatsServers } from '@mimo/core/bus/nats-connect';
import { subjects } from '@mimo/core/bus/subjects';
import { Heartbeat } from '@mimo/proto/worker';

import type { EngineStats } from './engines/mimo/engine-api.ts';

/** How far back the throughput looks, in time in which the group had work. */
const throughputWindowMs = 5_000;

/** Completion tokens per second over the last seconds with work. Fed at each heartbeat; pure but for what it keeps. */
export class Throughput {
  readonly #samples: { readonly busyMs: number; readonly tokens: number }[] = [];
  #lastMs: number | undefined;
  #lastTokens = 0;

  /** Takes the counters as of `nowMs`, by performance.now(). An interval without a token is idle, and is left out. */
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
  /** Sends one at once, besides the regular ones: for a change of state. */
  beat(): void;
  /** Sends a last one and leaves the server; gives up after a second where it cannot be reached. */
  close(): Promise<void>;
}

export interface HeartbeatOptions extends NatsServers {
  readonly intervalMs: number;
  /** Asked for each heartbeat. */
  readonly read: () => Heartbeat;
  readonly log: Log;
}

const closeTimeoutMs = 1_000;

/** Starts sending; returns at once and connects in the background. Throws as `connectNats` does. */
export function startHeartbeats(options: HeartbeatOptions): HeartbeatSender {
  const connecting = connectNats(options);
  // Set while the server can be reached: publishing to a lost one would hoard stale heartbeats and send them later.
  let connected: NatsConnection | undefined;
  let closing = false;
  const beat = (): void => {
    const heartbeat = options.read();
    connected?.publish(
      subjects.heartbeat(heartbeat.model, heartbeat.group),
      Heartbeat.encode(heartbeat).finish(),
    );
  };
  const run = async (): Promise<void> => {
    const connection = await connecting;
    if (closing) {
      await connection.close();
      return;
    }
    connected = connection;
    beat();
    for await (const status of connection.status()) {
      if (status.type === 'disconnect' || status.type === 'reconnect') {
        connected = status.type === 'reconnect' ? connection : undefined;
        options.log.info({ connected: connected !== undefined }, 'NATS connection');
      }
    }
  };
  run().catch((error: unknown) => options.log.error({ error }, 'no connection to NATS'));
  const timer = setInterval(beat, options.intervalMs);
  return {
    beat,
    close: async () => {
      clearInterval(timer);
      beat();
      closing = true;
      const last = connected;
      connected = undefined;
      if (last !== undefined) {
        await beforeAbort(last.flush(), AbortSignal.timeout(closeTimeoutMs)).catch(() => undefined);
        await last.close();
      }
    },
  };
}
