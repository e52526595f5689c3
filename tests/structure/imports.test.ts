// The direction of imports between packages, which neither the type checker nor npm workspaces enforce.

import { globSync, readFileSync } from 'node:fs';
import { dirname, join, relative, sep } from 'node:path';

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
  cli: ['core', 'gateway', 'proto', 'tokenizer', 'worker'],
  tests: ['cli', 'controller', 'core', 'docs', 'gateway', 'proto', 'tokenizer', 'worker'],
};

/**
 * What each folder of a package may import of the same package. What belongs into a folder is in the package's README.
 * Files beside the folders compose them, and may import all of them.
 */
const folders: Readonly<Record<string, readonly string[]>> = {
  'core/src/process': [],
  'core/src/grpc': ['core/src/process'],
  'core/src/bus': ['core/src/process'],
  'core/src/bus/nats': ['core/src/bus', 'core/src/process'],
  'core/src/bus/memory': ['core/src/bus', 'core/src/process'],
  'gateway/src/admission': [],
  'gateway/src/prompts': ['gateway/src', 'gateway/src/admission'],
  'gateway/src/dispatcher': ['gateway/src'],
  'gateway/src/doors': [
    'gateway/src',
    'gateway/src/admission',
    'gateway/src/dispatcher',
    'gateway/src/prompts',
  ],
  'worker/src/shards': [],
  'worker/src/runtime': ['worker/src/shards'],
  'worker/src/collective': [],
  'worker/src/compiler': ['worker/src/shards'],
  'worker/src/engines/mimo': ['worker/src/collective', 'worker/src/runtime', 'worker/src/shards'],
  'controller/src/resources': [],
  'controller/src/decide': ['controller/src/resources'],
  'controller/src/kube': ['controller/src/resources'],
  'controller/src/observe': ['controller/src/decide', 'controller/src/kube', 'controller/src/resources'],
  'controller/src/act': [
    'controller/src/decide',
    'controller/src/kube',
    'controller/src/observe',
    'controller/src/resources',
  ],
  'cli/src/local': [],
};

/** Below these folders only the packages named may be imported: the engine knows no text, queue, HTTP or Kubernetes. */
const engineFolders = ['shards', 'runtime', 'collective', 'compiler', 'engines'].map((name) =>
  join('worker', 'src', name),
);
/** Gets a checkpoint over HTTP and logs its progress: the compiler's input, and no part of the engine. */
const hub = 'worker/src/compiler/hub.ts';
const engineImports =
  /^(node:|koffi$|onnxruntime-node$|@bufbuild\/protobuf\/wire$|@mimo\/core\/process\/(?:errors|file-lock)$|@mimo\/proto\/limits$|\.)/;

