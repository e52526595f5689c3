// A test client of the gateway's streams: sends requests, reads a whole stream and checks its order, or reads a part of
// one. Knows nothing about the servers.

import { callServerStream, type CallLimits } from '@mimo/core/grpc/client';
import {
  GenerateRequest,
  InferenceServiceService,
  type ChatResponse,
  type GenerateResponse,
  type InferenceServiceClient,
} from '@mimo/proto/inference';
import type { FinishReason } from '@mimo/proto/sampling';
import { expect } from 'vitest';

import { GatewayStage } from './gateway-stage.ts';

type Sampling = NonNullable<Parameters<typeof GenerateRequest.fromPartial>[0]['sampling']>;

/** A request for a completion of the prompt. */
export function generation(prompt: string, sampling: Sampling = {}): GenerateRequest {
  return GenerateRequest.fromPartial({
    model: GatewayStage.model,
    input: { $case: 'prompt', value: prompt },
    sampling,
  });
}

export function generate(
  client: InferenceServiceClient,
  request: GenerateRequest,
  limits: CallLimits = {},
): AsyncGenerator<GenerateResponse, void, undefined> {
  return callServerStream(client, InferenceServiceService.generate, { request, ...limits });
}

/** A stream from `started` to `finish`. */
export interface WholeStream {
  readonly requestId: string;
  readonly seed: number;
  readonly promptTokens: number;
  readonly tokenIds: readonly number[];
  readonly text: string;
  readonly reasoning: string;
  readonly messages: number;
  readonly finish:
    | {
        readonly reason: FinishReason;
        readonly matchedStop: string;
        readonly drafted: number;
        readonly completionTokens: number;
      }
    | undefined;
}

/**
 * Reads a whole stream; asserts that its indices are contiguous, and that it begins with `started` and ends with
 * `finish`.
 */
export async function collect(stream: AsyncIterable<GenerateResponse | ChatResponse>): Promise<WholeStream> {
  const events: string[] = [];
  let started = { requestId: '', seed: 0, promptTokens: 0 };
  const tokenIds: number[] = [];
  let text = '';
  let reasoning = '';
  let contiguous = true;
  let finish;
  for await (const { event } of stream) {
    events.push(event?.$case ?? 'none');
    if (event?.$case === 'started') {
      started = event.value;
    } else if (event?.$case === 'delta') {
      contiguous &&= event.value.index === tokenIds.length;
      tokenIds.push(...event.value.tokenIds);
      text += event.value.text;
      reasoning += event.value.reasoning;
    } else if (event?.$case === 'finish') {
      const { reason, matchedStop, usage, speculation } = event.value;
      finish = {
        reason,
        matchedStop,
        drafted: speculation?.draftedTokens ?? -1,
        completionTokens: usage?.completionTokens ?? -1,
      };
    }
  }
  expect(contiguous).toBe(true);
  expect(events[0]).toBe('started');
  expect(events.indexOf('finish')).toBe(events.length - 1);
  const { requestId, seed, promptTokens } = started;
  return { requestId, seed, promptTokens, tokenIds, text, reasoning, messages: events.length, finish };
}

/** Reads until `count` tokens have come, and leaves the stream open. */
export async function begin(
  stream: AsyncIterator<GenerateResponse>,
  count: number,
): Promise<{ readonly requestId: string; readonly tokens: number }> {
  let requestId = '';
  let tokens = 0;
  while (tokens < count) {
    const { value } = await stream.next();
    if (value?.event?.$case === 'started') {
      requestId = value.event.value.requestId;
    } else if (value?.event?.$case === 'delta') {
      tokens += value.event.value.tokenIds.length;
    }
  }
  return { requestId, tokens };
}

/** Reads a stream to its end, for the end alone. */
export async function readToEnd(stream: AsyncIterable<unknown>): Promise<void> {
  for await (const _ of stream) {
    // Only the end counts.
  }
}
