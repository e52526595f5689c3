// The gRPC door: mimo.inference.v1.InferenceService over admission, the requests' table and the models. Owns who may call,
// how a stream begins and ends, and the metrics of calls; every check of a request's content is in admission.ts.

import { randomInt, randomUUID } from 'node:crypto';

import type * as grpc from '@grpc/grpc-js';

import { ClusterError } from '@mimo/core/process/errors';
import {
  strictDeserializer,
  streamHandler,
  unaryHandler,
  type CallContext,
  type ServiceEntry,
} from '@mimo/core/grpc/server';
import {
  CancelRequest,
  ChatRequest,
  CountTokensRequest,
  GenerateRequest,
  InferenceServiceService,
  ListModelsRequest,
  type CancelResponse,
  type ChatResponse,
  type CountTokensResponse,
  type GenerateResponse,
  type ListModelsResponse,
  type Started,
} from '@mimo/proto/inference';
import { requestLimits } from '@mimo/proto/limits';
import type { SamplingParams } from '@mimo/proto/sampling';
import type { Heartbeat } from '@mimo/proto/worker';
import { TooManyTokensError } from '@mimo/tokenizer';

import {
  admitRequest,
  assertNone,
  checkPrompt,
  type ModelFacts,
  type PromptInput,
  tooManyTokens,
  type ReadPrompt,
} from '../admission/admission.ts';
import { assertMayUse, type Authenticate, type Caller } from '../admission/auth.ts';
import type { Groups } from '../dispatcher/groups.ts';
import type { GatewayMetrics } from '../metrics.ts';
import { factsOf, type ServedModel } from '../models.ts';
import type { EncodeFor } from '../prompts/prompt-encoder.ts';
import type { OpenRequest, Requests } from '../requests.ts';
import type { ServedModels } from '../served-models.ts';
import { chooseVersion } from '../version-choice.ts';

/** What the door works with. `stopping` fires when new requests are to be refused. */
export interface InferenceServiceParts {
  readonly gatewayId: string;
  readonly models: ServedModels;
  readonly groups: Groups;
  /** The groups of a model that take requests. */
  readonly openGroups: (model: string) => readonly Heartbeat[];
  readonly requests: Requests;
  readonly authenticate: Authenticate;
  readonly metrics: GatewayMetrics;
  readonly promptMaxBytes: number;
  readonly maxRequests: number;
  readonly stopping: AbortSignal;
}

type StreamEvent = NonNullable<ChatResponse['event']>;

interface Completion {
  readonly model: string;
  readonly input: PromptInput;
  readonly sampling: SamplingParams | undefined;
}

/** The service, ready to be registered with a server. */
export function createInferenceService(parts: InferenceServiceParts): ServiceEntry {
  const counted = async <T>(method: string, serve: () => Promise<T>): Promise<T> => {
    try {
      const result = await serve();
      parts.metrics.requests({ method, code: 'ok' });
      return result;
    } catch (error) {
      parts.metrics.requests({ method, code: ClusterError.from(error).code });
      throw error;
    }
  };
  return {
    definition: {
      chat: {
        ...InferenceServiceService.chat,
        requestDeserialize: strictDeserializer(ChatRequest, requestLimits.ChatRequest),
      },
      generate: {
        ...InferenceServiceService.generate,
        requestDeserialize: strictDeserializer(GenerateRequest, requestLimits.GenerateRequest),
      },
      cancel: {
        ...InferenceServiceService.cancel,
        requestDeserialize: strictDeserializer(CancelRequest, requestLimits.CancelRequest),
      },
      countTokens: {
        ...InferenceServiceService.countTokens,
        requestDeserialize: strictDeserializer(CountTokensRequest, requestLimits.CountTokensRequest),
      },
      listModels: {
        ...InferenceServiceService.listModels,
        requestDeserialize: strictDeserializer(ListModelsRequest, requestLimits.ListModelsRequest),
      },
    },
    implementation: {
      chat: streamHandler<ChatRequest, ChatResponse>((request, context, write) =>
        counted('chat', () => complete(parts, chatOf(request), context, (event) => write({ event }))),
      ),
      generate: streamHandler<GenerateRequest, GenerateResponse>((request, context, write) =>
        counted('generate', () =>
          complete(parts, generationOf(request), context, (event) => write({ event })),
        ),
      ),
      cancel: unaryHandler<CancelRequest, CancelResponse>((request, context) =>
        counted('cancel', async () => {
          const { tenant } = callerOf(parts, context.metadata);
          return { cancelled: await parts.requests.cancel({ requestId: request.requestId, tenant }) };
        }),
      ),
      countTokens: unaryHandler<CountTokensRequest, CountTokensResponse>((request, context) =>
        counted('countTokens', async () => countTokens(parts, request, context)),
      ),
      listModels: unaryHandler<ListModelsRequest, ListModelsResponse>((_request, context) =>
        counted('listModels', async () => listModels(parts, context)),
      ),
    },
  };
}

