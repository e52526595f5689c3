// The sampler of a CUDA device against the host's: draws from rows of every shape, compared id for id, with their
// logits and log-probabilities; and the time of a launch by rows and shape. Part `draws` of `npm run bench -- gpu`.

import { availableParallelism } from 'node:os';
import { Worker } from 'node:worker_threads';
import { createRuntime } from '@mimo/worker/runtime/create-runtime';
import type { SampledToken } from '@mimo/worker/runtime/kernel';
import type { RuntimeMemory } from '@mimo/worker/runtime/memory';
import type { Runtime } from '@mimo/worker/runtime/runtime';
import { median } from './engine-run.ts';
import { drawOf, fillRow, rowKinds } from './draw-cases.ts';
import type { DrawCheck, DrawVerdict } from './gpu-draws-thread.ts';
import { mimo7b } from '@mimo/worker/compiler/random-checkpoint';

const saltsOfSet = 8;
const drawsOfRow = 512;
const setsOfReport = 10;
/** As the tokenizer leaves it: what follows is padding. */
const usable = 151_669;
const timedRows = [1, 8, 32, 64, 128, 256] as const;
const timedLaunches = 40;

type Report = (result: Record<string, unknown>) => void;

/** At least `draws` draws. Reports a line for each shape of rows, and the times. */
export async function compareDraws(
  {
    libraryPath,
    draws,
    rowLength = mimo7b.vocabSize,
  }: {
    readonly libraryPath: string;
    readonly draws: number;
    readonly rowLength?: number;
  },
  report: Report,
): Promise<void> {
  const runtime = await createRuntime({
    implementation: 'ort-capi',
    executionProvider: 'cuda',
    libraryPath,
    intraOpThreads: 1,
  });
  const threads = Array.from(
    { length: availableParallelism() },
    () => new Worker(new URL('gpu-draws-thread.ts', import.meta.url)),
  );
  try {
    timeLaunches(runtime, rowLength, report);
    await compare({ runtime, threads, draws, rowLength }, report);
  } finally {
    await Promise.all(threads.map((thread) => thread.terminate()));
    runtime.close();
  }
}

async function compare(
  {
    runtime,
    threads,
    draws,
    rowLength,
  }: {
    readonly runtime: Runtime;
    readonly threads: readonly Worker[];
    readonly draws: number;
    readonly rowLength: number;
  },
  report: Report,
): Promise<void> {
  const count = rowKinds.length * saltsOfSet;
  const usableIds = Math.min(usable, rowLength);
  const rows = new Float32Array(new SharedArrayBuffer(4 * count * rowLength));
  const memory = runtime.allocate('float', rows.length, 'exchanged');
  const startedMs = performance.now();
  const sampler = runtime.createSampler?.({ rowLength, firstId: 0, usable: usableIds, maxRows: count });
  if (sampler === undefined) {
    throw new Error('no sampler on this device');
  }
  report({ step: 'sampler', seconds: (performance.now() - startedMs) / 1000 });
  const verdicts = new Map(rowKinds.map((kind) => [kind, emptyVerdict()]));
  for (let set = 0, drawn = 0; drawn < draws; set++) {
    const places = Array.from({ length: count }, (_, row) => ({
      row,
      kind: rowKinds[row % rowKinds.length]!,
      salt: set * saltsOfSet + Math.floor(row / rowKinds.length),
    }));
    await share(
      threads,
      places.map((place) => ({ do: 'fill', rows, rowLength, ...place })),
    );
    memory.write(0, rows);
    const answers: SampledToken[][] = places.map(() => []);
    for (let index = 0; index < drawsOfRow; index++) {
      sampler.ask(places.map(({ kind, salt }) => drawOf(kind, salt, index, usableIds)));
      sampler.run(memory);
      for (const [row, answer] of sampler.answers().entries()) {
        answers[row]!.push(answer);
      }
    }
    const checks = await share(
      threads,
      places.map((place) => ({
        do: 'check',
        rows,
        rowLength,
        usable: usableIds,
        answers: answers[place.row]!,
        ...place,
      })),
    );
    for (const [row, { kind }] of places.entries()) {
      add(verdicts.get(kind)!, checks[row]!);
    }
    drawn += count * drawsOfRow;
    if (set % setsOfReport === 0) {
      const different = [...verdicts.values()].reduce((sum, verdict) => sum + verdict.different, 0);
      report({ step: 'draws', kind: 'so far', draws: drawn, different });
    }
  }
  sampler.release();
  memory.release();
  const all = emptyVerdict();
  for (const [kind, verdict] of verdicts) {
    add(all, verdict);
    report({ step: 'draws', kind, ...verdict });
  }
  report({ step: 'draws', kind: 'all', ...all, examples: [] });
}

