// One model's prompts -> token ids. Owns the model's readers (prompt-reader.ts), which run its template and tokenizer
// in separate processes, and the queue for them (prompt-queue.ts). prompt-input.ts defines prompts. A model whose
// template or tokenizer loops or exhausts the memory harms only its own callers.

import { beforeAbort } from '@mimo/core/process/abort';
import { ClusterError } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';
import { createTokenTable, TooManyTokensError, type TokenTable } from '@mimo/tokenizer';

import { promptCost, type PromptInput } from '../admission/prompt-input.ts';
import type { GatewayMetrics } from '../metrics.ts';
import type { EncodedPrompt, ReaderMessage, ReadPromptMessage } from './prompt-messages.ts';
import { PromptQueue } from './prompt-queue.ts';
import { startPromptReader, type PromptReader } from './prompt-reader.ts';

/** Limits and dependencies of an encoder. */
export interface PromptEncoderOptions {
  /** At most this many readers of a model. */
  readonly maxReaders: number;
  /** For one prompt: template and tokenizer together. */
  readonly timeoutMs: number;
  readonly metrics: Pick<GatewayMetrics, 'promptFailures' | 'promptTime'>;
  readonly log: Log;
}

/** The prompt's tenant, and its limits. */
export interface EncodeFor {
  readonly tenant: string;
  readonly maxTokens: number;
  readonly signal: AbortSignal;
}

interface Waiting {
  readonly message: ReadPromptMessage;
  readonly promise: Promise<EncodedPrompt>;
  readonly resolve: (prompt: EncodedPrompt) => void;
  readonly reject: (error: unknown) => void;
}

/** Waiting prompts take memory: limits of their number and letters, per tenant and in total. Only attacks need more. */
const waitingMax = {
  tenant: { prompts: 4_096, cost: 32 * 2 ** 20 },
  all: { prompts: 16_384, cost: 128 * 2 ** 20 },
} as const;
/** A reader beyond the first is ended after being idle for this long, to free its memory. */
const idleMs = 600_000;

/** Starts the first reader of a model, with the files in `directory`; fails as `startPromptReader` does. */
export async function loadPromptEncoder(
  model: string,
  directory: string,
  options: PromptEncoderOptions,
): Promise<PromptEncoder> {
  const reader = await startPromptReader({ directory, timeoutMs: options.timeoutMs });
  return new PromptEncoder({ model, directory, reader, options });
}

/** One model's encoder. Close it to end its processes. */
export class PromptEncoder {
  readonly tokenTable: TokenTable;
  readonly #model: string;
  readonly #directory: string;
  readonly #options: PromptEncoderOptions;
  readonly #queue: PromptQueue<Waiting>;
  readonly #idle: PromptReader[] = [];
  readonly #readers = new Set<PromptReader>();
  readonly #waiting = new Set<Waiting>();
  #starting: Promise<void> | undefined;
  #idleTimer: NodeJS.Timeout | undefined;
  #closed = false;

  constructor(parts: {
    readonly model: string;
    readonly directory: string;
    readonly reader: PromptReader;
    readonly options: PromptEncoderOptions;
  }) {
    this.tokenTable = createTokenTable(parts.reader.tokenTable);
    this.#model = parts.model;
    this.#directory = parts.directory;
    this.#options = parts.options;
    this.#queue = new PromptQueue(parts.options.maxReaders);
    this.#add(parts.reader);
  }

  /**
   * The token ids of a checked prompt. Fails with `invalid_argument` if the template rejects the messages,
   * `TooManyTokensError` over the limit, `resource_exhausted` if too many prompts wait, `failed_precondition` if the
   * template or tokenizer times out or crashes. Leaves the queue and rejects with the signal's reason if that fires
   * first.
   */
  async encode(input: PromptInput, { tenant, maxTokens, signal }: EncodeFor): Promise<EncodedPrompt> {
    if (input.kind === 'tokens' || input.kind === 'none') {
      return { tokenIds: input.kind === 'tokens' ? input.tokenIds : [], begun: '' };
    }
    if (input.kind === 'text' && this.tokenTable.leastTokens(input.text) > maxTokens) {
      throw new TooManyTokensError(this.tokenTable.leastTokens(input.text), maxTokens);
    }
    signal.throwIfAborted();
    const cost = promptCost(input);
    this.#assertRoom(tenant, cost);
    const { promise, resolve, reject } = Promise.withResolvers<EncodedPrompt>();
    const waiting: Waiting = { message: { input, maxTokens }, promise, resolve, reject };
    const leave = this.#queue.add({ tenant, cost }, waiting);
    this.#waiting.add(waiting);
    const beganMs = performance.now();
    this.#pump();
    try {
      return await beforeAbort(promise, signal);
    } finally {
      leave();
      this.#waiting.delete(waiting);
      this.#options.metrics.promptTime(performance.now() - beganMs, { model: this.#model });
    }
  }

