// The records in a JetStream stream: a message a request until it is erased by its sequence. Followers get the
// message's header, a summary, and not the prompt. Whether the stream stores is tried out in trial.ts, its room is
// counted in room.ts, following is in replay.ts.

import { headers, type MsgHdrs } from '@nats-io/transport-node';

import { RequestRecord, RequestSummary } from '@mimo/proto/queue';

import { pause } from '../../process/abort.ts';
import type { Log } from '../../process/log.ts';
import { QueueRefusal } from '../queue-refusal.ts';
import { summaryOf, type FollowedRecord, type RecordPlace, type Records } from '../records.ts';
import { EraseQueue } from './erase-queue.ts';
import { isNoMessage, isTaken, refusalOf, unavailable } from './errors.ts';
import type { NatsLink } from './link.ts';
import { decoded } from './messages.ts';
import { followRecords, summaryHeader } from './replay.ts';
import { Room } from './room.ts';
import type { NatsStreams, StreamLimits } from './streams.ts';
import { requestStream, subjects, trialSubjects } from './subjects.ts';
import { StreamTrials } from './trial.ts';

const retryMs = 500;
/** The largest file of a stream; what fills it comes in parts that take no more than this share of a stream's bound. */
const fileBytes = 8 * 2 ** 20;
const partShare = 1 / 16;

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

/** What the records need. */
export interface NatsRecordsOptions {
  readonly link: NatsLink;
  readonly streams: NatsStreams;
  readonly limits?: StreamLimits | undefined;
  readonly log: Log;
}

/** The records behind one link. Nothing to close: iterations and trials end with the link. */
export class NatsRecords implements Records {
  readonly #link: NatsLink;
  readonly #streams: NatsStreams;
  readonly #room: Room;
  readonly #trials: StreamTrials;
  readonly #log: Log;
  readonly #erases: EraseQueue;
  #publishing = 0;
  /** The first record of the stream, as the server last said. */
  #first: RecordPlace = { storeId: '', sequence: 0 };

