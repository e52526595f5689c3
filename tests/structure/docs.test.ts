// References in the documentation exist: links and their anchors, an entry for each alert and each decision. Lines of
// prose are at most 120 characters long.

import { existsSync, globSync, readFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';

import { describe, expect, it } from 'vitest';

import { allPages } from '../../docs/site/pages.ts';

const root = join(import.meta.dirname, '../..');
const maxProse = 120;

const read = (file: string): string => readFileSync(join(root, file), 'utf8');

const withoutCode = (text: string): string => text.replaceAll(/^```[\s\S]*?^```$/gm, '');

/** The anchors that GitHub and the site give to a page's headings. */
function anchorsOf(page: string): readonly string[] {
  return [...withoutCode(read(page)).matchAll(/^#+ (.+)$/gm)].map((match) =>
    (match[1] ?? '')
      .toLowerCase()
      .replaceAll(/[^\p{L}\p{N} _-]/gu, '')
      .replaceAll(' ', '-'),
  );
}

function isBroken(page: string, link: string): boolean {
  const [path = '', anchor] = link.split('#');
  const target = path === '' ? page : join(dirname(page), path);
  return (
    !existsSync(join(root, target)) ||
    (anchor !== undefined && target.endsWith('.md') && !anchorsOf(target).includes(anchor))
  );
}

describe.each(allPages())('%s', (page) => {
  it('links to files and headings that exist', () => {
    const links = [...withoutCode(read(page)).matchAll(/\]\(([^)\s]+)\)/g)].map((match) => match[1] ?? '');
    expect(links.filter((link) => !/^[a-z]+:/.test(link) && isBroken(page, link))).toEqual([]);
  });

  it('has no long lines of prose', () => {
    const text = read(page);
    const prose = text.startsWith('<!-- Written by') ? [] : withoutCode(text).split('\n');
    const isFree = /^\s*(?:\||- \[|\d+\. \[|#| {4})/;
    const long = prose.filter((line) => line.length > maxProse && !isFree.test(line));
    expect(long).toEqual([]);
  });
});

describe('the pages', () => {
  it('explain every alert', () => {
    const alerts = [...read('charts/mimo-cluster/alerts/mimo-cluster.yaml').matchAll(/- alert: (\w+)/g)];
    const explained = [...read('docs/how-to/alerts.md').matchAll(/^## (\w+)$/gm)];
    expect(explained.map((match) => match[1])).toEqual(alerts.map((match) => match[1]));
  });

  it('list every decision by its number and title', () => {
    const folder = 'docs/explanation/decisions';
    const lines = globSync('[0-9]*.md', { cwd: join(root, folder) })
      .toSorted()
      .map((file) => {
        const [, number, title] = /^# (\d+)\. (.+)$/m.exec(read(join(folder, file))) ?? [];
        return `- [${number}. ${title}](${basename(file)})`;
      });
    expect(
      read(join(folder, 'README.md'))
        .split('\n')
        .filter((line) => line.startsWith('- [')),
    ).toEqual(lines);
  });

  it('are all reached from docs/README.md or README.md', () => {
    const starts = ['README.md', 'docs/README.md', 'docs/explanation/decisions/README.md'];
    const linked = new Set(
      starts.flatMap((start) =>
        [...read(start).matchAll(/\]\(([^)\s#]+)/g)].map((match) => join(dirname(start), match[1] ?? '')),
      ),
    );
    const pages = allPages().filter((page) => page.startsWith('docs/') && basename(page) !== 'README.md');
    expect(pages.filter((page) => !linked.has(page))).toEqual([]);
  });
});
