// Whether the stream of records stores: tried out with a real write at a steady pace, and at once where a write has failed.
// Owns the refusal of records before the stream is full, and the repair of streams that are gone or that store nothing
// any more. What is connected to is in nats-connection.ts.
//
// A nats-server whose disk was full for a moment refuses every later write and deletion of that stream until the server is
// restarted. Only a new stream stores again, so the stream is deleted and made anew; the gateways then record again
// what they hold, as after the loss of a disk.

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

/** A stream that is gone is missed for at most this long by who writes nothing. */
const trialMs = 1_000;
const bucketsEveryRounds = 5;
/** Well above a slow disk's worst. */
const trialTimeoutMs = 2_000;
/** One trial may fail because the machine stood still. */
const faultAfterTrials = 2;
/** A stream that answers and has stored nothing for so many trials will not do so again. */
const remakeAfterTrials = 3;
/** A disk that is still full breaks the new stream too. */
const remakePauseMs = { first: 5_000, most: 60_000 };
/** Records are refused from this share of a limit on, so that other gateways' and those recorded again still fit. */
const refuseAtShare = 0.9;

type StreamName = keyof typeof trialSubjects;

/** That of the records first. */
const streamNames = [requestStream, `KV_${leaseBucket}`, `KV_${drainBucket}`] as const satisfies StreamName[];
const streamNotFoundCode = 10059;

interface Write {
  readonly subject: string;
  readonly bytes: Uint8Array;
  readonly headers: MsgHdrs;
  /** It was accepted before: only the stream's own limits refuse it. */
  readonly isRestored: boolean;
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
  /** As the server last said, and what was written from here since. */
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

  /** Why a record is not stored at this moment, as far as is known; undefined where it is. */
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

  /** Has the streams tried out at once: somebody's write has failed. */
  suspect(): void {
    this.#suspected.abort();
  }

  /** Writes a record. Fails with a QueueRefusal; where the stream was missing it is made and the write repeated. */
  async write(write: Write): Promise<RecordPlace> {
    const fault = this.fault;
    if (fault !== undefined && (fault.reason !== 'full' || !write.isRestored)) {
      throw fault;
    }
    if (!write.isRestored) {
      this.#assertRoom(write.bytes.length);
    }
    // Counted before they are stored: what is on its way needs room too.
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

  /** Where the stream is missing it is made first. */
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

  async #publish({ subject, bytes, headers, isRestored }: Write): Promise<RecordPlace> {
    const { stream, manager } = await this.#link.session();
    const { storeId } = this.#link;
    const expect = isRestored ? { lastSubjectSequence: 0 } : {};
    const { seq } = await stream
      .publish(subject, bytes, { headers, expect })
      .catch(async (error: unknown): Promise<{ readonly seq: number }> => {
        // The stream was made again before this side knew: it is there, under a place of the stream before.
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
          this.#log.debug({ error: ClusterError.from(error) }, 'queue not tried out');
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
      // A server that does not answer, or cannot make the stream.
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
        this.#log.info('queue stores records again');
      } else {
        this.#log.error({ reason: refusal.reason, error: refusal }, 'queue stores no records');
      }
    }
    this.#fault = refusal;
  }

  async #firstRefusal(names: readonly StreamName[]): Promise<QueueRefusal | undefined> {
    const refusals = await Promise.all(names.map((name) => this.#trial(name)));
    return refusals.find((refusal) => refusal !== undefined);
  }

  /** Writes a message that nobody follows, and takes it away again. */
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

  /** A stream that cannot write leaves publishers without an answer, and gives the reason to whoever takes messages away. */
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

  /** Reads what the stream holds. False where it is another one, or a bucket is gone. */
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
   * Deletes and makes again what stores nothing any more, the records first: while there is no room for them, the marks are
   * left alone. Streams on several servers repair themselves.
   */
  async #remakeBroken(): Promise<void> {
    const { manager } = await this.#link.session();
    for (const name of streamNames) {
      const info = await manager.streams.info(name);
      const isOurs = name !== requestStream || info.created === this.#link.storeId;
      if (isOurs && info.config.num_replicas === 1 && isDead(await this.#trial(name))) {
        this.#log.error(
          { stream: name, messages: info.state.messages },
          'stream stores nothing: it is made anew',
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

/** A stream's own bound; what is not positive is none. */
function boundOf(limit: number): number {
  return limit > 0 ? limit : Number.POSITIVE_INFINITY;
}
