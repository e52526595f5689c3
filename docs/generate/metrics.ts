// Every metric of every process, from the places that make the instruments.

import { globSync, readFileSync } from 'node:fs';
import { join } from 'node:path';

import { code, pageOf, tableOf } from './markdown.ts';

const kinds: Readonly<Record<string, string>> = { counter: 'counter', gauge: 'gauge', duration: 'histogram' };
/** A call that makes an instrument, and a line of the worker's table of counters. */
const made = /\b(counter|gauge|duration)\(\s*'([a-z_]+)',\s*'((?:[^'\\]|\\.)*)'/g;
const tabled = /^ {2}([a-z_]+_total): \['\w+', '((?:[^'\\]|\\.)*)'\]/gm;

interface Metric {
  readonly name: string;
  readonly kind: string;
  readonly description: string;
}

/** The page of metrics. */
export function metricsPage(root: string): string {
  const parts = ['gateway', 'worker', 'controller'].map((name) => {
    const metrics = globSync(`${name}/src/**/*.ts`, { cwd: root })
      .filter((file) => !file.endsWith('.test.ts'))
      .flatMap((file) => metricsIn(readFileSync(join(root, file), 'utf8')))
      .toSorted((a, b) => a.name.localeCompare(b.name));
    const rows = metrics.map((metric) => [code(metric.name), metric.kind, metric.description]);
    return `## ${name}\n\n${tableOf(['metric', 'kind', 'meaning'], rows)}`;
  });
  return pageOf({ title: 'Metrics', source: 'the code that makes them', parts });
}

/** The text of a string literal. */
function plain(literal: string): string {
  return literal.replaceAll(/\\(.)/g, '$1');
}

function metricsIn(source: string): Metric[] {
  return [
    ...[...source.matchAll(made)].map(([, kind = '', name = '', text = '']) => ({
      name,
      kind: kinds[kind] ?? kind,
      description: plain(text),
    })),
    ...[...source.matchAll(tabled)].map(([, name = '', text = '']) => ({
      name,
      kind: 'counter',
      description: plain(text),
    })),
  ];
}
