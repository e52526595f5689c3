// The contract of the model catalogue, on a real nats-server that is killed, restarted and emptied.

import { randomBytes } from 'node:crypto';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { jetstream, jetstreamManager, type StreamAPI } from '@nats-io/jetstream';
import { Objm } from '@nats-io/obj';
import { connect } from '@nats-io/transport-node';

import { ClusterError } from '@mimo/core/process/errors';
import { createLog } from '@mimo/core/process/log';
import type { CatalogModel, ModelCatalog, ModelFiles } from '@mimo/core/bus/model-catalog';
import { NatsLink } from '@mimo/core/bus/nats/link';
import { createModelCatalog } from '@mimo/core/bus/nats/model-catalog';
import { modelBucket } from '@mimo/core/bus/nats/subjects';
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';

import type { NatsServer } from '../../cli/src/local/nats-server.ts';
import { startTestNats } from '../harness/nats.ts';
import { mountSmall } from '../harness/small-volume.ts';
import { patience } from '../harness/wait-for.ts';

const name = 'XiaomiMiMo/MiMo-7B-RL.v2';
const log = createLog({ process: 'test', level: 'silent' });

let directory: string;
let server: NatsServer;
const opened: NatsLink[] = [];
const stops: AbortController[] = [];

function open(options: { readonly server?: NatsServer; readonly maxBytes?: number } = {}): ModelCatalog {
  const { maxBytes } = options;
  const link = new NatsLink({ servers: [(options.server ?? server).url], clientName: 'test', log });
  opened.push(link);
  return createModelCatalog(link, { replicas: 1, ...(maxBytes === undefined ? {} : { maxBytes }), log });
}

function within(timeoutMs: number): AbortSignal {
  return AbortSignal.timeout(timeoutMs);
}

function modelOf(files: Record<string, string | Uint8Array>): ModelFiles {
  return {
    name,
    identity: 'i',
    files: new Map(Object.entries(files).map(([file, text]) => [file, Buffer.from(text)])),
  };
}

/** Every set that a follower yields, the latest last. */
function follow(catalog: ModelCatalog): {
  readonly sets: (readonly CatalogModel[])[];
  readonly done: Promise<void>;
} {
  const stop = new AbortController();
  stops.push(stop);
  const sets: (readonly CatalogModel[])[] = [];
  const run = async (): Promise<void> => {
    for await (const models of catalog.follow(stop.signal)) {
      sets.push(models);
    }
  };
  return { sets, done: run() };
}

function filesOfRound(round: number): ReturnType<typeof modelOf> {
  return modelOf({ 'config.json': String(round), 'tokenizer.json': Buffer.alloc(3_000_000, String(round)) });
}

/** What a fetch of a round ends in: `whole`, `mixed` or the code of its error. */
async function readRound(catalog: ModelCatalog, model: CatalogModel, path: string): Promise<string> {
  try {
    await catalog.fetch(model, path, within(60_000));
  } catch (error) {
    return ClusterError.from(error).code;
  }
  const { 'config.json': round = '', 'tokenizer.json': text } = await readAll(path);
  return text === round.repeat(3_000_000) ? 'whole' : 'mixed';
}

async function readAll(path: string): Promise<Record<string, string>> {
  const files = await readdir(path);
  return Object.fromEntries(
    await Promise.all(files.map(async (file) => [file, await readFile(join(path, file), 'utf8')] as const)),
  );
}

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'mimo-catalog-'));
  server = await startTestNats({ storeDirectory: join(directory, 'nats'), port: 0 });
});

afterEach(async () => {
  stops.splice(0).forEach((stop) => stop.abort());
  await open().remove(name, within(20_000));
  await Promise.all(opened.splice(0).map((link) => link.close()));
});

afterAll(async () => {
  await server.close();
  await rm(directory, { recursive: true, force: true });
});