/** Files that decide and never act: they import nothing that waits, reads a clock or draws a number. */
const pureFiles = [
  ...sources('controller/src/decide/*.ts').filter((file) => !file.endsWith('.test.ts')),
  'gateway/src/admission/check.ts',
  'gateway/src/admission/permit.ts',
  'gateway/src/admission/prompt-input.ts',
  'gateway/src/admission/record.ts',
  'gateway/src/client-window.ts',
  'gateway/src/dispatcher/arrivals.ts',
  'gateway/src/dispatcher/backlog.ts',
  'gateway/src/dispatcher/dispatch-state.ts',
  'gateway/src/dispatcher/placement.ts',
  'gateway/src/dispatcher/suspicion.ts',
  'gateway/src/version-choice.ts',
  'core/src/bus/nats/room.ts',
  'core/src/bus/queue-refusal.ts',
  'proto/src/limits.ts',
  'worker/src/engines/mimo/kv-cache.ts',
  'worker/src/engines/mimo/scheduler.ts',
  'worker/src/engines/mimo/sampler.ts',
  'worker/src/engines/mimo/step-passes.ts',
  'worker/src/shards/shard-plan.ts',
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

/**
 * Files that import one another in a circle, each circle sorted; Tarjan's strongly connected components. Type-only
 * imports count: a reader who follows them goes in circles too.
 */
function circles(graph: ReadonlyMap<string, readonly string[]>): string[][] {
  const found: string[][] = [];
  const order = new Map<string, number>();
  const stack: string[] = [];
  /** The earliest visited file on the stack that this one reaches. */
  const visit = (file: string): number => {
    const index = order.size;
    order.set(file, index);
    const depth = stack.push(file) - 1;
    const reached = (graph.get(file) ?? []).map((target) => {
      const seen = order.get(target);
      return seen === undefined ? visit(target) : stack.includes(target) ? seen : index;
    });
    const earliest = Math.min(index, ...reached);
    if (earliest === index) {
      const component = stack.splice(depth);
      if (component.length > 1 || (graph.get(file) ?? []).includes(file)) {
        found.push(component.toSorted());
      }
    }
    return earliest;
  };
  for (const file of graph.keys()) {
    if (!order.has(file)) {
      visit(file);
    }
  }
  return found;
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

  it.each(Object.entries(folders))("of %s stay within their package's arrows", (folder, mayImport) => {
    const stray = sources(`${folder}/*.ts`)
      .filter((file) => !file.endsWith('.test.ts'))
      .flatMap(importsOf)
      .filter(({ file, specifier }) => {
        const target = specifier.startsWith('.') ? dirname(join(file, '..', specifier)) : folder;
        return (
          target !== folder && target.split(sep)[0] === folder.split('/')[0] && !mayImport.includes(target)
        );
      });
    expect(stray).toEqual([]);
  });

  it("has every folder of a package in the table, and in the package's README", () => {
    const found = sources('{core,gateway,worker,controller,cli}/src/**/*.ts').map((file) => dirname(file));
    const rooms = [...new Set(found)].filter((folder) => !folder.endsWith('src')).toSorted();
    expect(rooms).toEqual(Object.keys(folders).toSorted());
    const unnamed = rooms.filter((folder) => {
      const [name = '', ...rest] = folder.split('/');
      return !readFileSync(join(root, name, 'README.md'), 'utf8').includes(`- \`${rest.join('/')}/\`: `);
    });
    expect(unnamed).toEqual([]);
  });

  it('of the engine know no text, queue, HTTP, gRPC or Kubernetes', () => {
    const stray = engineFolders
      .flatMap((folder) => sources(`${folder}/**/*.ts`))
      .filter((file) => !file.endsWith('.test.ts') && file !== hub)
      .flatMap(importsOf)
      .filter(({ file, specifier }) => {
        const leaves =
          specifier.startsWith('.') &&
          !engineFolders.some((folder) => join(file, '..', specifier).startsWith(folder + sep));
        return leaves || !engineImports.test(specifier);
      });
    expect(stray).toEqual([]);
  });

  it.each(Object.keys(allowed))('of %s form no circle', (name) => {
    const files = sources(`${name}/**/*.ts`);
    const graph = new Map(
      files.map((file) => {
        const targets = importsOf(file).filter(({ specifier }) => specifier.startsWith('.'));
        return [file, targets.map(({ specifier }) => join(file, '..', specifier))] as const;
      }),
    );
    expect(graph.size).toBeGreaterThan(1);
    expect(circles(graph)).toEqual([]);
  });

  it('finds circles of any length, and none in a diamond', () => {
    const diamond = { a: ['b', 'c'], b: ['d'], c: ['d'], d: [] };
    expect(circles(new Map(Object.entries(diamond)))).toEqual([]);
    const rings = { a: ['b'], b: ['c'], c: ['e'], e: ['b', 'd'], d: ['d'] };
    expect(circles(new Map(Object.entries(rings)))).toEqual([['d'], ['b', 'c', 'e']]);
  });

  it.each(pureFiles)('%s decides only: no clock, no chance, nothing that waits', (file) => {
    const text = readFileSync(join(root, file), 'utf8');
    expect(text).not.toMatch(
      /Date\.now|performance\.now|Math\.random|setTimeout|setInterval|\bawait\b|random(?:UUID|Bytes|Int)|node:(?!crypto)/,
    );
  });

  it('finds the sources that it judges', () => {
    expect(sources('gateway/**/*.ts').length).toBeGreaterThan(5);
    expect(sources('worker/**/*.ts').flatMap(importsOf).length).toBeGreaterThan(20);
  });
});