function chatOf({ model, messages, sampling }: ChatRequest): Completion {
  return { model, input: { kind: 'chat', messages }, sampling };
}

function generationOf({ model, input, sampling }: GenerateRequest): Completion {
  if (input === undefined) {
    return { model, input: { kind: 'none' }, sampling };
  }
  return input.$case === 'prompt'
    ? { model, input: { kind: 'text', text: input.value }, sampling }
    : { model, input: { kind: 'tokens', tokenIds: input.value.ids }, sampling };
}

/** Admits a request, sends `started` once it is recorded, and relays it to its end. */
async function complete(
  parts: InferenceServiceParts,
  completion: Completion,
  context: CallContext,
  write: (event: StreamEvent) => Promise<void>,
): Promise<void> {
  const receivedMs = performance.now();
  const { open, started } = await accept(parts, completion, context);
  const { relay, recorded } = open;
  const leave = (): void => relay.fail(ClusterError.from(context.signal.reason));
  context.signal.addEventListener('abort', leave, { once: true });
  if (context.signal.aborted) {
    leave();
  }
  try {
    await recorded;
    const labels = { model: started.model };
    let lastWriteMs: number | undefined;
    await relay.deliver(started, async (event) => {
      await write(event);
      if (event.$case === 'delta' && event.value.tokenIds.length > 0) {
        const nowMs = performance.now();
        if (lastWriteMs === undefined) {
          parts.metrics.timeToFirstToken(nowMs - receivedMs, labels);
        } else {
          parts.metrics.interTokenLatency(nowMs - lastWriteMs, labels);
        }
        lastWriteMs = nowMs;
        parts.metrics.completionTokens(labels, event.value.tokenIds.length);
      }
    });
  } catch (error) {
    relay.fail(ClusterError.from(error));
    throw error;
  } finally {
    context.signal.removeEventListener('abort', leave);
  }
}

/** Admits a request and has it recorded. Apart from its relay, so that what it was made from is not held while it waits. */
async function accept(
  parts: InferenceServiceParts,
  completion: Completion,
  context: CallContext,
): Promise<{ readonly open: OpenRequest; readonly started: Started }> {
  const caller = callerOf(parts, context.metadata);
  if (parts.stopping.aborted) {
    throw new ClusterError('unavailable', 'this gateway is stopping', { detail: { retryAfterMs: 500 } });
  }
  const { requests } = parts.requests.counts();
  if (requests >= parts.maxRequests && !parts.requests.makeRoom()) {
    const text = `this gateway holds ${requests} requests; the limit is ${parts.maxRequests}`;
    throw new ClusterError('resource_exhausted', text, { detail: { retryAfterMs: 1_000 } });
  }
  const { model, identity, facts } = versionFor(parts, caller, completion.model);
  const prompt = await readPrompt(completion.input, {
    model,
    facts,
    promptMaxBytes: parts.promptMaxBytes,
    for: { tenant: caller.tenant, maxTokens: facts.maxContextTokens - 1, signal: context.signal },
  });
  const record = admitRequest(prompt, completion.sampling, {
    facts,
    requestId: randomUUID(),
    tenant: caller.tenant,
    gatewayId: parts.gatewayId,
    identity,
    seed: randomInt(2 ** 32),
    timeLeftMs: timeLeftMs(context),
  });
  const open = parts.requests.open(record, {
    tokenTable: model.tokenTable,
    stop: record.sampling?.stop ?? [],
    stopInReasoning: record.sampling?.stopInReasoning ?? false,
    minTokens: record.sampling?.minTokens ?? 0,
    reasoning: completion.input.kind === 'chat' ? { begun: prompt.begun } : undefined,
  });
  const { requestId, promptTokenIds, sampling } = record;
  const promptTokens = promptTokenIds.length;
  return { open, started: { requestId, model: model.name, promptTokens, seed: sampling?.seed ?? 0 } };
}

