// The direction of imports between packages, which neither the type checker nor npm workspaces enforce.

import { globSync, readFileSync } from 'node:fs';
import { join, relative, sep } from 'node:path';

import { describe, expect, it } from 'vitest';

const root = join(import.meta.dirname, '../..');

/** What each package may import of ours; the arrows of docs/explanation/architecture.md. */
const allowed: Readonly<Record<string, readonly string[]>> = {
  proto: [],
  core: ['proto'],
  tokenizer: ['core'],
  gateway: ['core', 'proto', 'tokenizer'],
  worker: ['core', 'proto'],
  controller: ['core', 'proto'],
  deploy: ['core'],
  cli: ['core', 'deploy', 'gateway', 'proto', 'tokenizer', 'worker'],
  tests: ['cli', 'controller', 'core', 'deploy', 'docs', 'gateway', 'proto', 'tokenizer', 'worker'],
};

/** Below these folders only the packages named may be imported: the engine knows no text, queue, HTTP or Kubernetes. */
const engineFolders = ['engine', 'model', 'runtime', 'collective'].map((name) => join('worker', 'src', name));
const engineImports =
  /^(node:|koffi$|onnxruntime-node$|@bufbuild\/protobuf\/wire$|@mimo\/core\/(?:errors|file-lock)$|@mimo\/proto\/limits$|\.)/;

/** Files that decide and never act: they import nothing that waits, reads a clock or draws a number. */
const pureFiles = [
  ...sources('controller/src/decide/*.ts').filter((file) => !file.endsWith('.test.ts')),
  'gateway/src/admission.ts',
  'gateway/src/dispatcher/placement.ts',
  'gateway/src/suspicion.ts',
  'gateway/src/version-choice.ts',
  'proto/src/limits.ts',
  'worker/src/engine/kv-cache.ts',
  'worker/src/engine/scheduler.ts',
  'worker/src/engine/sampler.ts',
  'worker/src/model/shard-plan.ts',
];

interface Import {
  readonly file: string;
  readonly specifier: string;
}

function sources(pattern: string): string[] {
  return globSync(pattern, { cwd: root, exclude: (name) => name === 'node_modules' || name === 'gen' });
}

function importsOf(file: string): Import[] {
  const text = readFileSync(join(root, file), 'utf8');
  const pattern =
    /(?:^|\n)\s*(?:import|export)\s[^;]*?from\s+'([^']+)'|import\(\s*'([^']+)'\s*\)|\n\s*import\s+'([^']+)'/g;
  return [...text.matchAll(pattern)].map((match) => ({
    file,
    specifier: match[1] ?? match[2] ?? match[3] ?? '',
  }));
}

/** The package of ours that an import reaches, or undefined for one from elsewhere. */
function packageOf({ file, specifier }: Import): string | undefined {
  if (specifier.startsWith('@mimo/')) {
    return specifier.split('/')[1];
  }
  if (specifier.startsWith('.')) {
    return relative(root, join(root, file, '..', specifier)).split(sep)[0];
  }
  return undefined;
}

describe('imports', () => {
  for (const [name, mayImport] of Object.entries(allowed)) {
    it(`of ${name} reach only ${mayImport.join(', ') || 'nothing of ours'}`, () => {
      const stray = sources(`${name}/**/*.ts`)
        .flatMap(importsOf)
        .filter((found) => {
          const target = packageOf(found);
          return target !== undefined && target !== name && !mayImport.includes(target);
        });
      // A package's own tests may not reach further than the package.
      expect(stray).toEqual([]);
    });
  }

  it('of the engine know no text, queue, HTTP, gRPC or Kubernetes', () => {
    const stray = engineFolders
      .flatMap((folder) => sources(`${folder}/**/*.ts`))
      .filter((file) => !file.endsWith('.test.ts'))
      .flatMap(importsOf)
      .filter(({ file, specifier }) => {
        const leaves =
          specifier.startsWith('.') &&
          !engineFolders.some((folder) => join(file, '..', specifier).startsWith(folder + sep));
        return leaves || !engineImports.test(specifier);
      });
    expect(stray).toEqual([]);
  });

  it.each(pureFiles)('%s decides only: no clock, no chance, nothing that waits', (file) => {
    const text = readFileSync(join(root, file), 'utf8');
    expect(text).not.toMatch(
      /Date\.now|performance\.now|Math\.random|setTimeout|setInterval|\bawait\b|node:/,
    );
  });

  it('finds the sources that it judges', () => {
    expect(sources('gateway/**/*.ts').length).toBeGreaterThan(5);
    expect(sources('worker/**/*.ts').flatMap(importsOf).length).toBeGreaterThan(20);
  });
});
