// Every flood of the benchmark `floods`, for a second each: an honest tenant's streams all come out right meanwhile,
// over a connection made before, and the gateway's memory stays bounded. The benchmark measures their speed.

import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { pause } from '@mimo/core/process/abort';
import * as grpc from '@grpc/grpc-js';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { ask, chatRequest, startTestCluster, type TestCluster } from '../harness/cluster.ts';
import { floods } from '../harness/floods.ts';
import { callHeaders, connectRaw, frameTypes, headerBlock, http2Frame } from '../harness/raw-http2.ts';
import { waitFor } from '../harness/wait-for.ts';

const keys = { honest: 'honest-key-2b9d4f60', hostile: 'hostile-key-e07c15a8' };
const floodMs = 1_000;
/** Of what the benchmark has; many processes share a test's machine. */
const scale = 0.25;
/** Above what it held before: the bound of unanswered requests, as much for what they become, and garbage. */
const maxGrownBytes = 512 * 2 ** 20;

describe('a flood', () => {
  let cluster: TestCluster;
  let directory: string;
  let expected: readonly number[];
  let startBytes: number;
  const request = chatRequest('What is 47 + 85?', { temperature: 0.6, topP: 0.95, seed: 7, maxTokens: 16 });
  const metadata = new grpc.Metadata();
  metadata.set('authorization', `Bearer ${keys.honest}`);

  const askOnce = async (): Promise<readonly number[]> =>
    (await ask(cluster.client, { request, metadata })).tokenIds;
  const residentBytes = async (): Promise<number> => {
    const status = await readFile(`/proc/${cluster.parts.gateway.children[0]?.pid}/status`, 'utf8');
    return Number(/^VmRSS:\s+(\d+) kB$/m.exec(status)?.[1]) * 1_024;
  };

  beforeAll(async () => {
    directory = await mkdtemp(join(tmpdir(), 'mimo-floods-'));
    const keysFile = join(directory, 'keys.json');
    const entries = Object.entries(keys).map(([tenant, key]) => ({ tenant, key }));
    await writeFile(keysFile, JSON.stringify({ keys: entries }), { mode: 0o600 });
    cluster = await startTestCluster({
      tensorParallel: 1,
      apiKey: keys.honest,
      gatewayEnv: { MIMO_GATEWAY_KEYS_FILE: keysFile },
    });
    expected = await askOnce();
    startBytes = await residentBytes();
  });
  afterAll(async () => {
    await cluster.close();
    await rm(directory, { recursive: true });
  });

  it.each(Object.entries(floods).map(([name, flood], index) => [name, index, flood] as const))(
    'of %s harms no honest stream',
    async (_, index, flood) => {
      const ending = new AbortController();
      const target = { address: cluster.parts.gatewayAddress, apiKey: keys.hostile, scale };
      const flooding = flood({ ...target, localAddress: `127.0.4.${index + 1}` }, ending.signal);
      const timer = setTimeout(() => ending.abort(), floodMs);
      const answers = [await askOnce()];
      let peakBytes = 0;
      while (!ending.signal.aborted) {
        answers.push(await askOnce());
        peakBytes = Math.max(peakBytes, await residentBytes());
      }
      clearTimeout(timer);
      await flooding;
      answers.push(await askOnce());
      expect(answers).toEqual(answers.map(() => expected));
      expect(peakBytes - startBytes).toBeLessThan(maxGrownBytes);
    },
  );

  it('of all kinds leaves nothing behind', async () => {
    await waitFor('everything to be released', async () =>
      Object.values(await cluster.held()).every((count) => count === 0),
    );
    expect(await askOnce()).toEqual(expected);
  });

  it('of endless headers loses its connection before idle connections do', async () => {
    const options = { localAddress: '127.0.4.100' };
    const idle = connectRaw(cluster.parts.gatewayAddress, options);
    const slow = connectRaw(cluster.parts.gatewayAddress, options);
    const payload = headerBlock(callHeaders('/mimo.inference.v1.InferenceService/Chat', ''));
    slow.write(http2Frame(frameTypes.headers, { stream: 1, payload }));
    await new Promise((resolve) => slow.once('close', resolve));
    await pause(100, new AbortController().signal);
    expect(idle.closed).toBe(false);
    idle.destroy();
  });
});
