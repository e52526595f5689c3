// The queue on NATS: records in a JetStream stream, leases in a key-value bucket with a TTL, the small messages on core
// NATS. The connection is in nats-connection.ts, leases in nats-lease.ts, drain marks in nats-drains.ts.

import {
  DeliverPolicy,
  JetStreamApiError,
  type Consumer,
  type JetStreamClient,
  type JsMsg,
} from '@nats-io/jetstream';
import { errors, headers, type Msg } from '@nats-io/transport-node';

import {
  Assignment,
  AssignmentReply,
  Cancellation,
  CancellationReply,
  RequestEnded,
  RequestRecord,
  RequestSummary,
} from '@mimo/proto/queue';
import { Heartbeat } from '@mimo/proto/worker';

import { beforeAbort, pause } from '../process/abort.ts';
import { ClusterError } from '../process/errors.ts';
import type { Log } from '../process/log.ts';
import { NatsLink, unavailable, type NatsOptions } from './nats-connection.ts';
import { NatsDrains } from './nats-drains.ts';
import { NatsLeases } from './nats-lease.ts';
import { NatsStore } from './nats-store.ts';
import { QueueRefusal } from './queue-refusal.ts';
import { ownerSilent, ownerTimeoutMs, summaryOf } from './queue.ts';
import type {
  Closeable,
  DrainMark,
  DrainMarks,
  FollowedRecord,
  Lease,
  QueueState,
  RecordPlace,
  RequestQueue,
} from './queue.ts';
import { requestStream, subjects, trialSubjects } from './subjects.ts';

/**
 * Opens the queue. Returns at once and connects in the background, retrying forever; until then `connected` is false.
 * Close it to end its iterations, release its leases and leave the server.
 */
export function createNatsQueue(options: NatsOptions): RequestQueue {
  return new NatsQueue(options);
}

const summaryHeader = 'Mimo-Summary';
const retryMs = 500;
const replayCheckMs = 250;
/** A lease that cannot be released in this time expires by itself. */
const releaseTimeoutMs = 1_000;
// The server's codes for a missing message. The last one also covers any other failure of a deletion.
const noMessageCodes = new Set([10037, 10043]);
const deletionFailedCode = 10057;

class NatsQueue implements RequestQueue {
  readonly kind = 'nats';
  readonly #link: NatsLink;
  readonly #store: NatsStore;
  readonly #leases: NatsLeases;
  readonly #drains: NatsDrains;
  readonly #log: Log;

  constructor(options: NatsOptions) {
    this.#link = new NatsLink(options);
    this.#store = new NatsStore(this.#link, options);
    this.#leases = new NatsLeases(this.#link, options.log);
    this.#drains = new NatsDrains(this.#link, options.log);
    this.#log = options.log;
  }

  get connected(): boolean {
    return this.#link.connected;
  }

  get fault(): QueueRefusal | undefined {
    return this.#store.fault;
  }

  get storeId(): string {
    return this.#link.storeId;
  }

  get oldest(): RecordPlace {
    return this.#store.oldest;
  }

  async opened(signal: AbortSignal): Promise<void> {
    await this.#link.opened(signal);
  }

  publish(record: RequestRecord): Promise<RecordPlace> {
    return this.#write(record, record.storesOutlived > 0 ? 0 : undefined);
  }

  publishAgain(record: RequestRecord, { sequence }: RecordPlace): Promise<RecordPlace> {
    return this.#write(record, sequence);
  }

  turnFile(): Promise<void> {
    return this.#store.turnFile();
  }

