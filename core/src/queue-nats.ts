// The queue on NATS: records in a JetStream stream, leases in a key-value bucket with a TTL, the small messages on core
// NATS. Owns connecting, connecting again, and making the stream and the bucket where they are missing (also after a
// server came back empty). Works with nats-server 2.10 and later; uses no feature that an older server would ignore.

import {
  DeliverPolicy,
  DiscardPolicy,
  jetstream,
  JetStreamApiError,
  RetentionPolicy,
  StorageType,
} from '@nats-io/jetstream';
import type { JetStreamClient, JetStreamManager, JsMsg } from '@nats-io/jetstream';
import { Kvm, type KV } from '@nats-io/kv';
import { connect, errors, nanos, type Msg, type NatsConnection } from '@nats-io/transport-node';

import {
  Assignment,
  AssignmentOutcome,
  AssignmentReply,
  RequestEnded,
  RequestRecord,
} from '@mimo/proto/queue';
import { Heartbeat } from '@mimo/proto/worker';

import { beforeAbort, pause } from './abort.ts';
import { ClusterError } from './errors.ts';
import type { Log } from './log.ts';
import { assignTimeoutMs, leaseRenewMs, leaseTtlMs } from './queue.ts';
import type { Closeable, Lease, QueuedRecord, QueueState, RequestQueue } from './queue.ts';
import { leaseBucket, requestStream, subjects, tokenFromName } from './subjects.ts';

/** What a NATS queue needs. `replicas` is 3 in production and 1 locally; records older than `recordMaxAgeMs` go. */
export interface NatsQueueOptions {
  readonly servers: readonly string[];
  /** Shown by the server's own tools. */
  readonly clientName: string;
  readonly replicas: number;
  readonly recordMaxAgeMs: number;
  readonly log: Log;
}

/**
 * Opens the queue. Returns at once and connects in the background, for ever; until then `connected` is false. Close it
 * to end its iterations, release its leases and leave the server.
 */
export function createNatsQueue(options: NatsQueueOptions): RequestQueue {
  return new NatsQueue(options);
}

const publishTimeoutMs = 5_000;
const retryMs = 500;
/** A lease that cannot be given back in this time expires by itself. */
const releaseTimeoutMs = 1_000;
// Codes of the server's API: the message is not there, the last sequence of a key is another.
const streamNotFoundCode = 10059;
const noMessageCodes = new Set([10037, 10043, 10057]);
const wrongLastSequenceCodes = new Set([10071, 10164]);

interface Session {
  readonly connection: NatsConnection;
  readonly stream: JetStreamClient;
  readonly manager: JetStreamManager;
  readonly leases: KV;
}

class NatsQueue implements RequestQueue {
  readonly kind = 'nats';
  readonly #options: NatsQueueOptions;
  readonly #closing = new AbortController();
  readonly #closed: Promise<void>;
  readonly #leases = new Set<Lease>();
  readonly #givingBack = new Set<Promise<void>>();
  readonly #opened = Promise.withResolvers<Session>();
  #connected = false;
  #storeId = '';
  // Replaced when the stream is another one: its sequences begin anew, so whoever follows it must too.
  #generation = new AbortController();

