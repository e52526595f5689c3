// The life of one request in its gateway: waiting -> running -> ended, and back to waiting if its group is lost,
// rejects it or hands it over. The next group gets the prompt and the tokens delivered so far, so the client sees only
// a pause. Owns the client's stream: contiguous indices, dropping frames of older attempts, text, stop texts, credit,
// and the guarantee that the request ends exactly once. Knows neither the queue nor gRPC: its owner passes it a session
// and a `write` function.
//
// INVARIANT: the indices of the written deltas are contiguous from 0; a written token never changes; nothing is written
// after the end.

import { ClusterError, isErrorCode } from '@mimo/core/process/errors';
import { startTimer } from '@mimo/core/process/timer';
import type { Delta, Finish, Started, Usage } from '@mimo/proto/inference';
import { Company, type Needs, type RequestRecord } from '@mimo/proto/queue';
import { FinishReason } from '@mimo/proto/sampling';
import { FinishKind, type SequenceDelta, type SequenceFinish } from '@mimo/proto/worker';

import { ClientWindow } from './client-window.ts';
import { CompletionText, type CompletionTextOptions, type TextDelta } from './completion-text.ts';
import type { SequenceHandle, SequenceListener, Session } from './session.ts';
import {
  companyFor,
  isGuilty,
  provenTokens,
  suspicionAfter,
  unsuspected,
  type LostAttempt,
} from './dispatcher/suspicion.ts';

/** One message to the client. */
export type RelayEvent =
  | { readonly $case: 'started'; readonly value: Started }
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

/** A group's offer to a request. */
export interface Offer {
  /** Its identity. */
  readonly identity: string;
  /** Its company, which no sequence joins before the request makes progress; UNSPECIFIED: no promise. */
  readonly company: Company;
  /** Whether no other sequence is known to run there now. */
  readonly isAlone: () => boolean;
}

/** A relay's callbacks to its owner. */
export interface RelayListener {
  /** The attempt is over without a result: the request waits for another group, or is parked. */
  onRequeued(attempt: LostAttempt): void;
  /** The group freed the sequence's slot because the client is behind: the request is parked. */
  onParked(): void;
  /** The client has caught up: the request waits for a group again. */
  onUnparked(): void;
  /** Its client read nothing for too long. */
  onStalled(): void;
  /** The request ended. Called once. */
  onEnded(end: RelayEnd): void;
}

interface Attempt {
  readonly epoch: number;
  readonly offer: Offer;
  readonly place: AttemptPlace;
  readonly handle: SequenceHandle;
  /** The number of completion tokens when it began. */
  readonly firstIndex: number;
  /** Tokens that it was allowed to send. */
  creditTokens: number;
  /** Speculation figures, as far as the group has reported them. */
  draftedTokens: number;
  acceptedTokens: number;
}

/** A relay's options. */
export interface RelayOptions {
  readonly text: CompletionTextOptions;
  /** The request ends if its client leaves one message unread for this long. */
  readonly stallLimitMs: number;
}

/** A record in memory while its request lives: the prompt is stored in its most compact form. */
export type HeldRecord = Omit<RequestRecord, 'promptTokenIds'> & {
  readonly promptTokenIds: Iterable<number> & { readonly length: number };
};

/**
 * One request, parked until its client has taken the first message. Its owner begins attempts, cancels it, and relays
 * with `deliver`.
 */
export class Relay {
  readonly record: HeldRecord;
  readonly #listener: RelayListener;
  readonly #text: CompletionText;
  /** The deadline by performance.now(); undefined: none. */
  readonly #deadlineMs: number | undefined;
  /** Received completion tokens, in order, whether in transit to the client or delivered. */
  readonly #tokenIds: number[] = [];
  #attempt: Attempt | undefined;
  #epoch = 0;
  #suspicion = unsuspected;
  #identity: string;
  #released = true;
  readonly #window = new ClientWindow();
  /** Sums over the ended attempts. */
  #draftedTokens = 0;
  #acceptedTokens = 0;
  /** Set when a stop text was found; the relay then only waits for the engine's last delta. */
  #matchedStop: string | undefined;
  #pending: Delta | undefined;
  #end: RelayEnd | undefined;
  #wake: (() => void) | undefined;
  /** The client is not reading or is far behind: the request has no group and should get none. */
  #isParked = true;
  /** When the client's unread message was written, by performance.now(); undefined without one. */
  #writingSinceMs: number | undefined;
  readonly #stalled = Promise.withResolvers<never>();
  readonly #stallLimitMs: number;

