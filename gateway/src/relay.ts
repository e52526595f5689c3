// The life of one request in its gateway: waiting -> running -> ended, possibly back to waiting while nothing has been
// delivered. Owns the client's stream: contiguous indices, frames of older attempts dropped, text, stop texts, credit, and
// that the request ends exactly once. Knows neither the queue nor gRPC: it is handed a session and a `write`.
//
// INVARIANT: the indices of the deltas written are contiguous from 0; after the end nothing is written.

import { ClusterError, isErrorCode } from '@mimo/core/errors';
import type { Delta, Finish, Usage } from '@mimo/proto/inference';
import type { RequestRecord } from '@mimo/proto/queue';
import { FinishReason } from '@mimo/proto/sampling';
import { FinishKind, type SequenceDelta, type SequenceFinish } from '@mimo/proto/worker';

import { CompletionText, type CompletionTextOptions, type TextDelta } from './completion-text.ts';
import type { SequenceHandle, SequenceListener, Session } from './session.ts';

/** One message to the client. */
export type RelayEvent =
  | { readonly $case: 'delta'; readonly value: Delta }
  | { readonly $case: 'finish'; readonly value: Finish };

/** How a request ended. */
export type RelayEnd =
  | { readonly kind: 'finish'; readonly finish: Finish }
  | { readonly kind: 'error'; readonly error: ClusterError };

/** Where an attempt runs. */
export interface AttemptPlace {
  readonly group: string;
  readonly incarnation: string;
}

/** What its owner hears from a relay. */
export interface RelayListener {
  /** The attempt failed before anything was delivered: the request waits for another group. */
  onRequeued(): void;
  /** Once. */
  onEnded(end: RelayEnd): void;
}

/** Tokens that a sequence may be ahead of its client: enough to hide a round trip, small beside a KV cache. */
const creditWindowTokens = 256;
/** Credit is given back in portions, so that it costs a message every so often and not one a token. */
const creditPortionTokens = 64;
/** A request that was with this many groups when they broke is not given to a further one: it may be what breaks them. */
const maxAttempts = 2;

/** One request. Its owner begins attempts, cancels it, and relays with `deliver`. */
export class Relay {
  readonly record: RequestRecord;
  readonly #listener: RelayListener;
  readonly #text: CompletionText;
  #attempt:
    | { readonly epoch: number; readonly place: AttemptPlace; readonly handle: SequenceHandle }
    | undefined;
  #epoch = 0;
  #brokenAttempts = 0;
  #nextIndex = 0;
  #owedCreditTokens = 0;
  /** Set when a stop text was found: what is left is the engine's last word on this sequence. */
  #matchedStop: string | undefined;
  #pending: Delta | undefined;
  #end: RelayEnd | undefined;
  #wake: (() => void) | undefined;

  constructor(record: RequestRecord, text: CompletionTextOptions, listener: RelayListener) {
    this.record = record;
    this.#text = new CompletionText(text);
    this.#listener = listener;
  }

  /** Where it runs; undefined while it waits, and once it has ended. */
  get place(): AttemptPlace | undefined {
    return this.#attempt?.place;
  }

  /** The number of the latest attempt: the epoch of its frames. 0: none yet. */
  get epoch(): number {
    return this.#epoch;
  }

  get ended(): boolean {
    return this.#end !== undefined;
  }

  /** Completion tokens handed over to the client's side. */
  get completionTokens(): number {
    return this.#nextIndex;
  }

  /** Begins an attempt on a group. Only while it waits. */
  begin(session: Pick<Session, 'submit' | 'target'>): void {
    this.#epoch += 1;
    const epoch = this.#epoch;
    const { requestId, promptTokenIds, sampling, deadlineUnixMs } = this.record;
    const current = (): boolean => this.#attempt?.epoch === epoch;
    const listener: SequenceListener = {
      onDelta: (delta) => {
        try {
          if (current()) {
            this.#receive(delta);
          }
        } catch (error) {
          // Such as a token that the tokenizer does not know: this request's trouble, not the whole session's.
          this.fail(new ClusterError('internal', 'a frame could not be relayed', { cause: error }));
        }
      },
      onLost: (error, begun) => {
        if (current()) {
          this.#lose(error, begun);
        }
      },
    };
    const handle = session.submit(
      {
        requestId,
        epoch,
        tokenIds: promptTokenIds,
        resumedTokens: 0,
        sampling,
        deadlineUnixMs,
        creditTokens: creditWindowTokens,
      },
      listener,
    );
    const { group, incarnation } = session.target;
    this.#attempt = { epoch, place: { group, incarnation }, handle };
  }

  /** Ends the request with an error, unless it has ended; the engine frees its sequence. */
  fail(error: ClusterError): void {
    this.#finish({ kind: 'error', error });
  }

