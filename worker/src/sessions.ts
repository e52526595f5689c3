// The gateways' sessions with this group: the messages of each stream -> the group's live sequences (sequences.ts), and
// their deltas -> frames. Owns the order of messages, and aborts the sequences of a session that ends. Uses two methods
// of the stream; knows no gRPC and no NATS.
//
// Back-pressure: credit bounds what a sequence may have in flight. While a session's stream is full its deltas are
// merged, one for each sequence, and go out as one frame when it drains: memory stays below the credit granted.

import { ClusterError } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';
import type { SequenceDelta, SessionRequest, SessionResponse, Welcome } from '@mimo/proto/worker';

import { LiveSequences, type LiveSequence, type SequenceEngine, type SequenceReader } from './sequences.ts';
import { mergeDelta } from './sequence-wire.ts';

/** One session's stream to its gateway. */
export interface SessionStream {
  /** False: the stream is full, and `drained` will be called on the session. */
  send(response: SessionResponse): boolean;
  /** Ends the stream, with a status if there is an error. */
  end(error?: ClusterError): void;
}

/** Every session of the group, over its `sequences`. The leader closes it with `fail`. */
export class Sessions {
  readonly sequences: LiveSequences;
  readonly #welcome: Welcome;
  readonly #sessions = new Set<Session>();

  /** `log` is for `LiveSequences`. */
  constructor(engine: SequenceEngine, welcome: Welcome, log?: Log) {
    this.sequences = new LiveSequences(engine, welcome, log);
    this.#welcome = welcome;
  }

  get count(): number {
    return this.#sessions.size;
  }

  /** Begins a session; the caller feeds it with `receive`, calls `drained`, and ends it with `close`. */
  open(stream: SessionStream): Session {
    const session = new Session(this, stream);
    this.#sessions.add(session);
    return session;
  }

  /** Ends every sequence with this error at once, without waiting for the engine, and then every session. */
  fail(error: ClusterError): void {
    this.sequences.fail(error);
    for (const session of this.#sessions) {
      session.end(error);
    }
  }

  /** Checks a Hello; fails with `not_found` for a model that is not this group's. */
  greet(model: string): Welcome {
    if (model !== this.#welcome.model) {
      throw new ClusterError('not_found', `this group serves ${this.#welcome.model}, not ${model}`);
    }
    return this.#welcome;
  }

  /** Forgets a session and frees its sequences. */
  closed(session: Session): void {
    this.#sessions.delete(session);
    this.sequences.leave(session);
  }
}

/** One gateway's session. The service feeds it messages and closes it when the stream has ended, however it ended. */
export class Session implements SequenceReader {
  readonly #sessions: Sessions;
  readonly #stream: SessionStream;
  /** Unsent deltas, at most one for each slot and epoch. */
  readonly #pending = new Map<string, SequenceDelta>();
  #pendingStep = 0;
  #greeted = false;
  #full = false;
  #over = false;

  constructor(sessions: Sessions, stream: SessionStream) {
    this.#sessions = sessions;
    this.#stream = stream;
  }

  /**
   * Handles one message. A message that breaks the protocol ends the session with a status and aborts its sequences.
   */
  receive(request: SessionRequest): void {
    if (this.#over) {
      return;
    }
    try {
      this.#take(request);
    } catch (error) {
      this.end(ClusterError.from(error));
    }
  }

  /** The stream accepts messages again: sends the held-back deltas. */
  drained(): void {
    this.#full = false;
    this.flush();
  }

  /** Ends the stream and frees the session's sequences. Idempotent. */
  end(error?: ClusterError): void {
    if (!this.#over) {
      this.drained();
      this.close();
      this.#stream.end(error);
    }
  }

  /** The stream has ended: frees the session's sequences. Idempotent. */
  close(): void {
    if (!this.#over) {
      this.#over = true;
      this.#sessions.closed(this);
    }
  }

  /** Holds a delta for the next `flush`, merged with its sequence's waiting delta. */
  deliver(step: number, delta: SequenceDelta): void {
    this.#pendingStep = Math.max(this.#pendingStep, step);
    const key = `${delta.slot}/${delta.epoch}`;
    const waiting = this.#pending.get(key);
    if (waiting === undefined) {
      this.#pending.set(key, delta);
    } else {
      mergeDelta(waiting, delta);
    }
  }

  /** Sends the waiting deltas as one frame, unless the stream is full. */
  flush(): void {
    if (this.#full || this.#over || this.#pending.size === 0) {
      return;
    }
    const deltas = [...this.#pending.values()];
    this.#pending.clear();
    this.#send({ $case: 'frame', value: { step: this.#pendingStep, deltas } });
  }

  #send(message: NonNullable<SessionResponse['message']>): void {
    this.#full = !this.#stream.send({ message });
  }

  #take({ message }: SessionRequest): void {
    if (message === undefined) {
      throw new ClusterError('invalid_argument', 'a session message without content');
    }
    if (message.$case === 'hello') {
      this.#greeted = true;
      this.#send({ $case: 'welcome', value: this.#sessions.greet(message.value.model) });
      return;
    }
    if (!this.#greeted) {
      throw new ClusterError('failed_precondition', `the first message must be hello, not ${message.$case}`);
    }
    const { sequences } = this.#sessions;
    switch (message.$case) {
      case 'submit':
        sequences.begin(this, message.value);
        break;
      case 'abort':
        this.#withSequence(message.value, (sequence) => sequences.abort(sequence, 'gateway'));
        break;
      case 'credit': {
        const { tokens } = message.value;
        this.#withSequence(message.value, (sequence) => sequences.addCredit(sequence, tokens));
        break;
      }
      case 'ping':
        this.#send({ $case: 'pong', value: { nonce: message.value.nonce } });
        break;
    }
  }

  /** A message about an ended sequence was sent before its end arrived: ignore it. */
  #withSequence(
    target: { readonly slot: number; readonly epoch: number },
    act: (sequence: LiveSequence) => void,
  ): void {
    const sequence = this.#sessions.sequences.at(this, target.slot);
    if (sequence?.epoch === target.epoch) {
      act(sequence);
    }
  }
}
