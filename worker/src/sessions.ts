// The gateways' sessions with this group: slots of a session <-> sequences of the engine. Owns who gets which delta,
// deadlines, and that a session's end aborts its sequences. Knows the engine by three methods and the stream by two;
// no gRPC, no NATS. Time and timers come from the platform, because a deadline has to fire by itself.
//
// Back-pressure: credit bounds what a sequence may have in flight. While a session's stream is full its deltas are
// merged, one for each sequence, and go out as one frame when it drains: memory stays below the credit granted.

import { ClusterError, errorTable } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';
import { startTimer, type Timer } from '@mimo/core/process/timer';
import type {
  RunningRequest,
  SequenceDelta,
  SessionRequest,
  SessionResponse,
  Submit,
  Welcome,
} from '@mimo/proto/worker';

import type { EngineFrame, EngineHost, SequenceEnd } from './engines/mimo/engine-host.ts';
import { samplingFromWire } from './sampling.ts';
import { deltaToWire, failedDelta, mergeDelta, type SequenceOnWire } from './session-deltas.ts';

/** The engine as sessions use it. */
export type SequenceEngine = Pick<EngineHost, 'submit' | 'abort' | 'addCredit'>;

/** One session's way back to its gateway. */
export interface SessionStream {
  /** False: the stream is full, and `drained` will be called on the session. */
  send(response: SessionResponse): boolean;
  /** Ends the stream, with a status where there is an error. */
  end(error?: ClusterError): void;
}

interface Sequence extends SequenceOnWire {
  readonly id: number;
  readonly session: Session;
  readonly requestId: string;
  /** Completion index of the first token that it gets here. */
  readonly firstIndex: number;
  readonly onTrial: boolean;
  deadline: Timer | undefined;
}

/** Every session of the group. The leader feeds it the engine's frames and closes it. */
export class Sessions {
  readonly #engine: SequenceEngine;
  readonly #welcome: Welcome;
  readonly #log: Log | undefined;
  readonly #sequences = new Map<number, Sequence>();
  /** Of sessions that have ended, what the engine has not let go of yet. */
  readonly #leaving = new Map<number, Sequence>();
  readonly #sessions = new Set<Session>();
  #nextSequenceId = 1;
  #refusing: ClusterError | undefined;

  /** `log` takes what clients are not shown: why the engine ended a sequence with a fault of its own or of the model. */
  constructor(engine: SequenceEngine, welcome: Welcome, log?: Log) {
    this.#engine = engine;
    this.#welcome = welcome;
    this.#log = log;
  }

  get sessionCount(): number {
    return this.#sessions.size;
  }

  get sequenceCount(): number {
    return this.#sequences.size;
  }

  /** What is in the engine, for heartbeats; also what was aborted there and is not gone yet. */
  running(): RunningRequest[] {
    return [...this.#sequences.values(), ...this.#leaving.values()].map(
      ({ requestId, epoch, onTrial, firstIndex, nextIndex }) => ({
        requestId,
        epoch,
        tokens: nextIndex - firstIndex,
        onTrial,
      }),
    );
  }

  /** Begins a session; the caller feeds it with `receive`, tells it `drained`, and ends it with `close`. */
  open(stream: SessionStream): Session {
    const session = new Session(this, stream);
    this.#sessions.add(session);
    return session;
  }

  /** Ends new sequences with this error from here on; running ones go on. */
  refuse(error: ClusterError): void {
    this.#refusing ??= error;
  }

  /** Has the engine end every sequence: each tells its last tokens and figures, and that another group may go on. */
  handOver(): void {
    for (const sequence of this.#sequences.values()) {
      this.abort(sequence, 'handOver');
    }
  }

  /** Ends every sequence with this error, at once and without waiting for the engine, and every session after them. */
  fail(error: ClusterError): void {
    this.refuse(error);
    for (const sequence of this.#sequences.values()) {
      sequence.session.deliver(0, failedDelta(sequence, error));
      this.#forget(sequence);
    }
    for (const session of this.#sessions) {
      session.end(error);
    }
  }

  /** Hands each session its sequences' deltas of one engine step, in one message. */
  onFrame(frame: EngineFrame): void {
    const touched = new Set<Session>();
    for (const delta of frame.deltas) {
      const sequence = this.#sequences.get(delta.sequenceId);
      if (sequence === undefined) {
        // Its session has ended.
        if (delta.finish !== undefined) {
          this.#leaving.delete(delta.sequenceId);
        }
        continue;
      }
      sequence.session.deliver(frame.step, deltaToWire(sequence, delta));
      touched.add(sequence.session);
      if (delta.finish !== undefined) {
        this.#logFault(sequence, delta.finish);
        this.#forget(sequence);
      }
    }
    for (const session of touched) {
      session.flush();
    }
  }

  /** Checks a Hello; fails with `not_found` for a model that is not this group's. */
  greet(model: string): Welcome {
    if (model !== this.#welcome.model) {
      throw new ClusterError('not_found', `this group holds ${this.#welcome.model}, not ${model}`);
    }
    return this.#welcome;
  }