describe('the model catalogue', () => {
  it('sends a reader the whole set first and at each change, and the files of each model', async () => {
    const [writer, reader] = [open(), open()];
    const seen = follow(reader);
    await vi.waitFor(() => expect(seen.sets).toEqual([[]]), patience);

    const first = await writer.publish(
      modelOf({ 'config.json': '{"a":1}', 'tokenizer.json': 'x' }),
      within(20_000),
    );
    await vi.waitFor(() => expect(seen.sets.at(-1)).toEqual([first]), patience);
    await reader.fetch(first, join(directory, 'first'), within(20_000));
    expect(await readAll(join(directory, 'first'))).toEqual({
      'config.json': '{"a":1}',
      'tokenizer.json': 'x',
    });

    const second = await writer.publish(modelOf({ 'config.json': '{"a":2}' }), within(20_000));
    expect(second.digest).not.toBe(first.digest);
    await vi.waitFor(() => expect(seen.sets.at(-1)).toEqual([second]), patience);
    await reader.fetch(second, join(directory, 'second'), within(20_000));
    expect(await readAll(join(directory, 'second'))).toEqual({ 'config.json': '{"a":2}' });
    // What was replaced is gone, and leaves nothing behind.
    await expect(reader.fetch(first, join(directory, 'late'), within(20_000))).rejects.toMatchObject({
      code: 'not_found',
    });
    expect((await readdir(directory)).filter((each) => each.startsWith('late'))).toEqual([]);

    await writer.remove(name, within(20_000));
    await vi.waitFor(() => expect(seen.sets.at(-1)).toEqual([]), patience);
    await writer.remove(name, within(20_000));
    expect(seen.sets).toEqual([[], [first], [second], []]);
  });

  it('writes nothing when the same files are published again, in any order', async () => {
    const [one, two] = [open(), open()];
    const seen = follow(one);
    const model = await one.publish(modelOf({ 'a.json': '1', 'b.json': '2' }), within(20_000));
    await vi.waitFor(() => expect(seen.sets.at(-1)).toEqual([model]), patience);
    expect(await two.publish(modelOf({ 'b.json': '2', 'a.json': '1' }), within(20_000))).toEqual(model);
    expect(await storedBytes()).toBeLessThan(5_000);
  });

  it('keeps one whole model of several published at the same time, and nothing of the others', async () => {
    const contents = ['one', 'two', 'three'].map((word) => Buffer.alloc(2_000_000, word));
    const published = await Promise.all(
      contents.map((content) => open().publish(modelOf({ 'tokenizer.json': content }), within(60_000))),
    );
    const reader = open();
    const seen = follow(reader);
    await vi.waitFor(() => expect(published).toContainEqual(seen.sets.at(-1)?.[0]), patience);
    const [kept] = seen.sets.at(-1) ?? [];
    await reader.fetch(kept as CatalogModel, join(directory, 'kept'), within(20_000));
    const content = await readFile(join(directory, 'kept/tokenizer.json'));
    expect(contents.some((each) => each.equals(content))).toBe(true);
    expect(await storedBytes()).toBeLessThan(2_200_000);
  });

  it('carries a tokenizer of the real size', async () => {
    const catalog = open();
    const content = randomBytes(11 * 2 ** 20);
    const model = await catalog.publish(modelOf({ 'tokenizer.json': content }), within(60_000));
    await catalog.fetch(model, join(directory, 'large'), within(60_000));
    expect((await readFile(join(directory, 'large/tokenizer.json'))).equals(content)).toBe(true);
  });

  it('returns a whole model or none while it is replaced over and over', async () => {
    const [writer, reader] = [open(), open()];
    let latest = await writer.publish(filesOfRound(0), within(20_000));
    const written = new AbortController();
    const write = async (): Promise<void> => {
      for (let round = 1; round <= 6; round++) {
        latest = await writer.publish(filesOfRound(round), within(60_000));
      }
    };
    const writing = write().finally(() => written.abort());
    const outcomes: string[] = [];
    for (let turn = 0; !written.signal.aborted; turn++) {
      outcomes.push(await readRound(reader, latest, join(directory, `turn-${turn}`)));
    }
    await writing;
    expect(['whole', 'not_found', 'unavailable']).toEqual(expect.arrayContaining(outcomes));
    expect(await readRound(reader, latest, join(directory, 'end'))).toBe('whole');
  });

  it.each([
    ['no files', {}, /it must have 1 to 16 files, not 0/],
    ['a path', { '../config.json': '{}' }, /"\.\.\/config\.json" is not a plain file name/],
    ['too many bytes', { 'tokenizer.json': Buffer.alloc(65 * 2 ** 20) }, /over the limit of 67108864/],
  ])('refuses a model with %s', async (_what, files, message) => {
    await expect(open().publish(modelOf(files), within(20_000))).rejects.toMatchObject({
      code: 'invalid_argument',
      message: expect.stringMatching(message) as string,
    });
  });

  it('rejects files that do not match their digests', async () => {
    const catalog = open();
    const model = await catalog.publish(
      modelOf({ 'config.json': 'aaaa', 'tokenizer.json': 'bbbb' }),
      within(20_000),
    );
    await tamper((metadata) => metadata, 'aaaacccc');
    await expect(catalog.fetch(model, join(directory, 'bad'), within(20_000))).rejects.toMatchObject({
      code: 'data_loss',
      message: `model ${name}: tokenizer.json does not match its digest`,
    });
    await tamper((metadata) => ({ ...metadata, files: '[]' }), 'aaaabbbb');
    await expect(catalog.fetch(model, join(directory, 'bad'), within(20_000))).rejects.toMatchObject({
      code: 'data_loss',
      message: `model ${name}: the catalogue's entry contradicts itself`,
    });
    expect((await readdir(directory)).filter((each) => each.startsWith('bad'))).toEqual([]);
  });

  it('continues after the server was away, and reports the changes made meanwhile', async () => {
    const [writer, reader] = [open(), open()];
    const seen = follow(reader);
    const model = await writer.publish(modelOf({ 'config.json': '1' }), within(20_000));
    await vi.waitFor(() => expect(seen.sets.at(-1)).toEqual([model]), patience);
    await restart({ emptied: false });
    const next = await writer.publish(modelOf({ 'config.json': '2' }), within(60_000));
    await vi.waitFor(() => expect(seen.sets.at(-1)).toEqual([next]), patience);
    await reader.fetch(next, join(directory, 'after'), within(20_000));
  });

  const losses: Readonly<Record<string, () => Promise<unknown>>> = {
    'comes back empty': () => restart({ emptied: true }),
    'is deleted': () => withStreams((streams) => streams.delete(`OBJ_${modelBucket}`)),
    'is emptied': () => withStreams((streams) => streams.purge(`OBJ_${modelBucket}`)),
  };

  it.each(Object.entries(losses))(
    'keeps its models when the store %s, until they are published again or removed',
    async (_what, lose) => {
      const [writer, reader] = [open(), open()];
      const other = { ...modelOf({ 'config.json': 'other' }), name: 'other' };
      const seen = follow(reader);
      const model = await writer.publish(modelOf({ 'config.json': '1' }), within(20_000));
      const second = await writer.publish(other, within(20_000));
      await vi.waitFor(() => expect(seen.sets.at(-1)).toEqual([model, second]), patience);
      await lose();
      const [lost, lostSecond] = [model, second].map((each) => ({ ...each, isStored: false }));
      await vi.waitFor(() => expect(seen.sets.at(-1)).toEqual([lost, lostSecond]), patience);
      const late = follow(open());
      await vi.waitFor(() => expect(late.sets.at(-1)).toEqual([]), patience);

      await writer.remove('other', within(20_000));
      await vi.waitFor(() => expect(seen.sets.at(-1)).toEqual([lost]), patience);
      expect(await writer.publish(modelOf({ 'config.json': '1' }), within(20_000))).toEqual(model);
      await vi.waitFor(
        () => expect([seen.sets.at(-1), late.sets.at(-1)]).toEqual([[model], [model]]),
        patience,
      );
      await reader.fetch(model, join(directory, 'again'), within(20_000));
      await rm(join(directory, 'again'), { recursive: true });
      await writer.remove(name, within(20_000));
      await vi.waitFor(() => expect([seen.sets.at(-1), late.sets.at(-1)]).toEqual([[], []]), patience);
    },
  );

  it('restores a lost model unchanged from its fetched files, and keeps anything published since', async () => {
    const [writer, ...readers] = [open(), open(), open(), open()];
    const files = modelOf({ 'config.json': '1', 'tokenizer.json': Buffer.alloc(1_000_000, 'x') });
    const model = await writer.publish(files, within(20_000));
    const place = join(directory, 'kept-files');
    await writer.fetch(model, place, within(20_000));
    const seen = follow(writer);
    await vi.waitFor(() => expect(seen.sets.at(-1)).toEqual([model]), patience);

    await losses['is deleted']?.();
    // Every reader has the files, and all of them act at once.
    await Promise.all(readers.map((reader) => reader.restore(model, place, within(20_000))));
    const late = follow(open());
    await vi.waitFor(() => expect(late.sets.at(-1)).toEqual([model]), patience);
    await writer.fetch(model, join(directory, 'restored'), within(20_000));
    expect(await readAll(join(directory, 'restored'))).toEqual(await readAll(place));
    expect(await storedBytes()).toBeLessThan(1_100_000);

    await losses['is deleted']?.();
    const newer = await writer.publish(modelOf({ 'config.json': '2' }), within(20_000));
    await writer.restore(model, place, within(20_000));
    await vi.waitFor(() => expect(late.sets.at(-1)).toEqual([newer]), patience);
    await losses['is deleted']?.();
    await writer.remove(name, within(20_000));
    await writer.restore(model, place, within(20_000));
    await vi.waitFor(() => expect(late.sets.at(-1)).toEqual([]), patience);

    await losses['is deleted']?.();
    await writeFile(join(place, 'config.json'), '3');
    await expect(writer.restore(model, place, within(20_000))).rejects.toMatchObject({ code: 'data_loss' });
  });

  it('keeps to the bound that a follower sets, and names the model that did not fit', async () => {
    await losses['is deleted']?.();
    const bounded = open({ maxBytes: 4 * 2 ** 20 });
    const seen = follow(bounded);
    await vi.waitFor(() => expect(seen.sets).toEqual([[]]), patience);
    const model = await bounded.publish(modelOf({ 'a.json': randomBytes(2 ** 20) }), within(20_000));
    const large = { ...modelOf({ 'a.json': randomBytes(6 * 2 ** 20) }), name: 'large' };
    await expect(open().publish(large, within(20_000))).rejects.toMatchObject({
      code: 'resource_exhausted',
      message: 'the model catalogue could not store large: maximum bytes exceeded',
    });
    // What had come of it is gone again.
    expect(await storedBytes()).toBeLessThan(1.2 * 2 ** 20);
    const next = await open().publish(modelOf({ 'a.json': randomBytes(2 ** 20) }), within(20_000));
    await vi.waitFor(() => expect(seen.sets.at(-1)).toEqual([next]), patience);
    expect(next).not.toEqual(model);
    await losses['is deleted']?.();
    await vi.waitFor(async () => expect(await boundOfStore()).toBe(4 * 2 ** 20), patience);
    await losses['is deleted']?.();
  });

  it('stores again after its disk was full, without a restart, and stays readable meanwhile', async (context) => {
    const volume = await mountSmall(join(directory, 'volume'));
    if (volume === undefined) {
      context.skip('needs the right to mount a small filesystem');
      return;
    }
    const small = await startTestNats({ storeDirectory: join(volume.path, 'nats'), port: 0 });
    try {
      const writer = open({ server: small });
      const seen = follow(writer);
      const first = await writer.publish({ ...filesOfRound(1), name: 'first' }, within(60_000));
      const place = join(directory, 'first-of-full');
      await writer.fetch(first, place, within(20_000));
      await vi.waitFor(() => expect(seen.sets.at(-1)).toEqual([first]), patience);

      await writeFile(volume.ballast, Buffer.alloc(64 * 2 ** 20)).catch(() => undefined);
      for (const _attempt of [1, 2]) {
        await expect(writer.publish(filesOfRound(2), within(60_000))).rejects.toMatchObject({
          code: 'unavailable',
          message: `the model catalogue could not store ${name}: its server cannot write, no space left on device`,
        });
      }
      await rm(volume.ballast);
      // Nothing was given up while there was no room, and readers need no more than room.
      await writer.fetch(first, join(directory, 'after-full'), within(20_000));
      expect(seen.sets).toEqual([[], [first]]);

      const second = await writer.publish(filesOfRound(2), within(60_000));
      await vi.waitFor(
        () => expect(seen.sets.at(-1)).toEqual([second, { ...first, isStored: false }]),
        patience,
      );
      await writer.restore(first, place, within(60_000));
      await vi.waitFor(() => expect(seen.sets.at(-1)).toEqual([second, first]), patience);

      // A removal needs to be written too.
      await writeFile(volume.ballast, Buffer.alloc(64 * 2 ** 20)).catch(() => undefined);
      await writer.publish(filesOfRound(3), within(60_000)).catch(() => undefined);
      await rm(volume.ballast);
      await writer.remove('first', within(60_000));
      await vi.waitFor(() => expect(seen.sets.at(-1)?.map((each) => each.name)).toEqual([name]), patience);
    } finally {
      await small.close();
      await volume.unmount();
    }
  });

  it('ends its iterations when its link is closed, and aborts when a signal fires', async () => {
    const link = new NatsLink({ servers: ['127.0.0.1:1'], clientName: 'test', log });
    const away = createModelCatalog(link, { replicas: 1, log });
    await expect(away.publish(modelOf({ 'config.json': '1' }), within(200))).rejects.toMatchObject({
      name: 'TimeoutError',
    });
    const seen = follow(away);
    await link.close();
    await seen.done;
    expect(seen.sets).toEqual([]);
  });
});

