// The contract of the ports of the bus, for both implementations: the same suite runs on the bus in memory and on a
// real nats-server. The cases that only a server has (it dies, comes back, comes back empty) follow after it.

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

import { ClusterError } from '@mimo/core/process/errors';
import { createLog } from '@mimo/core/process/log';
import type { Bus } from '@mimo/core/bus/bus';
import { leaseRenewMs, leaseTtlMs } from '@mimo/core/bus/leases';
import { MemoryBroker } from '@mimo/core/bus/memory/broker';
import { createMemoryBus } from '@mimo/core/bus/memory/bus';
import { createNatsBus } from '@mimo/core/bus/nats/bus';
import { summaryOf, type QueuedRecord, type RecordPlace } from '@mimo/core/bus/records';
import type { QueueState } from '@mimo/core/bus/signals';
import {
  Assignment,
  AssignmentOutcome,
  AssignmentReply,
  type Cancellation,
  Company,
  RequestEnded,
  RequestRecord,
} from '@mimo/proto/queue';
import { SamplingParams } from '@mimo/proto/sampling';
import { Heartbeat } from '@mimo/proto/worker';
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';

import {
  cacheDirectoryFrom,
  findNatsServer,
  startNatsServer,
  type NatsServer,
} from '../../cli/src/local/nats-server.ts';

const model = 'XiaomiMiMo/MiMo-7B-RL.v2';
const log = createLog({ process: 'test', level: 'silent' });
/** As long as a slow machine may take for what is there within two seconds. */
const patience = { timeout: 30_000, interval: 50 };

function record(requestId: string, overrides: Partial<RequestRecord> = {}): RequestRecord {
  return RequestRecord.fromPartial({
    requestId,
    model,
    gatewayId: 'g1',
    promptTokenIds: [1, 2, 3],
    ...overrides,
  });
}

/** Takes the first values of an iteration, then leaves it. */
async function take<T>(values: AsyncIterable<T>, count: number): Promise<T[]> {
  const taken: T[] = [];
  for await (const value of values) {
    taken.push(value);
    if (taken.length === count) {
      break;
    }
  }
  return taken;
}

/** What is left in a queue, of one model. */
async function replayOf(queue: Bus, of: string): Promise<QueuedRecord[]> {
  const replayed = new AbortController();
  const records = queue.records.follow(of, replayed.signal, () => replayed.abort());
  return take(records, Number.POSITIVE_INFINITY);
}

/** Gathers an iteration in the background. */
function gather<T>(values: AsyncIterable<T>): { readonly values: T[]; readonly done: Promise<void> } {
  const gathered: T[] = [];
  const run = async (): Promise<void> => {
    for await (const value of values) {
      gathered.push(value);
    }
  };
  return { values: gathered, done: run() };
}

interface Backend {
  open(): Promise<Bus>;
  close(): Promise<void>;
}

let server: NatsServer;
let storeDirectory: string;

function openNats(name: string, port: number = server.port): Bus {
  const servers = [`127.0.0.1:${port}`];
  return createNatsBus({ servers, clientName: name, replicas: 1, recordMaxAgeMs: 3_600_000, log });
}

async function startServer(port: number, directory: string): Promise<NatsServer> {
  const binary = await findNatsServer({
    cacheDirectory: cacheDirectoryFrom(process.env),
    onProgress: () => undefined,
    signal: AbortSignal.timeout(170_000),
  });
  if (binary === null) {
    throw new Error('these tests need a nats-server: on the PATH, or a Go toolchain to build one');
  }
  return startNatsServer({ binary, storeDirectory: directory, port });
}

beforeAll(async () => {
  storeDirectory = await mkdtemp(join(tmpdir(), 'mimo-queue-'));
  server = await startServer(0, storeDirectory);
});

afterAll(async () => {
  await server.close();
  await rm(storeDirectory, { recursive: true, force: true });
});

const backends: Readonly<Record<string, () => Backend>> = {
  'the bus in memory': () => {
    const broker = new MemoryBroker();
    return { open: async () => createMemoryBus(broker), close: async () => undefined };
  },
  'the bus on NATS': () => {
    const opened: Bus[] = [];
    return {
      open: async () => {
        const queue = openNats(`test-${opened.length}`);
        opened.push(queue);
        await vi.waitFor(() => expect(queue.connected).toBe(true), patience);
        return queue;
      },
      close: async () => undefined,
    };
  },
};

