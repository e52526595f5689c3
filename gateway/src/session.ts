// One session with one incarnation of a group: a bidirectional gRPC stream that carries every request between this
// gateway and that group. Owns slots, the keep-alive and the fate of its sequences when it breaks; knows nothing of
// clients, text or the queue.

import * as grpc from '@grpc/grpc-js';

import { ClusterError } from '@mimo/core/process/errors';
import { channelOptions } from '@mimo/core/grpc/client';
import { errorFromStatus } from '@mimo/core/grpc/status';
import type { Log } from '@mimo/core/process/log';
import {
  WorkerServiceClient,
  type SequenceDelta,
  type SessionRequest,
  type SessionResponse,
  type Submit,
} from '@mimo/proto/worker';

/** A session's operations on one sequence. Both are ignored once the sequence has ended. */
export interface SequenceHandle {
  /** Asks the engine to free the sequence; its last delta still comes. */
  abort(): void;
  /** Allows it to send more tokens. */
  grant(tokens: number): void;
}

/** A sequence's callbacks. None is called after a delta with `finish`, or after `onLost`. */
export interface SequenceListener {
  onDelta(delta: SequenceDelta): void;
  /** The session broke. `begun` false: the group never answered, so it cannot have worked on the sequence. */
  onLost(error: ClusterError, begun: boolean): void;
}

/** An incarnation of a group, and its address. */
export interface SessionTarget {
  readonly model: string;
  readonly group: string;
  readonly incarnation: string;
  readonly address: string;
}

const greetTimeoutMs = 5_000;
const pingIntervalMs = 1_000;
/**
 * A group that leaves pings unanswered for this long is lost: stopped or cut off. Its steps run in a separate thread,
 * so a long step does not delay its answers.
 */
const silenceLimitMs = 3_000;
/** Minimum time between openings of a session that no request needs yet. */
const holdAgainMs = 500;
/** A step frame of a thousand sequences with logprobs stays below it. */
const maxReceiveBytes = 64 * 2 ** 20;

interface Slot {
  readonly epoch: number;
  readonly listener: SequenceListener;
}

/** A session; it opens at once. Close it, or wait until it breaks: `onEnd` is called once either way. */
export class Session {
  readonly target: SessionTarget;
  readonly #client: WorkerServiceClient;
  readonly #stream: grpc.ClientDuplexStream<SessionRequest, SessionResponse>;
  readonly #slots = new Map<number, Slot>();
  readonly #freeSlots: number[] = [];
  readonly #log: Log;
  readonly #onEnd: () => void;
  readonly #keepAlive: NodeJS.Timeout;
  readonly #openedMs = performance.now();
  #heardMs = performance.now();
  #watchedMs = performance.now();
  #nextSlot = 0;
  #nonce = 0;
  #greeted = false;
  #ended = false;

