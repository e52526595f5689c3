// The engine as its process sees it: threads, messages, credit and clean-up.

import { mkdtempSync, rmSync } from 'node:fs';
import { cp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import * as path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, afterEach, describe, expect, it } from 'vitest';
import {
  startEngine,
  type EngineHost,
  type EngineOptions,
  type SequenceDelta,
  type SequenceRequest,
} from '@mimo/worker/engines/mimo/engine-host';
import { CompiledFixtures, readExpectedIds } from '../golden/fixture.ts';
import { freeAddresses } from '../../cli/src/local/free-ports.ts';
import { greedySampling } from '../harness/greedy-sampling.ts';
import { waitFor } from '../harness/wait-for.ts';

const name = 'one-to-one';
const { promptIds, greedyIds } = readExpectedIds(name);
const fixtures = new CompiledFixtures();
const scratch = mkdtempSync(path.join(tmpdir(), 'mimo-engine-host-'));
const hosts: EngineHost[] = [];

afterEach(async () => {
  await Promise.all(hosts.splice(0).map((host) => host.close()));
});
afterAll(() => {
  fixtures.remove();
  rmSync(scratch, { recursive: true, force: true });
});

const compiled = (tensorParallel: number) => fixtures.compile(name, { precision: 'fp32', tensorParallel });

async function start(tensorParallel: number, more: Partial<EngineOptions> = {}): Promise<EngineHost> {
  const shardDirectories = await compiled(tensorParallel);
  const host = await startEngine({
    shardDirectories,
    group: { kind: 'in-process' },
    maxSequences: 4,
    ...more,
  });
  hosts.push(host);
  return host;
}

type Changes = Partial<Omit<SequenceRequest, 'sampling'>> & {
  readonly sampling?: Partial<SequenceRequest['sampling']>;
};

function request(sequenceId: number, more: Changes = {}): SequenceRequest {
  const sampling = greedySampling(more.sampling);
  return { sequenceId, tokenIds: promptIds, resumedTokens: 0, creditTokens: Infinity, ...more, sampling };
}

/** Everything a host reports from now on. */
class Watcher {
  readonly deltas: SequenceDelta[] = [];

  constructor(host: EngineHost) {
    host.onFrame((frame) => this.deltas.push(...frame.deltas));
  }

  completion(sequenceId: number): number[] {
    return this.deltas.filter((delta) => delta.sequenceId === sequenceId).flatMap(({ tokenIds }) => tokenIds);
  }

  finish(sequenceId: number): SequenceDelta['finish'] {
    return this.deltas.findLast((delta) => delta.sequenceId === sequenceId)?.finish;
  }

  async ended(sequenceId: number): Promise<SequenceDelta['finish']> {
    await waitFor(`the end of sequence ${sequenceId}`, () => this.finish(sequenceId) !== undefined);
    return this.finish(sequenceId);
  }
}

const ports = (): number => process.getActiveResourcesInfo().filter((kind) => kind === 'MessagePort').length;

const idle = { runningSequences: 0, waitingSequences: 0, kvBlocksUsed: 0 };

