// `npm test`: every check, then every layer of tests, fastest first; no other begins after a stage that fails.
// `npm run check` is the checks alone: format, lint, types, unused code, generated files, units.

import { spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

const root = join(import.meta.dirname, '..');
const reports = mkdtempSync(join(tmpdir(), 'mimo-tests-'));

interface Stage {
  readonly name: string;
  readonly command: readonly string[];
  /** A vitest project: its counts go into the closing line. */
  readonly vitest?: boolean;
}

const vitest = (project: string): Stage => ({
  name: project,
  command: [
    'vitest',
    'run',
    '--project',
    project,
    '--reporter=default',
    '--reporter=json',
    `--outputFile.json=${join(reports, `${project}.json`)}`,
  ],
  vitest: true,
});

const checks: readonly Stage[] = [
  { name: 'format', command: ['oxfmt', '--check'] },
  { name: 'lint', command: ['oxlint', '--deny-warnings'] },
  { name: 'types', command: ['tsc', '-p', '.'] },
  { name: 'unused', command: ['knip'] },
  vitest('unit'),
];
/** One after another: beside one another they starve the processes that each of them measures and kills. */
const layers: readonly Stage[] = [
  { name: 'site', command: ['node', 'docs/site/build.ts'] },
  vitest('fuzz'),
  vitest('golden'),
  vitest('webgpu'),
  vitest('servers'),
  vitest('hostile'),
  vitest('kubernetes'),
];

/** Returns its exit code. */
async function runStage({ command }: Stage): Promise<number> {
  const [program, ...args] = command;
  const path = program === 'node' ? process.execPath : join(root, 'node_modules/.bin', program ?? '');
  const child = spawn(path, args, { cwd: root, stdio: 'inherit' });
  const { promise, resolve, reject } = Promise.withResolvers<number>();
  child.once('error', reject);
  child.once('close', (code) => {
    resolve(code ?? 1);
  });
  return promise;
}

const counts = { passed: 0, failed: 0, skipped: 0 };
const seconds: string[] = [];
const failed: string[] = [];

function addCounts(project: string): void {
  const report = JSON.parse(readFileSync(join(reports, `${project}.json`), 'utf8')) as {
    readonly numPassedTests: number;
    readonly numFailedTests: number;
    readonly numPendingTests: number;
  };
  counts.passed += report.numPassedTests;
  counts.failed += report.numFailedTests;
  counts.skipped += report.numPendingTests;
}

/** One stage after another, until one fails. */
async function runStages(stages: readonly Stage[]): Promise<void> {
  for (const stage of stages) {
    if (failed.length > 0) {
      return;
    }
    const begin = performance.now();
    console.log(`\n== ${stage.name}`);
    const code = await runStage(stage);
    seconds.push(`${stage.name} ${((performance.now() - begin) / 1000).toFixed(1)} s`);
    if (code !== 0) {
      failed.push(stage.name);
    }
    if (stage.vitest === true) {
      addCounts(stage.name);
    }
  }
}

const only = process.argv[2];
const stages = [...checks, ...layers];
const chosen = only === 'check' ? checks : stages.filter(({ name }) => name === only);
if (only !== undefined && chosen.length === 0) {
  console.error(`no stage '${only}': give check or one of ${stages.map(({ name }) => name).join(', ')}`);
  process.exit(2);
}
const beginMs = performance.now();
try {
  await runStages(only === undefined ? stages : chosen);
} finally {
  rmSync(reports, { recursive: true, force: true });
}
console.log(`\n${seconds.join(', ')}; ${((performance.now() - beginMs) / 1000).toFixed(1)} s in all`);
console.log(`${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped`);
if (failed.length > 0) {
  console.error(`${failed.join(' and ')} failed`);
  process.exitCode = 1;
}