  constructor(record: HeldRecord, options: RelayOptions, listener: RelayListener) {
    this.record = record;
    this.#identity = record.identity;
    this.#stallLimitMs = options.stallLimitMs;
    this.#stalled.promise.catch(() => undefined);
    this.#deadlineMs = record.timeLeftMs === undefined ? undefined : performance.now() + record.timeLeftMs;
    this.#text = new CompletionText(options.text);
    this.#listener = listener;
  }

  /** The group that runs it; undefined while it waits, and once it has ended. */
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

  /** The kind of group that it needs. */
  get needs(): Needs {
    const { breaks } = this.#suspicion;
    return { identity: this.#identity, company: companyFor(this.#suspicion), breaks };
  }

  /** Whether no group holds it: it never had one, or the last one confirmed its removal. */
  get released(): boolean {
    return this.#released;
  }

  /** Whether it should get no group now, because the client does not read. */
  get isParked(): boolean {
    return this.#isParked;
  }

  /** How long the client has left the last message unread. */
  stalledMs(nowMs: number): number {
    return this.#writingSinceMs === undefined ? 0 : nowMs - this.#writingSinceMs;
  }

  /** Completion tokens passed to the client's side. */
  get completionTokens(): number {
    return this.#tokenIds.length;
  }

  /** Begins an attempt on a group, continuing from the received tokens. Call only while it waits and is not parked. */
  begin(session: Pick<Session, 'submit' | 'target'>, offer: Offer): void {
    this.#epoch += 1;
    this.#released = false;
    const epoch = this.#epoch;
    const { requestId, promptTokenIds, sampling } = this.record;
    const current = (): boolean => this.#attempt?.epoch === epoch;
    const listener: SequenceListener = {
      onDelta: (delta) => {
        try {
          if (current()) {
            this.#receive(delta);
          }
        } catch (error) {
          // For example a token unknown to the tokenizer: an error of this request, not of the whole session.
          this.fail(new ClusterError('internal', 'cannot relay a frame', { cause: error }));
        }
      },
      onLost: (error, begun) => {
        if (current()) {
          this.#lose(error, begun);
        }
      },
    };
    const firstIndex = this.#tokenIds.length;
    const onTrial = offer.company !== Company.UNSPECIFIED;
    const creditTokens = this.#window.openTokens;
    const handle = session.submit(
      {
        requestId,
        epoch,
        tokenIds: [...promptTokenIds, ...this.#tokenIds],
        resumedTokens: firstIndex,
        sampling,
        timeLeftMs: this.#timeLeftMs,
        creditTokens,
        identity: this.#identity,
        onTrial,
      },
      listener,
    );
    const { group, incarnation } = session.target;
    const place = { group, incarnation };
    const speculation = { draftedTokens: 0, acceptedTokens: 0 };
    this.#attempt = { epoch, offer, place, handle, firstIndex, creditTokens, ...speculation };
  }

  /** Ends the request with an error, unless it has ended; the engine frees its sequence. */
  fail(error: ClusterError): void {
    this.#finish({ kind: 'error', error });
  }

  /** Ends the request with an error, without waiting for its client to read. */
  stall(error: ClusterError): void {
    this.fail(error);
    this.#stalled.reject(this.#end?.kind === 'error' ? this.#end.error : error);
    this.#listener.onStalled();
  }

  /**
   * Relays until the end; `write` resolves when the client's side has taken the message. Rejects with the request's
   * error, or with that of `write`, which fails the request.
   */
  async deliver(started: Started, write: (event: RelayEvent) => Promise<void>): Promise<void> {
    await this.#write(write, { $case: 'started', value: started });
    this.#unpark();
    for (;;) {
      const delta = this.#pending;
      if (delta !== undefined) {
        this.#pending = undefined;
        await this.#write(write, { $case: 'delta', value: delta });
        this.#window.take(delta.tokenIds.length);
        this.#giveCredit();
        this.#unpark();
      } else if (this.#end === undefined) {
        const { promise, resolve } = Promise.withResolvers<void>();
        this.#wake = resolve;
        await promise;
      } else if (this.#end.kind === 'finish') {
        await this.#write(write, { $case: 'finish', value: this.#end.finish });
        return;
      } else {
        throw this.#end.error;
      }
    }
  }

  /** Writes a message. The request ends if the client does not read it within the limit. */
  async #write(write: (event: RelayEvent) => Promise<void>, event: RelayEvent): Promise<void> {
    this.#writingSinceMs = performance.now();
    const timer = startTimer(this.#stallLimitMs, () => {
      const error = new ClusterError(
        'deadline_exceeded',
        `the client read nothing for ${this.#stallLimitMs} ms (MIMO_GATEWAY_CLIENT_STALL)`,
      );
      this.stall(error);
    });
    try {
      await Promise.race([write(event), this.#stalled.promise]);
    } finally {
      timer.clear();
      this.#writingSinceMs = undefined;
    }
  }

  /** Continues if it is parked and the client has caught up. */
  #unpark(): void {
    if (this.#isParked && this.#end === undefined && !this.#window.isBehind) {
      this.#isParked = false;
      this.#listener.onUnparked();
    }
  }

  get #timeLeftMs(): number | undefined {
    return this.#deadlineMs === undefined
      ? undefined
      : Math.max(0, Math.ceil(this.#deadlineMs - performance.now()));
  }

  /** Tokens that the current attempt has added. */
  get #attemptTokens(): number {
    return this.#attempt === undefined ? 0 : this.#tokenIds.length - this.#attempt.firstIndex;
  }

  #giveCredit(): void {
    const attempt = this.#attempt;
    if (attempt !== undefined) {
      const grantedTokens = this.#window.grantTo(attempt.creditTokens - this.#attemptTokens);
      if (grantedTokens > 0) {
        attempt.creditTokens += grantedTokens;
        attempt.handle.grant(grantedTokens);
      }
    }
  }