describe('startEngine', () => {
  it.each([1, 2])('serves many sequences over %i ranks and is empty afterwards', async (tensorParallel) => {
    const host = await start(tensorParallel);
    expect(host.info).toMatchObject({
      rank: 0,
      worldSize: tensorParallel,
      draftTokens: 1,
      precision: 'fp32',
      maxSequences: 4,
    });
    const watcher = new Watcher(host);
    const ids = Array.from({ length: 12 }, (_, i) => i);
    ids.forEach((id) => host.submit(request(id)));
    for (const id of ids) {
      expect(await watcher.ended(id)).toMatchObject({ kind: 'length', completionTokens: 64 });
      expect(watcher.completion(id)).toEqual(greedyIds.slice(0, 64));
    }
    expect(host.stats()).toMatchObject({ ...idle, completionTokens: 12 * 64 });
    expect(host.stats().acceptedTokens).toBeGreaterThan(0);
  });

  it('leaves the event loop alone while it computes', async () => {
    const host = await start(1);
    const watcher = new Watcher(host);
    [1, 2, 3, 4].forEach((id) => host.submit(request(id, { sampling: { maxTokens: 2000 } })));
    let turns = 0;
    for (; watcher.finish(4) === undefined; turns++) {
      await sleep(1);
    }
    // Computing on this thread would leave it a turn or two before the last token.
    expect(turns).toBeGreaterThan(50);
    expect(watcher.completion(1)).toHaveLength(2000);
  });

  it('stops when credit runs out, keeps the cache, and continues with more credit', async () => {
    const host = await start(1);
    const watcher = new Watcher(host);
    host.submit(request(1, { creditTokens: 5 }));
    await waitFor('five tokens', () => watcher.completion(1).length === 5);
    host.submit(request(2));
    await watcher.ended(2);
    expect(watcher.completion(1)).toEqual(greedyIds.slice(0, 5));
    expect(host.stats()).toMatchObject({ runningSequences: 1, kvBlocksUsed: 1 });
    host.addCredit(1, 1000);
    await watcher.ended(1);
    expect(watcher.completion(1)).toEqual(greedyIds.slice(0, 64));
  });

  it('aborts a running, a waiting and an unknown sequence', async () => {
    const host = await start(1, { maxSequences: 1 });
    const watcher = new Watcher(host);
    [1, 2].forEach((id) => host.submit(request(id, { sampling: { maxTokens: 4000 } })));
    await waitFor('tokens', () => watcher.completion(1).length > 0);
    [1, 2, 3].forEach((id) => host.abort(id));
    for (const id of [1, 2]) {
      expect(await watcher.ended(id)).toMatchObject({
        kind: 'aborted',
        completionTokens: watcher.completion(id).length,
      });
    }
    expect(host.stats()).toMatchObject(idle);
  });

  it('rejects an invalid request with its last delta', async () => {
    const host = await start(1);
    const watcher = new Watcher(host);
    host.submit(request(2, { tokenIds: [] }));
    expect(await watcher.ended(2)).toMatchObject({ kind: 'error', code: 'invalid_argument' });
  });

  it('reports nothing and leaves no thread after it is closed, at any moment', async () => {
    const portsBefore = ports();
    for (const afterTokens of [0, 1, 20]) {
      const host = await start(2);
      const watcher = new Watcher(host);
      host.submit(request(1, { sampling: { maxTokens: 4000 } }));
      await waitFor('tokens', () => watcher.completion(1).length >= afterTokens);
      const closing = Promise.all([host.close(), host.close()]);
      const told = watcher.deltas.length;
      await closing;
      expect(watcher.deltas).toHaveLength(told);
      expect(() => host.submit(request(2))).toThrow('the engine is closing');
      expect(host.stats()).toMatchObject(idle);
    }
    expect(ports()).toBe(portsBefore);
  });

  it('drafts nothing when speculation is off, and returns the same text', async () => {
    const host = await start(1, { draftTokens: 0 });
    expect(host.info.draftTokens).toBe(0);
    const watcher = new Watcher(host);
    host.submit(request(1));
    expect(await watcher.ended(1)).toMatchObject({ kind: 'length', draftedTokens: 0 });
    expect(watcher.completion(1)).toEqual(greedyIds.slice(0, 64));
    expect(host.stats().draftedTokens).toBe(0);
  });

  it('computes the same with keys and values for two sequences only', async () => {
    const host = await start(2, { kvBlocks: 4, maxSequences: 4 });
    const watcher = new Watcher(host);
    const ids = [1, 2, 3, 4, 5];
    ids.forEach((id) => host.submit(request(id, { sampling: { maxTokens: 140 } })));
    for (const id of ids) {
      await watcher.ended(id);
      expect(watcher.completion(id)).toEqual(greedyIds.slice(0, 140));
    }
    expect(host.stats()).toMatchObject({ ...idle, kvBlocks: 4 });
    expect(host.info.maxContextTokens).toBe(256);
  });

  it.each<[string, Partial<EngineOptions>, string, RegExp]>([
    ['no directory', { shardDirectories: [] }, 'invalid_argument', /takes 1 here, has 0/],
    ['a missing directory', { shardDirectories: ['/nowhere'] }, 'not_found', /\/nowhere/],
    [
      'fractions',
      { maxSequences: 1.5 },
      'invalid_argument',
      /maxSequences: must be an integer from 1, is 1.5/,
    ],
    [
      'too few rows',
      { maxBatchTokens: 3 },
      'invalid_argument',
      /maxBatchTokens: must be at least 2 x maxSequences \(8\), is 3/,
    ],
    ['no room for a block', { kvBytes: 10 }, 'invalid_argument', /kvBytes: one block takes \d+, are 10/],
    [
      'a vocabulary larger than the model',
      { usableVocab: 68 },
      'invalid_argument',
      /usableVocab: must be at most 67, is 68/,
    ],
  ])('refuses %s', async (_, wrong, code, message) => {
    await expect(start(1, wrong)).rejects.toMatchObject({ code, message: expect.stringMatching(message) });
  });

  it('rejects shards of another rank or group', async () => {
    const [first, second] = await compiled(2);
    for (const shardDirectories of [[second!, first!], [first!], [first!, first!]]) {
      await expect(start(1, { shardDirectories })).rejects.toMatchObject({ code: 'failed_precondition' });
    }
  });

  it('fails when any rank cannot load a segment, and stops the other ranks', async () => {
    const [first, second] = await compiled(2);
    const broken = path.join(scratch, 'broken');
    await cp(second!, broken, { recursive: true });
    await writeFile(path.join(broken, 'layer.1.mlp.onnx'), 'no graph');
    await expect(start(2, { shardDirectories: [first!, broken] })).rejects.toMatchObject({
      code: 'data_loss',
      message: expect.stringContaining('segment layer.1.mlp'),
    });
    await rm(broken, { recursive: true });
  });

  it('can be cancelled while it waits for its group', async () => {
    const [, second] = await compiled(2);
    const addresses = await freeAddresses(2);
    const group = { kind: 'network', rank: 1, addresses, token: 'secret' } as const;
    const waiting = startEngine({ shardDirectories: [second!], group }, AbortSignal.timeout(300));
    await expect(waiting).rejects.toMatchObject({ code: 'deadline_exceeded' });
  });
});
