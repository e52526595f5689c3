// The durable record of each accepted request. Gateways publish, erase and read; dispatchers follow. Implemented by
// nats/records.ts (a JetStream stream) and memory/records.ts (one process, nothing durable).

import type { RequestRecord, RequestSummary } from '@mimo/proto/queue';

import type { QueueRefusal } from './queue-refusal.ts';

/** The position of a record. Sequences only grow within a store, so they are also the order of arrival. */
export interface RecordPlace {
  readonly storeId: string;
  readonly sequence: number;
}

/** A live record; its prompt stays in the store. */
export interface QueuedRecord extends RecordPlace {
  readonly record: RequestSummary;
}

/** A live record as a follower gets it. */
export interface FollowedRecord extends QueuedRecord {
  /** True: it arrived after the following began. False: it existed before. */
  readonly isArrival: boolean;
  /** How long it had been stored when it was delivered, by the store's own clock; about 0 for new records. */
  readonly ageMs: number;
}

/** The records of every model. */
export interface Records {
  /**
   * Why records cannot be stored, according to the latest writes; undefined if they can. A test record is written
   * every second, so this is known without any requests.
   */
  readonly fault: QueueRefusal | undefined;
  /** The id of the store: it changes when a server came back empty. Sequences and lease epochs then start over. */
  readonly storeId: string;
  /** Records of any other store, and records before this one, are gone. */
  readonly oldest: RecordPlace;
  /**
   * Writes a record and waits until it is stored. Fails with a QueueRefusal if it cannot be written, or if the store
   * is nearly full and the record is new (not one that outlived a store).
   */
  publish(record: RequestRecord): Promise<RecordPlace>;
  /**
   * Writes the record of a request again, behind all others; it replaces the stored one at `place`. Fails like
   * `publish`, and if there is no record at `place` any more.
   */
  publishAgain(record: RequestRecord, place: RecordPlace): Promise<RecordPlace>;
  /** Has the store begin another file. The store removes a file once it holds no live record. */
  turnFile(): Promise<void>;
  /**
   * Deletes a record, and overwrites it on disk if the server keeps it in plain text. True if this call deleted
   * it, false if it was gone, perhaps with its whole store. Waits through disconnections.
   */
  erase(place: RecordPlace): Promise<boolean>;
  /** The live record of a request by its id alone, prompt included; undefined if there is none. */
  read(requestId: string): Promise<RequestRecord | undefined>;
  /**
   * Replays the live records of a model in order, then follows new ones; each record once. `onReplayed` is called when
   * the records from before the start have been read, and again after the store was replaced.
   */
  follow(model: string, signal: AbortSignal, onReplayed?: () => void): AsyncIterable<FollowedRecord>;
  /** Live records of every model, counted by the server. */
  count(): Promise<number>;
}

/** What followers get of a record. */
export function summaryOf(record: RequestRecord): RequestSummary {
  const { requestId, model, gatewayId, identity, timeLeftMs, storesOutlived, firstSequence, heldMs } = record;
  const tokens = record.promptTokenIds.length + (record.sampling?.maxTokens ?? 0);
  return { requestId, model, gatewayId, tokens, identity, timeLeftMs, storesOutlived, firstSequence, heldMs };
}