  constructor({ link, streams, limits, log }: NatsRecordsOptions) {
    this.#link = link;
    this.#streams = streams;
    this.#room = new Room(limits);
    this.#log = log;
    const look = (): ReturnType<Room['look']> => {
      const seen = this.#room.look();
      return (info) => {
        seen(info);
        this.#first = { storeId: info.created, sequence: info.state.first_seq };
      };
    };
    this.#trials = new StreamTrials({ link, streams, look, log });
    this.#erases = new EraseQueue({
      erase: (place) => this.#erase(place),
      isPublishing: () => this.#publishing > 0,
      signal: link.closing,
    });
  }

  get fault(): QueueRefusal | undefined {
    return this.#trials.fault;
  }

  get storeId(): string {
    return this.#streams.storeId;
  }

  get oldest(): RecordPlace {
    const { storeId } = this;
    return storeId === this.#first.storeId ? this.#first : { storeId, sequence: 0 };
  }

  /** Resolves when the link is closed and the last trial has ended. */
  ended(): Promise<void> {
    return this.#trials.ended();
  }

  publish(record: RequestRecord): Promise<RecordPlace> {
    return this.#publish(record, record.storesOutlived > 0 ? 0 : undefined);
  }

  publishAgain(record: RequestRecord, { sequence }: RecordPlace): Promise<RecordPlace> {
    return this.#publish(record, sequence);
  }

  /**
   * Fills the file that the stream writes to with a message that is taken away again, in parts that a small stream has
   * room for. nats-server offers no other way to close one.
   */
  async turnFile(): Promise<void> {
    const { connection, stream, manager } = await this.#streams.stores();
    const filter = trialSubjects[requestStream];
    const payloadBytes = connection.info?.max_payload ?? fileBytes;
    const partBytes = Math.min(payloadBytes, fileBytes, this.#room.maxBytes * partShare);
    const part = Buffer.alloc(Math.ceil(partBytes));
    for (let written = 0; written < fileBytes; written += part.length) {
      await stream.publish(filter, part);
      await manager.streams.purge(requestStream, { filter });
    }
  }

  /** `after`: the sequence of what the store must have of the request; 0: nothing. */
  async #publish(record: RequestRecord, after: number | undefined): Promise<RecordPlace> {
    const { connection } = await this.#streams.stores();
    const bytes = RequestRecord.encode(record).finish();
    const limitBytes = connection.info?.max_payload ?? Number.POSITIVE_INFINITY;
    if (bytes.length > limitBytes) {
      const text = `the request's record has ${bytes.length} bytes, over the queue's limit of ${limitBytes}`;
      throw new QueueRefusal('too_large', text);
    }
    const summary = Buffer.from(RequestSummary.encode(summaryOf(record)).finish()).toString('base64');
    const withSummary = headers();
    withSummary.set(summaryHeader, summary);
    const fault = this.fault;
    if (fault !== undefined && (fault.reason !== 'full' || after === undefined)) {
      throw fault;
    }
    if (after === undefined) {
      this.#room.assertFor(bytes.length);
    }
    const takeBack = this.#room.add(bytes.length);
    const subject = subjects.request(record.model, record.requestId);
    this.#publishing += 1;
    try {
      return await this.#writeMaking({ subject, bytes, headers: withSummary, after });
    } catch (error) {
      takeBack();
      throw error;
    } finally {
      this.#publishing -= 1;
    }
  }

  erase(place: RecordPlace): Promise<boolean> {
    return this.#erases.add(place);
  }

  async #erase({ storeId, sequence }: RecordPlace): Promise<boolean> {
    const { closing } = this.#link;
    for (;;) {
      closing.throwIfAborted();
      try {
        const { manager } = await this.#streams.stores();
        if (storeId !== this.storeId) {
          // Its sequence belongs, or will belong, to another request's record.
          return false;
        }
        return await manager.streams.deleteMessage(requestStream, sequence, true);
      } catch (error) {
        if (isNoMessage(error)) {
          return false;
        }
        this.#trials.suspect();
        await pause(retryMs, closing);
      }
    }
  }

  async read(requestId: string): Promise<RequestRecord | undefined> {
    const { manager } = await this.#streams.stores();
    const subject = subjects.requestById(requestId);
    const stored = await manager.streams
      .getMessage(requestStream, { last_by_subj: subject })
      .catch((error: unknown) => {
        if (isNoMessage(error)) {
          return null;
        }
        throw unavailable('the queue did not answer in time', error);
      });
    return stored === null ? undefined : decoded(stored.data, RequestRecord, this.#log);
  }

  follow(model: string, signal: AbortSignal, onReplayed?: () => void): AsyncIterable<FollowedRecord> {
    const until = AbortSignal.any([signal, this.#link.closing]);
    const from = { link: this.#link, streams: this.#streams, log: this.#log };
    return followRecords(from, { model, until, onReplayed });
  }

  async count(): Promise<number> {
    const { manager } = await this.#streams.stores();
    const trial = trialSubjects[requestStream];
    const { state } = await manager.streams.info(requestStream, { subjects_filter: trial });
    return state.messages - (state.subjects?.[trial] ?? 0);
  }

  /** Creates a missing stream first. */
  async #writeMaking(write: Write): Promise<RecordPlace> {
    try {
      return await this.#write(write);
    } catch (error) {
      const refusal = refusalOf(error);
      if (refusal.reason !== 'missing') {
        this.#trials.suspect();
        throw refusal;
      }
      return await this.#streams
        .prepareAgain()
        .then(() => this.#write(write))
        .catch((again: unknown) => {
          throw refusalOf(again);
        });
    }
  }

  async #write({ subject, bytes, headers: withSummary, after }: Write): Promise<RecordPlace> {
    const { stream, manager } = await this.#streams.stores();
    const { storeId } = this;
    const expect = after === undefined ? {} : { lastSubjectSequence: after };
    const { seq } = await stream
      .publish(subject, bytes, { headers: withSummary, expect })
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
}
