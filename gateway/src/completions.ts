// The use case of every door: a request and its caller in, `started` and events out. Owns the order of admission (a
// place, the model and its version, the prompt, the record), the end of a request whose client leaves, and the times
// that clients see. Knows no protocol: a door translates a message into a CompletionRequest and writes the events.

import { randomInt, randomUUID } from 'node:crypto';

import { ClusterError } from '@mimo/core/process/errors';
import type { Model, Started } from '@mimo/proto/inference';
import type { SamplingParams } from '@mimo/proto/sampling';
import type { Heartbeat } from '@mimo/proto/worker';
import { TooManyTokensError } from '@mimo/tokenizer';

import type { Caller } from './admission/auth.ts';
import { assertNone, checkPrompt, tooManyTokens, type ModelFacts } from './admission/check.ts';
import { assertMayUse, assertPlace, mayUse } from './admission/permit.ts';
import type { PromptInput } from './admission/prompt-input.ts';
import { admitRequest, type ReadPrompt } from './admission/record.ts';
import type { Groups } from './dispatcher/groups.ts';
import type { GatewayMetrics } from './metrics.ts';
import { factsOf, type ServedModel } from './models.ts';
import type { EncodeFor } from './prompts/prompt-encoder.ts';
import type { Relay, RelayEvent } from './relay.ts';
import type { OpenRequest, Requests } from './requests.ts';
import type { ServedModels } from './served-models.ts';
import { chooseVersion } from './version-choice.ts';

/** The dependencies of completions. `stopping` fires when new requests must be refused. */
export interface CompletionsParts {
  readonly gatewayId: string;
  readonly models: ServedModels;
  readonly groups: Groups;
  /** The groups of a model that accept requests. */
  readonly openGroups: (model: string) => readonly Heartbeat[];
  readonly requests: Requests;
  readonly metrics: GatewayMetrics;
  readonly promptMaxBytes: number;
  readonly maxRequests: number;
  readonly stopping: AbortSignal;
}

/** A client's request, in any protocol. Not checked yet. */
export interface CompletionRequest {
  readonly model: string;
  readonly input: PromptInput;
  readonly sampling: SamplingParams | undefined;
}

/** The call that brings a request. */
export interface CompletionCall {
  readonly caller: Caller;
  /** Fires when the client leaves or its deadline passes, with the reason. */
  readonly signal: AbortSignal;
  /** By performance.now(); infinite: the caller set none. */
  readonly deadlineMs: number;
}

/** An accepted request: its record is stored. Deliver it, once. */
export interface Completion {
  readonly started: Started;
  /**
   * Hands the events to `write`, one after another: `started`, deltas, `finish`. `write` resolves when the client's
   * side has taken the event. Rejects with the request's error, or with that of `write`, which fails the request.
   */
  deliver(write: (event: RelayEvent) => Promise<void>): Promise<void>;
}

/** The length of a prompt, and its limit. */
export interface TokenCount {
  readonly promptTokens: number;
  readonly maxContextTokens: number;
}

/** The use cases. Nothing to close: the table in requests.ts holds every request. */
export class Completions {
  readonly #parts: CompletionsParts;

  constructor(parts: CompletionsParts) {
    this.#parts = parts;
  }