  constructor(options: NatsQueueOptions) {
    this.#options = options;
    this.#opened.promise.catch(() => undefined);
    this.#closed = this.#run().catch((error: unknown) => {
      this.#opened.reject(error);
      if (!this.#closing.signal.aborted) {
        options.log.error({ error: ClusterError.from(error) }, 'queue connection ended');
      }
    });
  }

  get connected(): boolean {
    return this.#connected;
  }

  get storeId(): string {
    return this.#storeId;
  }

  async opened(signal: AbortSignal): Promise<void> {
    await beforeAbort(this.#opened.promise, signal);
  }

  async #run(): Promise<void> {
    const connecting = connect({
      servers: [...this.#options.servers],
      name: this.#options.clientName,
      waitOnFirstConnect: true,
      maxReconnectAttempts: -1,
      reconnectTimeWait: 250,
      reconnectJitter: 250,
      // A server that stopped answering is noticed within 15 s, where the default takes minutes.
      pingInterval: 5_000,
      maxPingOut: 2,
    });
    const connection = await beforeAbort(connecting, this.#closing.signal).catch((error: unknown) => {
      // A connection that comes after the queue was closed has no other owner.
      void connecting.then((late) => late.close()).catch(() => undefined);
      throw error;
    });
    const session = await this.#prepareUntilDone(connection);
    this.#opened.resolve(session);
    this.#options.log.info({ server: connection.getServer() }, 'queue connected');
    for await (const status of connection.status()) {
      if (status.type === 'disconnect') {
        this.#connected = false;
        this.#options.log.warn('queue disconnected');
      } else if (status.type === 'reconnect') {
        await this.#prepareUntilDone(connection);
        this.#options.log.info({ server: connection.getServer() }, 'queue connected again');
      }
    }
  }

  async #prepareUntilDone(connection: NatsConnection): Promise<Session> {
    for (;;) {
      this.#closing.signal.throwIfAborted();
      try {
        const session = await this.#prepare(connection);
        this.#connected = true;
        return session;
      } catch (error) {
        this.#options.log.warn({ error: ClusterError.from(error) }, 'queue not ready');
        await pause(retryMs, this.#closing.signal);
      }
    }
  }

  async #prepare(connection: NatsConnection): Promise<Session> {
    const stream = jetstream(connection, { timeout: publishTimeoutMs });
    const manager = await stream.jetstreamManager();
    const info = await manager.streams.info(requestStream).catch((error: unknown) => {
      if (error instanceof JetStreamApiError && error.code === streamNotFoundCode) {
        return manager.streams.add({
          name: requestStream,
          subjects: [subjects.allRequests],
          retention: RetentionPolicy.Limits,
          storage: StorageType.File,
          discard: DiscardPolicy.New,
          max_age: nanos(this.#options.recordMaxAgeMs),
          num_replicas: this.#options.replicas,
          allow_direct: true,
        });
      }
      throw error;
    });
    if (this.#storeId !== info.created) {
      this.#storeId = info.created;
      this.#generation.abort();
      this.#generation = new AbortController();
    }
    const leases = await new Kvm(stream).create(leaseBucket, {
      ttl: leaseTtlMs,
      history: 1,
      replicas: this.#options.replicas,
    });
    return { connection, stream, manager, leases };
  }

  async #session(): Promise<Session> {
    if (!this.#connected) {
      throw unavailable('the queue is not connected');
    }
    return this.#opened.promise;
  }

  async publish(record: RequestRecord): Promise<number> {
    const { connection, stream } = await this.#session();
    const bytes = RequestRecord.encode(record).finish();
    const limitBytes = connection.info?.max_payload ?? Number.POSITIVE_INFINITY;
    if (bytes.length > limitBytes) {
      throw new ClusterError(
        'invalid_argument',
        `the request's record has ${bytes.length} bytes, over the queue's limit of ${limitBytes}`,
      );
    }
    try {
      const ack = await stream.publish(subjects.request(record.model, record.requestId), bytes);
      return ack.seq;
    } catch (error) {
      throw unavailable('the queue did not store the request', error);
    }
  }

  async delete(sequence: number): Promise<boolean> {
    for (;;) {
      this.#closing.signal.throwIfAborted();
      try {
        const { manager } = await this.#session();
        return await manager.streams.deleteMessage(requestStream, sequence, false);
      } catch (error) {
        if (error instanceof JetStreamApiError && noMessageCodes.has(error.code)) {
          return false;
        }
        await pause(retryMs, this.#closing.signal);
      }
    }
  }

  async *follow(model: string, signal: AbortSignal): AsyncGenerator<QueuedRecord, void, undefined> {
    const until = this.#until(signal);
    const session = await beforeAbort(this.#opened.promise, until).catch(() => undefined);
    let nextSequence = 1;
    while (session !== undefined && !until.aborted) {
      const generation = this.#generation.signal;
      try {
        const stop = AbortSignal.any([until, generation]);
        for await (const message of this.#messagesFrom(session.stream, { model, nextSequence, stop })) {
          nextSequence = message.seq + 1;
          const record = this.#decoded(message.data, RequestRecord);
          if (record !== undefined) {
            yield { sequence: message.seq, record };
          }
        }
      } catch (error) {
        if (!until.aborted) {
          this.#options.log.warn({ error: ClusterError.from(error), model }, 'queue replay interrupted');
          await pause(retryMs, until);
        }
      }
      nextSequence = generation.aborted ? 1 : nextSequence;
    }
  }

  /** The stream's messages of a model from a sequence on. The consumer is made again by the client where it is lost. */
  async *#messagesFrom(
    stream: JetStreamClient,
    from: { readonly model: string; readonly nextSequence: number; readonly stop: AbortSignal },
  ): AsyncGenerator<JsMsg, void, undefined> {
    const consumer = await stream.consumers.get(requestStream, {
      filter_subjects: subjects.requestsOf(from.model),
      deliver_policy: DeliverPolicy.StartSequence,
      opt_start_seq: from.nextSequence,
    });
    const messages = await consumer.consume({ max_messages: 500 });
    const close = (): void => void messages.close();
    from.stop.addEventListener('abort', close, { once: true });
    try {
      if (!from.stop.aborted) {
        yield* messages;
      }
    } finally {
      from.stop.removeEventListener('abort', close);
      close();
    }
  }

  async counts(): Promise<{ readonly records: number }> {
    const { manager } = await this.#session();
    const info = await manager.streams.info(requestStream);
    return { records: info.state.messages };
  }

  async acquireLease(model: string, holder: string, signal: AbortSignal): Promise<Lease> {
    const until = this.#until(signal);
    const key = tokenFromName(model);
    const value = JSON.stringify({ holder });
    await this.opened(until);
    for (;;) {
      until.throwIfAborted();
      const startedMs = performance.now();
      try {
        const { leases } = await this.#session();
        const creating = leases.create(key, value);
        const revision = await beforeAbort(creating, until).catch((error: unknown) => {
          // Taken for nobody where the answer comes after the signal.
          const giveBack = creating
            .then((late) => leases.delete(key, { previousSeq: late }))
            .catch(() => undefined)
            .finally(() => this.#givingBack.delete(giveBack));
          this.#givingBack.add(giveBack);
          throw error;
        });
        return this.#hold({ leases, key, value, revision, startedMs });
      } catch (error) {
        until.throwIfAborted();
        if (!isTaken(error) && this.#connected) {
          this.#options.log.warn({ error: ClusterError.from(error), model }, 'lease not taken');
        }
      }
      await pause(leaseRenewMs, until);
    }
  }

  /** Renews until the lease is lost or released. What counts is when a renewal was asked for, not when it came back. */
  #hold(held: { leases: KV; key: string; value: string; revision: number; startedMs: number }): Lease {
    const { leases, key, value, revision: epoch } = held;
    const lost = new AbortController();
    let { revision, startedMs } = held;
    const renew = async (): Promise<void> => {
      while (!lost.signal.aborted) {
        await pause(leaseRenewMs, lost.signal);
        const askedMs = performance.now();
        try {
          revision = await leases.update(key, value, revision, leaseRenewMs);
          startedMs = askedMs;
        } catch (error) {
          if (isTaken(error)) {
            break;
          }
        }
        // Given up before the server's own expiry, so that two holders do not overlap.
        if (performance.now() - startedMs > leaseTtlMs - leaseRenewMs) {
          break;
        }
      }
      lost.abort();
    };
    const release = async (): Promise<void> => {
      const holding = !lost.signal.aborted;
      lost.abort();
      await renewing;
      if (holding) {
        await leases.delete(key, { previousSeq: revision }).catch(() => undefined);
      }
      this.#leases.delete(lease);
    };
    let released: Promise<void> | undefined;
    const lease: Lease = {
      epoch,
      lost: lost.signal,
      release: () => {
        released ??= release();
        return released;
      },
    };
    this.#leases.add(lease);
    const renewing = renew();
    return lease;
  }

  async assign(gatewayId: string, assignment: Assignment): Promise<AssignmentReply> {
    const { connection } = await this.#session();
    try {
      const message = await connection.request(
        subjects.assignments(gatewayId),
        Assignment.encode(assignment).finish(),
        { timeout: assignTimeoutMs },
      );
      return AssignmentReply.decode(message.data);
    } catch (error) {
      const nobody =
        error instanceof errors.NoRespondersError ||
        (error instanceof Error && error.cause instanceof errors.NoRespondersError);
      if (nobody) {
        throw new ClusterError('not_found', `gateway ${gatewayId} does not listen for assignments`, {
          cause: error,
        });
      }
      throw unavailable(`gateway ${gatewayId} did not answer within ${assignTimeoutMs} ms`, error);
    }
  }

  serveAssignments(gatewayId: string, handler: (assignment: Assignment) => AssignmentReply): Closeable {
    const stop = new AbortController();
    const serve = async (): Promise<void> => {
      for await (const message of this.#messages(subjects.assignments(gatewayId), stop.signal)) {
        const assignment = this.#decoded(message.data, Assignment);
        const reply =
          assignment === undefined ? { outcome: AssignmentOutcome.UNKNOWN_REQUEST } : handler(assignment);
        message.respond(AssignmentReply.encode(AssignmentReply.create(reply)).finish());
      }
    };
    const serving = serve();
    return {
      close: async () => {
        stop.abort();
        await serving;
        // Once closed, an assignment finds nobody at once, where the server did not know yet it would time out.
        await this.#session()
          .then(({ connection }) => connection.flush())
          .catch(() => undefined);
      },
    };
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

  async close(): Promise<void> {
    if (this.#closing.signal.aborted) {
      return this.#closed;
    }
    this.#closing.abort(new ClusterError('canceled', 'the queue is closed'));
    this.#connected = false;
    const released = Promise.all([...[...this.#leases].map((lease) => lease.release()), ...this.#givingBack]);
    await beforeAbort(released, AbortSignal.timeout(releaseTimeoutMs)).catch(() => undefined);
    await this.#opened.promise.then(({ connection }) => connection.close()).catch(() => undefined);
    await this.#closed;
  }

  /** Core messages are for now: what would wait in the client's buffer for a reconnection would arrive stale. */
  #send(subject: string, bytes: Uint8Array): void {
    if (this.#connected) {
      void this.#opened.promise
        .then(({ connection }) => connection.publish(subject, bytes))
        .catch(() => undefined);
    }
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
    const session = await beforeAbort(this.#opened.promise, until).catch(() => undefined);
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
      this.#options.log.error({ error: ClusterError.from(error) }, 'queue message not understood');
      return undefined;
    }
  }

  #until(signal: AbortSignal): AbortSignal {
    return AbortSignal.any([signal, this.#closing.signal]);
  }
}

function unavailable(message: string, cause?: unknown): ClusterError {
  return new ClusterError('unavailable', message, { cause, detail: { retryAfterMs: 1_000 } });
}

function isTaken(error: unknown): boolean {
  return error instanceof JetStreamApiError && wrongLastSequenceCodes.has(error.code);
}