/** Each job to whichever thread is free; answers in the order of the jobs. */
async function share(threads: readonly Worker[], jobs: readonly DrawCheck[]): Promise<DrawVerdict[]> {
  const verdicts: DrawVerdict[] = [];
  let next = 0;
  await Promise.all(
    threads.map(async (thread) => {
      while (next < jobs.length) {
        const at = next++;
        const { promise, resolve, reject } = Promise.withResolvers<DrawVerdict>();
        thread.once('message', resolve);
        thread.once('error', reject);
        thread.postMessage(jobs[at]);
        verdicts[at] = await promise;
        thread.off('error', reject);
      }
    }),
  );
  return verdicts;
}

function emptyVerdict(): DrawVerdict {
  return { draws: 0, different: 0, worstLogprob: 0, differentTops: 0, examples: [] };
}

function add(to: DrawVerdict, more: DrawVerdict): void {
  to.draws += more.draws;
  to.different += more.different;
  to.differentTops += more.differentTops;
  to.worstLogprob = Math.max(to.worstLogprob, more.worstLogprob);
  to.examples = [...to.examples, ...more.examples].slice(0, 4);
}

/** Microseconds of a launch, by the shape and number of the rows; asking and reading come on top. */
function timeLaunches(runtime: Runtime, rowLength: number, report: Report): void {
  const maxRows = Math.max(...timedRows);
  const memory = runtime.allocate('float', maxRows * rowLength, 'exchanged');
  const sampler = runtime.createSampler?.({ rowLength, firstId: 0, usable: rowLength, maxRows });
  const base = new Float32Array(rowLength);
  const shapes = [
    ['greedy', 'usual', { temperature: 0, topP: 1 }],
    ['peaked', 'peaked', { temperature: 0.6, topP: 0.95 }],
    ['usual', 'usual', { temperature: 0.6, topP: 0.95 }],
    ['usual, top 20', 'usual', { temperature: 0.6, topP: 0.95, logprobs: 20 }],
    ['usual, no cut', 'usual', { temperature: 1, topP: 1 }],
    ['wide', 'wide', { temperature: 0.6, topP: 0.95 }],
    ['flat', 'flat', { temperature: 0.6, topP: 0.95 }],
  ] as const;
  for (const [shape, kind, changes] of shapes) {
    fillRow(base, kind, 3);
    fillTurned(memory, base, maxRows);
    const { sampling } = drawOf(kind, 0, 0, rowLength);
    const plain = {
      ...sampling,
      topK: 0,
      minP: 0,
      repetitionPenalty: 1,
      presencePenalty: 0,
      frequencyPenalty: 0,
    };
    const microseconds = timedRows.map((rows) => {
      sampler!.ask(
        Array.from({ length: rows }, (_, position) => ({
          sampling: { ...plain, logprobs: -1, ...changes },
          position,
          seen: new Map(),
          forbidden: [],
        })),
      );
      const times = Array.from({ length: 7 }, () => {
        sampler!.answers();
        const startedMs = performance.now();
        for (let i = 0; i < timedLaunches; i++) {
          sampler!.run(memory);
        }
        sampler!.answers();
        return (1000 * (performance.now() - startedMs)) / timedLaunches;
      });
      return median(times);
    });
    report({ step: 'launch', shape, rows: timedRows, microseconds });
  }
  sampler!.release();
  memory.release();
}

/** The same row, turned by a few places from row to row. */
function fillTurned(memory: RuntimeMemory, base: Float32Array, rows: number): void {
  const turned = new Float32Array(base.length);
  for (let row = 0; row < rows; row++) {
    const by = (row * 148) % base.length;
    turned.set(base.subarray(by));
    turned.set(base.subarray(0, by), base.length - by);
    memory.write(row * base.length, turned);
  }
}
