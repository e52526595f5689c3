// The chart is consistent before rendering: every value has a reason, a place in the schema and a row in the README;
// versions agree. tests/kubernetes/chart.test.ts renders and installs it.

import { existsSync, readFileSync, realpathSync } from 'node:fs';
import { join } from 'node:path';

import { describe, expect, it } from 'vitest';
import { parse } from 'yaml';

import { natsServerVersion } from '../../cli/src/local/nats-server.ts';
import { readValues, tableInReadme, valuesTable } from './chart-values.ts';

const root = join(import.meta.dirname, '../..');
const chart = join(root, 'charts/mimo-cluster');
const values = readValues();

interface Schema {
  readonly $ref?: string;
  readonly type?: string | readonly string[];
  readonly properties?: Readonly<Record<string, Schema>>;
  readonly additionalProperties?: boolean | Schema;
  readonly $defs?: Readonly<Record<string, Schema>>;
}

interface ChartFile {
  readonly version: string;
  readonly appVersion: string;
  readonly dependencies?: readonly { readonly version: string }[];
}

function readYaml(path: string): unknown {
  return parse(readFileSync(join(chart, path), 'utf8'));
}

function readSchema(path: string): Schema {
  return readYaml(path) as Schema;
}

/** The schema of a value, or undefined if it has none. */
function schemaOf(file: string, path: string): Schema | undefined {
  const whole = readSchema(file);
  const resolve = (schema: Schema | undefined): Schema | undefined =>
    schema?.$ref === undefined ? schema : resolve(whole.$defs?.[schema.$ref.replace('#/$defs/', '')]);
  return path
    .split('.')
    .reduce<Schema | undefined>((schema, key) => resolve(schema?.properties?.[key]), whole);
}

/** Maps that the schema leaves open, by their path; `path` is where the walk is. */
function openMaps(schema: Schema, path: string): string[] {
  const own =
    schema.properties !== undefined && (schema.additionalProperties ?? true) === true
      ? [path || 'the top']
      : [];
  return [
    ...own,
    ...Object.entries(schema.properties ?? {}).flatMap(([key, inner]) => openMaps(inner, `${path}.${key}`)),
    ...Object.entries(schema.$defs ?? {}).flatMap(([key, inner]) => openMaps(inner, `$defs.${key}`)),
  ];
}

describe('values.yaml', () => {
  it('has values', () => {
    expect(values.length).toBeGreaterThan(80);
  });

  it.each(values)('states the reason for $path', ({ reason }) => {
    expect(reason.length).toBeGreaterThan(5);
  });

  it.each(values)('has a schema for $path', ({ path }) => {
    const isNats = path.startsWith('nats.') && schemaOf('values.schema.json', path) === undefined;
    const schema = isNats
      ? schemaOf('charts/nats/values.schema.json', path.slice('nats.'.length))
      : schemaOf('values.schema.json', path);
    expect(schema).toBeDefined();
  });
});

describe('the schema', () => {
  it('rejects unknown keys everywhere but in the section that the subchart checks', () => {
    expect(openMaps(readSchema('values.schema.json'), '')).toEqual(['.nats']);
    expect(openMaps(readSchema('charts/nats/values.schema.json'), '')).toEqual([]);
  });
});

describe('the README', () => {
  it('has the values of values.yaml: node tests/structure/chart-values.ts writes them', () => {
    expect(tableInReadme()).toBe(valuesTable(values));
  });

  it('names only files that exist', () => {
    const text = readFileSync(join(chart, 'README.md'), 'utf8');
    const links = [...text.matchAll(/\]\(([\w./-]+)\)/g)].map((match) => match[1] ?? '');
    expect(links.filter((link) => !existsSync(join(chart, link)))).toEqual([]);
    expect(links.length).toBeGreaterThan(0);
  });
});

describe('versions', () => {
  const own = readYaml('Chart.yaml') as ChartFile;
  const nats = readYaml('charts/nats/Chart.yaml') as ChartFile;

  it('are those of the packages and of the NATS server that the tests run', () => {
    const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { version: string };
    expect([own.version, own.appVersion]).toEqual([version, version]);
    expect(own.dependencies?.map((dependency) => dependency.version)).toEqual([nats.version]);
    expect(nats.appVersion).toBe(natsServerVersion);
    expect(readYaml('values.yaml')).toMatchObject({
      nats: { image: { tag: `${natsServerVersion}-alpine` } },
    });
  });
});

it("the subchart's own defaults are the parent's", () => {
  const { nats } = readYaml('values.yaml') as { readonly nats: Readonly<Record<string, unknown>> };
  const { enabled, externalUrls, credentialsSecret, ...shared } = nats;
  expect([enabled, externalUrls, credentialsSecret]).toEqual([true, [], '']);
  expect(readYaml('charts/nats/values.yaml')).toMatchObject(shared);
});

it.each(['alerts', 'dashboards'])("deploy/%s are the chart's", (name) => {
  expect(realpathSync(join(root, 'deploy', name))).toBe(realpathSync(join(chart, name)));
});
