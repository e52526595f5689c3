// `npm run pack [-- --out DIR]`: the mimo command as one npm package, dist/mimo-cluster-VERSION.tgz. Owns what is in
// it: JavaScript that tsc emits, because Node strips no types below node_modules; our packages, bundled under their own
// names; the demonstration model. The folders in it are those of the repository, so that a path from one file to
// another holds in both. All other packages are dependencies, which npm fetches.

import { execFileSync } from 'node:child_process';
import { cpSync, globSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { parseArgs } from 'node:util';

type Versions = Readonly<Record<string, string>>;

/** A package.json, as far as it is read here. */
interface Manifest {
  readonly name: string;
  readonly version: string;
  readonly license?: string;
  readonly description?: string;
  readonly exports?: Versions;
  readonly dependencies?: Versions;
  readonly optionalDependencies?: Versions;
}

const root = resolve(import.meta.dirname, '../..');
/** The command's own sources, at the top of the package. */
const own = 'cli/src';
/** The packages that it imports, below node_modules/@mimo. */
const bundled = ['proto', 'core', 'tokenizer', 'gateway', 'worker'];
/**
 * Its install script fetches a CUDA library that the command does not use, and fails without access to NuGet. npm
 * leaves out an optional package that fails, so a client still installs; `mimo up` then says how to install the rest.
 */
const scripted = 'onnxruntime-node';

function readManifest(folder: string): Manifest {
  return JSON.parse(readFileSync(join(root, folder, 'package.json'), 'utf8')) as Manifest;
}

function writeManifest(folder: string, manifest: object): void {
  writeFileSync(join(folder, 'package.json'), `${JSON.stringify(manifest, undefined, 2)}\n`);
}

/** Copies a source folder: what tsc made of its TypeScript, and its other files, such as kernels and descriptors. */
function copySources(folder: string, emitted: string, target: string): void {
  cpSync(join(emitted, folder), target, { recursive: true });
  const others = globSync('**/*.*', { cwd: join(root, folder) }).filter((file) => !/\.(ts|md)$/.test(file));
  for (const file of others) {
    mkdirSync(dirname(join(target, file)), { recursive: true });
    cpSync(join(root, folder, file), join(target, file));
  }
}

/** Bundles one of our packages. Its dependencies are the whole package's: npm installs none for a bundled package. */
function bundle(folder: string, emitted: string, stage: string): void {
  const { name, version, exports = {} } = readManifest(folder);
  const target = join(stage, 'node_modules', name);
  copySources(join(folder, 'src'), emitted, join(target, 'src'));
  const compiled = Object.entries(exports).map(([key, path]) => [key, path.replace(/\.ts$/, '.js')]);
  writeManifest(target, { name, version, type: 'module', exports: Object.fromEntries(compiled) });
}

/** The package's own manifest. */
function packageManifest(): object {
  const { name, version, description, license, optionalDependencies } = readManifest('.');
  const { [scripted]: scriptedVersion, ...dependencies } = Object.fromEntries(
    [...bundled, 'cli'].flatMap((folder) => Object.entries(readManifest(folder).dependencies ?? {})),
  );
  return {
    name,
    version,
    description,
    license,
    type: 'module',
    bin: { mimo: 'cli/src/local/mimo.mjs' },
    engines: { node: '>=18' },
    dependencies,
    optionalDependencies: { ...optionalDependencies, [scripted]: scriptedVersion },
    bundleDependencies: bundled.map((folder) => readManifest(folder).name),
  };
}

/** Makes the package in `out`, beside the folders that it is made of; gives the path of the file. */
function pack(out: string): string {
  const emitted = join(out, 'emitted');
  const stage = join(out, 'package');
  for (const folder of [emitted, stage]) {
    rmSync(folder, { recursive: true, force: true });
    mkdirSync(folder, { recursive: true });
  }
  const tsc = join(root, 'node_modules/.bin/tsc');
  execFileSync(tsc, ['-p', import.meta.dirname, '--outDir', emitted], { stdio: 'inherit' });
  copySources(own, emitted, join(stage, own));
  for (const folder of bundled) {
    bundle(folder, emitted, stage);
  }
  for (const path of ['models/mimo-demo', 'LICENSE', 'README.md']) {
    cpSync(join(root, path), join(stage, path), { recursive: true });
  }
  writeManifest(stage, packageManifest());
  const packed = execFileSync('npm', ['pack', stage, '--silent', '--pack-destination', out], {
    encoding: 'utf8',
  });
  return join(out, packed.trim());
}

const { values } = parseArgs({ options: { out: { type: 'string', default: join(root, 'dist') } } });
process.stdout.write(`${pack(resolve(values.out))}\n`);
