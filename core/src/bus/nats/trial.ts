// Whether the streams can write: a real test write at a steady pace, and at once after a failed write. Owns the repair
// of streams that are gone or can no longer write.
//
// A nats-server whose disk was full for a moment refuses every later write and deletion of that stream until the
// server is restarted. Only a new stream can write again, so the stream is deleted and recreated; the gateways then
// record their requests again, as after the loss of a disk.

import type { StreamInfo } from '@nats-io/jetstream';

import { pause } from '../../process/abort.ts';
import { ClusterError } from '../../process/errors.ts';
import type { Log } from '../../process/log.ts';
import { QueueRefusal } from '../queue-refusal.ts';
import { isStreamMissing, refusalOf } from './errors.ts';
import type { NatsLink } from './link.ts';
import { secondsOf, type NatsStreams } from './streams.ts';
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

type StreamName = keyof typeof trialSubjects;

/** The stream of records comes first. */
const streamNames = [requestStream, `KV_${leaseBucket}`, `KV_${drainBucket}`] as const satisfies StreamName[];

/** What the trials work with. `look` begins a look at the stream of records; what it returns takes the answer. */
export interface TrialOptions {
  readonly link: NatsLink;
  readonly streams: NatsStreams;
  readonly look: () => (info: StreamInfo) => void;
  readonly log: Log;
}

/** The trials of one link's streams; they run until it closes. */
export class StreamTrials {
  readonly #link: NatsLink;
  readonly #streams: NatsStreams;
  readonly #look: TrialOptions['look'];
  readonly #log: Log;
  #fault: QueueRefusal | undefined;
  #round = 0;
  #failedTrials = 0;
  #remakePauseMs = remakePauseMs.first;
  #remakeNotBeforeMs = 0;
  #suspected = new AbortController();
  readonly #ended: Promise<void>;

  constructor({ link, streams, look, log }: TrialOptions) {
    this.#link = link;
    this.#streams = streams;
    this.#look = look;
    this.#log = log;
    this.#ended = this.#run();
  }

  /** Why records cannot be stored now, as far as known; undefined if they can. */
  get fault(): QueueRefusal | undefined {
    return this.#streams.ready ? this.#fault : new QueueRefusal('disconnected', 'the queue is not connected');
  }

  /** Resolves when the link is closed and the last trial has ended. */
  ended(): Promise<void> {
    return this.#ended;
  }

  /** Starts a trial of the streams at once: a write has failed. */
  suspect(): void {
    this.#suspected.abort();
  }

  async #run(): Promise<void> {
    const { closing } = this.#link;
    await this.#streams.opened(closing).catch(() => undefined);
    while (!closing.aborted) {
      this.#suspected = new AbortController();
      if (this.#streams.ready) {
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
        await this.#streams.prepareAgain();
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
    const { stream, manager } = await this.#streams.stores();
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
    const { manager } = await this.#streams.stores();
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
    const { manager } = await this.#streams.stores();
    const seen = this.#look();
    const infos = await Promise.all(
      streamNames.map((name) =>
        manager.streams.info(name).catch((error: unknown): StreamInfo | undefined => {
          if (isStreamMissing(error)) {
            return undefined;
          }
          throw error;
        }),
      ),
    );
    const [records, leases] = infos;
    if (records !== undefined) {
      seen(records);
    }
    return (
      infos.every((info) => info !== undefined) &&
      records?.created === this.#streams.storeId &&
      leases !== undefined &&
      secondsOf(leases) === this.#streams.leasesMadeSeconds
    );
  }

  /**
   * Deletes and recreates streams that cannot write, the stream of records first: the marks are left alone until the
   * records have room. Replicated streams repair themselves.
   */
  async #remakeBroken(): Promise<void> {
    const { manager } = await this.#streams.stores();
    for (const name of streamNames) {
      const info = await manager.streams.info(name);
      const isOurs = name !== requestStream || info.created === this.#streams.storeId;
      if (isOurs && info.config.num_replicas === 1 && isDead(await this.#trial(name))) {
        this.#log.error(
          { stream: name, messages: info.state.messages },
          'stream cannot write: recreating it',
        );
        const marks = name === `KV_${drainBucket}` ? await this.#readMarks() : [];
        await manager.streams.delete(name);
        await this.#streams.prepareAgain();
        if ((await this.#trial(name)) !== undefined) {
          break;
        }
        const { drains } = await this.#streams.stores();
        await Promise.all(marks.map(([key, value]) => drains.put(key, value)));
      }
    }
    this.#remakeNotBeforeMs = performance.now() + this.#remakePauseMs;
    this.#remakePauseMs = Math.min(2 * this.#remakePauseMs, remakePauseMs.most);
  }

  async #readMarks(): Promise<(readonly [string, Uint8Array])[]> {
    const { drains } = await this.#streams.stores();
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
