// Alerts and dashboards use metrics and labels of the code, in PromQL that Prometheus' own grammar accepts; and each
// metric of the code is on some dashboard.

import { globSync, readFileSync } from 'node:fs';
import { basename, join } from 'node:path';

import { parser } from '@prometheus-io/lezer-promql';
import { describe, expect, it } from 'vitest';
import { parse } from 'yaml';

const root = join(import.meta.dirname, '../..');
const chart = join(root, 'charts/mimo-cluster');

/** The metrics of the code, by name; a histogram has three series. */
const metrics = new Map<string, 'histogram' | 'single'>();
for (const file of globSync('{gateway,worker,controller,core}/src/**/*.ts', { cwd: root })) {
  if (file.endsWith('.test.ts')) {
    continue;
  }
  const text = readFileSync(join(root, file), 'utf8');
  for (const [, kind, name] of text.matchAll(/\b(counter|duration|gauge)\(\s*'([a-z_]+)'/g)) {
    metrics.set(name ?? '', kind === 'duration' ? 'histogram' : 'single');
  }
  // The worker's counters are a table.
  for (const [, name] of text.matchAll(/^ {2}(engine_[a-z_]+_total): \[/gm)) {
    metrics.set(name ?? '', 'single');
  }
}
const series = new Set(
  [...metrics].flatMap(([name, kind]) =>
    kind === 'single' ? [name] : ['bucket', 'sum', 'count'].map((part) => `${name}_${part}`),
  ),
);

/** Labels of our instruments, and those that the scrape adds (the chart's monitors; `le` is the histogram's). */
const ownLabels = [
  'cause',
  'code',
  'method',
  'model',
  'phase',
  'reason',
  'resource',
  'result',
  'service',
  'state',
];
const scrapeLabels = ['namespace', 'pod', 'le', 'mimo_cluster_dev_service', 'mimo_cluster_dev_group'];
const labels = new Set([...ownLabels, ...scrapeLabels]);

interface Query {
  readonly where: string;
  readonly expr: string;
}

interface AlertFile {
  readonly groups: readonly {
    readonly rules: readonly {
      readonly alert: string;
      readonly expr: string;
      readonly for: string;
      readonly labels: { readonly severity: string };
      readonly annotations: Readonly<Record<string, string>>;
    }[];
  }[];
}

interface Dashboard {
  readonly uid: string;
  readonly panels: readonly {
    readonly id: number;
    readonly title: string;
    readonly description: string;
    readonly targets: readonly { readonly expr: string; readonly legendFormat: string }[];
  }[];
  readonly templating: { readonly list: readonly { readonly name: string; readonly definition?: string }[] };
}

const alerts = (
  parse(readFileSync(join(chart, 'alerts/mimo-cluster.yaml'), 'utf8')) as AlertFile
).groups.flatMap(({ rules }) => rules);
const dashboards = globSync('dashboards/*.json', { cwd: chart }).map(
  (file) => [basename(file), JSON.parse(readFileSync(join(chart, file), 'utf8')) as Dashboard] as const,
);
const alertQueries = alerts.map(({ alert, expr }) => ({ where: alert, expr }));
const panelQueries = dashboards.flatMap(([file, { panels }]) =>
  panels.flatMap(({ title, targets }) => targets.map(({ expr }) => ({ where: `${file}: ${title}`, expr }))),
);

interface Parsed {
  readonly errors: readonly string[];
  readonly series: readonly string[];
  readonly labels: readonly string[];
}

/** Reads an expression with the grammar of Prometheus' own editor; Grafana's variables are filled in first. */
function read(expr: string): Parsed {
  const text = expr.replaceAll('$__rate_interval', '5m');
  const found = { errors: [] as string[], series: [] as string[], labels: [] as string[] };
  parser.parse(text).iterate({
    enter: (node) => {
      const content = text.slice(node.from, node.to);
      if (node.type.isError) {
        found.errors.push(`at ${node.from}: ${text.slice(node.from, node.from + 20)}`);
      } else if (node.name === 'Identifier' && node.node.parent?.name === 'VectorSelector') {
        found.series.push(content);
      } else if (node.name === 'LabelName') {
        found.labels.push(content);
      }
    },
  });
  return found;
}

describe('the reader of expressions', () => {
  it('finds series, labels and errors', () => {
    expect(read('sum by (model) (rate(a_total{code=~"x|y"}[5m])) / on (pod) b')).toEqual({
      errors: [],
      series: ['a_total', 'b'],
      labels: ['model', 'code', 'pod'],
    });
    expect(read('sum by (model (a)').errors).not.toEqual([]);
  });

  it('knows the metrics of the code', () => {
    expect([...series]).toEqual(
      expect.arrayContaining([
        'gateway_requests_total',
        'gateway_time_to_first_token_seconds_bucket',
        'queue_depth_requests',
        'engine_steps_total',
      ]),
    );
    expect(series.has('gateway_time_to_first_token_seconds')).toBe(false);
  });
});

describe.each([...alertQueries, ...panelQueries] satisfies Query[])('$where', ({ expr }) => {
  it('is PromQL over metrics and labels of the code', () => {
    const parsed = read(expr);
    expect(parsed.errors).toEqual([]);
    expect(parsed.series.length).toBeGreaterThan(0);
    expect(parsed.series.filter((name) => !series.has(name))).toEqual([]);
    expect(parsed.labels.filter((name) => !labels.has(name))).toEqual([]);
  });
});

describe('alerts', () => {
  it('have a unique name, a severity, a duration, a summary and a description', () => {
    expect(new Set(alerts.map(({ alert }) => alert)).size).toBe(alerts.length);
    for (const { alert, for: patience, labels: own, annotations } of alerts) {
      expect(alert).toMatch(/^Mimo[A-Za-z]+$/);
      expect(['critical', 'warning']).toContain(own.severity);
      expect(patience).toMatch(/^\d+m$/);
      expect(Object.keys(annotations).toSorted()).toEqual(['description', 'summary']);
      // A label that the expression does not keep would print as nothing.
      const kept = read(alertQueries.find(({ where }) => where === alert)?.expr ?? '').labels;
      const named = [...JSON.stringify(annotations).matchAll(/\$labels\.(\w+)/g)].map((match) => match[1]);
      expect(named.filter((label) => !kept.includes(label ?? ''))).toEqual([]);
    }
  });
});

describe.each(dashboards)('%s', (file, { uid, panels, templating }) => {
  it('has panels with a title, a description and an id each', () => {
    expect(`${uid}.json`).toBe(file);
    expect(new Set(panels.map(({ id }) => id)).size).toBe(panels.length);
    for (const { title, description, targets } of panels) {
      expect([title, description].every((words) => words.length > 3)).toBe(true);
      expect(targets.every(({ legendFormat }) => legendFormat !== '')).toBe(true);
    }
  });

  it('uses the variables that it defines, which read metrics of the code', () => {
    const defined = new Set(templating.list.map(({ name }) => name));
    const used = [...JSON.stringify(panels).matchAll(/\$\{?([a-z]+)\b/g)].map((match) => match[1] ?? '');
    expect(used.filter((name) => !defined.has(name))).toEqual([]);
    const sources = templating.list.flatMap(({ definition }) => definition ?? []);
    for (const source of sources) {
      const [, name, label] = /^label_values\((\w+), (\w+)\)$/.exec(source) ?? [];
      expect([series.has(name ?? ''), labels.has(label ?? '')]).toEqual([true, true]);
    }
  });
});

it('every metric of the code is on a dashboard', () => {
  const shown = new Set(panelQueries.flatMap(({ expr }) => read(expr).series));
  const unseen = [...metrics.keys()].filter((name) => !shown.has(name) && !shown.has(`${name}_bucket`));
  expect(unseen).toEqual([]);
});