describe.each(Object.keys(backends))('%s', (name) => {
  const opened: Bus[] = [];
  let backend: Backend;
  const open = async (): Promise<Bus> => {
    const queue = await backend.open();
    opened.push(queue);
    return queue;
  };
  const abort = new AbortController();
  const never = abort.signal;

  beforeAll(() => {
    const create = backends[name];
    if (create === undefined) {
      throw new Error(`no backend ${name}`);
    }
    backend = create();
  });
  afterEach(async () => {
    const [queue] = opened;
    if (queue?.connected === true && (await queue.records.count()) > 0) {
      for (const each of [...(await replayOf(queue, model)), ...(await replayOf(queue, 'other'))]) {
        await queue.records.erase(each);
      }
    }
    await Promise.all(opened.map((each) => each.close()));
    opened.length = 0;
  });

  it('replays the live records of a model in order, then follows new ones', async () => {
    const queue = await open();
    const first = await queue.records.publish(record('a'));
    const second = await queue.records.publish(record('b', { model: 'other' }));
    const third = await queue.records.publish(record('c'));
    expect([first.sequence < second.sequence, second.sequence < third.sequence]).toEqual([true, true]);
    const values = queue.records.follow(model, never)[Symbol.asyncIterator]();
    expect((await values.next()).value).toMatchObject({
      ...first,
      record: summaryOf(record('a')),
      isArrival: false,
    });
    expect((await values.next()).value).toMatchObject({
      ...third,
      record: summaryOf(record('c')),
      isArrival: false,
    });
    const next = values.next();
    const fourth = await queue.records.publish(record('d'));
    expect((await next).value).toMatchObject({ ...fourth, record: summaryOf(record('d')), isArrival: true });
    await values.return?.();
  });

  it('reports the age of an existing record', async () => {
    const queue = await open();
    await queue.records.publish(record('a'));
    await sleep(300);
    const [queued] = await take(queue.records.follow(model, never), 1);
    expect(queued?.ageMs).toBeGreaterThan(250);
    expect(queued?.ageMs).toBeLessThan(60_000);
  });

  it('shows a dispatcher the fields of a record that it needs, but not the prompt', async () => {
    const queue = await open();
    await queue.records.publish(
      record('full', {
        timeLeftMs: 10 * 365 * 86_400_000,
        promptTokenIds: [0, 151_643, 151_679],
        sampling: SamplingParams.fromPartial({ maxTokens: 40 }),
        storesOutlived: 2,
        firstSequence: 2 ** 40,
        heldMs: 7,
        identity: 'i',
      }),
    );
    const [queued] = await take(queue.records.follow(model, never), 1);
    expect(queued?.record).toEqual({
      requestId: 'full',
      identity: 'i',
      model,
      gatewayId: 'g1',
      tokens: 43,
      timeLeftMs: 10 * 365 * 86_400_000,
      storesOutlived: 2,
      firstSequence: 2 ** 40,
      heldMs: 7,
    });
  });

  it('replaces a record only while the previous one still exists', async () => {
    const queue = await open();
    const first = await queue.records.publish(record('a', { heldMs: 0 }));
    const other = await queue.records.publish(record('b'));
    const again = record('a', { firstSequence: first.sequence, heldMs: 50_000 });
    const second = await queue.records.publishAgain(again, first);
    expect(second.sequence).toBeGreaterThan(other.sequence);
    expect(await queue.records.count()).toBe(2);
    const found = await take(queue.records.follow(model, never), 2);
    expect(found.map(({ sequence }) => sequence)).toEqual([other.sequence, second.sequence]);
    expect(found[1]?.ageMs).toBeGreaterThanOrEqual(50_000);
    await queue.records.turnFile();
    // The server's figures of all messages and of the test writes among them may be a moment apart.
    await expect.poll(() => queue.records.count(), { timeout: 10_000 }).toBe(2);
    expect(await queue.records.erase(first)).toBe(false);
    expect(await queue.records.erase(second)).toBe(true);
    await expect(queue.records.publishAgain(again, second)).rejects.toThrow(ClusterError);
    await expect.poll(() => queue.records.count(), { timeout: 10_000 }).toBe(1);
  });

  it('deletes a record once', async () => {
    const queue = await open();
    const place = await queue.records.publish(record('a'));
    expect(await queue.records.count()).toBe(1);
    expect(await queue.records.erase(place)).toBe(true);
    expect(await queue.records.erase(place)).toBe(false);
    expect(await queue.records.erase({ ...place, sequence: 9_999_999 })).toBe(false);
    expect(await queue.records.count()).toBe(0);
    const kept = await queue.records.publish(record('b'));
    expect((await take(queue.records.follow(model, never), 1))[0]?.sequence).toBe(kept.sequence);
  });

  it('ends an iteration when its signal fires, or the queue is closed', async () => {
    const queue = await open();
    const stop = new AbortController();
    const followed = [
      gather(queue.records.follow(model, stop.signal)),
      gather(queue.heartbeats.follow(stop.signal)),
      gather(queue.signals.followEnded(model, stop.signal)),
    ];
    const rest = [gather(queue.records.follow(model, never)), gather(queue.queueStates.follow(model, never))];
    stop.abort();
    await Promise.all(followed.map((each) => each.done));
    await queue.close();
    await Promise.all(rest.map((each) => each.done));
    await expect(queue.records.publish(record('late'))).rejects.toMatchObject({ code: 'unavailable' });
  });

  it('grants the lease of a model to one holder at a time, with a growing epoch', async () => {
    const [one, two] = [await open(), await open()];
    const other = await two.leases.acquire('other', 'two', never);
    const handoversMs: number[] = [];
    let first = await one.leases.acquire(model, 'one', never);
    for (const next of [two, one, two]) {
      const waiting = next.leases.acquire(model, 'next', never);
      const early = await Promise.race([waiting, sleep(200)]);
      expect(early).toBeUndefined();
      await first.release();
      expect(first.lost.aborted).toBe(true);
      const freedMs = performance.now();
      const second = await waiting;
      handoversMs.push(performance.now() - freedMs);
      expect(second.epoch).toBeGreaterThan(first.epoch);
      expect(second.lost.aborted).toBe(false);
      first = second;
    }
    // At once, and not at the next look, which is never so near; a machine that stands still makes one of them late.
    expect(Math.min(...handoversMs)).toBeLessThan(leaseRenewMs / 2);
    expect(other.lost.aborted).toBe(false);
    await first.release();
    await other.release();
  });

  it('stops waiting for a lease when the signal fires', async () => {
    const queue = await open();
    const lease = await queue.leases.acquire(model, 'one', never);
    const waiting = queue.leases.acquire(model, 'two', AbortSignal.timeout(50));
    await expect(waiting).rejects.toMatchObject({ name: 'TimeoutError' });
    await lease.release();
  });

  it('frees the leases of a queue that is closed', async () => {
    const [one, two] = [await open(), await open()];
    const lease = await one.leases.acquire(model, 'one', never);
    await one.close();
    expect(lease.lost.aborted).toBe(true);
    const next = await two.leases.acquire(model, 'two', never);
    expect(next.epoch).toBeGreaterThan(lease.epoch);
  });

  it('carries assignments to the owning gateway and its answer back', async () => {
    const [dispatcher, gateway] = [await open(), await open()];
    const assignment = Assignment.fromPartial({ requestId: 'r', model, group: 'g', dispatcherEpoch: 7 });
    await expect(dispatcher.signals.assign('gw.1', assignment)).rejects.toMatchObject({ code: 'not_found' });
    const answer = AssignmentReply.fromPartial({
      outcome: AssignmentOutcome.UNFIT,
      group: 'g',
      epoch: 3,
      needs: { identity: 'i' },
    });
    const seen: Assignment[] = [];
    const served = gateway.signals.serveAssignments('gw.1', (each) => {
      seen.push(each);
      return answer;
    });
    const reply = await vi.waitFor(() => dispatcher.signals.assign('gw.1', assignment), patience);
    expect(reply).toEqual(answer);
    expect(seen.at(-1)).toEqual(assignment);
    await served.close();
    await vi.waitFor(
      () =>
        expect(dispatcher.signals.assign('gw.1', assignment)).rejects.toMatchObject({ code: 'not_found' }),
      patience,
    );
  });

  it('reads an existing record by its request id alone', async () => {
    const [owner, reader] = [await open(), await open()];
    const requestId = 'of.mine *>';
    const place = await owner.records.publish(record(requestId, { tenant: 'me', gatewayId: 'gw.2' }));
    await owner.records.publish(record('another', { tenant: 'you', gatewayId: 'gw.2' }));
    const expected = { requestId, tenant: 'me', gatewayId: 'gw.2', promptTokenIds: [1, 2, 3] };
    expect(await reader.records.read(requestId)).toMatchObject(expected);
    expect(await reader.records.read('unknown')).toBeUndefined();
    await owner.records.erase(place);
    expect(await reader.records.read(requestId)).toBeUndefined();
  });

  it('asks the owner to end a request, and reports when the owner is gone', async () => {
    const [asked, owner] = [await open(), await open()];
    const seen: Cancellation[] = [];
    const served = owner.signals.serveCancellations('gw.2', (each) => {
      seen.push(each);
      return seen.length === 1;
    });
    const mine = { requestId: 'of.mine *>', tenant: 'me' };
    expect(await vi.waitFor(() => asked.signals.cancel('gw.2', mine), patience)).toBe(true);
    expect(await asked.signals.cancel('gw.2', mine)).toBe(false);
    expect(seen).toEqual([mine, mine]);
    await served.close();
    const unanswered = { code: 'unavailable', message: expect.stringContaining('gw.2') as string };
    await expect(asked.signals.cancel('gw.2', mine)).rejects.toMatchObject(unanswered);
  });

  it('delivers heartbeats, ends and states to their followers', async () => {
    const [sender, follower] = [await open(), await open()];
    const stop = new AbortController();
    const heartbeats = gather(follower.heartbeats.follow(stop.signal));
    const ended = gather(follower.signals.followEnded(model, stop.signal));
    const states = gather(follower.queueStates.follow(model, stop.signal));
    const heartbeat = Heartbeat.fromPartial({
      model,
      group: 'g0',
      sequenceNumber: 1,
      running: [{ requestId: 'r' }],
    });
    const state: QueueState = {
      model,
      dispatcherEpoch: 2,
      waitingRequests: 3,
      runningRequests: 4,
      parkedRequests: 0,
      waitingTokens: 5,
      inFlightTokens: 8,
      oldestWaitingMs: 6,
      readyGroups: 7,
      slots: 9,
      arrivedTokens: 10,
      endedTokens: 11,
      waitingFor: [{ identity: 'i', requests: 3, tokens: 5 }],
      groups: [
        {
          group: 'g0',
          incarnation: 'g0-1',
          revision: 'r',
          identity: 'i',
          routable: true,
          draining: false,
          slots: 9,
          inFlightRequests: 4,
          inFlightTokens: 8,
        },
      ],
    };
    const end = RequestEnded.fromPartial({
      requestId: 'r',
      model,
      requeued: true,
      epoch: 1,
      needs: { identity: 'i', company: Company.PROVEN },
    });
    await vi.waitFor(() => {
      sender.heartbeats.publish(heartbeat);
      sender.signals.publishEnded({ ...end, model: 'other' });
      sender.signals.publishEnded(end);
      sender.queueStates.publish(state);
      expect(heartbeats.values[0]).toEqual(heartbeat);
      expect(ended.values[0]).toEqual(end);
      expect(states.values[0]).toEqual(state);
    }, patience);
    expect(ended.values.every((each) => each.model === model)).toBe(true);
    stop.abort();
    await Promise.all([heartbeats.done, ended.done, states.done]);
  });

  it('reports the end of the replay, also for an empty queue or deleted records', async () => {
    const [writer, reader] = [await open(), await open()];
    const empty = new AbortController();
    let emptyReplayed = 0;
    const nothing = gather(reader.records.follow(model, empty.signal, () => void (emptyReplayed += 1)));
    await vi.waitFor(() => expect(emptyReplayed).toBe(1), patience);
    await writer.records.publish(record('a'));
    await vi.waitFor(() => expect(nothing.values).toHaveLength(1), patience);
    expect(emptyReplayed).toBe(1);
    empty.abort();
    await nothing.done;
    // More than a reader asks for at once, so that the end of it can be deleted before it is sent.
    const places = await Promise.all(
      Array.from({ length: 700 }, (_, index) => writer.records.publish(record(`r${index}`))),
    );
    let replayed = false;
    const values = reader.records.follow(model, never, () => void (replayed = true))[Symbol.asyncIterator]();
    await values.next();
    expect(replayed).toBe(false);
    await Promise.all(places.slice(-20).map((place) => writer.records.erase(place)));
    const rest = gather({ [Symbol.asyncIterator]: () => values });
    await vi.waitFor(() => expect(replayed).toBe(true), patience);
    expect(rest.values).toHaveLength(680);
    await reader.close();
    await rest.done;
  });

  it('keeps drain marks until they are cleared, and sends all of them first and at every change', async () => {
    const [controller, dispatcher] = [await open(), await open()];
    await controller.drainMarks.mark(model, 'g.0', { sinceUnixMs: 1 });
    await controller.drainMarks.mark('other', 'g9', { sinceUnixMs: 9 });
    const stop = new AbortController();
    const followed = gather(dispatcher.drainMarks.follow(model, stop.signal));
    const last = (): Record<string, unknown> => Object.fromEntries(followed.values.at(-1) ?? []);
    await vi.waitFor(() => expect(last()).toEqual({ 'g.0': { sinceUnixMs: 1 } }), patience);
    await controller.drainMarks.mark(model, 'g1', { sinceUnixMs: 2 });
    await vi.waitFor(
      () => expect(last()).toEqual({ 'g.0': { sinceUnixMs: 1 }, g1: { sinceUnixMs: 2 } }),
      patience,
    );
    await controller.drainMarks.mark(model, 'g1', { sinceUnixMs: 3 });
    await controller.drainMarks.clear(model, 'g.0');
    await controller.drainMarks.clear(model, 'unmarked');
    await vi.waitFor(() => expect(last()).toEqual({ g1: { sinceUnixMs: 2 } }), patience);
    await Promise.all(
      ['a', 'b', 'c'].map((group) => controller.drainMarks.mark(model, group, { sinceUnixMs: 4 })),
    );
    await vi.waitFor(() => expect(Object.keys(last()).toSorted()).toEqual(['a', 'b', 'c', 'g1']), patience);
    await Promise.all(['a', 'b', 'c', 'g1'].map((group) => controller.drainMarks.clear(model, group)));
    await vi.waitFor(() => expect(last()).toEqual({}), patience);
    stop.abort();
    await followed.done;
    const [none] = await take(dispatcher.drainMarks.follow('unheard of', never), 1);
    expect(none?.size).toBe(0);
    await controller.drainMarks.clear('other', 'g9');
  });

  it('replays 5,000 records in order, each once', async () => {
    const [writer, reader] = [await open(), await open()];
    const total = 5_000;
    const places: RecordPlace[] = [];
    for (let at = 0; at < total; at += 500) {
      const batch = Array.from({ length: 500 }, (_, offset) =>
        writer.records.publish(record(`r${at + offset}`)),
      );
      places.push(...(await Promise.all(batch)));
    }
    const replayed = await take(reader.records.follow(model, never), total);
    const sequences = places.map((place) => place.sequence).toSorted((a, b) => a - b);
    expect(replayed.map((each) => each.sequence)).toEqual(sequences);
    expect(new Set(replayed.map((each) => each.record.requestId)).size).toBe(total);
    for (let at = 0; at < total; at += 500) {
      await Promise.all(places.slice(at, at + 500).map((place) => writer.records.erase(place)));
    }
    expect(await reader.records.count()).toBe(0);
  });
});

