// The hostile corpus against real processes: each input ends as it must, an honest tenant's streams beside them are
// unharmed, and afterwards nothing is held. Prints the honest tenant's times and the memory; they are figures, not limits.

import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { waitFor } from '../harness/wait-for.ts';
import { startBystander, type Bystander } from './bystander.ts';
import { subjects } from './corpus/all.ts';
import type { CallEnd } from './hostile-case.ts';
import { openWorld, type Footprint, type HostileWorld } from './world.ts';

/** What a process may keep of the corpus: heaps and caches that grew once. Leaks of a case's input are larger. */
const keptBytes = 192 * 2 ** 20;

let world: HostileWorld;
let bystander: Bystander;
let before: Footprint;

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
    expect(end).toEqual({
      code: expect.toSatisfy((seen: CallEnd['code']) => [code].flat().includes(seen), String(code)),
      message: expect.stringMatching(message ?? /^/),
    });
  });
});

describe('afterwards', () => {
  it('has harmed nobody, and holds nothing', async () => {
    const report = await bystander.stop();
    await waitFor('everything to be released', async () => {
      const { held, gatewaySockets } = await world.footprint();
      return Object.values(held).every((count) => count === 0) && gatewaySockets <= before.gatewaySockets;
    });
    const after = await world.footprint();
    const inputs = subjects.reduce((sum, { cases }) => sum + cases.length, 0);
    console.log(JSON.stringify({ inputs, bystander: report, before, after }));
    expect(report.harmed).toEqual([]);
    expect(report.streams).toBeGreaterThan(0);
    expect(after.gatewayBytes - before.gatewayBytes).toBeLessThan(keptBytes);
    expect(after.workerBytes - before.workerBytes).toBeLessThan(keptBytes);
    const lives = [...world.cluster.parts.groups, world.cluster.parts.gateway].map(({ life }) => life);
    expect(lives).toEqual([1, 1]);
  });

  it('has unique names', () => {
    const names = subjects.flatMap(({ name, cases }) => cases.map((each) => `${name}: ${each.name}`));
    expect(new Set(names).size).toBe(names.length);
  });
});