  constructor(options: {
    readonly target: SessionTarget;
    readonly gatewayId: string;
    readonly log: Log;
    readonly onEnd: () => void;
  }) {
    const { target, gatewayId } = options;
    this.target = target;
    this.#log = options.log.child({ group: target.group, model: target.model });
    this.#onEnd = options.onEnd;
    this.#client = new WorkerServiceClient(target.address, grpc.credentials.createInsecure(), {
      ...channelOptions(maxReceiveBytes),
      // A separate connection: sessions share neither a flow-control window nor a failure.
      'grpc.use_local_subchannel_pool': 1,
    });
    this.#stream = this.#client.session();
    this.#stream.on('data', (response: SessionResponse) => this.#receive(response));
    this.#stream.on('end', () =>
      this.#end(new ClusterError('unavailable', `group ${target.group} ended its session`)),
    );
    this.#stream.on('error', (error) => {
      // For any code of the transport (a killed peer may look like CANCELLED), the group is unavailable for a request.
      const text = `group ${target.group} lost its session: ${errorFromStatus(error).message}`;
      this.#end(new ClusterError('unavailable', text, { cause: error }));
    });
    this.#send({ $case: 'hello', value: { gatewayId, model: target.model } });
    this.#keepAlive = setInterval(() => this.#watch(), pingIntervalMs);
  }

  /** Sequences in it. */
  get sequences(): number {
    return this.#slots.size;
  }

  get ended(): boolean {
    return this.#ended;
  }

  /** Whether the group has answered and the session has not broken since. */
  get routable(): boolean {
    return this.#greeted && !this.#ended;
  }

  /** Begins a sequence. Its listener is called from the next turn of the event loop on. */
  submit(submit: Omit<Submit, 'slot'>, listener: SequenceListener): SequenceHandle {
    const slot = this.#freeSlots.pop() ?? this.#nextSlot++;
    const { epoch } = submit;
    const held: Slot = { epoch, listener };
    this.#slots.set(slot, held);
    this.#send({ $case: 'submit', value: { ...submit, slot } });
    const ifLive = (message: NonNullable<SessionRequest['message']>): void => {
      if (this.#slots.get(slot) === held) {
        this.#send(message);
      }
    };
    return {
      abort: () => ifLive({ $case: 'abort', value: { slot, epoch } }),
      grant: (tokens) => ifLive({ $case: 'credit', value: { slot, epoch, tokens } }),
    };
  }

  /** Ends the session; the group aborts its remaining sequences, whose listeners get `error`. */
  close(
    error = new ClusterError('canceled', `the session with group ${this.target.group} was closed`),
  ): void {
    this.#end(error);
  }

  #send(message: NonNullable<SessionRequest['message']>): void {
    if (!this.#ended) {
      this.#stream.write({ message });
    }
  }

  #receive({ message }: SessionResponse): void {
    this.#heardMs = performance.now();
    if (message?.$case === 'welcome') {
      this.#greeted = true;
    } else if (message?.$case === 'frame') {
      for (const delta of message.value.deltas) {
        const slot = this.#slots.get(delta.slot);
        if (slot?.epoch === delta.epoch) {
          if (delta.finish !== undefined) {
            this.#slots.delete(delta.slot);
            this.#freeSlots.push(delta.slot);
          }
          slot.listener.onDelta(delta);
        }
      }
    }
  }

  #watch(): void {
    const nowMs = performance.now();
    const { group } = this.target;
    if (nowMs - this.#watchedMs > 2 * pingIntervalMs) {
      // This process was paused, and the group's messages may not have been read yet.
      this.#heardMs = nowMs;
    }
    this.#watchedMs = nowMs;
    if (!this.#greeted && nowMs - this.#openedMs > greetTimeoutMs) {
      this.#end(new ClusterError('unavailable', `group ${group} did not answer within ${greetTimeoutMs} ms`));
    } else if (nowMs - this.#heardMs > silenceLimitMs) {
      this.#end(new ClusterError('unavailable', `group ${group} was silent for ${silenceLimitMs} ms`));
    } else {
      this.#nonce += 1;
      this.#send({ $case: 'ping', value: { nonce: this.#nonce } });
    }
  }

  #end(error: ClusterError): void {
    if (this.#ended) {
      return;
    }
    this.#ended = true;
    clearInterval(this.#keepAlive);
    if (this.#slots.size > 0) {
      this.#log.warn({ error, sequences: this.#slots.size }, 'session lost');
    }
    // Only cancelling ensures that nothing more arrives; the error that it causes is ignored.
    this.#stream.removeAllListeners('error');
    this.#stream.on('error', () => undefined);
    this.#stream.cancel();
    this.#client.close();
    const lost = [...this.#slots.values()];
    this.#slots.clear();
    this.#onEnd();
    for (const { listener } of lost) {
      listener.onLost(error, this.#greeted);
    }
  }
}

/** The sessions of this gateway, one for each incarnation of a group. Close it. */
export class Sessions {
  readonly #gatewayId: string;
  readonly #log: Log;
  readonly #sessions = new Map<string, Session>();
  /** Groups whose session has just ended: `hold` does not reconnect for a moment. */
  readonly #resting = new Set<string>();

  constructor(gatewayId: string, log: Log) {
    this.#gatewayId = gatewayId;
    this.#log = log;
  }

  get sessionCount(): number {
    return this.#sessions.size;
  }

  get sequenceCount(): number {
    return [...this.#sessions.values()].reduce((sum, session) => sum + session.sequences, 0);
  }

  /** The session with a group's incarnation, opened if needed. Opening it ends the session with an earlier one. */
  to(target: SessionTarget): Session {
    const key = keyOf(target);
    const existing = this.#sessions.get(key);
    if (existing !== undefined) {
      if (existing.target.incarnation === target.incarnation && existing.target.address === target.address) {
        return existing;
      }
      const text = `group ${target.group} was restarted`;
      existing.close(new ClusterError('unavailable', text));
    }
    const session = new Session({
      target,
      gatewayId: this.#gatewayId,
      log: this.#log,
      onEnd: () => {
        if (this.#sessions.get(key) === session) {
          this.#sessions.delete(key);
          this.#resting.add(key);
          setTimeout(() => this.#resting.delete(key), holdAgainMs).unref();
        }
      },
    });
    this.#sessions.set(key, session);
    return session;
  }

  /** Keeps a session open with a group before it has requests; a broken session is reopened after a while. */
  hold(target: SessionTarget): void {
    const key = keyOf(target);
    if (this.#sessions.get(key)?.target.incarnation !== target.incarnation && !this.#resting.has(key)) {
      this.to(target);
    }
  }

  /** Whether a session with this incarnation of the group is open and answered. */
  isRoutable(target: Pick<SessionTarget, 'model' | 'group' | 'incarnation'>): boolean {
    const session = this.#sessions.get(keyOf(target));
    return session?.target.incarnation === target.incarnation && session.routable;
  }

  close(): void {
    for (const session of this.#sessions.values()) {
      session.close();
    }
  }
}

function keyOf({ model, group }: Pick<SessionTarget, 'model' | 'group'>): string {
  return JSON.stringify([model, group]);
}
