// `mimo compile`: turns flags into CompileOptions, shows progress on stderr, prints one closing line on stdout. The
// compiler itself is compile.ts.

import { parseArgs } from 'node:util';
import { ClusterError } from '@mimo/core/process/errors';
import { compile, type CompileOptions, type CompileProgress } from './compile.ts';
import { precisions } from '../shards/target-profile.ts';

/** The flags of `mimo compile`, for its usage text. */
export const compileUsage = `mimo compile --model DIR --out DIR [options]
  --model DIR              checkpoint directory with config.json and safetensors files
  --out DIR                where to write rank-0, rank-1, ...
  --tensor-parallel N      ranks that share the model (default 1)
  --precision P            ${precisions.join(', ')} (default int8)
  --mtp-hidden H           hidden state that feeds the MTP layer: pre-norm (default) or post-norm
  --accuracy-level N       compute int8 and int4 products in int8 (4, default) or in fp32 (0)
  --max-positions N        positions that the RoPE tables cover (default: the model's)
  --threads N              compile threads (default: one for each core, at most 8)`;

const progressIntervalMs = { terminal: 100, lines: 5_000 } as const;
const barWidth = 30;

/**
 * Compiles with these flags. Throws `invalid_argument` naming every wrong flag, and the errors of `compile`. The
 * signal cancels; the next call continues from the work already done.
 */
export async function runCompile(argv: readonly string[], signal: AbortSignal): Promise<void> {
  const options = parseCompileArgs(argv);
  const startedMs = performance.now();
  const result = await compile({ ...options, onProgress: createProgressPrinter(startedMs) }, signal);
  const seconds = ((performance.now() - startedMs) / 1_000).toFixed(1);
  const sizes = result.rankBytes.map((bytes) => gigabytes(bytes)).join(' + ');
  const peak = gigabytes(process.resourceUsage().maxRSS * 1_024);
  const verb = result.upToDate ? 'up to date' : 'compiled';
  process.stdout.write(
    `${verb}: ${options.outDirectory} (key ${result.key.slice(0, 16)}) in ${seconds} s, weights ${sizes}, peak memory ${peak}\n`,
  );
}

/** Flags to options; pure. */
export function parseCompileArgs(argv: readonly string[]): CompileOptions {
  const problems: string[] = [];
  const values = readFlags(argv);
  const choice = <Value extends string>(
    flag: string,
    value: string,
    allowed: readonly Value[],
  ): Value | undefined => {
    const found = allowed.find((each) => each === value);
    if (found === undefined) {
      problems.push(`--${flag}: must be ${allowed.join(' or ')}, is ${value}`);
    }
    return found;
  };
  const count = (flag: string, value: string): number => {
    const parsed = Number(value);
    if (!Number.isInteger(parsed) || parsed < 1) {
      problems.push(`--${flag}: must be a whole number of at least 1, is ${value}`);
    }
    return parsed;
  };
  for (const flag of ['model', 'out'] as const) {
    if (values[flag] === undefined || values[flag] === '') {
      problems.push(`--${flag}: is missing; give a directory`);
    }
  }
  const maxPositions = values['max-positions'];
  const threads = values.threads;
  const options: CompileOptions = {
    modelDirectory: values.model ?? '',
    outDirectory: values.out ?? '',
    tensorParallel: count('tensor-parallel', values['tensor-parallel']),
    precision: choice('precision', values.precision, precisions) ?? 'int8',
    mtpHidden: choice('mtp-hidden', values['mtp-hidden'], ['pre-norm', 'post-norm']) ?? 'pre-norm',
    accuracyLevel: choice('accuracy-level', values['accuracy-level'], ['4', '0']) === '0' ? 0 : 4,
    ...(maxPositions === undefined ? {} : { maxPositions: count('max-positions', maxPositions) }),
    ...(threads === undefined ? {} : { threads: count('threads', threads) }),
  };
  if (problems.length > 0) {
    throw new ClusterError('invalid_argument', problems.join('; '));
  }
  return options;
}

function readFlags(argv: readonly string[]) {
  try {
    return parseArgs({
      args: [...argv],
      options: {
        model: { type: 'string' },
        out: { type: 'string' },
        'tensor-parallel': { type: 'string', default: '1' },
        precision: { type: 'string', default: 'int8' },
        'mtp-hidden': { type: 'string', default: 'pre-norm' },
        'accuracy-level': { type: 'string', default: '4' },
        'max-positions': { type: 'string' },
        threads: { type: 'string' },
      },
    }).values;
  } catch (error) {
    throw new ClusterError('invalid_argument', ClusterError.from(error).message, { cause: error });
  }
}

/** Progress on standard error: a redrawn bar on a terminal, a line every few seconds elsewhere. */
export function createProgressPrinter(startedMs: number): (progress: CompileProgress) => void {
  const { isTTY } = process.stderr;
  let printedMs = startedMs;
  return ({ tensor, doneBytes, totalBytes }) => {
    const nowMs = performance.now();
    const last = doneBytes === totalBytes;
    if (!last && nowMs - printedMs < (isTTY ? progressIntervalMs.terminal : progressIntervalMs.lines)) {
      return;
    }
    printedMs = nowMs;
    const ratio = doneBytes / totalBytes;
    const counts = `${gigabytes(doneBytes)} of ${gigabytes(totalBytes)}`;
    if (isTTY) {
      const bar = '#'.repeat(Math.round(ratio * barWidth)).padEnd(barWidth, '.');
      const clearToEnd = '\u001B[K';
      process.stderr.write(`\r[${bar}] ${counts}  ${tensor}${clearToEnd}${last ? '\n' : ''}`);
    } else {
      process.stderr.write(`compiling: ${counts}, ${tensor}\n`);
    }
  };
}

function gigabytes(bytes: number): string {
  return bytes < 1e8 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
}
