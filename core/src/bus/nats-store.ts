// Whether the stream of records can write: a real test write at a steady pace, and at once after a failed write. Owns
// the rejection of records before the stream is full, and the repair of streams that are gone or can no longer write.
// The connection is nats-connection.ts.
//
// A nats-server whose disk was full for a moment refuses every later write and deletion of that stream until the
// server is restarted. Only a new stream can write again, so the stream is deleted and recreated; the gateways then
// record their requests again, as after the loss of a disk.

import { JetStreamApiError, type StreamInfo } from '@nats-io/jetstream';
import type { MsgHdrs } from '@nats-io/transport-node';

import { pause } from '../process/abort.ts';
import { ClusterError } from '../process/errors.ts';
import type { Log } from '../process/log.ts';
import { secondsOf, type NatsLink, type RecordLimits } from './nats-connection.ts';
import { isTaken } from './nats-lease.ts';
import { QueueRefusal, refusalOf } from './queue-refusal.ts';
import type { RecordPlace } from './queue.ts';
import { drainBucket, leaseBucket, requestStream, trialSubjects } from './subjects.ts';

/** How long a missing stream can go unnoticed if nothing is written. */
const trialMs = 1_000;
const bucketsEveryRounds = 5;
/** Well above the worst case of a slow disk. */
const trialTimeoutMs = 2_000;
/** A single trial may fail because the machine was paused. */
const faultAfterTrials = 2;
/** A stream that answers but fails this many trials in a row will not recover. */
const remakeAfterTrials = 3;
/** If the disk is still full, the new stream breaks too. */
const remakePauseMs = { first: 5_000, most: 60_000 };
/**
 * Records are rejected from this share of a limit on, so that records of other gateways and repeated ones still fit.
 */
const refuseAtShare = 0.9;
/** The largest file of a stream; what fills it comes in parts that take no more than this share of a stream's bound. */
const fileBytes = 8 * 2 ** 20;
const partShare = 1 / 16;

type StreamName = keyof typeof trialSubjects;

/** The stream of records comes first. */
const streamNames = [requestStream, `KV_${leaseBucket}`, `KV_${drainBucket}`] as const satisfies StreamName[];
const streamNotFoundCode = 10059;

interface Write {
  readonly subject: string;
  readonly bytes: Uint8Array;
  readonly headers: MsgHdrs;
  /**
   * Sequence of the message that must be stored under its subject, 0 for none. If set, the record was accepted before:
   * only the stream's own limits can reject it.
   */
  readonly after: number | undefined;
}

/** The stream of one connection; runs until the connection closes. */
export class NatsStore {
  readonly #link: NatsLink;
  readonly #log: Log;
  #fault: QueueRefusal | undefined;
  #round = 0;
  #failedTrials = 0;
  #remakePauseMs = remakePauseMs.first;
  #remakeNotBeforeMs = 0;
  #storeId = '';
  #firstSequence = 0;
  /** The stream's own, once they are read. */
  #limits: RecordLimits;
  /** The server's last figures, plus what this process wrote since. */
  #stored = { bytes: 0, records: 0 };
  #written = { bytes: 0, records: 0 };
  #suspected = new AbortController();
  readonly #ended: Promise<void>;

  constructor(link: NatsLink, options: { readonly limits?: RecordLimits | undefined; readonly log: Log }) {
    const none = { maxBytes: Number.POSITIVE_INFINITY, maxRecords: Number.POSITIVE_INFINITY };
    this.#link = link;
    this.#limits = options.limits ?? none;
    this.#log = options.log;
    this.#ended = this.#watch();
  }

  /** Why records cannot be stored now, as far as known; undefined if they can. */
  get fault(): QueueRefusal | undefined {
    return this.#link.connected
      ? this.#fault
      : new QueueRefusal('disconnected', 'the queue is not connected');
  }

  get oldest(): RecordPlace {
    return {
      storeId: this.#link.storeId,
      sequence: this.#storeId === this.#link.storeId ? this.#firstSequence : 0,
    };
  }

  /** Resolves when the connection is closed and the last trial has ended. */
  ended(): Promise<void> {
    return this.#ended;
  }

  /** Starts a trial of the streams at once: a write has failed. */
  suspect(): void {
    this.#suspected.abort();
  }

