// The chart's values as a table: each with its default and the comment above it. `node tests/structure/chart-values.ts`
// writes it into the chart's README; chart.test.ts compares.

import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { isMap, isScalar, parseDocument, type Node, type Pair } from 'yaml';

const chart = join(import.meta.dirname, '../../charts/mimo-cluster');
const readme = join(chart, 'README.md');
const begin = '<!-- values: written by tests/structure/chart-values.ts -->';
const end = '<!-- /values -->';

/** One value: its path with dots, its default as JSON, and the comment above or behind it. */
export interface ChartValue {
  readonly path: string;
  readonly fallback: string;
  /** Empty if there is none. */
  readonly reason: string;
}

/** Every leaf of a values file in its order. A map without entries, and a list, are leaves. */
export function readValues(file = join(chart, 'values.yaml')): readonly ChartValue[] {
  return leavesOf(parseDocument(readFileSync(file, 'utf8')).contents, []);
}

function leavesOf(node: Node | null, path: readonly string[]): ChartValue[] {
  if (!isMap(node) || node.items.length === 0 || isFree(path)) {
    return [];
  }
  return (node.items as Pair<Node, Node>[]).flatMap(({ key, value }, index) => {
    const inner = [...path, isScalar(key) ? String(key.value) : ''];
    const leaves = leavesOf(value, inner);
    if (leaves.length > 0) {
      return leaves;
    }
    // The comment of a map's first key belongs to the map itself in the tree.
    const above = key.commentBefore ?? (index === 0 ? node.commentBefore : undefined);
    const reason = wordsOf(value?.comment ?? above ?? '');
    return [{ path: inner.join('.'), fallback: JSON.stringify(value?.toJSON() ?? null), reason }];
  });
}

/** Maps whose keys are the user's, not the chart's: their default is one value. */
function isFree(path: readonly string[]): boolean {
  return ['resources', 'labels', 'nodeSelector'].includes(path.at(-1) ?? '') && path.length > 1;
}

function wordsOf(comment: string): string {
  // A blank line ends what was said about something else.
  const own = comment.split(/\n\s*\n/).at(-1) ?? '';
  return own
    .split('\n')
    .map((line) => line.trim())
    .join(' ')
    .trim();
}

/** The table as the README has it. */
export function valuesTable(values: readonly ChartValue[]): string {
  const rows = values.map(({ path, fallback, reason }) =>
    [`\`${path}\``, `\`${fallback}\``, reason].map((cell) => cell.replaceAll('|', '\\|')).join(' | '),
  );
  return ['| value | default | why |', '| --- | --- | --- |', ...rows.map((row) => `| ${row} |`)].join('\n');
}

/** The table that is in the README, its columns unaligned. */
export function tableInReadme(): string {
  const text = readFileSync(readme, 'utf8');
  return text
    .slice(text.indexOf(begin) + begin.length, text.indexOf(end))
    .trim()
    .split('\n')
    .map((line) => line.replaceAll(/ +(?=\|)|(?<=\|) +/g, ' ').replaceAll(/\| -+ (?=\|)/g, '| --- '))
    .join('\n');
}

if (import.meta.main) {
  const text = readFileSync(readme, 'utf8');
  const [before, after] = [text.slice(0, text.indexOf(begin)), text.slice(text.indexOf(end))];
  writeFileSync(readme, `${before}${begin}\n\n${valuesTable(readValues())}\n\n${after}`);
}
