// Code blocks of the documentation work: manifests are valid by the CRDs, values by the chart, and commands and their
// options exist. Languages that this test cannot check are not allowed.

import { existsSync, globSync, readFileSync } from 'node:fs';
import { join } from 'node:path';

import { describe, expect, it } from 'vitest';
import { parseAllDocuments } from 'yaml';

import { parseModelService } from '../../controller/src/resources/resources.ts';
import { parseTenant } from '../../controller/src/resources/tenant.ts';
import { allPages } from '../../docs/site/pages.ts';
import { readValues } from './chart-values.ts';

const root = join(import.meta.dirname, '../..');
const read = (file: string): string => readFileSync(join(root, file), 'utf8');

/** `text` and blocks without a language are pictures and output. */
const languages = new Set(['', 'text', 'sh', 'yaml']);

interface Block {
  readonly page: string;
  readonly language: string;
  readonly text: string;
}

function blocksOf(page: string): readonly Block[] {
  return [...read(page).matchAll(/^( *)```(\w*)\n([\s\S]*?)^\1```$/gm)].map(
    ([, indent = '', language = '', text = '']) => ({
      page,
      language,
      text: text.replaceAll(new RegExp(`^${indent}`, 'gm'), ''),
    }),
  );
}

const pages = allPages();
const blocks = pages.flatMap(blocksOf);

