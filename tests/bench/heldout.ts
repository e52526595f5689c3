// How well the demonstration model answers problems it has never seen, asked through the gateway of a whole local
// cluster: exact answers, draft acceptance and tokens/s of each (precision, tensorParallel, speculation). Greedy.
//
//   npm run bench -- heldout [--problems 200] [--concurrency 8]

import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';

import { Connection } from '@mimo/cli/connection';
import { Role } from '@mimo/proto/inference';
import { compile } from '@mimo/worker/compiler/compile';
import type { Precision } from '@mimo/worker/shards/target-profile';

import { startLocalCluster } from '../../cli/src/local/local-cluster.ts';
import { cacheDirectoryFrom, findNatsServer } from '../../cli/src/local/nats-server.ts';

const models = resolve(import.meta.dirname, '../../models');
const modelName = 'mimo-demo';

/** A line of models/heldout.jsonl: the text after `</think>` must equal `answer`. */
interface Problem {
  readonly task: string;
  readonly question: string;
  readonly answer: string;
}

interface Group {
  readonly precision: Precision;
  readonly tensorParallel: number;
}

const groups: readonly Group[] = [
  { precision: 'fp32', tensorParallel: 1 },
  { precision: 'fp32', tensorParallel: 2 },
  { precision: 'int8', tensorParallel: 2 },
  { precision: 'int4', tensorParallel: 2 },
];

/** One row of the table. `texts` are kept to compare rows: speculation may not change one. */
interface Row extends Group {
  readonly speculation: boolean;
  readonly problems: number;
  readonly exactRatio: number;
  readonly acceptedRatio: number | null;
  readonly completionTokens: number;
  readonly tokensPerSecond: number;
  readonly texts: readonly string[];
}

interface Answer {
  readonly text: string;
  readonly completionTokens: number;
  readonly drafted: number;
  readonly accepted: number;
}

async function ask(
  connection: Connection,
  question: { readonly content: string; readonly draftTokens: number },
  signal: AbortSignal,
): Promise<Answer> {
  const request = {
    model: modelName,
    messages: [{ role: Role.USER, content: question.content }],
    sampling: { temperature: 0, draftTokens: question.draftTokens, stop: [], stopTokenIds: [] },
  };
  let text = '';
  for await (const { event } of connection.chat(request, signal)) {
    if (event?.$case === 'delta') {
      text += event.value.text;
    } else if (event?.$case === 'finish') {
      const { usage, speculation } = event.value;
      return {
        text: text.trim(),
        completionTokens: usage?.completionTokens ?? 0,
        drafted: speculation?.draftedTokens ?? 0,
        accepted: speculation?.acceptedTokens ?? 0,
      };
    }
  }
  throw new Error('the stream ended without a finish');
}

/** Runs `work` over the items, `limit` at a time, and keeps their order. */
async function mapBounded<Item, Result>(
  items: readonly Item[],
  limit: number,
  work: (item: Item) => Promise<Result>,
): Promise<Result[]> {
  const results: Result[] = [];
  let next = 0;
  const lane = async (): Promise<void> => {
    while (next < items.length) {
      const index = next++;
      results[index] = await work(items[index] as Item);
    }
  };
  await Promise.all(Array.from({ length: limit }, lane));
  return results;
}

/** Measures both speculation settings on one group, which stays up between them. */
async function measureGroup(
  group: Group,
  problems: readonly Problem[],
  options: { readonly concurrency: number; readonly signal: AbortSignal },
): Promise<Row[]> {
  const { signal } = options;
  const scratch = await mkdtemp(join(tmpdir(), 'mimo-heldout-'));
  const natsServerBinary = await findNatsServer({
    cacheDirectory: cacheDirectoryFrom(process.env),
    signal,
    onProgress: console.error,
  });
  if (natsServerBinary === null) {
    throw new Error('this benchmark needs nats-server');
  }
  const modelDirectory = join(models, modelName);
  const shardDirectory = join(scratch, 'shards');
  await compile({ modelDirectory, outDirectory: shardDirectory, ...group }, signal);
  const cluster = await startLocalCluster({
    modelName,
    modelDirectory,
    shardDirectory,
    ...group,
    groups: 1,
    gatewayPort: 0,
    natsServerBinary,
    dataDirectory: join(scratch, 'data'),
    onEvent: console.error,
  });
  const connection = new Connection(cluster.gatewayAddress, undefined);
  try {
    await Promise.race([untilReady(connection, signal), cluster.givenUp]);
    const rows: Row[] = [];
    for (const speculation of [true, false]) {
      const draftTokens = speculation ? 1 : 0;
      await ask(connection, { content: 'What is 1 + 1?', draftTokens }, signal);
      const begin = performance.now();
      const answers = await mapBounded(problems, options.concurrency, (problem) =>
        ask(connection, { content: problem.question, draftTokens }, signal),
      );
      const seconds = (performance.now() - begin) / 1000;
      const sum = (pick: (answer: Answer) => number): number =>
        answers.reduce((total, answer) => total + pick(answer), 0);
      const drafted = sum(({ drafted: tokens }) => tokens);
      const completionTokens = sum((answer) => answer.completionTokens);
      rows.push({
        ...group,
        speculation,
        problems: problems.length,
        exactRatio:
          answers.filter(({ text }, index) => text === problems[index]?.answer).length / problems.length,
        acceptedRatio: drafted === 0 ? null : sum(({ accepted }) => accepted) / drafted,
        completionTokens,
        tokensPerSecond: completionTokens / seconds,
        texts: answers.map(({ text }) => text),
      });
    }
    return rows;
  } finally {
    connection.close();
    await cluster.close();
    await rm(scratch, { recursive: true, force: true });
  }
}

async function untilReady(connection: Connection, signal: AbortSignal): Promise<void> {
  for (;;) {
    const served = await connection.listModels(signal).catch(() => []);
    if (served.some(({ readyGroups }) => readyGroups > 0)) {
      return;
    }
    await sleep(100, undefined, { signal });
  }
}

/** Runs the benchmark; the last line is one JSON document. */
export async function run(args: readonly string[], signal: AbortSignal): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: {
      problems: { type: 'string', default: '200' },
      concurrency: { type: 'string', default: '8' },
    },
  });
  const lines = (await readFile(join(models, 'heldout.jsonl'), 'utf8')).trim().split('\n');
  const all = lines.map((line) => JSON.parse(line) as Problem);
  // Every k-th, so that each task keeps its share.
  const wanted = Math.min(Number(values.problems), all.length);
  const problems = Array.from(
    { length: wanted },
    (_, i) => all[Math.floor((i * all.length) / wanted)] as Problem,
  );
  const rows: Row[] = [];
  for (const group of groups) {
    rows.push(...(await measureGroup(group, problems, { concurrency: Number(values.concurrency), signal })));
  }
  const report = rows.map(({ texts, ...row }, index) => ({
    ...row,
    sameAsWithoutSpeculation: row.speculation
      ? texts.filter((text, i) => text === rows[index + 1]?.texts[i]).length
      : undefined,
  }));
  console.table(report);
  console.log(JSON.stringify({ bench: 'heldout', concurrency: Number(values.concurrency), rows: report }));
}