  /** Writes a record; creates a missing stream and repeats the write. Fails with a QueueRefusal. */
  async write(write: Write): Promise<RecordPlace> {
    const fault = this.fault;
    if (fault !== undefined && (fault.reason !== 'full' || write.after === undefined)) {
      throw fault;
    }
    if (write.after === undefined) {
      this.#assertRoom(write.bytes.length);
    }
    // Counted before they are stored: records in transit need room too.
    this.#written.bytes += write.bytes.length;
    this.#written.records += 1;
    try {
      return await this.#publishMaking(write);
    } catch (error) {
      this.#written.bytes -= write.bytes.length;
      this.#written.records -= 1;
      throw error;
    }
  }

  /** Creates a missing stream first. */
  async #publishMaking(write: Write): Promise<RecordPlace> {
    try {
      return await this.#publish(write);
    } catch (error) {
      const refusal = refusalOf(error);
      if (refusal.reason !== 'missing') {
        this.suspect();
        throw refusal;
      }
      return await this.#link
        .prepareAgain()
        .then(() => this.#publish(write))
        .catch((again: unknown) => {
          throw refusalOf(again);
        });
    }
  }

  async #publish({ subject, bytes, headers, after }: Write): Promise<RecordPlace> {
    const { stream, manager } = await this.#link.session();
    const { storeId } = this.#link;
    const expect = after === undefined ? {} : { lastSubjectSequence: after };
    const { seq } = await stream
      .publish(subject, bytes, { headers, expect })
      .catch(async (error: unknown): Promise<{ readonly seq: number }> => {
        // The record is there: an answer was lost, or the stream was recreated without this process knowing.
        const there = isTaken(error)
          ? await manager.streams.getMessage(requestStream, { last_by_subj: subject })
          : null;
        if (there === null) {
          throw error;
        }
        return there;
      });
    return { storeId, sequence: seq };
  }

  /**
   * Fills the file that the stream writes to with a message that is taken away again, in parts that a small stream has room for.
   * nats-server offers no other way to close one.
   */
  async turnFile(): Promise<void> {
    const { connection, stream, manager } = await this.#link.session();
    const filter = trialSubjects[requestStream];
    const payloadBytes = connection.info?.max_payload ?? fileBytes;
    const partBytes = Math.min(payloadBytes, fileBytes, this.#limits.maxBytes * partShare);
    const part = Buffer.alloc(Math.ceil(partBytes));
    for (let written = 0; written < fileBytes; written += part.length) {
      await stream.publish(filter, part);
      await manager.streams.purge(requestStream, { filter });
    }
  }

  #assertRoom(bytes: number): void {
    const { maxBytes, maxRecords } = this.#limits;
    const heldBytes = this.#stored.bytes + this.#written.bytes;
    const heldRecords = this.#stored.records + this.#written.records;
    if (heldBytes + bytes > refuseAtShare * maxBytes) {
      const text = `the queue is full: it holds ${heldBytes} bytes of ${maxBytes}`;
      throw new QueueRefusal('full', text);
    }
    if (heldRecords + 1 > refuseAtShare * maxRecords) {
      const text = `the queue is full: it holds ${heldRecords} requests of ${maxRecords}`;
      throw new QueueRefusal('full', text);
    }
  }

  async #watch(): Promise<void> {
    const { closing } = this.#link;
    await this.#link.opened(closing).catch(() => undefined);
    while (!closing.aborted) {
      this.#suspected = new AbortController();
      if (this.#link.connected && !closing.aborted) {
        await this.#tryOut().catch((error: unknown) => {
          this.#log.debug({ error: ClusterError.from(error) }, 'cannot test the queue');
        });
      }
      await pause(trialMs, AbortSignal.any([closing, this.#suspected.signal]));
    }
  }

  async #tryOut(): Promise<void> {
    const names: readonly StreamName[] =
      this.#failedTrials > 0 || this.#round % bucketsEveryRounds === 0 ? streamNames : [requestStream];
    this.#round += 1;
    let refusal = await this.#firstRefusal(names);
    try {
      if (refusal?.reason === 'missing' || !(await this.#takeStock())) {
        await this.#link.prepareAgain();
        refusal = await this.#firstRefusal(names);
      }
    } catch (error) {
      // The server does not answer, or cannot create the stream.
      refusal = refusal === undefined || refusal.reason === 'missing' ? refusalOf(error) : refusal;
    }
    const isBroken = refusal !== undefined && refusal.reason !== 'full';
    this.#failedTrials = isBroken ? this.#failedTrials + 1 : 0;
    if (!isBroken || this.#failedTrials >= faultAfterTrials) {
      this.#note(refusal);
    }
    if (this.#failedTrials >= remakeAfterTrials && performance.now() >= this.#remakeNotBeforeMs) {
      await this.#remakeBroken();
    }
  }

  #note(refusal: QueueRefusal | undefined): void {
    if (refusal?.reason !== this.#fault?.reason) {
      if (refusal === undefined) {
        this.#remakePauseMs = remakePauseMs.first;
        this.#log.info('queue can store records again');
      } else {
        this.#log.error({ reason: refusal.reason, error: refusal }, 'queue cannot store records');
      }
    }
    this.#fault = refusal;
  }

  async #firstRefusal(names: readonly StreamName[]): Promise<QueueRefusal | undefined> {
    const refusals = await Promise.all(names.map((name) => this.#trial(name)));
    return refusals.find((refusal) => refusal !== undefined);
  }

  /** Writes a message that nobody follows, and deletes it again. */
  async #trial(name: StreamName): Promise<QueueRefusal | undefined> {
    const { stream, manager } = await this.#link.session();
    const filter = trialSubjects[name];
    try {
      await stream.publish(filter, undefined, { timeout: trialTimeoutMs });
      await manager.streams.purge(name, { filter });
      return undefined;
    } catch (error) {
      const refusal = refusalOf(error);
      return refusal.reason === 'unanswered' ? this.#readCause(name, refusal) : refusal;
    }
  }

  /** A stream that cannot write does not answer publishers; a deletion, however, fails with the reason. */
  async #readCause(name: StreamName, refusal: QueueRefusal): Promise<QueueRefusal> {
    const { manager } = await this.#link.session();
    try {
      await manager.streams.purge(name, { filter: trialSubjects[name] });
      return refusal;
    } catch (error) {
      const cause = refusalOf(error);
      return cause.reason === 'disk_failed' ? cause : refusal;
    }
  }

  /** Reads how full the stream is. False if it was replaced, or if a bucket is gone. */
  async #takeStock(): Promise<boolean> {
    const { manager } = await this.#link.session();
    const before = { ...this.#written };
    const infos = await Promise.all(
      streamNames.map((name) =>
        manager.streams.info(name).catch((error: unknown): StreamInfo | undefined => {
          if (error instanceof JetStreamApiError && error.code === streamNotFoundCode) {
            return undefined;
          }
          throw error;
        }),
      ),
    );
    const [records, leases] = infos;
    if (records !== undefined) {
      const { bytes, messages } = records.state;
      this.#storeId = records.created;
      this.#firstSequence = records.state.first_seq;
      this.#stored = { bytes, records: messages };
      this.#limits = {
        maxBytes: boundOf(records.config.max_bytes),
        maxRecords: boundOf(records.config.max_msgs),
      };
      this.#written.bytes -= before.bytes;
      this.#written.records -= before.records;
    }
    return (
      infos.every((info) => info !== undefined) &&
      records?.created === this.#link.storeId &&
      leases !== undefined &&
      secondsOf(leases) === this.#link.leasesMadeSeconds
    );
  }

  /**
   * Deletes and recreates streams that cannot write, the stream of records first: the marks are left alone until the
   * records have room. Replicated streams repair themselves.
   */
  async #remakeBroken(): Promise<void> {
    const { manager } = await this.#link.session();
    for (const name of streamNames) {
      const info = await manager.streams.info(name);
      const isOurs = name !== requestStream || info.created === this.#link.storeId;
      if (isOurs && info.config.num_replicas === 1 && isDead(await this.#trial(name))) {
        this.#log.error(
          { stream: name, messages: info.state.messages },
          'stream cannot write: recreating it',
        );
        const marks = name === `KV_${drainBucket}` ? await this.#readMarks() : [];
        await manager.streams.delete(name);
        await this.#link.prepareAgain();
        if ((await this.#trial(name)) !== undefined) {
          break;
        }
        const { drains } = await this.#link.session();
        await Promise.all(marks.map(([key, value]) => drains.put(key, value)));
      }
    }
    this.#remakeNotBeforeMs = performance.now() + this.#remakePauseMs;
    this.#remakePauseMs = Math.min(2 * this.#remakePauseMs, remakePauseMs.most);
  }

  async #readMarks(): Promise<(readonly [string, Uint8Array])[]> {
    const { drains } = await this.#link.session();
    const marks: (readonly [string, Uint8Array])[] = [];
    for await (const key of await drains.keys()) {
      const entry = await drains.get(key);
      if (entry?.operation === 'PUT') {
        marks.push([key, entry.value]);
      }
    }
    return marks;
  }
}

function isDead(refusal: QueueRefusal | undefined): boolean {
  return refusal?.reason === 'unanswered' || refusal?.reason === 'disk_failed';
}

/** A stream's own bound; zero and below mean no bound. */
function boundOf(limit: number): number {
  return limit > 0 ? limit : Number.POSITIVE_INFINITY;
}
