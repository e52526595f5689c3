// The live sequences of the group, from their submit to their last delta: the one place that knows the live sequences,
// their readers and their progress. The engine identifies them by id, sessions by slot; both only route. Knows no
// stream, no gRPC and no NATS. Time and timers come from the platform, because a deadline has to fire by itself.
//
// Each event in the life of a sequence has one path:
//   begin   `begin`; a sequence that cannot begin ends at once
//   cancel  `abort`, for its gateway, its deadline, a hand-over, or because its session has closed; the engine frees
//           the sequence within a step and reports its end
//   end     `#end`: sequences that the engine finished, parked, aborted or failed, rejected ones, and all sequences
//           when the group is lost
//
// INVARIANT: a reader gets exactly one delta with `finish` for each sequence, and none after it, unless it left before.

import { beforeAbort } from '@mimo/core/process/abort';
import { ClusterError, errorTable } from '@mimo/core/process/errors';
import type { Log } from '@mimo/core/process/log';
import { startTimer, type Timer } from '@mimo/core/process/timer';
import type { RunningRequest, SequenceDelta as WireDelta, Submit, Welcome } from '@mimo/proto/worker';

import {
  lastDelta,
  type EngineFrame,
  type EngineHost,
  type SequenceDelta,
} from './engines/mimo/engine-api.ts';
import { samplingFromWire } from './sampling.ts';
import { deltaToWire, type SequenceOnWire } from './sequence-wire.ts';

/** The engine as sequences use it. */
export type SequenceEngine = Pick<EngineHost, 'submit' | 'abort' | 'addCredit'>;

/** The receiver of some sequences' deltas: a session. */
export interface SequenceReader {
  /** Receives a delta, which may wait for the next `flush`. */
  deliver(step: number, delta: WireDelta): void;
  flush(): void;
}

/** One sequence; changed by `LiveSequences` alone. */
export interface LiveSequence extends SequenceOnWire {
  readonly id: number;
  readonly requestId: string;
  /** Completion index of its first token in this group. */
  readonly firstIndex: number;
  /** Completion index of the next token. */
  nextIndex: number;
  readonly onTrial: boolean;
  /** Undefined once its session has closed, while the engine still holds the sequence. */
  reader: SequenceReader | undefined;
  deadline: Timer | undefined;
}

/**
 * Every live sequence. The leader feeds it the engine's frames; sessions begin and abort; the group's end `fail`s it.
 */
export class LiveSequences {
  readonly #engine: SequenceEngine;
  readonly #group: Pick<Welcome, 'group' | 'identity'>;
  readonly #log: Log | undefined;
  readonly #byId = new Map<number, LiveSequence>();
  /** The sequences that have a reader. */
  readonly #bySlot = new Map<SequenceReader, Map<number, LiveSequence>>();
  #nextId = 1;
  #refusing: ClusterError | undefined;
  #emptied = Promise.withResolvers<void>();

  /** `log` receives the causes that clients do not see: faults of the engine or the model. */
  constructor(engine: SequenceEngine, group: Pick<Welcome, 'group' | 'identity'>, log?: Log) {
    this.#engine = engine;
    this.#group = group;
    this.#log = log;
  }

  /** Sequences that the engine still holds. */
  get count(): number {
    return this.#byId.size;
  }

