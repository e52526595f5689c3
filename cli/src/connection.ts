// The cluster as a client sees it: one gRPC connection to a gateway and the calls that the commands make. Owns the
// message for an unreachable gateway.

import * as grpc from '@grpc/grpc-js';

import { ClusterError } from '@mimo/core/process/errors';
import { callServerStream, callUnary, channelOptions } from '@mimo/core/grpc/client';
import {
  InferenceServiceClient,
  InferenceServiceService,
  type ChatRequest,
  type ChatResponse,
  type Model,
} from '@mimo/proto/inference';

import { commandLine } from './command-line.ts';

/** Where `mimo up` listens. */
export const defaultAddress = '127.0.0.1:50051';
const maxReceiveBytes = 64 * 2 ** 20;

/** An open connection. Close it. */
export class Connection {
  readonly #address: string;
  readonly #client: InferenceServiceClient;
  readonly #metadata = new grpc.Metadata();

  constructor(address: string, apiKey: string | undefined) {
    this.#address = address;
    this.#client = new InferenceServiceClient(
      address,
      grpc.credentials.createInsecure(),
      channelOptions(maxReceiveBytes),
    );
    if (apiKey !== undefined) {
      this.#metadata.set('authorization', `Bearer ${apiKey}`);
    }
  }

  /** The models that the caller may use. */
  async listModels(signal: AbortSignal): Promise<readonly Model[]> {
    try {
      const method = InferenceServiceService.listModels;
      const limits = { signal, metadata: this.#metadata, request: {} };
      return (await callUnary(this.#client, method, limits)).models;
    } catch (error) {
      throw this.#explain(error);
    }
  }

  /** Streams one answer; leaving the loop or the signal cancels it. */
  async *chat(request: ChatRequest, signal: AbortSignal): AsyncGenerator<ChatResponse, void, undefined> {
    try {
      yield* callServerStream(this.#client, InferenceServiceService.chat, {
        signal,
        metadata: this.#metadata,
        request,
      });
    } catch (error) {
      throw this.#explain(error);
    }
  }

  close(): void {
    this.#client.close();
  }

  #explain(error: unknown): ClusterError {
    const known = ClusterError.from(error);
    const isReached = this.#client.getChannel().getConnectivityState(false) === grpc.connectivityState.READY;
    return known.code === 'unavailable' && !isReached
      ? new ClusterError(
          'unavailable',
          `no gateway at ${this.#address}: start one with \`${commandLine('up')}\``,
          {
            cause: error,
          },
        )
      : known;
  }
}

/**
 * Chooses the given model, else the first one with a ready group. Fails with `not_found` if the gateway has no model.
 */
export async function chooseModel(
  connection: Connection,
  asked: string | undefined,
  signal: AbortSignal,
): Promise<string> {
  if (asked !== undefined) {
    return asked;
  }
  const models = await connection.listModels(signal);
  const model = models.find(({ readyGroups }) => readyGroups > 0) ?? models[0];
  if (model === undefined) {
    throw new ClusterError('not_found', 'the gateway has no model');
  }
  return model.name;
}