  /** Ends the readers once the waiting prompts have been read. */
  async retire(): Promise<void> {
    while (this.#waiting.size > 0) {
      await Promise.allSettled([...this.#waiting].map(({ promise }) => promise));
    }
    await this.close();
  }

  /** Ends the readers at once; waiting prompts fail with `unavailable`. */
  async close(): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#idleTimer);
    for (const { reject } of this.#waiting) {
      reject(new ClusterError('unavailable', `model ${this.#model} is no longer served here`));
    }
    await Promise.all([...this.#readers].map((reader) => reader.close()));
    await this.#starting;
  }

  #assertRoom(tenant: string, cost: number): void {
    if (this.#closed) {
      throw new ClusterError('unavailable', `model ${this.#model} is no longer served here`);
    }
    const full = (seen: { prompts: number; cost: number }, max: { prompts: number; cost: number }): boolean =>
      seen.prompts >= max.prompts || seen.cost + cost > max.cost;
    const own = this.#queue.waiting(tenant);
    if (full(own, waitingMax.tenant) || full(this.#queue.waiting(), waitingMax.all)) {
      const text = `too many prompts are waiting for model ${this.#model}: ${own.prompts} of this tenant`;
      throw new ClusterError('resource_exhausted', text, { detail: { retryAfterMs: 1_000 } });
    }
  }

  /** Assigns waiting prompts to idle readers, and starts one more reader if a prompt could use it. */
  #pump(): void {
    while (this.#idle.length > 0) {
      const taken = this.#queue.take(this.#readers.size);
      const reader = taken === undefined ? undefined : this.#idle.pop();
      if (taken === undefined || reader === undefined) {
        break;
      }
      void this.#read(reader, taken.item).finally(() => {
        taken.done();
        this.#pump();
      });
    }
    if (this.#queue.hasTurn(this.#readers.size + 1)) {
      this.#start();
    }
    this.#watchIdle();
  }

  async #read(reader: PromptReader, { message, resolve, reject }: Waiting): Promise<void> {
    const beganMs = performance.now();
    const reply = await reader.read(message);
    if (reply === undefined || reply.kind === 'timed out' || reply.kind === 'loaded') {
      await reader.close();
      if (!this.#closed) {
        reject(this.#failure(reply, performance.now() - beganMs));
      }
      return;
    }
    this.#idle.push(reader);
    switch (reply.kind) {
      case 'read':
        resolve(reply.prompt);
        break;
      case 'too many tokens':
        reject(new TooManyTokensError(reply.leastTokens, message.maxTokens));
        break;
      case 'failed':
        reject(new ClusterError(reply.code, reply.message));
        break;
      case 'broken':
        reject(this.#failure(reply, performance.now() - beganMs));
        break;
    }
  }

  /**
   * Counts and logs a prompt that crashed its reader, timed out or failed unexpectedly. Returns the caller's error,
   * which names the model.
   */
  #failure(reply: ReaderMessage | undefined, tookMs: number): ClusterError {
    const { timeoutMs, metrics, log } = this.#options;
    const model = this.#model;
    const stage =
      reply?.kind === 'timed out' || reply?.kind === 'broken' ? reply.stage : 'chat template or tokenizer';
    const error = reply?.kind === 'broken' ? new ClusterError('internal', reply.error) : undefined;
    const isLate = error === undefined && tookMs >= timeoutMs;
    metrics.promptFailures({ model, cause: isLate ? 'timeout' : 'crash' });
    log.warn(
      { model, stage, timeoutMs, error },
      isLate
        ? 'a prompt took too long to read'
        : error === undefined
          ? 'reading a prompt ended its process'
          : 'reading a prompt failed',
    );
    const what = isLate
      ? `did not finish within ${timeoutMs} ms`
      : 'failed, for example because it ran out of memory';
    return new ClusterError(
      'failed_precondition',
      `model ${model} cannot read this prompt: its ${stage} ${what}`,
    );
  }

  #add(reader: PromptReader): void {
    this.#readers.add(reader);
    this.#idle.push(reader);
    void this.#replaceOnceEnded(reader);
  }

  async #replaceOnceEnded(reader: PromptReader): Promise<void> {
    await reader.ended;
    this.#readers.delete(reader);
    const index = this.#idle.indexOf(reader);
    if (index >= 0) {
      this.#idle.splice(index, 1);
    }
    if (this.#readers.size === 0) {
      this.#start();
    }
  }

  #start(): void {
    if (this.#closed || this.#starting !== undefined || this.#readers.size >= this.#options.maxReaders) {
      return;
    }
    const start = async (): Promise<void> => {
      try {
        const reader = await startPromptReader({
          directory: this.#directory,
          timeoutMs: this.#options.timeoutMs,
        });
        if (this.#closed) {
          await reader.close();
          return;
        }
        this.#add(reader);
      } catch (cause) {
        this.#startFailed(cause);
      }
    };
    this.#starting = start().finally(() => {
      this.#starting = undefined;
      this.#pump();
    });
  }

  /**
   * Rejects the waiting prompts, since a long prompt could wait for this reader forever; the next prompt tries again.
   */
  #startFailed(cause: unknown): void {
    const model = this.#model;
    this.#options.log.error({ error: ClusterError.from(cause), model }, 'cannot start a prompt reader');
    const text = `model ${model} cannot read prompts now`;
    for (const { reject } of this.#waiting) {
      reject(new ClusterError('unavailable', text, { cause, detail: { retryAfterMs: 1_000 } }));
    }
  }

  /** Ends idle readers one after another, all but the last. */
  #watchIdle(): void {
    clearTimeout(this.#idleTimer);
    if (!this.#closed && this.#idle.length > 0 && this.#readers.size > 1) {
      this.#idleTimer = setTimeout(() => {
        void this.#idle.pop()?.close();
        this.#watchIdle();
      }, idleMs);
      this.#idleTimer.unref();
    }
  }
}
