// The hostile corpus against real processes: each input ends as required, an honest tenant's streams beside them are
// unharmed, and afterwards everything is released. Prints the honest tenant's times and the memory as figures, not
// limits.

import { readFile, writeFile } from 'node:fs/promises';

import { ChatRequest, Role } from '@mimo/proto/inference';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { waitFor } from '../harness/wait-for.ts';
import { startBystander, type Bystander } from './bystander.ts';
import { subjects } from './corpus/all.ts';
import { quotedMarker } from './corpus/quotes.ts';
import { frame, type CallEnd } from './raw-call.ts';
import { openWorld, type Footprint, type HostileWorld } from './world.ts';

/**
 * The memory that a process may keep after the corpus and a garbage collection: compiled code, metrics, caches.
 * Three runs in a row kept 2.0, 0.8 and 0.2 MiB in the gateway, 1.0, 0.0 and 0.0 in the worker (2026-11).
 */
const keptLiveBytes = 8 * 2 ** 20;
/**
 * What it may take of the machine beyond that is the allocators': 38 MiB more after the first of these runs and 28
 * after the third in the gateway, 55 and 57 in the worker.
 */
const keptBytes = 128 * 2 ** 20;

/** The gateway's default. */
const maxReadersPerModel = 2;

/** Each is found nowhere but where it was put. */
const markers = {
  keysFile: 'marker-in-keys-file-5e1d',
  header: 'marker-in-header-91fa',
  /** A name that is not served, or a request that is not there: who asked may read it again. */
  name: 'marker-as-a-name-3d70',
};

/** Everywhere that a prompt comes from. */
const promptMarkers = {
  system: 'marker in a system message 20aa',
  user: 'marker in a user message 7c02',
  assistant: 'marker in an answer given back 51d3',
  continued: 'marker in an answer to be continued 9e4f',
  raw: 'marker in a raw prompt c3b6',
  stop: 'marker in a stop text 66f1',
};

/** Everywhere that a header may hold one. */
function headersWith(marker: string): Record<string, string>[] {
  return [
    { authorization: `Bearer\t${marker}` },
    { authorization: `Bearer ${marker}` },
    { authorization: `Basic ${marker}` },
    { 'x-api-key': marker },
    { 'x-tabbed': `a\t${marker}` },
    { 'x-latin': `\u00e9 ${marker}` },
    { 'x-trace-bin': `***${marker}` },
    { 'grpc-encoding': marker },
    { 'user-agent': marker },
  ];
}

/** Prompts and stop texts that are read, and the same where something else about them is refused. */
async function sendPrompts(): Promise<void> {
  const { system, user, assistant, continued, raw, stop } = promptMarkers;
  const { SYSTEM, USER, ASSISTANT } = Role;
  const turns = [
    { role: SYSTEM, content: system },
    { role: USER, content: user },
    { role: ASSISTANT, content: assistant },
  ];
  const sampling = { maxTokens: 1, stop: [stop] };
  const hot = { ...sampling, temperature: 9 };
  const chats = [
    [...turns, { role: USER, content: user }],
    [...turns.slice(0, 2), { role: ASSISTANT, content: continued }],
  ];
  for (const messages of chats) {
    const value = { model: 'mimo-demo', messages };
    const ends = [
      await world.chat({ messages, sampling }),
      await world.chat({ messages, sampling: hot }),
      await world.countTokens({ request: { $case: 'chat', value } }),
    ];
    expect(ends.map(({ code }) => code)).toEqual(['ok', 'invalid_argument', 'ok']);
    said.push(...ends.map(({ message }) => message));
  }
  const input = { $case: 'prompt' as const, value: raw };
  const ends = [await world.generate({ input, sampling }), await world.generate({ input, sampling: hot })];
  expect(ends.map(({ code }) => code)).toEqual(['ok', 'invalid_argument']);
  said.push(...ends.map(({ message }) => message));
}

/** Keys pasted where a name belongs. */
async function sendNames(): Promise<void> {
  const { name } = markers;
  const messages = [{ role: Role.USER, content: 'x' }];
  const ends = [
    await world.chat({ model: name, messages }),
    await world.countTokens({ request: { $case: 'chat', value: { model: name, messages } } }),
    await world.raw({ path: `/mimo.inference.v1.InferenceService/${name}`, body: frame(Buffer.alloc(0)) }),
    await world.raw({ path: `/${name}`, body: frame(Buffer.alloc(0)) }),
  ];
  expect(ends.map(({ code }) => code)).toEqual(['not_found', 'not_found', 'unimplemented', 'unimplemented']);
  expect((await world.cancel({ requestId: name })).code).not.toBe('internal');
}

