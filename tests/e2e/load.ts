// Streams that run all the time, as clients see them: each lane sends a request, reads to the end, compares the text
// with an undisturbed run, and sends it again. Owns the counts of failures; `ask` fails on a repeated or missing index.

import { pause } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import type { ChatRequest } from '@mimo/proto/inference';

import { ask, type Answer } from '../harness/cluster.ts';
import type { Installation } from './installation.ts';

/** What clients saw. */
interface LoadReport {
  readonly requests: number;
  readonly tokens: number;
  /** One line for each request that failed, had a gap or a repetition, or another text than undisturbed. */
  readonly wrong: readonly string[];
  /** Requests that ended `unavailable` if that was tolerated, so that the client asked again. */
  readonly unavailable: number;
  /** The longest time between two messages of a stream. */
  readonly longestPauseMs: number;
  /** The longest time from a request, tolerated failures apart, to its first token. */
  readonly longestWaitMs: number;
}

export interface Load {
  /** So far. */
  readonly report: () => LoadReport;
  /** Lets every stream come to its end. */
  stop(): Promise<LoadReport>;
}

export interface LoadOptions {
  readonly installation: Installation;
  readonly request: ChatRequest;
  readonly expected: Answer;
  readonly lanes: number;
  /** Ends every stream where the scenario has ended without stopping its load. */
  readonly signal: AbortSignal;
  /**
   * What a client must expect of this fault: `unavailable` before anything was accepted, or at any time. Default:
   * nothing, as actions of the operator are not a reason for an error.
   */
  readonly tolerated?: 'refusal' | 'break';
}

/** What a client waits before it asks again. */
const retryMs = 200;

/** Begins to ask; returns when each lane has had a token. */
export async function startLoad(options: LoadOptions): Promise<Load> {
  const { installation, request, expected, tolerated } = options;
  const wrong: string[] = [];
  let requests = 0;
  let unavailable = 0;
  let tokens = 0;
  let longestPauseMs = 0;
  let longestWaitMs = 0;
  const stopping = new AbortController();
  const over = AbortSignal.any([stopping.signal, options.signal]);
  const begun: Promise<void>[] = [];
  const lanes = Array.from({ length: options.lanes }, async (_, lane) => {
    const first = Promise.withResolvers<void>();
    begun.push(first.promise);
    while (!over.aborted) {
      let last: number | undefined;
      let accepted = false;
      const startedAt = new Date().toISOString();
      const askedMs = performance.now();
      try {
        const answer = await ask(installation.client, {
          request,
          metadata: installation.metadata,
          signal: options.signal,
          onMessage: ({ event }) => {
            const now = performance.now();
            accepted = true;
            // The wait before the first token is queueing, not a pause of a stream.
            longestPauseMs = Math.max(longestPauseMs, last === undefined ? 0 : now - last);
            if (event?.$case === 'delta') {
              longestWaitMs = Math.max(longestWaitMs, last === undefined ? now - askedMs : 0);
              last = now;
              first.resolve();
            }
          },
        });
        tokens += answer.tokenIds.length;
        if (answer.tokenIds.join() !== expected.tokenIds.join() || answer.text !== expected.text) {
          wrong.push(`lane ${lane} from ${startedAt}: another answer than undisturbed`);
        }
      } catch (error) {
        if (options.signal.aborted) {
          break;
        }
        const { code } = ClusterError.from(error);
        if (code === 'unavailable' && (tolerated === 'break' || (tolerated === 'refusal' && !accepted))) {
          unavailable += 1;
          await pause(retryMs, over);
        } else {
          wrong.push(`lane ${lane} from ${startedAt} to ${new Date().toISOString()}: ${String(error)}`);
          first.resolve();
        }
      }
      requests += 1;
    }
  });
  const report = (): LoadReport => ({
    requests,
    tokens,
    wrong: [...wrong],
    unavailable,
    longestPauseMs: Math.round(longestPauseMs),
    longestWaitMs: Math.round(longestWaitMs),
  });
  await Promise.all(begun);
  return {
    report,
    stop: async () => {
      stopping.abort();
      await Promise.all(lanes);
      return report();
    },
  };
}
