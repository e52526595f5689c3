// Golden fixtures as tests use them: the oracle's values, and the checkpoint compiled into a temporary folder.
// Owns reading and clean-up; each test owns its comparisons and tolerances.

import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import * as path from 'node:path';
import { compile, type CompileOptions } from '@mimo/worker/compiler/compile';

/** `expected.json`: see README.md. */
export interface ExpectedIds {
  readonly tensorParallel: readonly number[];
  readonly promptIds: readonly number[];
  readonly greedyIds: readonly number[];
  readonly greedyMinMargin: number;
  readonly draftIds?: readonly number[];
}

/** A float32 matrix of the oracle, [rows, columns]. */
export interface ExpectedMatrix {
  readonly rows: number;
  readonly columns: number;
  readonly values: Float32Array;
}

export const fixtureNames = ['one-to-one', 'two-to-one-sharded', 'four-to-one-no-mtp', 'quantised'] as const;

export type FixtureName = (typeof fixtureNames)[number];

function fixtureDirectory(name: FixtureName): string {
  return path.join(import.meta.dirname, 'fixtures', name);
}

export function readExpectedIds(name: FixtureName): ExpectedIds {
  return JSON.parse(readFileSync(path.join(fixtureDirectory(name), 'expected.json'), 'utf8')) as ExpectedIds;
}

/** Throws if the fixture has no such tensor. */
export function readExpectedMatrix(name: FixtureName, tensor: string): ExpectedMatrix {
  const bytes = readFileSync(path.join(fixtureDirectory(name), 'expected.safetensors'));
  const headerBytes = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.toString('utf8', 8, 8 + headerBytes)) as Record<
    string,
    {
      readonly dtype: string;
      readonly shape: readonly [number, number];
      readonly data_offsets: readonly [number, number];
    }
  >;
  const entry = header[tensor];
  if (entry === undefined || entry.dtype !== 'F32') {
    throw new Error(`fixture ${name} has no float32 tensor ${tensor}`);
  }
  const [start, end] = entry.data_offsets.map((offset) => 8 + headerBytes + offset) as [number, number];
  const values = new Float32Array(Uint8Array.from(bytes.subarray(start, end)).buffer);
  return { rows: entry.shape[0], columns: entry.shape[1], values };
}

/** Compiles fixtures into a folder of its own, each combination once; `remove` deletes it. */
export class CompiledFixtures {
  readonly #root = mkdtempSync(path.join(tmpdir(), 'mimo-golden-'));
  readonly #done = new Map<string, Promise<readonly string[]>>();

  /** One directory per rank. */
  compile(
    name: FixtureName,
    options: Pick<CompileOptions, 'precision' | 'tensorParallel' | 'mtpHidden' | 'accuracyLevel'>,
  ): Promise<readonly string[]> {
    const key = [name, ...Object.values(options)].join('-');
    const running =
      this.#done.get(key) ??
      compile(
        {
          ...options,
          modelDirectory: fixtureDirectory(name),
          outDirectory: path.join(this.#root, key),
          threads: 1,
        },
        AbortSignal.timeout(60_000),
      ).then(({ rankDirectories }) => rankDirectories);
    this.#done.set(key, running);
    return running;
  }

  remove(): void {
    rmSync(this.#root, { recursive: true, force: true });
  }
}

/** Largest difference of any row from the oracle's, relative to the row's largest magnitude. */
export function relativeError(actual: readonly Float32Array[], expected: ExpectedMatrix): number {
  let worst = actual.length === expected.rows ? 0 : Infinity;
  for (const [row, values] of actual.entries()) {
    const reference = expected.values.subarray(row * expected.columns, (row + 1) * expected.columns);
    const scale = Math.max(...reference.map(Math.abs));
    const difference = Math.max(...reference.map((value, i) => Math.abs(value - (values[i] ?? Infinity))));
    worst = Math.max(worst, difference / scale);
  }
  return worst;
}