/** Checks a prompt and, where it is sound, tokenises it. */
async function readPrompt(
  input: PromptInput,
  by: {
    readonly model: ServedModel;
    readonly facts: ModelFacts;
    readonly promptMaxBytes: number;
    readonly for: EncodeFor;
  },
): Promise<ReadPrompt> {
  const { kind } = input;
  const problems = checkPrompt(input, by);
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

/** Whole milliseconds, as they are recorded. */
function timeLeftMs({ deadlineMs }: CallContext): number | undefined {
  return deadlineMs === Number.POSITIVE_INFINITY
    ? undefined
    : Math.ceil(Math.max(0, deadlineMs - performance.now()));
}

async function countTokens(
  parts: InferenceServiceParts,
  { request }: CountTokensRequest,
  { metadata, signal }: CallContext,
): Promise<CountTokensResponse> {
  const caller = callerOf(parts, metadata);
  if (request === undefined) {
    throw new ClusterError('invalid_argument', 'request must hold chat or generate', {
      detail: { fieldViolations: [{ field: 'request', description: 'must hold chat or generate' }] },
    });
  }
  const { model: name, input } =
    request.$case === 'chat' ? chatOf(request.value) : generationOf(request.value);
  const { model, facts } = versionFor(parts, caller, name);
  const { tokenIds, problems } = await readPrompt(input, {
    model,
    facts,
    promptMaxBytes: parts.promptMaxBytes,
    for: { tenant: caller.tenant, maxTokens: Infinity, signal },
  });
  assertNone(problems);
  return { promptTokens: tokenIds.length, maxContextTokens: facts.maxContextTokens };
}

async function listModels(
  parts: InferenceServiceParts,
  { metadata }: CallContext,
): Promise<ListModelsResponse> {
  const caller = callerOf(parts, metadata);
  const nowMs = performance.now();
  const models = parts.models
    .all()
    .filter(({ name }) => caller.models?.has(name) !== false)
    .map((model) => {
      const { name, maxContextTokens, draftTokens } = factsOf(model, parts.groups.alive(model.name, nowMs));
      return { name, maxContextTokens, draftTokens, readyGroups: parts.groups.ready(name, nowMs).length };
    });
  return { models };
}

function callerOf(parts: InferenceServiceParts, metadata: grpc.Metadata): Caller {
  return parts.authenticate(metadata.get('authorization')[0]?.toString());
}

function modelFor(parts: InferenceServiceParts, caller: Caller, name: string): ServedModel {
  const model = parts.models.get(name);
  if (model === undefined) {
    throw unservedModel(parts, caller, name);
  }
  assertMayUse(caller, name);
  return model;
}

/** The version of a model that a request is bound to, and what may be asked of it. */
function versionFor(
  parts: InferenceServiceParts,
  caller: Caller,
  name: string,
): { readonly model: ServedModel; readonly identity: string; readonly facts: ModelFacts } {
  const newest = modelFor(parts, caller, name);
  const versions = parts.models.versions(name) ?? [newest];
  const { version, identity } = chooseVersion(versions, parts.openGroups(name), Math.random());
  const alive = parts.groups
    .alive(name, performance.now())
    .filter((group) => identity === '' || group.identity === identity);
  return { model: version, identity, facts: factsOf(version, alive) };
}

/** The error for a name that is not served: to be tried again where it is on its way, with what there is where it is not. */
function unservedModel(parts: InferenceServiceParts, caller: Caller, name: string): ClusterError {
  const shown = JSON.stringify(name.slice(0, 200));
  if (parts.models.mayCome(name)) {
    const text = `model ${shown} is not loaded here yet`;
    return new ClusterError('unavailable', text, { detail: { retryAfterMs: 1_000 } });
  }
  const known = parts.models
    .all()
    .filter((model) => caller.models?.has(model.name) !== false)
    .map((model) => model.name);
  const there =
    known.length === 0
      ? 'there is no model yet: create a ModelService, or set MIMO_GATEWAY_MODELS'
      : `there is: ${known.join(', ')}`;
  return new ClusterError('not_found', `model ${shown} is not served here; ${there}`);
}
