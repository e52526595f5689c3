// Short prompts behind long ones at the gateway: a chat of 5 kB alone, and right after eight oversized prompts of a
// megabyte from the same tenant; on a cluster of real processes with the demonstration model.
//
//   npm run bench -- prompts [--kinds word,letters,spaces,marks,han] [--count 8] [--asks 5] [--vocabulary DIRECTORY]
//
// --vocabulary: a directory with tokenizer.json and tokenizer_config.json, such as MiMo-7B's. It is served as a model
// without groups and a context of 32,768, and the 5 kB are counted with CountTokens; reading prompts is all that takes
// time there.

import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { availableParallelism, cpus, tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';

import { callServerStream, callUnary } from '@mimo/core/grpc/client';
import { ChatRequest, CountTokensRequest, InferenceServiceService, Role } from '@mimo/proto/inference';

import { ask, chatRequest, createClient, startTestCluster, type TestCluster } from '../harness/cluster.ts';

const megabyte = 2 ** 20;
const demo = join(import.meta.dirname, '../../models/mimo-demo');
const maxRatio = 2;
const fiveKilobytes = 'please '.repeat(750);

const kinds: Readonly<Record<string, () => string>> = {
  word: () => 'a'.repeat(megabyte),
  letters: () => scatter(Array.from('abcdefghijklmnopqrstuvwxyz'), megabyte),
  spaces: () => ' '.repeat(megabyte),
  marks: () => `a${scatter(['\u0301', '\u0327', '\u0345', '\u0334'], megabyte / 2 - 1)}`,
  han: () => scatter(Array.from('龘靐齉爩鱻麤龗灪'), Math.floor(megabyte / 3)),
};

/** Prints a line for each kind and, last, one JSON line. */
export async function run(args: readonly string[], signal: AbortSignal): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: {
      kinds: { type: 'string', default: Object.keys(kinds).join() },
      count: { type: 'string', default: '8' },
      asks: { type: 'string', default: '5' },
      vocabulary: { type: 'string' },
    },
  });
  const directory = await mkdtemp(join(tmpdir(), 'mimo-bench-prompts-'));
  const models = [`mimo-demo=${demo}`];
  if (values.vocabulary !== undefined) {
    models.push(`vocabulary=${directory}`);
    await cp(values.vocabulary, directory, { recursive: true });
    const config = JSON.parse(await readFile(join(demo, 'config.json'), 'utf8'));
    const large = { ...config, vocab_size: 152_000, max_position_embeddings: 32_768 };
    await writeFile(join(directory, 'config.json'), JSON.stringify(large));
  }
  const model = values.vocabulary === undefined ? 'mimo-demo' : 'vocabulary';
  const cluster = await startTestCluster({ gatewayEnv: { MIMO_GATEWAY_MODELS: models.join() } });
  const measure = values.vocabulary === undefined ? timeToFirstToken : timeToCount;
  const results: Record<string, unknown>[] = [];
  try {
    const median = async (text: string): Promise<number> => {
      const times: number[] = [];
      for (let n = 0; n < Number(values.asks) * 4; n += 1) {
        times.push(await measure(cluster, model, text));
      }
      return times.toSorted((a, b) => a - b)[Math.floor(times.length / 2)] ?? Number.NaN;
    };
    const smallMs = await median('What is 47 + 85?');
    const aloneMs = await median(fiveKilobytes);
    process.stdout.write(
      `${model}: 16 bytes ${smallMs.toFixed(1)} ms, 5 kB alone ${aloneMs.toFixed(1)} ms\n`,
    );
    for (const kind of values.kinds.split(',')) {
      const long = kinds[kind]?.() ?? '';
      const behindMs: number[] = [];
      const longMs: number[] = [];
      for (let round = 0; round < Number(values.asks); round += 1) {
        signal.throwIfAborted();
        const sentMs = performance.now();
        const asked = Array.from({ length: Number(values.count) }, () => sendLong(cluster, model, long));
        await sleep(300);
        behindMs.push(await measure(cluster, model, fiveKilobytes));
        await Promise.all(asked);
        longMs.push(performance.now() - sentMs);
      }
      const worstMs = Math.max(...behindMs);
      results.push({ kind, aloneMs, behindMs, longMs });
      process.stdout.write(
        `${kind}: 5 kB behind ${values.count} of 1 MB ${behindMs.map((ms) => ms.toFixed(0)).join(', ')} ms; ` +
          `all read or refused within ${Math.max(...longMs).toFixed(0)} ms\n`,
      );
      results.at(-1)!['worstRatio'] = worstMs / aloneMs;
    }
  } finally {
    await cluster.close();
    await rm(directory, { recursive: true, force: true });
  }
  const goals = results.map(({ kind, worstRatio }) => ({
    name: `5 kB behind a megabyte of ${String(kind)}, of alone`,
    goal: maxRatio,
    value: Number(Number(worstRatio).toFixed(2)),
    met: Number(worstRatio) <= maxRatio,
  }));
  const machine = { cores: availableParallelism(), cpu: cpus()[0]?.model };
  process.stdout.write(`${JSON.stringify({ bench: 'prompts', ...values, results, goals, ...machine })}\n`);
}

/** Milliseconds to the first token of a chat. */
async function timeToFirstToken(cluster: TestCluster, _model: string, text: string): Promise<number> {
  const sentMs = performance.now();
  let firstMs = Number.NaN;
  await ask(cluster.client, {
    request: chatRequest(text, { temperature: 0.6, topP: 0.95, maxTokens: 2, ignoreEos: true }),
    onMessage: ({ event }) => {
      if (event?.$case === 'delta' && Number.isNaN(firstMs)) {
        firstMs = performance.now() - sentMs;
      }
    },
  });
  return firstMs;
}

/** Milliseconds to count a chat's tokens. */
async function timeToCount(cluster: TestCluster, model: string, text: string): Promise<number> {
  const sentMs = performance.now();
  const value = { model, messages: [{ role: Role.USER, content: text }] };
  await callUnary(cluster.client, InferenceServiceService.countTokens, {
    request: CountTokensRequest.fromPartial({ request: { $case: 'chat', value } }),
  });
  return performance.now() - sentMs;
}

/** Sends a long chat on a connection of its own, and waits until it was read or refused. */
async function sendLong(cluster: TestCluster, model: string, text: string): Promise<void> {
  const client = createClient(cluster.parts.gatewayAddress);
  const request = ChatRequest.fromPartial({ model, messages: [{ role: Role.USER, content: text }] });
  try {
    for await (const _ of callServerStream(client, InferenceServiceService.chat, { request })) {
      // A large vocabulary has tokens of 128 spaces: a megabyte of them fits, and was read by now.
      break;
    }
  } catch (error) {
    if (!String(error).includes('limit')) {
      throw error;
    }
  } finally {
    client.close();
  }
}

/** `length` characters of the parts, in an order that repeats late. */
function scatter(parts: readonly string[], length: number): string {
  const text: string[] = [];
  for (let state = 1; text.length < length; state = (state * 48_271) % 0x7fff_ffff) {
    text.push(parts[state % parts.length] ?? '');
  }
  return text.join('');
}
