// Streams of an honest tenant that run beside the hostile inputs. Owns the measure of harm: each stream must end with
// the same tokens as alone; time to the first token and the longest gap are reported, not asserted.

import * as grpc from '@grpc/grpc-js';

import { ClusterError } from '@mimo/core/process/errors';

import { ask, chatRequest, createClient } from '../harness/cluster.ts';

/** The bystander's results. */
interface BystanderReport {
  readonly streams: number;
  /** One line for each stream that failed or came out different. */
  readonly harmed: readonly string[];
  readonly ttftMs: Spread;
  /** The streams whose first token took longest, and what was tried meanwhile. */
  readonly slowest: readonly Wait[];
  readonly longestGapMs: Spread;
}

interface Wait {
  readonly ttftMs: number;
  readonly during: string;
}

interface Spread {
  readonly p50: number;
  readonly p99: number;
  readonly max: number;
}

export interface Bystander {
  /** Names what is tried meanwhile, for the lines of harm. */
  mark(during: string): void;
  /** Ends after the running stream. */
  stop(): Promise<BystanderReport>;
}

const request = chatRequest('What is 47 + 85?', { temperature: 0.6, topP: 0.95, seed: 7 });

/** Asks the same question over and over on one connection, which must not break either. */
export async function startBystander(address: string, apiKey: string): Promise<Bystander> {
  const client = createClient(address);
  const metadata = new grpc.Metadata();
  metadata.set('authorization', `Bearer ${apiKey}`);
  const expected = (await ask(client, { request, metadata })).text;
  const waits: Wait[] = [];
  const longestGapMs: number[] = [];
  const harmed: string[] = [];
  let during = 'nothing yet';
  const stopping = new AbortController();
  const askOnce = async (): Promise<void> => {
    const begunDuring = during;
    const beganMs = performance.now();
    let lastMs = beganMs;
    let gapMs = 0;
    let tokens = 0;
    try {
      const { text } = await ask(client, {
        request,
        metadata,
        onMessage: ({ event }) => {
          if (event?.$case === 'delta' && event.value.tokenIds.length > 0) {
            const nowMs = performance.now();
            if (tokens === 0) {
              waits.push({ ttftMs: Math.round(nowMs - beganMs), during: `${begunDuring} .. ${during}` });
            } else {
              gapMs = Math.max(gapMs, nowMs - lastMs);
            }
            tokens += event.value.tokenIds.length;
            lastMs = nowMs;
          }
        },
      });
      longestGapMs.push(gapMs);
      if (text !== expected) {
        harmed.push(`${begunDuring} .. ${during}: another text`);
      }
    } catch (error) {
      const { code, message } = ClusterError.from(error);
      harmed.push(`${begunDuring} .. ${during}: ${code} ${message}`);
    }
  };
  const running = (async (): Promise<void> => {
    while (!stopping.signal.aborted) {
      await askOnce();
    }
  })();
  return {
    mark: (name) => {
      during = name;
    },
    stop: async () => {
      stopping.abort();
      await running;
      client.close();
      return {
        streams: waits.length,
        harmed,
        ttftMs: spreadOf(waits.map(({ ttftMs }) => ttftMs)),
        slowest: waits.toSorted((a, b) => b.ttftMs - a.ttftMs).slice(0, 5),
        longestGapMs: spreadOf(longestGapMs),
      };
    },
  };
}

function spreadOf(values: readonly number[]): Spread {
  const sorted = values.toSorted((a, b) => a - b);
  const at = (ratio: number): number =>
    Math.round(sorted[Math.min(sorted.length - 1, Math.floor(ratio * sorted.length))] ?? Number.NaN);
  return { p50: at(0.5), p99: at(0.99), max: at(1) };
}