  /** Begins a sequence; undefined where it ended at once, with a delta that says why. */
  begin(session: Session, submit: Submit): Sequence | undefined {
    const sequence: Sequence = {
      id: this.#nextSequenceId++,
      session,
      slot: submit.slot,
      epoch: submit.epoch,
      requestId: submit.requestId,
      firstIndex: submit.resumedTokens,
      onTrial: submit.onTrial,
      nextIndex: submit.resumedTokens,
      deadline: undefined,
      abortedFor: undefined,
    };
    try {
      if (this.#refusing !== undefined) {
        throw this.#refusing;
      }
      const { group, identity } = this.#welcome;
      if (submit.identity !== '' && submit.identity !== identity) {
        const text = `group ${group} computes with ${identity}, not with ${submit.identity}`;
        throw new ClusterError('unavailable', text);
      }
      this.#engine.submit({
        sequenceId: sequence.id,
        tokenIds: submit.tokenIds,
        resumedTokens: submit.resumedTokens,
        sampling: samplingFromWire(submit.sampling),
        creditTokens: submit.creditTokens,
      });
    } catch (error) {
      session.deliver(0, failedDelta(sequence, ClusterError.from(error)));
      session.flush();
      return undefined;
    }
    this.#sequences.set(sequence.id, sequence);
    if (submit.timeLeftMs !== undefined) {
      sequence.deadline = startTimer(submit.timeLeftMs, () => this.abort(sequence, 'deadline'));
    }
    return sequence;
  }

  abort(sequence: Sequence, reason: NonNullable<Sequence['abortedFor']>): void {
    sequence.abortedFor ??= reason;
    this.#engine.abort(sequence.id);
  }

  addCredit(sequence: Sequence, tokens: number): void {
    this.#engine.addCredit(sequence.id, tokens);
  }

  /** Forgets a session and frees its sequences; their last deltas have no reader any more. */
  closed(session: Session, sequences: Iterable<Sequence>): void {
    this.#sessions.delete(session);
    for (const sequence of sequences) {
      this.#leaving.set(sequence.id, sequence);
      this.#engine.abort(sequence.id);
      this.#forget(sequence);
    }
  }

  #logFault({ requestId }: Sequence, end: SequenceEnd): void {
    if (end.kind === 'error' && !errorTable[end.code].textLeaves) {
      this.#log?.error({ error: new ClusterError(end.code, end.message), requestId }, 'sequence failed');
    }
  }

  #forget(sequence: Sequence): void {
    sequence.deadline?.clear();
    this.#sequences.delete(sequence.id);
    sequence.session.forget(sequence.slot);
  }
}

/** One gateway's session. The service feeds it messages and closes it when the stream has ended, however it ended. */
export class Session {
  readonly #sessions: Sessions;
  readonly #stream: SessionStream;
  readonly #slots = new Map<number, Sequence>();
  /** Deltas that are not sent yet, at most one for each slot and epoch. */
  readonly #pending = new Map<string, SequenceDelta>();
  #pendingStep = 0;
  #greeted = false;
  #full = false;
  #over = false;

  constructor(sessions: Sessions, stream: SessionStream) {
    this.#sessions = sessions;
    this.#stream = stream;
  }

  /** Takes one message. A message that breaks the protocol ends the session with a status and aborts its sequences. */
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

  /** The stream takes messages again: sends what was held back. */
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
      this.#sessions.closed(this, [...this.#slots.values()]);
    }
  }

  /** Holds a delta for the next `flush`, merged with what waits already for its sequence. */
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

  /** Sends what waits as one frame, unless the stream is full. */
  flush(): void {
    if (this.#full || this.#over || this.#pending.size === 0) {
      return;
    }
    const deltas = [...this.#pending.values()];
    this.#pending.clear();
    this.#send({ $case: 'frame', value: { step: this.#pendingStep, deltas } });
  }

  forget(slot: number): void {
    this.#slots.delete(slot);
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
    switch (message.$case) {
      case 'submit':
        this.#submit(message.value);
        break;
      case 'abort':
        this.#withSequence(message.value, (sequence) => this.#sessions.abort(sequence, 'gateway'));
        break;
      case 'credit': {
        const { tokens } = message.value;
        this.#withSequence(message.value, (sequence) => this.#sessions.addCredit(sequence, tokens));
        break;
      }
      case 'ping':
        this.#send({ $case: 'pong', value: { nonce: message.value.nonce } });
        break;
    }
  }

  #submit(submit: Submit): void {
    const holder = this.#slots.get(submit.slot);
    if (holder !== undefined) {
      throw new ClusterError(
        'failed_precondition',
        `slot ${submit.slot} is in use by request ${holder.requestId}`,
      );
    }
    const sequence = this.#sessions.begin(this, submit);
    if (sequence !== undefined) {
      this.#slots.set(submit.slot, sequence);
    }
  }

  /** A message about a sequence that has ended crossed its end on the way: there is nothing to do. */
  #withSequence(
    target: { readonly slot: number; readonly epoch: number },
    act: (sequence: Sequence) => void,
  ): void {
    const sequence = this.#slots.get(target.slot);
    if (sequence?.epoch === target.epoch) {
      act(sequence);
    }
  }
}
