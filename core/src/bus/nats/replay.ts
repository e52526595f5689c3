// Following the stream of records: existing records first, then new ones, each once, over lost connections and
// replaced streams. Owns the consumer and its position.

import { DeliverPolicy, type Consumer, type JetStreamClient, type JsMsg } from '@nats-io/jetstream';

import { RequestSummary } from '@mimo/proto/queue';

import { pause } from '../../process/abort.ts';
import { ClusterError } from '../../process/errors.ts';
import type { Log } from '../../process/log.ts';
import type { FollowedRecord } from '../records.ts';
import type { NatsLink } from './link.ts';
import { decoded } from './messages.ts';
import type { NatsStreams } from './streams.ts';
import { requestStream, subjects } from './subjects.ts';

/** The header of a record's message that holds its RequestSummary, base64. */
export const summaryHeader = 'Mimo-Summary';

const retryMs = 500;
const replayCheckMs = 250;

interface Source {
  readonly link: NatsLink;
  readonly streams: NatsStreams;
  readonly log: Log;
}

interface Following {
  readonly model: string;
  readonly until: AbortSignal;
  readonly onReplayed: (() => void) | undefined;
}

/** Follows a model's records, as Records.follow promises. */
export async function* followRecords(
  { link, streams, log }: Source,
  { model, until, onReplayed }: Following,
): AsyncGenerator<FollowedRecord, void, undefined> {
  let storeId = '';
  let nextSequence = 1;
  /** The last record that lay there when the following began. */
  let lastFound: number | undefined;
  while (!until.aborted) {
    try {
      await streams.opened(until);
      const { stream, manager } = await streams.stores();
      // The client makes a consumer again that its server lost, but finds that out by heartbeats: 30 to 60 s late.
      const stop = AbortSignal.any([until, link.lost, streams.storeReplaced]);
      if (storeId !== streams.storeId) {
        lastFound = storeId === '' ? undefined : 0;
        ({ storeId } = streams);
        nextSequence = 1;
      }
      const { state, ts } = await manager.streams.info(requestStream);
      lastFound ??= state.last_seq;
      const beganMs = Date.parse(ts ?? '') || 0;
      const consumer = await consumerFrom(stream, { model, nextSequence });
      const replay = new Replay(consumer, onReplayed);
      await replay.begin(stop);
      for await (const message of messagesOf(consumer, stop)) {
        const bytes = Buffer.from(message.headers?.get(summaryHeader) ?? '', 'base64');
        const record = decoded(bytes, RequestSummary, log);
        if (record !== undefined) {
          // The server's clock is compared with itself. What comes later comes at once, so that a server whose clock is
          // set meanwhile makes nothing old.
          const storedMs = message.time.getTime();
          const storedForMs = message.seq > state.last_seq ? 0 : Math.max(0, beganMs - storedMs);
          const ageMs = record.heldMs + storedForMs;
          yield { storeId, sequence: message.seq, record, isArrival: message.seq > lastFound, ageMs };
        }
        nextSequence = message.seq + 1;
        replay.taken(message.seq);
      }
    } catch (error) {
      if (!until.aborted && streams.ready) {
        log.warn({ error: ClusterError.from(error), model }, 'queue replay interrupted');
      }
      await pause(retryMs, until);
    }
  }
}

/** Calls back once when what a consumer found at its beginning has been taken. */
class Replay {
  readonly #consumer: Consumer;
  #onReplayed: (() => void) | undefined;
  #left = 0;
  #lastSequence = 0;

  constructor(consumer: Consumer, onReplayed: (() => void) | undefined) {
    this.#consumer = consumer;
    this.#onReplayed = onReplayed;
  }

  async begin(stop: AbortSignal): Promise<void> {
    this.#left = (await this.#consumer.info()).num_pending;
    this.#endIfDone();
    void this.#watch(stop);
  }

  taken(sequence: number): void {
    this.#lastSequence = sequence;
    this.#left -= 1;
    this.#endIfDone();
  }

  /** What is deleted while it is replayed never comes: then the server's own count shows the end. */
  async #watch(stop: AbortSignal): Promise<void> {
    while (this.#onReplayed !== undefined && !stop.aborted) {
      await pause(replayCheckMs, stop);
      const info = await this.#consumer.info().catch(() => undefined);
      if (info?.num_pending === 0 && info.delivered.stream_seq <= this.#lastSequence) {
        this.#left = 0;
        this.#endIfDone();
      }
    }
  }

  #endIfDone(): void {
    if (this.#left <= 0) {
      this.#onReplayed?.();
      this.#onReplayed = undefined;
    }
  }
}

/** A consumer of a model's messages from a sequence on. The client recreates it if the server loses it. */
function consumerFrom(
  stream: JetStreamClient,
  from: { readonly model: string; readonly nextSequence: number },
): Promise<Consumer> {
  return stream.consumers.get(requestStream, {
    filter_subjects: subjects.requestsOf(from.model),
    deliver_policy: DeliverPolicy.StartSequence,
    opt_start_seq: from.nextSequence,
    headers_only: true,
  });
}

async function* messagesOf(consumer: Consumer, stop: AbortSignal): AsyncGenerator<JsMsg, void, undefined> {
  const messages = await consumer.consume({ max_messages: 500 });
  const close = (): void => void messages.close();
  stop.addEventListener('abort', close, { once: true });
  try {
    if (!stop.aborted) {
      yield* messages;
    }
  } finally {
    stop.removeEventListener('abort', close);
    close();
  }
}