describe('the bus on NATS, when its server', () => {
  let directory: string;
  let own: NatsServer;
  const queues: Bus[] = [];
  const abort = new AbortController();
  const open = async (name: string): Promise<Bus> => {
    const queue = openNats(name, own.port);
    queues.push(queue);
    await vi.waitFor(() => expect(queue.connected).toBe(true), patience);
    return queue;
  };
  beforeAll(async () => {
    directory = await mkdtemp(join(tmpdir(), 'mimo-queue-'));
    own = await startServer(0, directory);
  });
  afterEach(async () => {
    await Promise.all(queues.map((queue) => queue.close()));
    queues.length = 0;
  });
  afterAll(async () => {
    abort.abort();
    await own.close();
    await rm(directory, { recursive: true, force: true });
  });

  /** kill -9, then the same port again. */
  const restart = async (options: { emptied: boolean; whileDown: () => Promise<void> }): Promise<void> => {
    own.child.kill();
    await own.child.exited;
    await options.whileDown();
    if (options.emptied) {
      await rm(directory, { recursive: true, force: true });
    }
    own = await startServer(own.port, directory);
  };

  it('dies: refuses new records, keeps the old ones, and continues to follow', async () => {
    const queue = await open('survivor');
    const kept = await queue.records.publish(record('kept'));
    const doomed = await queue.records.publish(record('doomed'));
    const followed = gather(queue.records.follow(model, abort.signal));
    await vi.waitFor(() => expect(followed.values).toHaveLength(2), patience);
    let deleting: Promise<boolean> | undefined;
    await restart({
      emptied: false,
      whileDown: async () => {
        await vi.waitFor(() => expect(queue.connected).toBe(false), patience);
        const refused = queue.records.publish(record('refused'));
        await expect(refused).rejects.toMatchObject({ code: 'unavailable', detail: { retryAfterMs: 1_000 } });
        deleting = queue.records.erase(doomed);
      },
    });
    await vi.waitFor(() => expect(queue.connected).toBe(true), patience);
    expect(await deleting).toBe(true);
    const after = await queue.records.publish(record('after'));
    await vi.waitFor(
      () =>
        expect(followed.values.map((each) => each.sequence)).toEqual(
          [kept, doomed, after].map((place) => place.sequence),
        ),
      patience,
    );
    expect(await queue.records.count()).toBe(2);
    await Promise.all([queue.records.erase(kept), queue.records.erase(after)]);
  });

  it('dies for longer than a lease lasts: the holder notices, and another takes over', async () => {
    const [one, two] = [await open('one'), await open('two')];
    const first = await one.leases.acquire(model, 'one', abort.signal);
    await restart({
      emptied: false,
      whileDown: async () => {
        await vi.waitFor(() => expect(first.lost.aborted).toBe(true), {
          ...patience,
          timeout: leaseTtlMs + 10_000,
        });
      },
    });
    const second = await two.leases.acquire(model, 'two', AbortSignal.timeout(60_000));
    expect(second.epoch).toBeGreaterThan(first.epoch);
  });

  it('comes back empty: creates its stream again, and all followers start from the beginning', async () => {
    const [one, two] = [await open('one'), await open('two')];
    const lost = await one.records.publish(record('lost'));
    await one.records.publish(record('lost too'));
    const storeId = one.records.storeId;
    expect(two.records.storeId).toBe(storeId);
    const followed = [
      gather(one.records.follow(model, abort.signal)),
      gather(two.records.follow(model, abort.signal)),
    ];
    await vi.waitFor(() => expect(followed.every((each) => each.values.length === 2)).toBe(true), patience);
    await restart({ emptied: true, whileDown: async () => undefined });
    await vi.waitFor(() => {
      expect([one.connected, two.connected]).toEqual([true, true]);
      expect(one.records.storeId).not.toBe(storeId);
      expect(two.records.storeId).toBe(one.records.storeId);
    }, patience);
    const fresh = await one.records.publish(record('fresh'));
    // A number of the store that is lost is, or will be, that of another record.
    expect(await one.records.erase({ ...fresh, storeId: lost.storeId })).toBe(false);
    expect(await one.records.count()).toBe(1);
    await vi.waitFor(() => {
      expect(followed.map((each) => each.values.at(-1)?.record.requestId)).toEqual(['fresh', 'fresh']);
    }, patience);
  });

  it('dies: keeps drain marks, and delivers later ones', async () => {
    const [controller, dispatcher] = [await open('controller'), await open('dispatcher')];
    await controller.drainMarks.mark(model, 'before', { sinceUnixMs: 1 });
    const stop = new AbortController();
    const followed = gather(dispatcher.drainMarks.follow(model, stop.signal));
    await vi.waitFor(() => expect(followed.values.at(-1)?.has('before')).toBe(true), patience);
    await restart({ emptied: false, whileDown: async () => undefined });
    await vi.waitFor(() => controller.drainMarks.mark(model, 'after', { sinceUnixMs: 2 }), patience);
    await vi.waitFor(
      () => expect([...(followed.values.at(-1)?.keys() ?? [])]).toEqual(['before', 'after']),
      patience,
    );
    await controller.drainMarks.clear(model, 'before');
    await controller.drainMarks.clear(model, 'after');
    stop.abort();
    await followed.done;
  });

  it('is not running yet: opens at once and connects when it starts', async () => {
    own.child.kill();
    await own.child.exited;
    const queue = openNats('early', own.port);
    queues.push(queue);
    await expect(queue.records.publish(record('early'))).rejects.toMatchObject({ code: 'unavailable' });
    own = await startServer(own.port, directory);
    await vi.waitFor(() => expect(queue.connected).toBe(true), patience);
    const place = await queue.records.publish(record('in time'));
    expect(await queue.records.erase(place)).toBe(true);
  });

  it('never starts: closes without waiting for it', async () => {
    const queue = openNats('alone', 1);
    await queue.close();
    expect(queue.connected).toBe(false);
  });

  it('has a limit: refuses a larger record', async () => {
    const queue = await open('large');
    const promptTokenIds = Array.from({ length: 600_000 }, () => 150_000);
    await expect(queue.records.publish(record('large', { promptTokenIds }))).rejects.toMatchObject({
      code: 'invalid_argument',
    });
  });
});
