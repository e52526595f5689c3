// Streams that must return the same text whatever happens to their groups: each request first runs undisturbed, then
// again while the test disturbs the cluster. Owns the comparison and the counts; does not disturb anything.

import { ClusterError } from '@mimo/core/process/errors';
import type { ChatRequest, InferenceServiceClient } from '@mimo/proto/inference';

import { ask, chatRequest, type Answer } from './cluster.ts';

/** A request and its undisturbed answer. */
export interface ExpectedStream {
  readonly request: ChatRequest;
  readonly answer: Answer;
}

/** What became of the streams of a disturbed run. */
export interface StreamsOutcome {
  /** Finished with the same tokens, text and log-probabilities. */
  readonly same: number;
  /** What went wrong, one line each; empty if nothing did. */
  readonly wrong: readonly string[];
  /** The longest pause between two messages of a stream. */
  readonly longestPauseMs: number;
}

/** Requests of every kind that a move must not change: greedy, seeded, with penalties, with log-probabilities. */
export async function expectStreams(
  client: InferenceServiceClient,
  maxTokens: number,
): Promise<readonly ExpectedStream[]> {
  const samplings = [
    {},
    { temperature: 1, seed: 11 },
    { temperature: 0.8, topP: 0.9, topK: 40, seed: 12, logprobs: 2 },
    { temperature: 1, seed: 13, repetitionPenalty: 1.3, presencePenalty: 0.5, frequencyPenalty: 0.5 },
    { logprobs: 0 },
    { temperature: 1, minP: 0.05, seed: 14, minTokens: Math.floor(maxTokens / 2) },
    { temperature: 1, seed: 15, draftTokens: 0 },
    { temperature: 1.2, seed: 16 },
  ];
  const requests = samplings.map((sampling, index) =>
    chatRequest(`What is ${index} + 85?`, { ignoreEos: true, maxTokens, ...sampling }),
  );
  return Promise.all(requests.map(async (request) => ({ request, answer: await ask(client, { request }) })));
}

/** Begins one stream of each; `begun` resolves when all have had a few tokens, `outcome` when all have ended. */
export function startStreams(
  client: InferenceServiceClient,
  expected: readonly ExpectedStream[],
): { readonly begun: Promise<void>; readonly outcome: Promise<StreamsOutcome> } {
  const begun: Promise<void>[] = [];
  const ends = expected.map(async (stream, index) => {
    const { promise, resolve } = Promise.withResolvers<void>();
    begun.push(promise);
    const end = await runStream(client, stream, (tokens) => tokens >= fewTokens && resolve());
    resolve();
    return { ...end, wrong: end.wrong.map((line) => `stream ${index}: ${line}`) };
  });
  return {
    begun: Promise.all(begun).then(() => undefined),
    outcome: Promise.all(ends).then(sumUp),
  };
}

/** Keeps a lane for each running, one stream after another, until stopped; `stop` waits for the last ones. */
export function keepStreaming(
  client: InferenceServiceClient,
  expected: readonly ExpectedStream[],
): { readonly stop: () => Promise<StreamsOutcome> } {
  const stopping = new AbortController();
  const lanes = expected.map(async (stream, lane) => {
    const outcomes: StreamsOutcome[] = [];
    for (let round = 0; !stopping.signal.aborted; round += 1) {
      const end = await runStream(client, stream, () => undefined);
      outcomes.push({ ...end, wrong: end.wrong.map((line) => `lane ${lane}, round ${round}: ${line}`) });
    }
    return sumUp(outcomes);
  });
  return {
    stop: async () => {
      stopping.abort();
      return sumUp(await Promise.all(lanes));
    },
  };
}

const fewTokens = 10;

async function runStream(
  client: InferenceServiceClient,
  { request, answer }: ExpectedStream,
  onTokens: (tokens: number) => void,
): Promise<StreamsOutcome> {
  let tokens = 0;
  let longestPauseMs = 0;
  let lastMs = performance.now();
  const wrong: string[] = [];
  try {
    const got = await ask(client, {
      request,
      onMessage: ({ event }) => {
        tokens += event?.$case === 'delta' ? event.value.tokenIds.length : 0;
        longestPauseMs = Math.max(longestPauseMs, performance.now() - lastMs);
        lastMs = performance.now();
        onTokens(tokens);
      },
    });
    for (const part of ['tokenIds', 'logprobs', 'text', 'reasoning'] as const) {
      if (JSON.stringify(got[part]) !== JSON.stringify(answer[part])) {
        wrong.push(`other ${part} than undisturbed`);
      }
    }
    const { usage, reason, matchedStop, speculation } = got.finish ?? {};
    if (
      usage?.completionTokens !== answer.tokenIds.length ||
      usage.promptTokens !== answer.finish?.usage?.promptTokens ||
      reason !== answer.finish.reason ||
      matchedStop !== answer.finish.matchedStop
    ) {
      wrong.push(`finish is ${JSON.stringify(got.finish)}, not ${JSON.stringify(answer.finish)}`);
    }
    const { draftedTokens = 0, acceptedTokens = 0 } = speculation ?? {};
    // How many drafts are made depends on what else runs; a move only must not lose or invent any.
    const drafts = request.sampling?.draftTokens !== 0;
    if (acceptedTokens > draftedTokens || (draftedTokens > 0 && !drafts)) {
      wrong.push(`${acceptedTokens} of ${draftedTokens} drafts accepted`);
    }
  } catch (error) {
    wrong.push(`after ${tokens} tokens: ${String(ClusterError.from(error))}`);
  }
  return { same: wrong.length === 0 ? 1 : 0, wrong, longestPauseMs };
}

function sumUp(outcomes: readonly StreamsOutcome[]): StreamsOutcome {
  return {
    same: outcomes.reduce((sum, { same }) => sum + same, 0),
    wrong: outcomes.flatMap(({ wrong }) => wrong),
    longestPauseMs: Math.max(0, ...outcomes.map(({ longestPauseMs }) => longestPauseMs)),
  };
}
