// Core NATS messages over a link: sent while it is connected and dropped otherwise, followed, asked and answered. Knows
// no subject.

import type { Msg } from '@nats-io/transport-node';

import { ClusterError } from '../../process/errors.ts';
import type { Log } from '../../process/log.ts';
import { QueueRefusal } from '../queue-refusal.ts';
import type { Closeable } from '../signals.ts';
import type { NatsLink } from './link.ts';

/** Reads a generated message. */
export interface Decoder<T> {
  decode(bytes: Uint8Array): T;
}

/** A question that is asked on a subject, and how its answer is read. */
export interface Question<Answer> {
  readonly subject: string;
  readonly bytes: Uint8Array;
  readonly answer: Decoder<Answer>;
  readonly timeoutMs: number;
}

/** Reads a message, or logs that it is not one and returns undefined. */
export function decoded<T>(bytes: Uint8Array, message: Decoder<T>, log: Log): T | undefined {
  try {
    return message.decode(bytes);
  } catch (error) {
    log.error({ error: ClusterError.from(error) }, 'queue message not understood');
    return undefined;
  }
}

/** The messages of one link. Nothing to close: iterations end with the link. */
export class Messages {
  readonly #link: NatsLink;
  readonly #log: Log;

  constructor(link: NatsLink, log: Log) {
    this.#link = link;
    this.#log = log;
  }

  /** Sends now or never: what would wait in the client's buffer for a reconnection would arrive stale. */
  send(subject: string, bytes: Uint8Array): void {
    this.#link.connection?.publish(subject, bytes);
  }

  /**
   * Asks and waits for the answer. Fails with `unavailable` while there is no connection, else as NATS' request does.
   */
  async ask<Answer>({ subject, bytes, answer, timeoutMs }: Question<Answer>): Promise<Answer> {
    const { connection } = this.#link;
    if (connection === undefined) {
      throw new QueueRefusal('disconnected', 'the queue is not connected');
    }
    const { data } = await connection.request(subject, bytes, { timeout: timeoutMs });
    return answer.decode(data);
  }

  /** Follows a subject until the signal fires; messages that cannot be read are logged and left out. */
  async *follow<T>(
    subject: string,
    message: Decoder<T>,
    signal: AbortSignal,
  ): AsyncGenerator<T, void, undefined> {
    for await (const { data } of this.#received(subject, signal)) {
      const value = decoded(data, message, this.#log);
      if (value !== undefined) {
        yield value;
      }
    }
  }

  /** Answers questions on a subject until closed. */
  serve<T>(subject: string, question: Decoder<T>, answer: (question: T) => Uint8Array): Closeable {
    const stop = new AbortController();
    const serve = async (): Promise<void> => {
      for await (const message of this.#received(subject, stop.signal)) {
        const asked = decoded(message.data, question, this.#log);
        if (asked !== undefined) {
          message.respond(answer(asked));
        }
      }
    };
    const serving = serve();
    return {
      close: async () => {
        stop.abort();
        await serving;
        // Unsubscribing reaches the server now, so that a question fails at once instead of timing out.
        await this.#link.connection?.flush().catch(() => undefined);
      },
    };
  }

  async *#received(subject: string, signal: AbortSignal): AsyncGenerator<Msg, void, undefined> {
    const until = AbortSignal.any([signal, this.#link.closing]);
    const connection = await this.#link.opened(until).catch(() => undefined);
    if (connection === undefined || until.aborted) {
      return;
    }
    const subscription = connection.subscribe(subject);
    const stop = (): void => subscription.unsubscribe();
    until.addEventListener('abort', stop, { once: true });
    try {
      yield* subscription;
    } finally {
      until.removeEventListener('abort', stop);
      stop();
    }
  }
}