  #receive(delta: SequenceDelta): void {
    this.#noteSpeculation(delta);
    if (delta.finish !== undefined) {
      this.#noteSpeculation(delta.finish);
    }
    if (this.#matchedStop === undefined && delta.tokenIds.length > 0) {
      const nextIndex = this.#tokenIds.length;
      if (delta.index !== nextIndex) {
        const text = `got a frame at index ${delta.index}, expected ${nextIndex}`;
        this.fail(new ClusterError('internal', text));
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

  /** Keeps the largest figures reported: the last delta of a broken group may lack them. */
  #noteSpeculation(told: Pick<SequenceFinish, 'draftedTokens' | 'acceptedTokens'>): void {
    if (this.#attempt !== undefined) {
      this.#attempt.draftedTokens = Math.max(this.#attempt.draftedTokens, told.draftedTokens);
      this.#attempt.acceptedTokens = Math.max(this.#attempt.acceptedTokens, told.acceptedTokens);
    }
  }

  /** Adds to the pending delta: a slow client gets fewer and larger messages. */
  #append(from: Pick<SequenceDelta, 'tokenIds' | 'logprobs'>, { text, reasoning, tokens }: TextDelta): void {
    const tokenIds = from.tokenIds.slice(0, tokens);
    const logprobs = from.logprobs.slice(0, tokens);
    if (this.#pending === undefined) {
      this.#pending = { index: this.#tokenIds.length, tokenIds: [...tokenIds], logprobs, text, reasoning };
    } else {
      this.#pending.tokenIds.push(...tokenIds);
      this.#pending.logprobs.push(...logprobs);
      this.#pending.text += text;
      this.#pending.reasoning += reasoning;
    }
    this.#tokenIds.push(...tokenIds);
    if (this.#tokenIds.length > 0) {
      this.#identity ||= this.#attempt?.offer.identity ?? '';
    }
    this.#window.add(tokens);
    this.#wake?.();
  }

