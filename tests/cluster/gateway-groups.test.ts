// The gateway's handling of groups that come late, refuse, drain, vanish, restart or stall.

import { setTimeout as sleep } from 'node:timers/promises';

import { ClusterError } from '@mimo/core/process/errors';
import { callUnary } from '@mimo/core/grpc/client';
import { InferenceServiceService } from '@mimo/proto/inference';
import { GroupState } from '@mimo/proto/worker';
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';

import { begin, collect, generate, generation, readToEnd } from '../harness/client-streams.ts';
import { GatewayStage } from '../harness/gateway-stage.ts';
import { endless, type ScriptedGroup } from '../harness/scripted-group.ts';
import { patience, waitFor } from '../harness/wait-for.ts';

let stage: GatewayStage;
beforeAll(async () => {
  stage = await GatewayStage.open();
});
afterEach(async () => {
  await stage.clear();
});
afterAll(async () => {
  await stage.close();
});

async function openStalledGroup(group: string): Promise<ScriptedGroup> {
  const opened = await stage.openGroup({ group });
  opened.stall();
  return opened;
}

describe('groups', () => {
  it('that start later take waiting requests in order', async () => {
    const gateway = await stage.openGateway();
    const client = stage.clientOf(gateway);
    const results: Promise<{ text: string }>[] = [];
    for (const text of ['alpha', 'beta', 'gamma', 'delta']) {
      results.push(collect(generate(client, generation(text))));
      await vi.waitFor(async () => expect(await stage.bus.records.count()).toBe(results.length), patience);
    }
    const group = await stage.openGroup({ maxSequences: 1 });
    const texts = await Promise.all(results.map(async (result) => (await result).text));
    expect(texts).toEqual(['alpha', 'beta', 'gamma', 'delta']);
    expect(group.prompts.map((prompt) => stage.tokenizer.decode(prompt))).toEqual(texts);
  });

  it('that refuse a request are skipped: it goes to another group', async () => {
    const gateway = await stage.openGateway();
    const refusing = await stage.openGroup({ group: 'a' });
    refusing.refuse(new ClusterError('unavailable', 'draining'));
    await stage.openGroup({ group: 'b' });
    await vi.waitFor(async () => {
      const listed = await callUnary(stage.clientOf(gateway), InferenceServiceService.listModels, {
        request: {},
      });
      expect(listed.models).toEqual([
        expect.objectContaining({ name: GatewayStage.model, draftTokens: 1, readyGroups: 2 }),
      ]);
    }, patience);
    const result = await collect(generate(stage.clientOf(gateway), generation('hello')));
    expect(result.text).toBe('hello');
    expect(refusing.begun).toBe(0);
  });

  it('that drain get no new requests', async () => {
    const gateway = await stage.openGateway();
    const draining = await stage.openGroup({ group: 'a' });
    draining.become(GroupState.DRAINING);
    await stage.openGroup({ group: 'b' });
    const results = Array.from({ length: 5 }, () =>
      collect(generate(stage.clientOf(gateway), generation('hello'))),
    );
    await Promise.all(results);
    expect(draining.begun).toBe(0);
  });

  it('that vanish lose no stream: each continues in another group, with contiguous indices and the same text', async () => {
    const gateway = await stage.openGateway();
    const client = stage.clientOf(gateway);
    const doomed = await stage.openGroup({ group: 'a', stepMs: 5, maxSequences: 8 });
    const texts = Array.from(
      { length: 4 },
      (_, index) => `stream ${index}: größer 終 🙂 ${'ab '.repeat(60)}`,
    );
    doomed.stall();
    const running = texts.map((text) => collect(generate(client, generation(text))));
    await vi.waitFor(() => expect(doomed.begun).toBe(4), patience);
    doomed.resume();
    await vi.waitFor(() => expect(doomed.tokens).toBeGreaterThan(100), patience);
    doomed.stall();
    const quiet = collect(generate(client, generation('quiet')));
    await vi.waitFor(() => expect(doomed.begun).toBe(5), patience);
    const heir = await stage.openGroup({ group: 'b', maxSequences: 8 });
    await stage.loseGroup(doomed);
    const results = await Promise.all(running);
    expect(results.map(({ text }) => text)).toEqual(texts);
    expect((await quiet).text).toBe('quiet');
    for (const [index, { finish, tokenIds }] of results.entries()) {
      expect(tokenIds).toEqual(stage.tokenizer.encode(texts[index] ?? ''));
      expect(finish?.completionTokens).toBe(tokenIds.length);
    }
    expect(
      heir.prompts.filter((prompt) => prompt.length > stage.tokenizer.encode('quiet').length),
    ).toHaveLength(4);
  });

  it('that break three times under a request before its first token end that request', async () => {
    const gateway = await stage.openGateway();
    const client = stage.clientOf(gateway);
    let last = await openStalledGroup('a');
    const outcome = collect(generate(client, generation('poison'))).then(
      () => undefined,
      (error: unknown) => ClusterError.from(error),
    );
    for (const name of ['b', 'c']) {
      await vi.waitFor(() => expect(last.begun).toBe(1), patience);
      const next = await openStalledGroup(name);
      await stage.loseGroup(last);
      last = next;
    }
    await vi.waitFor(() => expect(last.begun).toBe(1), patience);
    await stage.loseGroup(last);
    expect(await outcome).toMatchObject({
      code: 'aborted',
      message: expect.stringContaining('3 groups in a row broke') as string,
    });
  });

  it('that one request breaks again and again lose only that request, not those that started beside it', async () => {
    const gateway = await stage.openGateway();
    const client = stage.clientOf(gateway);
    const texts = ['one of the others', 'another one of them', 'the poison', 'the last of the others'];
    const outcomes = texts.map((text) =>
      collect(generate(client, generation(text))).then(
        (result) => result.text,
        (error: unknown) => ClusterError.from(error).code,
      ),
    );
    await waitFor('all to wait', async () => (await stage.bus.records.count()) === texts.length);
    const all = Promise.all(outcomes);
    const over = new AbortController();
    void all.then(() => over.abort());
    for (let life = 0; life < 20 && !over.signal.aborted; life += 1) {
      const broken = Promise.withResolvers<void>();
      const script = function* ({ tokenIds }: { readonly tokenIds: readonly number[] }) {
        if (stage.tokenizer.decode(tokenIds) === 'the poison') {
          broken.resolve();
        }
        yield* tokenIds;
      };
      // Slower than it breaks: requests that begin together with the poison get nothing.
      const group = await stage.openGroup({ group: 'a', stepMs: 50, script });
      await Promise.race([broken.promise, all]);
      await stage.loseGroup(group);
    }
    expect(await all).toEqual(texts.map((text) => (text === 'the poison' ? 'aborted' : text)));
  });

  it('that restart continue their streams', async () => {
    const gateway = await stage.openGateway();
    const client = stage.clientOf(gateway);
    const text = 'a rather long prompt that takes its time to be said again, word by word, '.repeat(4);
    const running = collect(generate(client, generation(text)));
    for (let life = 0; life < 3; life += 1) {
      const group = await stage.openGroup({ group: 'a', stepMs: 10 });
      await vi.waitFor(() => expect(group.tokens).toBeGreaterThan(8), patience);
      await stage.loseGroup(group);
    }
    await stage.openGroup({ group: 'a' });
    expect((await running).text).toBe(text);
  });

  it('restart the longest wait each time one is lost, not from the first token', async () => {
    const maxWaitMs = 5_000;
    const gateway = await stage.openGateway({ MIMO_GATEWAY_MAX_WAIT: `${maxWaitMs}ms` });
    const client = stage.clientOf(gateway);
    const first = await stage.openGroup({ group: 'a', script: endless, stepMs: 20 });
    const running = collect(generate(client, generation('x'))).then(
      () => undefined,
      (error: unknown) => ClusterError.from(error),
    );
    await vi.waitFor(() => expect(first.tokens).toBeGreaterThan(0), patience);
    await sleep(maxWaitMs + 200);
    await stage.loseGroup(first);
    const second = await stage.openGroup({ group: 'b', script: endless, stepMs: 20 });
    await vi.waitFor(() => expect(second.tokens).toBeGreaterThan(3), patience);
    await stage.loseGroup(second);
    expect(await running).toMatchObject({
      code: 'deadline_exceeded',
      message: expect.stringMatching(
        /no group took the request up again, after \d+ completion tokens, within 5000 ms/,
      ) as string,
    });
  });

  it('with a stalled engine keep their streams while they answer pings', async () => {
    const gateway = await stage.openGateway();
    const group = await stage.openGroup({ script: endless });
    const stream = generate(stage.clientOf(gateway), generation('x', { maxTokens: 50 }));
    await begin(stream, 1);
    group.stall();
    await sleep(3_500);
    group.resume();
    expect(gateway.counts().sequences).toBe(1);
    await readToEnd(stream);
  });
});
