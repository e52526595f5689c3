// The cost of compiling the real model: writes a random checkpoint of MiMo-7B's full size in its real layout, compiles
// it in a separate process, so that the peak memory is the compiler's alone, and removes both.
//
//   npm run bench -- compile [--precision int8] [--tensor-parallel 2] [--directory DIR]

import { execFile } from 'node:child_process';
import { mkdtemp, rm, statfs } from 'node:fs/promises';
import { availableParallelism, cpus, tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs, promisify } from 'node:util';

import { ClusterError } from '@mimo/core/process/errors';
import { mimo7b, writeRandomCheckpoint } from '@mimo/worker/compiler/random-checkpoint';

/** The checkpoint, the shards of all ranks in int8, and room to breathe. */
const neededBytes = 30e9;
const files = 4;

/** Prints one JSON line: seconds, peak memory and bytes. The signal ends it; what it wrote is removed in any case. */
export async function run(args: readonly string[], signal: AbortSignal): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: {
      precision: { type: 'string', default: 'int8' },
      'tensor-parallel': { type: 'string', default: '2' },
      directory: { type: 'string', default: tmpdir() },
    },
  });
  const { bavail, bsize } = await statfs(values.directory);
  if (bavail * bsize < neededBytes) {
    throw new ClusterError(
      'resource_exhausted',
      `${values.directory}: the benchmark needs ${neededBytes} bytes, ${bavail * bsize} are free`,
    );
  }
  const directory = await mkdtemp(join(values.directory, 'mimo-bench-compile-'));
  try {
    const model = join(directory, 'checkpoint');
    const out = join(directory, 'shards');
    const writeStartedMs = performance.now();
    const checkpointBytes = await writeRandomCheckpoint(
      { directory: model, config: mimo7b, seed: 1, files },
      signal,
    );
    const writeSeconds = secondsSince(writeStartedMs);
    const { precision, 'tensor-parallel': tensorParallel } = values;
    const flags = [
      '--model',
      model,
      '--out',
      out,
      '--precision',
      precision,
      '--tensor-parallel',
      tensorParallel,
    ];
    const first = await compileApart(flags, signal);
    const again = await compileApart(flags, signal);
    const result = {
      bench: 'compile',
      model: 'MiMo-7B, random weights',
      precision,
      tensorParallel: Number(tensorParallel),
      checkpointBytes,
      checkpointWriteSeconds: writeSeconds,
      compileSeconds: first.seconds,
      peakMemoryBytes: first.peakMemoryBytes,
      cpuSeconds: first.cpuSeconds,
      rankBytes: first.rankBytes,
      upToDateSeconds: again.seconds,
      cores: availableParallelism(),
      cpu: cpus()[0]?.model,
    };
    process.stdout.write(`${JSON.stringify(result)}\n`);
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
}

/** What the compiling process tells of itself. */
interface CompileFigures {
  readonly seconds: number;
  readonly cpuSeconds: number;
  readonly peakMemoryBytes: number;
  readonly rankBytes: readonly number[];
}

async function compileApart(flags: readonly string[], signal: AbortSignal): Promise<CompileFigures> {
  const script = join(import.meta.dirname, 'compile-process.ts');
  const { stdout } = await promisify(execFile)(process.execPath, [script, ...flags], { signal });
  return JSON.parse(stdout);
}

function secondsSince(startedMs: number): number {
  return Math.round((performance.now() - startedMs) / 100) / 10;
}