  /** `after`: the sequence of what the store must have of the request; 0: nothing. */
  async #write(record: RequestRecord, after: number | undefined): Promise<RecordPlace> {
    const { connection } = await this.#link.session();
    const bytes = RequestRecord.encode(record).finish();
    const limitBytes = connection.info?.max_payload ?? Number.POSITIVE_INFINITY;
    if (bytes.length > limitBytes) {
      const text = `the request's record has ${bytes.length} bytes, over the queue's limit of ${limitBytes}`;
      throw new QueueRefusal('too_large', text);
    }
    const summary = headers();
    summary.set(
      summaryHeader,
      Buffer.from(RequestSummary.encode(summaryOf(record)).finish()).toString('base64'),
    );
    return this.#store.write({
      subject: subjects.request(record.model, record.requestId),
      bytes,
      headers: summary,
      after,
    });
  }

  async delete({ storeId, sequence }: RecordPlace): Promise<boolean> {
    const { closing } = this.#link;
    for (;;) {
      closing.throwIfAborted();
      try {
        const { manager } = await this.#link.session();
        if (storeId !== this.#link.storeId) {
          // Its sequence belongs, or will belong, to another request's record.
          return false;
        }
        return await manager.streams.deleteMessage(requestStream, sequence, true);
      } catch (error) {
        if (isNoMessage(error)) {
          return false;
        }
        this.#store.suspect();
        await pause(retryMs, closing);
      }
    }
  }

  async *follow(
    model: string,
    signal: AbortSignal,
    onReplayed?: () => void,
  ): AsyncGenerator<FollowedRecord, void, undefined> {
    const until = this.#until(signal);
    let storeId = '';
    let nextSequence = 1;
    /** The last record at the start of following. */
    let lastFound: number | undefined;
    while (!until.aborted) {
      try {
        await this.#link.opened(until);
        const { stream, manager } = await this.#link.session();
        // The client recreates a consumer that its server lost, but notices by heartbeats only: 30 to 60 s late.
        const stop = AbortSignal.any([until, this.#link.connectionLost, this.#link.storeReplaced]);
        if (storeId !== this.#link.storeId) {
          lastFound = storeId === '' ? undefined : 0;
          ({ storeId } = this.#link);
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
          const record = this.#decoded(bytes, RequestSummary);
          if (record !== undefined) {
            // The server's clock is compared only with itself. Later records arrive at once, so their age is about
            // zero even if the server's clock is set meanwhile.
            const storedMs = message.time.getTime();
            const storedForMs = message.seq > state.last_seq ? 0 : Math.max(0, beganMs - storedMs);
            const ageMs = record.heldMs + storedForMs;
            yield { storeId, sequence: message.seq, record, isArrival: message.seq > lastFound, ageMs };
          }
          nextSequence = message.seq + 1;
          replay.taken(message.seq);
        }
      } catch (error) {
        if (!until.aborted && this.#link.connected) {
          this.#log.warn({ error: ClusterError.from(error), model }, 'queue replay interrupted');
        }
        await pause(retryMs, until);
      }
    }
  }

  async counts(): Promise<{ readonly records: number }> {
    const { manager } = await this.#link.session();
    const trial = trialSubjects[requestStream];
    const { state } = await manager.streams.info(requestStream, { subjects_filter: trial });
    return { records: state.messages - (state.subjects?.[trial] ?? 0) };
  }

  acquireLease(model: string, holder: string, signal: AbortSignal): Promise<Lease> {
    return this.#leases.acquire(model, holder, this.#until(signal));
  }

  async assign(gatewayId: string, assignment: Assignment): Promise<AssignmentReply> {
    const { connection } = await this.#link.session();
    const bytes = Assignment.encode(assignment).finish();
    try {
      const timeout = ownerTimeoutMs;
      const message = await connection.request(subjects.assignments(gatewayId), bytes, { timeout });
      return AssignmentReply.decode(message.data);
    } catch (error) {
      const nobody =
        error instanceof errors.NoRespondersError ||
        (error instanceof Error && error.cause instanceof errors.NoRespondersError);
      if (nobody) {
        const text = `gateway ${gatewayId} is not listening for assignments`;
        throw new ClusterError('not_found', text, { cause: error });
      }
      throw unavailable(`gateway ${gatewayId} did not answer within ${ownerTimeoutMs} ms`, error);
    }
  }

  serveAssignments(gatewayId: string, handler: (assignment: Assignment) => AssignmentReply): Closeable {
    return this.#serve(subjects.assignments(gatewayId), Assignment, (assignment) =>
      AssignmentReply.encode(handler(assignment)).finish(),
    );
  }

  async cancel(cancellation: Cancellation): Promise<boolean> {
    const { connection, manager } = await this.#link.session();
    const subject = subjects.requestById(cancellation.requestId);
    const stored = await manager.streams
      .getMessage(requestStream, { last_by_subj: subject })
      .catch((error: unknown) => {
        if (isNoMessage(error)) {
          return null;
        }
        throw unavailable('the queue did not answer in time', error);
      });
    const record = stored === null ? undefined : this.#decoded(stored.data, RequestRecord);
    if (record?.tenant !== cancellation.tenant) {
      return false;
    }
    const { gatewayId } = record;
    const bytes = Cancellation.encode(cancellation).finish();
    try {
      const timeout = ownerTimeoutMs;
      const message = await connection.request(subjects.cancellations(gatewayId), bytes, { timeout });
      return CancellationReply.decode(message.data).cancelled;
    } catch (error) {
      throw ownerSilent(gatewayId, error);
    }
  }

  serveCancellations(gatewayId: string, handler: (cancellation: Cancellation) => boolean): Closeable {
    return this.#serve(subjects.cancellations(gatewayId), Cancellation, (cancellation) =>
      CancellationReply.encode({ cancelled: handler(cancellation) }).finish(),
    );
  }

  publishHeartbeat(heartbeat: Heartbeat): void {
    this.#send(subjects.heartbeat(heartbeat.model, heartbeat.group), Heartbeat.encode(heartbeat).finish());
  }

  followHeartbeats(signal: AbortSignal): AsyncIterable<Heartbeat> {
    return this.#followDecoded(subjects.allHeartbeats, Heartbeat, signal);
  }

  publishEnded(ended: RequestEnded): void {
    this.#send(subjects.ended(ended.model), RequestEnded.encode(ended).finish());
  }

  followEnded(model: string, signal: AbortSignal): AsyncIterable<RequestEnded> {
    return this.#followDecoded(subjects.ended(model), RequestEnded, signal);
  }

  publishState(state: QueueState): void {
    this.#send(subjects.queueState(state.model), Buffer.from(JSON.stringify(state)));
  }

  async *followState(model: string, signal: AbortSignal): AsyncGenerator<QueueState, void, undefined> {
    for await (const message of this.#messages(subjects.queueState(model), signal)) {
      yield message.json<QueueState>();
    }
  }

  async markDraining(model: string, group: string, { sinceUnixMs }: DrainMark): Promise<void> {
    await this.#drains.change(
      model,
      (marks) => !marks.has(group) && marks.set(group, { sinceUnixMs }) === marks,
    );
  }

  async clearDraining(model: string, group: string): Promise<void> {
    await this.#drains.change(model, (marks) => marks.delete(group));
  }

  followDrains(model: string, signal: AbortSignal): AsyncIterable<DrainMarks> {
    return this.#drains.follow(model, this.#until(signal));
  }

  async close(): Promise<void> {
    await this.#link.close(async () => {
      const limit = AbortSignal.timeout(releaseTimeoutMs);
      await beforeAbort(this.#leases.releaseAll(), limit).catch(() => undefined);
    });
    await this.#store.ended();
  }

  /** Answers requests on a subject until closed. */
  #serve<T>(
    subject: string,
    question: { decode(bytes: Uint8Array): T },
    answer: (question: T) => Uint8Array,
  ): Closeable {
    const stop = new AbortController();
    const serve = async (): Promise<void> => {
      for await (const message of this.#messages(subject, stop.signal)) {
        const asked = this.#decoded(message.data, question);
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
        await this.#link
          .session()
          .then(({ connection }) => connection.flush())
          .catch(() => undefined);
      },
    };
  }

  /**
   * Core messages are sent now or never: after a wait in the client's buffer for a reconnection they would be stale.
   */
  #send(subject: string, bytes: Uint8Array): void {
    void this.#link
      .session()
      .then(({ connection }) => connection.publish(subject, bytes))
      .catch(() => undefined);
  }

  async *#followDecoded<T>(
    subject: string,
    message: { decode(bytes: Uint8Array): T },
    signal: AbortSignal,
  ): AsyncGenerator<T, void, undefined> {
    for await (const { data } of this.#messages(subject, signal)) {
      const value = this.#decoded(data, message);
      if (value !== undefined) {
        yield value;
      }
    }
  }

  async *#messages(subject: string, signal: AbortSignal): AsyncGenerator<Msg, void, undefined> {
    const until = this.#until(signal);
    const session = await this.#link.opened(until).catch(() => undefined);
    if (session === undefined || until.aborted) {
      return;
    }
    const subscription = session.connection.subscribe(subject);
    const stop = (): void => subscription.unsubscribe();
    until.addEventListener('abort', stop, { once: true });
    try {
      yield* subscription;
    } finally {
      until.removeEventListener('abort', stop);
      stop();
    }
  }

  #decoded<T>(bytes: Uint8Array, message: { decode(bytes: Uint8Array): T }): T | undefined {
    try {
      return message.decode(bytes);
    } catch (error) {
      this.#log.error({ error: ClusterError.from(error) }, 'cannot parse a queue message');
      return undefined;
    }
  }

  #until(signal: AbortSignal): AbortSignal {
    return AbortSignal.any([signal, this.#link.closing]);
  }
}

function isNoMessage(error: unknown): boolean {
  return (
    error instanceof JetStreamApiError &&
    (noMessageCodes.has(error.code) ||
      (error.code === deletionFailedCode && /no message|store EOF|deleted message/.test(error.message)))
  );
}

/** Reports once when the consumer has read what existed at its start. */
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

  /** A record deleted during the replay never arrives: then the server's own count marks the end. */
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
