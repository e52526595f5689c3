// What a reader follows in the documentation exists: links, and an entry for each alert.

import { existsSync, globSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';

import { describe, expect, it } from 'vitest';

const root = join(import.meta.dirname, '../..');
const pages = globSync(['*.md', '{docs,charts,deploy,models,*}/**/*.md'], {
  cwd: root,
  exclude: (name) => name === 'node_modules',
});

const read = (file: string): string => readFileSync(join(root, file), 'utf8');

describe.each(pages)('%s', (page) => {
  it('links to files that exist', () => {
    const links = [...read(page).matchAll(/\]\(([^)\s#]+)(?:#[^)]*)?\)/g)].map((match) => match[1] ?? '');
    const broken = links
      .filter((link) => !/^[a-z]+:/.test(link))
      .filter((link) => !existsSync(join(root, dirname(page), link)));
    expect(broken).toEqual([]);
  });
});

describe('the pages', () => {
  it('explain every alert', () => {
    const alerts = [...read('charts/mimo-cluster/alerts/mimo-cluster.yaml').matchAll(/- alert: (\w+)/g)];
    const explained = [...read('docs/how-to/alerts.md').matchAll(/^## (\w+)$/gm)];
    expect(explained.map((match) => match[1])).toEqual(alerts.map((match) => match[1]));
  });
});