/** Kills the server and starts it again on its port, with its store or with none. */
async function restart(options: { readonly emptied: boolean }): Promise<void> {
  const { port } = server;
  server.child.kill();
  await server.child.exited;
  if (options.emptied) {
    await rm(join(directory, 'nats'), { recursive: true });
  }
  server = await startTestNats({ storeDirectory: join(directory, 'nats'), port });
}

/** Writes the model's object anew behind the catalogue's back. */
async function tamper(
  change: (metadata: Record<string, string>) => Record<string, string>,
  content: string,
): Promise<void> {
  const connection = await connect({ servers: server.url });
  const objects = await new Objm(jetstream(connection)).open(modelBucket);
  const info = await objects.info(name);
  await objects.putBlob({ name, metadata: change(info?.metadata ?? {}) }, Buffer.from(content));
  await connection.close();
}

/** Acts on the streams as an operator may. */
async function withStreams<Result>(act: (streams: StreamAPI) => Promise<Result>): Promise<Result> {
  const connection = await connect({ servers: server.url });
  try {
    return await act((await jetstreamManager(connection)).streams);
  } finally {
    await connection.close();
  }
}

async function boundOfStore(): Promise<number> {
  return withStreams(async (streams) => (await streams.info(`OBJ_${modelBucket}`)).config.max_bytes);
}

/** What the store holds at this moment. */
async function storedBytes(): Promise<number> {
  const connection = await connect({ servers: server.url });
  const { size } = await (await new Objm(jetstream(connection)).open(modelBucket)).status();
  await connection.close();
  return size;
}
