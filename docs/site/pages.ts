// The pages of the site: every Markdown file of the repository, grouped as docs/README.md groups them. Knows no
// generator.

import { existsSync, globSync, readFileSync, statSync } from 'node:fs';
import { dirname, join } from 'node:path';

export const root = join(import.meta.dirname, '../..');

/** Directories that hold no page. */
export const excluded = ['**/node_modules/**', '**/fixtures/**', 'docs/site/**'];

const sections: readonly (readonly [title: string, pattern: string])[] = [
  ['Getting started', 'docs/getting-started/*.md'],
  ['How to', 'docs/how-to/*.md'],
  ['Reference', 'docs/reference/*.md'],
  ['Explanation', 'docs/explanation/*.md'],
  ['Decisions', 'docs/explanation/decisions/*.md'],
  ['Lab', 'docs/lab/*.md'],
  ['Packages', '{charts,deploy,models,*}/**/README.md'],
  ['Project', '*.md'],
];

export interface SidebarGroup {
  readonly text: string;
  readonly collapsed: boolean;
  readonly items: readonly { readonly text: string; readonly link: string }[];
}

/** The navigation: one group for each section, one entry for each page, by its title. */
export function sidebar(): readonly SidebarGroup[] {
  const seen = new Set(['README.md']);
  return sections.map(([text, pattern]) => {
    const files = globSync(pattern, { cwd: root, exclude: excluded }).toSorted();
    const own = files.filter((file) => !seen.has(file));
    own.forEach((file) => seen.add(file));
    return {
      text,
      collapsed: own.length > 12,
      items: own.map((file) => ({ text: titleOf(file), link: `/${pageOf(file)}` })),
    };
  });
}

/** A folder's README is its index page, as readers of the repository expect. */
export function pageOf(file: string): string {
  return file.replace(/(^|\/)README\.md$/, '$1index.md');
}

function titleOf(file: string): string {
  return /^# (.+)$/m.exec(readFileSync(join(root, file), 'utf8'))?.[1]?.replaceAll('`', '') ?? file;
}

/** Where a relative link of `page` leads on the site. A folder is its README; every other file keeps its path. */
export function linkInSite(page: string, path: string): string {
  const isFolder =
    statSync(join(root, dirname(page), path), { throwIfNoEntry: false })?.isDirectory() === true;
  return pageOf(isFolder ? join(path, 'README.md') : path);
}

/** Files that pages link to and that are not pages: the site brings a copy of each. */
export function copiesOf(pages: readonly string[]): readonly string[] {
  const linked = pages.flatMap((page) =>
    [...readFileSync(join(root, page), 'utf8').matchAll(/\]\(([^)\s#]+)/g)].map((match) =>
      join(dirname(page), match[1] ?? ''),
    ),
  );
  return [...new Set(linked)].filter(
    (file) => !file.endsWith('.md') && existsSync(join(root, file)) && statSync(join(root, file)).isFile(),
  );
}

export function allPages(): readonly string[] {
  return globSync('**/*.md', { cwd: root, exclude: excluded });
}
