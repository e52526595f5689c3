// The hostile corpus against real processes: each input ends as it must, an honest tenant's streams beside them are
// unharmed, and afterwards nothing is held. Prints the honest tenant's times and the memory; they are figures, not limits.

import { readFile, writeFile } from 'node:fs/promises';

import { ChatRequest, Role } from '@mimo/proto/inference';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { waitFor } from '../harness/wait-for.ts';
import { startBystander, type Bystander } from './bystander.ts';
import { subjects } from './corpus/all.ts';
import type { CallEnd } from './hostile-case.ts';
import { frame } from './raw-call.ts';
import { openWorld, type Footprint, type HostileWorld } from './world.ts';

/** What a process may keep of the corpus: heaps and caches that grew once. Leaks of a case's input are larger. */
const keptBytes = 192 * 2 ** 20;

/** The gateway's default. */
const maxReadersPerModel = 2;

/** In the keys file, in a prompt, in headers: found nowhere else. */
const markers = ['marker-in-keys-file-5e1d', 'marker in prompt 7c02', 'marker-in-header-91fa'];

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
  it.each(cases.map((each) => [each.name, each] as const))('%s', async (name, { send, code, message }) => {
    bystander.mark(`${subjectName}: ${name}`);
    const end = await send(world);
    said.push(end.message);
    expect(end).toEqual({
      code: expect.toSatisfy((seen: CallEnd['code']) => [code].flat().includes(seen), String(code)),
      message: expect.stringMatching(message ?? /^/),
    });
  });
});

describe('afterwards', () => {
  it('has harmed nobody, and holds nothing', async () => {
    const report = await bystander.stop();
    let after = before;
    const isReleased = async (): Promise<boolean> => {
      after = await world.footprint();
      const { held, gatewaySockets } = after;
      return Object.values(held).every((count) => count === 0) && gatewaySockets <= before.gatewaySockets;
    };
    await waitFor('everything to be released', isReleased).catch((error: unknown) => {
      throw new Error(`before ${JSON.stringify(before)}, after ${JSON.stringify(after)}`, { cause: error });
    });
    const inputs = subjects.reduce((sum, { cases }) => sum + cases.length, 0);
    console.log(JSON.stringify({ inputs, bystander: report, before, after }));
    expect(report.harmed).toEqual([]);
    expect(report.streams).toBeGreaterThan(0);
    expect(after.gatewayBytes - before.gatewayBytes).toBeLessThan(keptBytes);
    expect(after.promptReaders).toBeLessThanOrEqual(maxReadersPerModel * world.models);
    expect(after.workerBytes - before.workerBytes).toBeLessThan(keptBytes);
    const lives = [...world.cluster.parts.groups, world.cluster.parts.gateway].map(({ life }) => life);
    expect(lives).toEqual([1, 1]);
  });

  it('has told nobody a key, a header, a prompt or what is in a file', async () => {
    const good = await readFile(world.keysFile, 'utf8');
    await writeFile(world.keysFile, `${markers[0]} is not JSON`);
    await waitFor('the gateway to refuse its keys file', async () =>
      [...(await world.readLogs()).values()].some((text) => text.includes('keys file not usable')),
    );
    await writeFile(world.keysFile, good);
    for (const content of markers.slice(1, 2)) {
      const request = {
        messages: [{ role: Role.USER, content }],
        sampling: { maxTokens: 1, stop: [content] },
      };
      expect(await world.chat(request)).toMatchObject({ code: 'ok' });
      said.push((await world.chat({ ...request, sampling: { temperature: 9 } })).message);
    }
    for (const headers of markers.slice(2).flatMap(headersWith)) {
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
    const secrets = [...markers, world.apiKey, world.bystanderKey, 'wrong-key-'];
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
