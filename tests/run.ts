// `npm test`: every check and every layer of tests, fastest first, stopping at the first stage that fails.
// `npm run check` is the first stages alone: format, lint, types, unused code, generated files, units.

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
const layers: readonly Stage[] = [
  { name: 'site', command: ['node', 'docs/site/build.ts'] },
  vitest('golden'),
  vitest('webgpu'),
  vitest('servers'),
  vitest('hostile'),
  vitest('kubernetes'),
];

async function runCommand(command: readonly string[]): Promise<number> {
  const [program, ...args] = command;
  const path = program === 'node' ? process.execPath : join(root, 'node_modules/.bin', program ?? '');
  const child = spawn(path, args, { cwd: root, stdio: 'inherit' });
  const { promise, resolve, reject } = Promise.withResolvers<number>();
  child.once('error', reject);
  child.once('exit', (code) => {
    resolve(code ?? 1);
  });
  return promise;
}

interface Counts {
  passed: number;
  failed: number;
  skipped: number;
}

function addCounts(counts: Counts, project: string): void {
  const report = JSON.parse(readFileSync(join(reports, `${project}.json`), 'utf8')) as {
    readonly numPassedTests: number;
    readonly numFailedTests: number;
    readonly numPendingTests: number;
  };
  counts.passed += report.numPassedTests;
  counts.failed += report.numFailedTests;
  counts.skipped += report.numPendingTests;
}

const only = process.argv[2];
const stages =
  only === undefined
    ? [...checks, ...layers]
    : only === 'check'
      ? checks
      : [...checks, ...layers].filter((stage) => stage.name === only);
if (stages.length === 0) {
  const names = [...checks, ...layers].map((stage) => stage.name).join(', ');
  console.error(`no stage '${only}': give check or one of ${names}`);
  process.exit(2);
}

const counts: Counts = { passed: 0, failed: 0, skipped: 0 };
const seconds: string[] = [];
let exitCode = 0;
for (const stage of stages) {
  const begin = performance.now();
  console.log(`\n== ${stage.name}`);
  exitCode = await runCommand(stage.command);
  seconds.push(`${stage.name} ${((performance.now() - begin) / 1000).toFixed(1)} s`);
  if (stage.vitest === true) {
    addCounts(counts, stage.name);
  }
  if (exitCode !== 0) {
    console.error(`\n${stage.name} failed`);
    break;
  }
}
rmSync(reports, { recursive: true, force: true });
console.log(`\n${seconds.join(', ')}`);
console.log(`${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped`);
process.exitCode = exitCode;