  /** Admits a request and has it recorded. Fails as admission does, or because the record cannot be stored. */
  async start(request: CompletionRequest, call: CompletionCall): Promise<Completion> {
    const receivedMs = performance.now();
    const { open, started } = await this.#accept(request, call);
    const { relay, recorded } = open;
    const stay = failOnAbort(relay, call.signal);
    try {
      await recorded;
    } catch (error) {
      stay();
      throw error;
    }
    return {
      started,
      deliver: async (write) => {
        try {
          await relay.deliver(started, this.#timed(started.model, receivedMs, write));
        } catch (error) {
          relay.fail(ClusterError.from(error));
          throw error;
        } finally {
          stay();
        }
      },
    };
  }

  /** Ends a request of the caller's tenant, here or in another gateway; false if there is none of that id. */
  cancel(requestId: string, { tenant }: Caller): Promise<boolean> {
    return this.#parts.requests.cancel({ requestId, tenant });
  }

  /** Counts the tokens of a prompt of any length. Fails if the prompt is invalid. */
  async countTokens(
    { model: name, input }: Pick<CompletionRequest, 'model' | 'input'>,
    { caller, signal }: Pick<CompletionCall, 'caller' | 'signal'>,
  ): Promise<TokenCount> {
    const { model, facts } = this.#versionFor(caller, name);
    const by = { tenant: caller.tenant, maxTokens: Number.POSITIVE_INFINITY, signal };
    const { tokenIds, problems } = await this.#readPrompt(input, { model, facts, for: by });
    assertNone(problems);
    return { promptTokens: tokenIds.length, maxContextTokens: facts.maxContextTokens };
  }

  /** The models that the caller may use. */
  listModels(caller: Caller): Model[] {
    const { models, groups } = this.#parts;
    const nowMs = performance.now();
    return models
      .all()
      .filter(({ name }) => mayUse(caller, name))
      .map((model) => {
        const { name, maxContextTokens, draftTokens } = factsOf(model, groups.alive(model.name, nowMs));
        return { name, maxContextTokens, draftTokens, readyGroups: groups.ready(name, nowMs).length };
      });
  }

  /** Separate from the delivery, so that the client's message is not kept in memory while the request waits. */
  async #accept(
    { model: name, input, sampling }: CompletionRequest,
    { caller, signal, deadlineMs }: CompletionCall,
  ): Promise<{ readonly open: OpenRequest; readonly started: Started }> {
    const { requests, gatewayId } = this.#parts;
    assertPlace(requests, this.#parts);
    const { model, identity, facts } = this.#versionFor(caller, name);
    const by = { tenant: caller.tenant, maxTokens: facts.maxContextTokens - 1, signal };
    const prompt = await this.#readPrompt(input, { model, facts, for: by });
    const record = admitRequest(prompt, sampling, {
      facts,
      requestId: randomUUID(),
      tenant: caller.tenant,
      gatewayId,
      identity,
      seed: randomInt(2 ** 32),
      timeLeftMs: timeLeftMs(deadlineMs),
    });
    const open = requests.open(record, {
      tokenTable: model.tokenTable,
      stop: record.sampling?.stop ?? [],
      stopInReasoning: record.sampling?.stopInReasoning ?? false,
      minTokens: record.sampling?.minTokens ?? 0,
      reasoning: input.kind === 'chat' ? { begun: prompt.begun } : undefined,
    });
    const { requestId, promptTokenIds } = record;
    const seed = record.sampling?.seed ?? 0;
    return { open, started: { requestId, model: model.name, promptTokens: promptTokenIds.length, seed } };
  }

  /** Writes events, and measures when those with tokens have been taken. */
  #timed(
    model: string,
    receivedMs: number,
    write: (event: RelayEvent) => Promise<void>,
  ): (event: RelayEvent) => Promise<void> {
    const { metrics } = this.#parts;
    const labels = { model };
    let lastWriteMs: number | undefined;
    return async (event) => {
      await write(event);
      if (event.$case === 'delta' && event.value.tokenIds.length > 0) {
        const nowMs = performance.now();
        if (lastWriteMs === undefined) {
          metrics.timeToFirstToken(nowMs - receivedMs, labels);
        } else {
          metrics.interTokenLatency(nowMs - lastWriteMs, labels);
        }
        lastWriteMs = nowMs;
        metrics.completionTokens(labels, event.value.tokenIds.length);
      }
    };
  }

  /** Checks a prompt, and tokenises it if it is valid. */
  async #readPrompt(
    input: PromptInput,
    by: { readonly model: ServedModel; readonly facts: ModelFacts; readonly for: EncodeFor },
  ): Promise<ReadPrompt> {
    const { kind } = input;
    const problems = checkPrompt(input, { facts: by.facts, promptMaxBytes: this.#parts.promptMaxBytes });
    const nothing = { kind, tokenIds: [], begun: '' };
    if (problems.length > 0) {
      return { ...nothing, problems };
    }
    try {
      return { kind, ...(await by.model.encoder.encode(input, by.for)), problems };
    } catch (error) {
      if (error instanceof TooManyTokensError) {
        return { ...nothing, problems: [tooManyTokens(input, error.leastTokens, by.facts)] };
      }
      throw error;
    }
  }

  /** The version of a model that a request is bound to, and its limits. */
  #versionFor(
    caller: Caller,
    name: string,
  ): { readonly model: ServedModel; readonly identity: string; readonly facts: ModelFacts } {
    const { models, groups, openGroups } = this.#parts;
    const newest = models.get(name);
    if (newest === undefined) {
      throw this.#unserved(caller, name);
    }
    assertMayUse(caller, name);
    const versions = models.versions(name) ?? [newest];
    const { version, identity } = chooseVersion(versions, openGroups(name), Math.random());
    const alive = groups
      .alive(name, performance.now())
      .filter((group) => identity === '' || group.identity === identity);
    return { model: version, identity, facts: factsOf(version, alive) };
  }

  /** The error for a name that is not served: retry later if the model is loading, else a list of the served models. */
  #unserved(caller: Caller, name: string): ClusterError {
    const { models } = this.#parts;
    const shown = JSON.stringify(name.slice(0, 200));
    if (models.mayCome(name)) {
      const text = `model ${shown} is not loaded here yet`;
      return new ClusterError('unavailable', text, { detail: { retryAfterMs: 1_000 } });
    }
    const known = models
      .all()
      .filter((model) => mayUse(caller, model.name))
      .map((model) => model.name);
    const there =
      known.length === 0
        ? 'no model exists yet: create a ModelService, or set MIMO_GATEWAY_MODELS'
        : `available: ${known.join(', ')}`;
    return new ClusterError('not_found', `model ${shown} is not served here; ${there}`);
  }
}

/** Fails the request when the signal fires. Call the result to stop listening. */
function failOnAbort(relay: Relay, signal: AbortSignal): () => void {
  const fail = (): void => relay.fail(ClusterError.from(signal.reason));
  signal.addEventListener('abort', fail, { once: true });
  if (signal.aborted) {
    fail();
  }
  return () => signal.removeEventListener('abort', fail);
}

/** Whole milliseconds, as they are recorded. */
function timeLeftMs(deadlineMs: number): number | undefined {
  return deadlineMs === Number.POSITIVE_INFINITY
    ? undefined
    : Math.ceil(Math.max(0, deadlineMs - performance.now()));
}