  /** The sequences that the engine still holds, for heartbeats. */
  running(): RunningRequest[] {
    return Array.from(this.#byId.values(), ({ requestId, epoch, onTrial, firstIndex, nextIndex }) => ({
      requestId,
      epoch,
      tokens: nextIndex - firstIndex,
      onTrial,
    }));
  }

  /** The sequence in a reader's slot. */
  at(reader: SequenceReader, slot: number): LiveSequence | undefined {
    return this.#bySlot.get(reader)?.get(slot);
  }

  /** Begins a sequence, or ends it at once if it cannot begin. Throws `failed_precondition` if its slot is in use. */
  begin(reader: SequenceReader, submit: Submit): void {
    const sequence = this.#add(reader, submit);
    try {
      this.#assertTaken(submit);
      this.#engine.submit({
        sequenceId: sequence.id,
        tokenIds: submit.tokenIds,
        resumedTokens: submit.resumedTokens,
        sampling: samplingFromWire(submit.sampling),
        creditTokens: submit.creditTokens,
      });
    } catch (error) {
      this.#endWith(sequence, ClusterError.from(error));
      reader.flush();
      return;
    }
    if (submit.timeLeftMs !== undefined) {
      sequence.deadline = startTimer(submit.timeLeftMs, () => this.abort(sequence, 'deadline'));
    }
  }

  addCredit({ id }: LiveSequence, tokens: number): void {
    this.#engine.addCredit(id, tokens);
  }

  /** Has the engine free the sequence; its end comes in a frame. The first reason counts. */
  abort(sequence: LiveSequence, reason: NonNullable<SequenceOnWire['abortedFor']>): void {
    sequence.abortedFor ??= reason;
    this.#engine.abort(sequence.id);
  }

  /** Aborts all sequences of a closed reader; their ends are not delivered. */
  leave(reader: SequenceReader): void {
    const left = this.#bySlot.get(reader);
    this.#bySlot.delete(reader);
    for (const sequence of left?.values() ?? []) {
      sequence.reader = undefined;
      sequence.deadline?.clear();
      this.abort(sequence, 'gateway');
    }
  }

  /**
   * Aborts every sequence; each end carries its last tokens and figures, and a code that lets another group continue.
   */
  handOver(): void {
    for (const sequence of this.#byId.values()) {
      this.abort(sequence, 'handOver');
    }
  }

  /** From now on new sequences end with this error; running ones continue. */
  refuse(error: ClusterError): void {
    this.#refusing ??= error;
  }

  /** Ends every sequence with this error at once; the engine reports nothing more. */
  fail(error: ClusterError): void {
    this.refuse(error);
    for (const sequence of this.#byId.values()) {
      this.#endWith(sequence, error);
    }
  }

  /** Resolves when no sequence is left, or rejects with the signal's reason. */
  async drained(signal: AbortSignal): Promise<void> {
    while (this.count > 0) {
      await beforeAbort(this.#emptied.promise, signal);
    }
  }

  /** Hands each reader its sequences' deltas of one engine step. */
  onFrame({ step, deltas }: EngineFrame): void {
    const touched = new Set<SequenceReader>();
    for (const delta of deltas) {
      const sequence = this.#byId.get(delta.sequenceId);
      if (sequence === undefined) {
        // It ended with its group while this delta was on its way.
        continue;
      }
      if (sequence.reader !== undefined) {
        touched.add(sequence.reader);
      }
      if (delta.finish === undefined) {
        this.#pass(sequence, step, delta);
      } else {
        this.#logFault(sequence, delta.finish);
        this.#end(sequence, step, delta);
      }
    }
    for (const reader of touched) {
      reader.flush();
    }
  }

  #add(reader: SequenceReader, submit: Submit): LiveSequence {
    const { slot, epoch, requestId, onTrial, resumedTokens } = submit;
    const holder = this.at(reader, slot);
    if (holder !== undefined) {
      const text = `slot ${slot} is in use by request ${holder.requestId}`;
      throw new ClusterError('failed_precondition', text);
    }
    const sequence: LiveSequence = {
      id: this.#nextId++,
      slot,
      epoch,
      requestId,
      firstIndex: resumedTokens,
      nextIndex: resumedTokens,
      onTrial,
      reader,
      deadline: undefined,
      abortedFor: undefined,
    };
    const slots = this.#bySlot.get(reader) ?? new Map<number, LiveSequence>();
    this.#bySlot.set(reader, slots.set(slot, sequence));
    this.#byId.set(sequence.id, sequence);
    return sequence;
  }

  /** Throws the reason why this group rejects the sequence. */
  #assertTaken({ identity: bound }: Submit): void {
    if (this.#refusing !== undefined) {
      throw this.#refusing;
    }
    const { group, identity } = this.#group;
    if (bound !== '' && bound !== identity) {
      throw new ClusterError('unavailable', `group ${group} has model identity ${identity}, not ${bound}`);
    }
  }

  #endWith(sequence: LiveSequence, { code, message }: ClusterError): void {
    this.#end(sequence, 0, lastDelta(sequence.id, sequence.nextIndex, { kind: 'error', code, message }));
  }

  #end(sequence: LiveSequence, step: number, last: SequenceDelta): void {
    this.#pass(sequence, step, last);
    sequence.deadline?.clear();
    this.#byId.delete(sequence.id);
    if (sequence.reader !== undefined) {
      this.#bySlot.get(sequence.reader)?.delete(sequence.slot);
    }
    if (this.count === 0) {
      this.#emptied.resolve();
      this.#emptied = Promise.withResolvers();
    }
  }

  #pass(sequence: LiveSequence, step: number, delta: SequenceDelta): void {
    sequence.nextIndex = delta.index + delta.tokenIds.length;
    sequence.reader?.deliver(step, deltaToWire(sequence, delta));
  }

  #logFault({ requestId }: LiveSequence, end: NonNullable<SequenceDelta['finish']>): void {
    if (end.kind === 'error' && !errorTable[end.code].textLeaves) {
      this.#log?.error({ error: new ClusterError(end.code, end.message), requestId }, 'sequence failed');
    }
  }
}
