// The gRPC door: mimo.inference.v1.InferenceService. Translates messages into requests, events into messages and errors
// into statuses, counts calls by method and code, and decides nothing: completions.ts carries requests out.

import { ClusterError } from '@mimo/core/process/errors';
import {
  strictDeserializer,
  streamHandler,
  unaryHandler,
  type CallContext,
  type ServiceEntry,
} from '@mimo/core/grpc/handlers';
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
} from '@mimo/proto/inference';
import { requestLimits } from '@mimo/proto/limits';

import type { Authenticate, Caller } from '../admission/auth.ts';
import type { CompletionCall, CompletionRequest, Completions } from '../completions.ts';
import type { GatewayMetrics } from '../metrics.ts';
import type { RelayEvent } from '../relay.ts';

/** The door's dependencies. */
export interface GrpcDoorParts {
  readonly completions: Completions;
  readonly authenticate: Authenticate;
  readonly metrics: Pick<GatewayMetrics, 'requests'>;
}

/** The service's methods. A request with a field over its limit is rejected before it is decoded into objects. */
const definition: ServiceEntry['definition'] = {
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
};

/** The service, ready to be registered with a server. */
export function createInferenceService({ completions, authenticate, metrics }: GrpcDoorParts): ServiceEntry {
  const counted = async <T>(method: string, serve: () => Promise<T>): Promise<T> => {
    try {
      const result = await serve();
      metrics.requests({ method, code: 'ok' });
      return result;
    } catch (error) {
      metrics.requests({ method, code: ClusterError.from(error).code });
      throw error;
    }
  };
  const callerOf = ({ metadata }: CallContext): Caller =>
    authenticate(metadata.get('authorization')[0]?.toString());
  const callOf = (context: CallContext): CompletionCall => ({
    caller: callerOf(context),
    signal: context.signal,
    deadlineMs: context.deadlineMs,
  });
  const complete = async (
    request: CompletionRequest,
    context: CallContext,
    write: (event: RelayEvent) => Promise<void>,
  ): Promise<void> => {
    const completion = await completions.start(request, callOf(context));
    await completion.deliver(write);
  };
  return {
    definition,
    implementation: {
      chat: streamHandler<ChatRequest, ChatResponse>((request, context, write) =>
        counted('chat', () => complete(chatOf(request), context, (event) => write({ event }))),
      ),
      generate: streamHandler<GenerateRequest, GenerateResponse>((request, context, write) =>
        counted('generate', () => complete(generationOf(request), context, (event) => write({ event }))),
      ),
      cancel: unaryHandler<CancelRequest, CancelResponse>(({ requestId }, context) =>
        counted('cancel', async () => ({
          cancelled: await completions.cancel(requestId, callerOf(context)),
        })),
      ),
      countTokens: unaryHandler<CountTokensRequest, CountTokensResponse>((request, context) =>
        counted('countTokens', async () => {
          const call = callOf(context);
          return completions.countTokens(countedOf(request), call);
        }),
      ),
      listModels: unaryHandler<ListModelsRequest, ListModelsResponse>((_request, context) =>
        counted('listModels', async () => ({ models: completions.listModels(callerOf(context)) })),
      ),
    },
  };
}

function chatOf({ model, messages, sampling }: ChatRequest): CompletionRequest {
  return { model, input: { kind: 'chat', messages }, sampling };
}

function generationOf({ model, input, sampling }: GenerateRequest): CompletionRequest {
  if (input === undefined) {
    return { model, input: { kind: 'none' }, sampling };
  }
  return input.$case === 'prompt'
    ? { model, input: { kind: 'text', text: input.value }, sampling }
    : { model, input: { kind: 'tokens', tokenIds: input.value.ids }, sampling };
}

function countedOf({ request }: CountTokensRequest): CompletionRequest {
  if (request === undefined) {
    const description = 'must contain chat or generate';
    throw new ClusterError('invalid_argument', `request ${description}`, {
      detail: { fieldViolations: [{ field: 'request', description }] },
    });
  }
  return request.$case === 'chat' ? chatOf(request.value) : generationOf(request.value);
}