/** A shell command's words. Quotes are taken off; what follows a pipe or `&&` is another command. */
function commandsIn(script: string): readonly (readonly string[])[] {
  return script
    .replaceAll(/<<(\w+)\n[\s\S]*?^\1$/gm, '')
    .replaceAll(/\\\n/g, ' ')
    .split(/\n|&&|;|\|(?=(?:[^']*'[^']*')*[^']*$)/)
    .map((line) =>
      line
        .replace(/(?:^|\s)#.*$/, '')
        .replace(/ &$/, '')
        .trim(),
    )
    .filter((line) => line !== '')
    .map((line) =>
      [...line.matchAll(/(?:[^\s'"]|'[^']*'|"[^"]*")+/g)].map(([word]) => word.replaceAll(/['"]/g, '')),
    );
}

const inlineCommands = pages
  // The log tells of commands as they were.
  .filter((page) => !page.startsWith('docs/lab/') && page !== 'CHANGELOG.md')
  .flatMap((page) =>
    [
      ...read(page)
        .replaceAll(/^```[\s\S]*?^```$/gm, '')
        .matchAll(/`((?:npm|npx|mimo|node|helm|kubectl) [^`]+)`/g),
    ].map(([, text = '']) => ({ page, text: text.replaceAll('\n', ' ') })),
  );
const commands = [...blocks.filter(({ language }) => language === 'sh'), ...inlineCommands].flatMap(
  ({ page, text }) => commandsIn(text).map((words) => ({ page, words, line: words.join(' ') })),
);

const { scripts } = JSON.parse(read('package.json')) as { scripts: Record<string, string> };
const layers = new Set([...read('vitest.config.ts').matchAll(/name: '(\w+)'/g)].map((match) => match[1]));

/** The help of each command of `mimo`, as docs/reference/cli.md has it. */
const helps = new Map(
  [...read('docs/reference/cli.md').matchAll(/^## mimo ?(\S*)\n\n```text\n([\s\S]*?)^```/gm)].map(
    ([, name = '', help = '']) => [name, help],
  ),
);

function optionsNotIn(help: string, words: readonly string[]): readonly string[] {
  return words
    .filter((word) => word.startsWith('--') && word !== '--' && word !== '--help')
    .map((word) => word.split('=')[0] ?? '')
    .filter((option) => !new RegExp(String.raw`(?<![\w-])${option}(?![\w-])`).test(help));
}

function problemsOfMimo([name = '', ...words]: readonly string[]): readonly string[] {
  const help = /^(?:COMMAND|--help)$/.test(name) ? '' : helps.get(name);
  return help === undefined ? [`mimo has no command ${name}`] : optionsNotIn(help, words);
}

/** What each program is asked of our repository: nothing, where it is as it should be. */
const judges: Readonly<Record<string, (words: readonly string[]) => readonly string[]>> = {
  mimo: problemsOfMimo,
  npm: ([verb = '', ...words]) => {
    const name = verb === 'run' ? (words.shift() ?? '') : verb;
    const rest = words.slice(words.indexOf('--') + 1);
    if (verb !== 'run' && verb !== 'test') {
      return [];
    }
    if (scripts[name] === undefined) {
      return [`package.json has no script ${name}`];
    }
    const isGiven = words.includes('--') && rest.length > 0;
    switch (name) {
      case 'up':
      case 'chat': {
        return problemsOfMimo([name, ...rest]);
      }
      case 'mimo': {
        return isGiven ? problemsOfMimo(rest) : [];
      }
      case 'bench': {
        const [bench = ''] = rest;
        return !isGiven || /^[A-Z]+$/.test(bench) || existsSync(join(root, `tests/bench/${bench}.ts`))
          ? []
          : [`tests/bench/${bench}.ts does not exist`];
      }
      case 'test': {
        return !isGiven || layers.has(rest[0] ?? '') || rest[0] === 'check' ? [] : [`no layer ${rest[0]}`];
      }
      case 'e2e:kubernetes': {
        return optionsNotIn(read('tests/e2e/main.ts').replaceAll(/'?([\w-]+)'?: \{ type/g, '--$1 '), rest);
      }
      default: {
        return [];
      }
    }
  },
  npx: (words) => {
    const project = words[words.indexOf('--project') + 1];
    return words[0] !== 'vitest' || !words.includes('--project') || layers.has(project)
      ? []
      : [`no layer ${project}`];
  },
  helm: (words) => {
    const paths = words.flatMap((word, index) =>
      words[index - 1] === '--set' || word.startsWith('--set=')
        ? word
            .replace('--set=', '')
            .split(',')
            .map((value) => value.split('=')[0] ?? '')
        : [],
    );
    return paths.filter((path) => !isValue(path)).map((path) => `the chart has no value ${path}`);
  },
};

const values = readValues();

function isValue(path: string): boolean {
  return values.some(
    (value) => value.path === path || path.startsWith(`${value.path}.`) || path.startsWith(`${value.path}[`),
  );
}

/** Files of ours that a command names, which must exist. */
function missingFiles(words: readonly string[]): readonly string[] {
  return words
    .map((word) => word.replaceAll(/\$\w+/g, '*'))
    .filter((word) =>
      /^(?:docs|charts|deploy|tests|models|proto|core|cli|gateway|worker|controller|tokenizer)\//.test(word),
    )
    .filter((word) => globSync(word, { cwd: root }).length === 0);
}

interface Schema {
  readonly properties?: Readonly<Record<string, Schema>>;
  readonly additionalProperties?: unknown;
  readonly items?: Schema;
}

/** Fields that the API server would drop without a word. */
function unknownFields(schema: Schema | undefined, value: unknown, path: string): readonly string[] {
  if (Array.isArray(value)) {
    return value.flatMap((entry, index) => unknownFields(schema?.items, entry, `${path}[${index}]`));
  }
  if (typeof value !== 'object' || value === null || schema?.properties === undefined) {
    return [];
  }
  return Object.entries(value).flatMap(([key, inner]) =>
    schema.properties?.[key] === undefined
      ? [`${path}.${key}`]
      : unknownFields(schema.properties[key], inner, `${path}.${key}`),
  );
}

const kinds = { ModelService: parseModelService, Tenant: parseTenant } as const;

function problemsOfManifest(manifest: Record<string, unknown>): readonly string[] {
  const kind = manifest['kind'] as string | undefined;
  if (kind === undefined) {
    // Values of the chart.
    const pathsOf = (value: unknown, path: string): readonly string[] =>
      isValue(path) || typeof value !== 'object' || value === null
        ? [path]
        : Object.entries(value).flatMap(([key, inner]) =>
            pathsOf(inner, path === '' ? key : `${path}.${key}`),
          );
    return pathsOf(manifest, '').filter((path) => !isValue(path));
  }
  if (!(kind in kinds)) {
    return manifest['apiVersion'] === undefined ? [`${kind} has no apiVersion`] : [];
  }
  // As the API server completes it.
  const metadata = { namespace: 'default', uid: '1', ...(manifest['metadata'] as object) };
  kinds[kind as keyof typeof kinds]({ ...manifest, metadata });
  const [crd] = parseAllDocuments(read(`charts/mimo-cluster/crds/${kind.toLowerCase()}s.yaml`));
  const schema = crd?.getIn(['spec', 'versions', 0, 'schema', 'openAPIV3Schema', 'properties', 'spec']) as
    | { toJSON: () => Schema }
    | undefined;
  return unknownFields(schema?.toJSON(), manifest['spec'], 'spec');
}

const manifests = [
  ...blocks.filter(({ language }) => language === 'yaml'),
  // What a shell command reads from its own lines.
  ...blocks.flatMap(({ page, text }) =>
    [...text.matchAll(/ -f - <<(\w+)\n([\s\S]*?)^\1$/gm)].map(([, , manifest = '']) => ({
      page,
      text: manifest,
    })),
  ),
  ...globSync('docs/**/*.yaml', { cwd: root, exclude: ['**/node_modules/**'] }).map((page) => ({
    page,
    text: read(page),
  })),
];

describe('code blocks', () => {
  it('use only languages that are checked here', () => {
    expect(blocks.filter(({ language }) => !languages.has(language))).toEqual([]);
  });

  it.each(manifests)('hold valid manifests and values: $page', ({ text }) => {
    const documents = parseAllDocuments(text);
    expect(documents.flatMap((document) => document.errors)).toEqual([]);
    expect(
      documents.flatMap((document) => problemsOfManifest(document.toJSON() as Record<string, unknown>)),
    ).toEqual([]);
  });

  it.each(commands)('name commands, options and files that exist: $page: $line', ({ words }) => {
    const [program = '', ...rest] = words;
    expect(judges[program]?.([...rest]) ?? []).toEqual([]);
    expect(missingFiles(words)).toEqual([]);
  });

  it('are many enough to be worth this test', () => {
    expect(manifests.length).toBeGreaterThan(4);
    expect(commands.length).toBeGreaterThan(40);
  });
});
