// Prompts -> token ids, without holding up the streams: short ones at once, long ones in a thread of their own, one after
// another. Owns that thread and its queue; what tokenising is lies in @mimo/tokenizer, what a prompt may be in admission.ts.

import { Worker } from 'node:worker_threads';

import { beforeAbort } from '@mimo/core/abort';
import { ClusterError, type ErrorCode } from '@mimo/core/errors';
import {
  defaultChatTemplate,
  encodeChat,
  loadTokenizer,
  parseChatTemplate,
  type ChatTemplate,
  type Tokenizer,
} from '@mimo/tokenizer';

import { continuesLast, conversationOf, promptCost, type PromptInput } from './admission.ts';

/** A prompt's ids, and what of the completion's text it already holds. */
export interface EncodedPrompt {
  readonly tokenIds: readonly number[];
  readonly begun: string;
}

/** A thread's answer to one prompt. */
export type EncodeReply = EncodedPrompt | { readonly code: ErrorCode; readonly message: string };

/** 4,096 characters of prose take 8 ms at most the first time; a thread's round trip is below one. */
const inlineMaxCharacters = 4_096;

/** Loads the encoder of the checkpoint in a directory; fails as `loadTokenizer` does. */
export async function loadPromptEncoder(directory: string): Promise<PromptEncoder> {
  const tokenizer = await loadTokenizer(directory);
  const template = parseChatTemplate(tokenizer.chatTemplate ?? defaultChatTemplate);
  return new PromptEncoder({ directory, tokenizer, template });
}

/** One model's encoder. Close it to stop its thread. */
export class PromptEncoder {
  readonly tokenizer: Tokenizer;
  readonly #template: ChatTemplate;
  readonly #directory: string;
  #thread: Worker | undefined;
  /** Resolves when the prompts before have been encoded. */
  #turn: Promise<unknown> = Promise.resolve();

  constructor(parts: {
    readonly directory: string;
    readonly tokenizer: Tokenizer;
    readonly template: ChatTemplate;
  }) {
    this.tokenizer = parts.tokenizer;
    this.#template = parts.template;
    this.#directory = parts.directory;
  }

  /**
   * The ids of a prompt that was checked. Fails with `invalid_argument` where the template refuses the messages; rejects
   * with the signal's reason where that fires first: a prompt that waits for the thread is not encoded any more.
   */
  async encode(input: PromptInput, signal: AbortSignal): Promise<EncodedPrompt> {
    if (promptCost(input) <= inlineMaxCharacters) {
      return this.encodeHere(input);
    }
    const turn = this.#turn.then(() => (signal.aborted ? undefined : this.#encodeThere(input)));
    this.#turn = turn.catch(() => undefined);
    const reply = await beforeAbort(turn, signal);
    if (reply === undefined || 'code' in reply) {
      throw new ClusterError(reply?.code ?? 'canceled', reply?.message ?? 'the prompt was not encoded');
    }
    return reply;
  }

  /** The same on the calling thread, whatever its length. */
  encodeHere(input: PromptInput): EncodedPrompt {
    switch (input.kind) {
      case 'chat':
        return encodeChat(this.tokenizer, this.#template, conversationOf(input.messages), {
          continueLast: continuesLast(input.messages),
        });
      case 'text':
        return { tokenIds: this.tokenizer.encode(input.text, { allowSpecial: true }), begun: '' };
      case 'tokens':
        return { tokenIds: input.tokenIds, begun: '' };
      case 'none':
      default:
        return { tokenIds: [], begun: '' };
    }
  }

  /** Stops the thread once the prompts before have been encoded. */
  async retire(): Promise<void> {
    await this.#turn;
    await this.close();
  }

  /** Stops the thread at once; who waits for it gets `unavailable`. */
  async close(): Promise<void> {
    await this.#thread?.terminate();
  }

  async #encodeThere(input: PromptInput): Promise<EncodeReply> {
    this.#thread ??= this.#startThread();
    const thread = this.#thread;
    const { promise, resolve, reject } = Promise.withResolvers<EncodeReply>();
    const fail = (): void => reject(new ClusterError('unavailable', 'the tokenizer thread ended'));
    thread.once('message', resolve);
    thread.once('exit', fail);
    thread.ref();
    thread.postMessage(input);
    try {
      return await promise;
    } finally {
      thread.off('message', resolve);
      thread.off('exit', fail);
      thread.unref();
    }
  }

  #startThread(): Worker {
    const thread = new Worker(new URL('./prompt-encoder-thread.ts', import.meta.url), {
      workerData: { directory: this.#directory },
    });
    const forget = (): void => {
      if (this.#thread === thread) {
        this.#thread = undefined;
      }
    };
    thread.on('exit', forget);
    // The exit that follows tells whoever waits.
    thread.on('error', forget);
    return thread;
  }
}
