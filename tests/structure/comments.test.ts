// Names in comments exist: a file by its path, or by its name within its own package; a field or function in some
// code. Otherwise a move or a rename would leave misleading comments behind.

import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { basename, join, posix } from 'node:path';

import { describe, expect, it } from 'vitest';

const root = join(import.meta.dirname, '../..');
const files = execFileSync('git', ['ls-files', '--cached', '--others', '--exclude-standard'], {
  cwd: root,
  encoding: 'utf8',
})
  .split('\n')
  .filter((file) => file !== '' && existsSync(join(root, file)));
const known = new Set(files);
const byName = Map.groupBy(files, (file) => basename(file));

const extensions = 'ts|mjs|js|json|ya?ml|md|proto|tpl|py|sh|conf|cu|toml';
const hasComments =
  /\.(?:ts|mjs|js|ya?ml|proto|tpl|py|sh|conf|cu|toml)$|(?:^|\/)(?:Dockerfile|\.dockerignore|NOTES\.txt)$/;
const fileName = new RegExp(`(?<![\\w/.@*-])[\\w./@-]*[\\w-]\\.(?:${extensions})\\b(?![\\w-])`, 'g');
/** Names of code: two words or more run together, in backticks. */
const codeName = /`#?([a-z]+[A-Z]\w*)(?:\(\))?`/g;

/** One stands in each package, and a comment may mean all of them. */
const inEachPackage = new Set(['main.ts', 'config.ts']);
/** Of the ONNX project, which no dependency brings. */
const foreign = new Set(['onnx.proto']);

interface Comment {
  readonly file: string;
  readonly line: number;
  readonly text: string;
}

const comments: Comment[] = [];
let code = '';
for (const file of files) {
  // What a generator copies from the protos of others, and inputs that are meant to be broken.
  if (!hasComments.test(file) || file.includes('/gen/') || file.startsWith('tests/hostile/corpus/')) {
    continue;
  }
  for (const [index, line] of readFileSync(join(root, file), 'utf8').split('\n').entries()) {
    const whole = /^\s*(?:\/\/|\/\*|\*|#|\{\{-?\s*\/\*)/.test(line);
    const at = whole ? 0 : line.search(/\s(?:\/\/|#)\s/);
    code += at < 0 ? `${line}\n` : `${line.slice(0, at)}\n`;
    if (at >= 0) {
      comments.push({ file, line: index + 1, text: line.slice(at) });
    }
  }
}

/**
 * As a path from the root, from the file or in a dependency; or by the end of its path: in the file's own package, else
 * where only one file has it and it is not just a name. Data that is written while something runs: where code names it.
 */
function exists(name: string, file: string): boolean {
  if (inEachPackage.has(name) || foreign.has(name) || existsSync(join(root, 'node_modules', name))) {
    return true;
  }
  if (name.endsWith('.json') && code.includes(basename(name))) {
    return true;
  }
  const own = file.split('/')[0];
  const found = (byName.get(basename(name)) ?? []).filter((each) => each.endsWith(`/${name}`));
  const isPackage = known.has(`${own}/package.json`);
  return (
    known.has(posix.normalize(name)) ||
    known.has(posix.join(posix.dirname(file), name)) ||
    found.some((each) => each.startsWith(`${own}/`)) ||
    (found.length === 1 && (!isPackage || own === 'tests' || name.includes('/')))
  );
}

function placesOf(pattern: RegExp, isWrong: (name: string, file: string) => boolean): string[] {
  return comments.flatMap(({ file, line, text }) =>
    [...text.matchAll(pattern)]
      .map((match) => match[1] ?? match[0])
      .filter((name) => isWrong(name, file))
      .map((name) => `${file}:${line}: ${name}`),
  );
}

describe('comments', () => {
  it('are found in all kinds of files', () => {
    const kinds = new Set(comments.map(({ file }) => file.split('.').at(-1)));
    expect([...kinds]).toEqual(expect.arrayContaining(['ts', 'mjs', 'yaml', 'tpl', 'proto', 'py']));
    expect(comments.length).toBeGreaterThan(3_000);
  });

  it('name files that exist: in their package by name, elsewhere by path', () => {
    expect(placesOf(fileName, (name, file) => !exists(name, file))).toEqual([]);
  });

  it('name fields and functions that exist', () => {
    const words = new Set(code.match(/\w+/g));
    expect(placesOf(codeName, (name) => !words.has(name))).toEqual([]);
  });

  it('have lines of at most 120 characters, tables apart', () => {
    const long = comments.filter(
      ({ file, text }) => /\.(?:ts|mjs|cu)$/.test(file) && text.length > 120 && !/\s{3}/.test(text),
    );
    expect(long.map(({ file, line }) => `${file}:${line}`)).toEqual([]);
  });

  it('are searched for file names, by package', () => {
    expect(exists('comments.test.ts', 'tests/structure/comments.test.ts')).toBe(true);
    expect(exists('no-such-file.ts', 'tests/structure/comments.test.ts')).toBe(false);
    // Of another package: only with its path.
    expect(exists('errors.ts', 'gateway/src/main.ts')).toBe(false);
    expect('// See a.ts, src/b.test.ts and ./c.mjs; not d.tsx, *.ts'.match(fileName)).toEqual([
      'a.ts',
      'src/b.test.ts',
      './c.mjs',
    ]);
  });
});
