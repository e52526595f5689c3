// Each package's README names every source file of the package and no missing file, and answers the same five
// questions; generated code is up to date.

import { execFileSync } from 'node:child_process';
import { existsSync, globSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';

import { describe, expect, it } from 'vitest';

const root = join(import.meta.dirname, '../..');
const packages = ['core', 'tokenizer', 'gateway', 'worker', 'controller', 'cli'];
const headings = ['Owns', 'Does not own', 'Flow by file', 'When it fails', 'How to test'];

describe.each(packages)('the README of %s', (name) => {
  const text = readFileSync(join(root, name, 'README.md'), 'utf8');
  const files = globSync('src/**/*.ts', { cwd: join(root, name) }).filter(
    (file) => !file.endsWith('.test.ts') && !file.includes('/gen/'),
  );

  it('has the five headings', () => {
    const found = [...text.matchAll(/^## (.+)$/gm)].map((match) => match[1]);
    expect(found).toEqual(headings);
  });

  it('names every file', () => {
    const missing = files.filter((file) => !text.includes(basename(file, '.ts')));
    expect(missing).toEqual([]);
  });

  it('names only files that exist', () => {
    const named = [...text.matchAll(/`((?:[\w-]+\/)*[\w-]+\.ts)`/g)].map((match) => match[1] ?? '');
    const absent = named.filter(
      (file) => !existsSync(join(root, name, file)) && !files.some((path) => path.endsWith(`/${file}`)),
    );
    expect(absent).toEqual([]);
  });
});

/** Every file below a directory, by path. */
function contentsOf(directory: string): Record<string, string> {
  const files = globSync('**/*.*', { cwd: directory }).toSorted();
  return Object.fromEntries(files.map((file) => [file, readFileSync(join(directory, file), 'latin1')]));
}

describe('generated code', () => {
  it('is up to date with the protos', () => {
    // Elsewhere: the generator begins with an empty directory, and other tests read the one here meanwhile.
    const directory = mkdtempSync(join(tmpdir(), 'mimo-generated-'));
    try {
      execFileSync(process.execPath, [join(root, 'proto/generate.ts'), directory], { stdio: 'pipe' });
      expect(contentsOf(join(root, 'proto/src/gen'))).toEqual(contentsOf(join(directory, 'proto/src/gen')));
    } finally {
      rmSync(directory, { recursive: true });
    }
  });

  it('of docs/reference is up to date with its sources', () => {
    const directory = mkdtempSync(join(tmpdir(), 'mimo-reference-'));
    try {
      execFileSync(process.execPath, [join(root, 'docs/generate.ts'), directory], { stdio: 'pipe' });
      expect(contentsOf(join(root, 'docs/reference'))).toEqual(contentsOf(directory));
    } finally {
      rmSync(directory, { recursive: true });
    }
  });
});

describe('the glossary', () => {
  it('forbids vague names, and no export has one', () => {
    const forbidden = /\b\w*(?:Manager|Helper|Util)\b(?!s?['"`])/;
    const guilty = globSync('{core,tokenizer,gateway,worker,controller,cli}/src/**/*.ts', {
      cwd: root,
    }).filter((file) =>
      readFileSync(join(root, file), 'utf8')
        .split('\n')
        .some(
          (line) => /^\s*export (?:class|interface|type|function|const) /.test(line) && forbidden.test(line),
        ),
    );
    expect(guilty).toEqual([]);
  });
});