  /** Relays until the end. Rejects with the request's error, or with that of `write`, which fails the request. */
  async deliver(write: (event: RelayEvent) => Promise<void>): Promise<void> {
    for (;;) {
      const delta = this.#pending;
      if (delta !== undefined) {
        this.#pending = undefined;
        await write({ $case: 'delta', value: delta });
        this.#giveCredit(delta.tokenIds.length);
      } else if (this.#end === undefined) {
        const { promise, resolve } = Promise.withResolvers<void>();
        this.#wake = resolve;
        await promise;
      } else if (this.#end.kind === 'finish') {
        await write({ $case: 'finish', value: this.#end.finish });
        return;
      } else {
        throw this.#end.error;
      }
    }
  }

  #giveCredit(tokens: number): void {
    this.#owedCreditTokens += tokens;
    if (this.#owedCreditTokens >= creditPortionTokens) {
      this.#attempt?.handle.grant(this.#owedCreditTokens);
      this.#owedCreditTokens = 0;
    }
  }

  #receive(delta: SequenceDelta): void {
    if (this.#matchedStop === undefined && delta.tokenIds.length > 0) {
      if (delta.index !== this.#nextIndex) {
        this.fail(
          new ClusterError(
            'internal',
            `a frame at index ${delta.index} came where ${this.#nextIndex} is next`,
          ),
        );
        return;
      }
      const text = this.#text.push(delta.tokenIds);
      this.#append(delta, text);
      if (text.stop !== undefined) {
        this.#matchedStop = text.stop;
        this.#attempt?.handle.abort();
      }
    }
    if (delta.finish !== undefined) {
      this.#close(delta.finish);
    }
  }

  /** Adds to the delta that waits to be written: a client that reads slowly gets fewer and larger messages. */
  #append(from: Pick<SequenceDelta, 'tokenIds' | 'logprobs'>, { text, reasoning, tokens }: TextDelta): void {
    const tokenIds = from.tokenIds.slice(0, tokens);
    const logprobs = from.logprobs.slice(0, tokens);
    if (this.#pending === undefined) {
      this.#pending = { index: this.#nextIndex, tokenIds, logprobs, text, reasoning };
    } else {
      this.#pending.tokenIds.push(...tokenIds);
      this.#pending.logprobs.push(...logprobs);
      this.#pending.text += text;
      this.#pending.reasoning += reasoning;
    }
    this.#nextIndex += tokens;
    this.#wake?.();
  }

  /** The engine has ended the sequence. */
  #close(last: SequenceFinish): void {
    if (this.#matchedStop !== undefined) {
      this.#finish({ kind: 'finish', finish: this.#finishOf(FinishReason.STOP, this.#matchedStop, last) });
      return;
    }
    if (last.kind === FinishKind.STOP || last.kind === FinishKind.LENGTH) {
      const rest = this.#text.end();
      if (rest.text !== '' || rest.reasoning !== '') {
        this.#append({ tokenIds: [], logprobs: [] }, rest);
      }
      const stopped = last.kind === FinishKind.STOP || rest.stop !== undefined;
      const matched = rest.stop ?? (last.kind === FinishKind.STOP ? String(last.stopTokenId) : '');
      const reason = stopped ? FinishReason.STOP : FinishReason.LENGTH;
      this.#finish({ kind: 'finish', finish: this.#finishOf(reason, matched, last) });
      return;
    }
    const asked = last.kind === FinishKind.ERROR ? last.errorCode : 'aborted';
    const code = isErrorCode(asked) ? asked : 'internal';
    const text = last.errorMessage === '' ? 'the sequence was aborted' : last.errorMessage;
    // A group that refuses is whole; one that aborts what it had taken is not.
    this.#lose(new ClusterError(code, `group ${this.#attempt?.place.group}: ${text}`), code === 'aborted');
  }

  /** The attempt is over without a result; `broke` where the group broke with the sequence in it. */
  #lose(error: ClusterError, broke: boolean): void {
    if (this.#matchedStop !== undefined) {
      // The completion is whole; only the engine's figures are lost with the group.
      this.#finish({ kind: 'finish', finish: this.#finishOf(FinishReason.STOP, this.#matchedStop) });
      return;
    }
    const retryable =
      error.code === 'unavailable' || error.code === 'aborted' || error.code === 'resource_exhausted';
    this.#brokenAttempts += broke ? 1 : 0;
    if (retryable && this.#nextIndex === 0 && this.#brokenAttempts < maxAttempts) {
      this.#attempt = undefined;
      this.#owedCreditTokens = 0;
      this.#listener.onRequeued();
      return;
    }
    const lost = retryable
      ? new ClusterError('aborted', `lost after ${this.#nextIndex} completion tokens: ${error.message}`, {
          cause: error,
          detail: { retryAfterMs: 1_000 },
        })
      : error;
    this.#finish({ kind: 'error', error: lost });
  }

  #finishOf(reason: FinishReason, matchedStop: string, last?: SequenceFinish): Finish {
    const usage: Usage = {
      promptTokens: this.record.promptTokenIds.length,
      completionTokens: this.#nextIndex,
    };
    const speculation = {
      draftedTokens: last?.draftedTokens ?? 0,
      acceptedTokens: last?.acceptedTokens ?? 0,
    };
    return { reason, matchedStop, usage, speculation };
  }

  #finish(end: RelayEnd): void {
    if (this.#end !== undefined) {
      return;
    }
    this.#end = end;
    this.#attempt?.handle.abort();
    this.#attempt = undefined;
    this.#wake?.();
    this.#listener.onEnded(end);
  }
}