let world: HostileWorld;
let bystander: Bystander;
let before: Footprint;
/** What clients were told, and nothing but: statuses. */
const said: string[] = [];

beforeAll(async () => {
  world = await openWorld(subjects);
  bystander = await startBystander(world.address, world.bystanderKey);
  before = await world.footprint();
}, 600_000);

afterAll(() => world?.close());

describe.each(subjects.map((subject) => [subject.name, subject] as const))('%s', (subjectName, { cases }) => {
  it.each(cases.map((each) => [each.name, each] as const))('%s', async (name, hostileCase) => {
    const { send, code, message, quotes = false } = hostileCase;
    bystander.mark(`${subjectName}: ${name}`);
    const end = await send(world);
    said.push(quotes ? '' : end.message);
    expect(end).toEqual({
      code: expect.toSatisfy((seen: CallEnd['code']) => [code].flat().includes(seen), String(code)),
      message: expect.stringMatching(message ?? /^/),
    });
  });
});

/** A prompt reader is reached through a socket of its own, and a model keeps as many of them as it needed. */
const socketsOf = ({ gatewaySockets, promptReaders }: Footprint): number => gatewaySockets - promptReaders;

describe('afterwards', () => {
  it('no other stream was harmed and nothing is held', async () => {
    const report = await bystander.stop();
    let after = before;
    const isReleased = async (): Promise<boolean> => {
      after = await world.footprint();
      const isNothingHeld = Object.values(after.held).every((count) => count === 0);
      return isNothingHeld && socketsOf(after) <= socketsOf(before);
    };
    await waitFor('everything to be released', isReleased).catch((error: unknown) => {
      throw new Error(`before ${JSON.stringify(before)}, after ${JSON.stringify(after)}`, { cause: error });
    });
    const inputs = subjects.reduce((sum, { cases }) => sum + cases.length, 0);
    console.log(JSON.stringify({ inputs, bystander: report, before, after }));
    expect(report.harmed).toEqual([]);
    expect(report.streams).toBeGreaterThan(0);
    expect(after.gatewayLiveBytes - before.gatewayLiveBytes).toBeLessThan(keptLiveBytes);
    expect(after.workerLiveBytes - before.workerLiveBytes).toBeLessThan(keptLiveBytes);
    expect(after.gatewayBytes - before.gatewayBytes).toBeLessThan(keptBytes);
    expect(after.promptReaders).toBeLessThanOrEqual(maxReadersPerModel * world.models);
    expect(after.workerBytes - before.workerBytes).toBeLessThan(keptBytes);
    const lives = [...world.cluster.parts.groups, world.cluster.parts.gateway].map(({ life }) => life);
    expect(lives).toEqual([1, 1]);
  });

  it('no log or other caller got a key, a header, a prompt or the content of a file', async () => {
    const good = await readFile(world.keysFile, 'utf8');
    await writeFile(world.keysFile, `${markers.keysFile} is not JSON`);
    await waitFor('the gateway to refuse its keys file', async () =>
      [...(await world.readLogs()).values()].some((text) => text.includes('invalid keys file')),
    );
    await writeFile(world.keysFile, good);
    await sendPrompts();
    await sendNames();
    for (const headers of headersWith(markers.header)) {
      const body = frame(ChatRequest.encode(ChatRequest.fromPartial({ model: 'none' })).finish());
      const path = '/mimo.inference.v1.InferenceService/Chat';
      said.push((await world.raw({ path, body, headers, from: '127.0.3.1' })).message);
    }
    await waitFor('the gateway to report metadata', async () =>
      [...(await world.readLogs()).values()].some((text) => text.includes('grpc-js reports')),
    );
    const places: [string, string][] = [
      ...(await world.readFiles()),
      ['metrics', await world.readMetrics()],
      ['statuses', said.join('\n')],
      ['events', world.cluster.events.join('\n')],
    ];
    const secrets = [
      ...Object.values(markers),
      ...Object.values(promptMarkers),
      quotedMarker,
      world.apiKey,
      world.bystanderKey,
      'wrong-key-',
    ];
    const found = places.flatMap(([place, text]) =>
      secrets.filter((secret) => text.includes(secret)).map((secret) => `${secret} in ${place}`),
    );
    expect(places.length).toBeGreaterThan(6);
    expect(found).toEqual([]);
  });

  it('has unique names', () => {
    const names = subjects.flatMap(({ name, cases }) => cases.map((each) => `${name}: ${each.name}`));
    expect(new Set(names).size).toBe(names.length);
  });
});