  /** The engine has ended the sequence. */
  #close(last: SequenceFinish): void {
    this.#released = true;
    if (this.#matchedStop !== undefined) {
      this.#finish({ kind: 'finish', finish: this.#finishOf(FinishReason.STOP, this.#matchedStop) });
      return;
    }
    if (last.kind === FinishKind.STOP || last.kind === FinishKind.LENGTH) {
      const rest = this.#text.end();
      if (rest.text !== '' || rest.reasoning !== '') {
        this.#append({ tokenIds: [], logprobs: [] }, rest);
      }
      const stopped = last.kind === FinishKind.STOP || rest.stop !== undefined;
      const byToken = last.kind === FinishKind.STOP ? this.#stopOf(last.stopTokenId) : '';
      const matched = rest.stop ?? byToken;
      const reason = stopped ? FinishReason.STOP : FinishReason.LENGTH;
      this.#finish({ kind: 'finish', finish: this.#finishOf(reason, matched) });
      return;
    }
    if (last.kind === FinishKind.PARKED) {
      const kept = { broke: false, tokens: this.#attemptTokens, alone: false };
      this.#suspicion = suspicionAfter(this.#suspicion, kept);
      this.#endAttempt();
      this.#isParked = true;
      this.#listener.onParked();
      // The client may have caught up while the group's message was on its way.
      this.#unpark();
      return;
    }
    const asked = last.kind === FinishKind.ERROR ? last.errorCode : 'aborted';
    const code = isErrorCode(asked) ? asked : 'internal';
    const text = last.errorMessage === '' ? 'the sequence was aborted' : last.errorMessage;
    // A group that rejects or hands over a sequence is intact; one that aborts an accepted sequence is not.
    this.#lose(new ClusterError(code, `group ${this.#attempt?.place.group}: ${text}`), code === 'aborted');
  }

  /** The attempt ended without a result; `broke` if the group broke while it ran the sequence. */
  #lose(error: ClusterError, broke: boolean): void {
    if (this.#matchedStop !== undefined) {
      // The completion is whole without the engine's last delta.
      this.#finish({ kind: 'finish', finish: this.#finishOf(FinishReason.STOP, this.#matchedStop) });
      return;
    }
    const retryable =
      error.code === 'unavailable' || error.code === 'aborted' || error.code === 'resource_exhausted';
    if (!retryable) {
      this.#finish({ kind: 'error', error });
      return;
    }
    const { offer } = this.#attempt ?? {};
    const alone = offer?.company === Company.NONE && offer.isAlone();
    const lost = { broke, tokens: this.#attemptTokens, alone };
    this.#suspicion = suspicionAfter(this.#suspicion, lost);
    if (isGuilty(this.#suspicion)) {
      const text =
        `given up after ${this.#tokenIds.length} completion tokens, because ${this.#suspicion.breaks} groups in a row ` +
        `broke with this request before it made progress by ${provenTokens} tokens, the last with nothing else in it: ` +
        error.message;
      this.#finish({ kind: 'error', error: new ClusterError('aborted', text, { cause: error }) });
      return;
    }
    this.#endAttempt();
    this.#isParked = this.#window.isBehind;
    this.#listener.onRequeued(lost);
  }

  #endAttempt(): void {
    this.#draftedTokens += this.#attempt?.draftedTokens ?? 0;
    this.#acceptedTokens += this.#attempt?.acceptedTokens ?? 0;
    this.#attempt = undefined;
  }

  /** The stop that ended the completion at a token: the caller's stop text for this token, else the token's id. */
  #stopOf(tokenId: number): string {
    return this.#text.stopTextOf(tokenId) ?? String(tokenId);
  }

  #finishOf(reason: FinishReason, matchedStop: string): Finish {
    const usage: Usage = {
      promptTokens: this.record.promptTokenIds.length,
      completionTokens: this.#tokenIds.length,
    };
    const speculation = {
      draftedTokens: this.#draftedTokens + (this.#attempt?.draftedTokens ?? 0),
      acceptedTokens: this.#acceptedTokens + (this.#attempt?.acceptedTokens ?? 0),
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
