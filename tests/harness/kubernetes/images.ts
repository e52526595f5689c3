// Our images without a registry: each from its ordinary Dockerfile, by buildah, on a base image made here of Debian's
// packages and npm's Node; and those of nats-server and of a pod's sandbox. Owns the cache of archives, keyed by their
// inputs. Needs root on Linux with Debian's package manager. Knows nothing about the programs in the images.

import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  chmod,
  cp,
  lstat,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  readlink,
  realpath,
  rename,
  rm,
  stat,
  statfs,
  symlink,
  writeFile,
} from 'node:fs/promises';
import { homedir } from 'node:os';
import { basename, dirname, join, relative } from 'node:path';
import { promisify } from 'node:util';

import { ClusterError } from '@mimo/core/process/errors';
import { withFileLock } from '@mimo/core/process/file-lock';

import { startChild } from '../../../cli/src/local/child-process.ts';
import { cacheDirectoryFrom, findNatsServer, type FindOptions } from '../../../cli/src/local/nats-server.ts';

const root = join(import.meta.dirname, '../../..');
const debianSuite = 'bookworm';

/** A stand-in for one of Docker's images, by the same name: Debian's essential packages and those of `packages`. */
interface Base {
  readonly name: string;
  readonly packages: readonly string[];
}

const nodeBase: Base = {
  name: 'docker.io/library/node:26-bookworm-slim',
  packages: ['libatomic1', 'libstdc++6'],
};
const pythonBase: Base = {
  name: 'docker.io/library/python:3.12-slim-bookworm',
  packages: ['python3', 'python3-pip', 'ca-certificates'],
};
/** Archives of one image that are kept: a change and its revert do not build again. */
const keptArchives = 2;
const keptFreeBytes = 10 * 2 ** 30;

/** What can be built: those of deploy/images, and the queue server's for a cluster without a registry. */
export type ImageName = 'gateway' | 'worker' | 'worker-cuda' | 'controller' | 'nats';

/** An image as `ctr images import` takes it. */
export interface BuiltImage {
  /** As a pod names it. */
  readonly name: string;
  /** Path of its OCI archive. */
  readonly archive: string;
  /** Of the archive: about what a registry would send. */
  readonly archiveBytes: number;
}

/** The names that pods give the images. */
const imageReferences: Readonly<Record<ImageName, string>> = {
  gateway: 'docker.io/mimo-cluster/gateway:test',
  worker: 'docker.io/mimo-cluster/worker:test',
  'worker-cuda': 'docker.io/mimo-cluster/worker-cuda:test',
  controller: 'docker.io/mimo-cluster/controller:test',
  nats: 'docker.io/mimo-cluster/nats:test',
};

interface Run {
  readonly command: readonly string[];
  readonly env?: NodeJS.ProcessEnv;
}

/** Where things lie, and how programs are run. */
interface Workshop {
  readonly directory: string;
  readonly options: FindOptions;
  /** Runs a program to its end, which does not outlive this process; fails with `unavailable` and its last words. */
  readonly run: (run: Run) => Promise<void>;
  readonly buildah: (...args: readonly string[]) => Promise<void>;
}

/** The start of every buildah command: a store of our own, beside the archives. */
export function buildahCommand(cacheDirectory: string): readonly string[] {
  const directory = join(cacheDirectory, 'images');
  return [
    'buildah',
    `--root=${join(directory, 'storage')}`,
    `--runroot=${join(directory, 'run')}`,
    '--storage-driver=overlay',
  ];
}

function createWorkshop(options: FindOptions): Workshop {
  const directory = join(options.cacheDirectory, 'images');
  const run = async ({ command, env }: Run): Promise<void> => {
    const logDirectory = await mkdtemp(join(directory, 'log-'));
    const [program = ''] = command;
    try {
      const child = await startChild({
        name: program,
        command,
        env: { ...(options.env ?? process.env), ...env },
        logFile: join(logDirectory, 'log'),
      });
      const stop = (): void => void child.stop(0);
      options.signal.addEventListener('abort', stop, { once: true });
      const { code } = await child.exited;
      options.signal.removeEventListener('abort', stop);
      options.signal.throwIfAborted();
      if (code !== 0) {
        throw new ClusterError('unavailable', `${command.join(' ')} failed:\n${child.logTail()}`);
      }
    } finally {
      await rm(logDirectory, { recursive: true, force: true });
    }
  };
  return {
    directory,
    options,
    run,
    buildah: async (...args) => run({ command: [...buildahCommand(options.cacheDirectory), ...args] }),
  };
}

/** Installs from Debian what is missing; fails with `failed_precondition`, saying what to do, where it cannot. */
async function installBuilders(workshop: Workshop): Promise<void> {
  const wanted = { buildah: 'buildah', runc: 'runc', mmdebstrap: 'mmdebstrap' };
  const path = `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin`;
  const missing: string[] = [];
  for (const [program, debianPackage] of Object.entries(wanted)) {
    if ((await findOnPath(program, path)) === undefined) {
      missing.push(debianPackage);
    }
  }
  if (missing.length === 0 && process.getuid?.() === 0) {
    return;
  }
  const install = `apt-get install --no-install-recommends ${missing.join(' ')}`;
  if (process.getuid?.() !== 0 || (await findOnPath('apt-get', path)) === undefined) {
    throw new ClusterError(
      'failed_precondition',
      `images are built here by root with ${Object.keys(wanted).join(', ')}` +
        (missing.length === 0 ? ': run as root' : `: run as root, and on Debian '${install}'`),
    );
  }
  workshop.options.onProgress(`installing ${missing.join(' ')} from Debian`);
  const env = { DEBIAN_FRONTEND: 'noninteractive' };
  const command = ['apt-get', 'install', '--yes', '--quiet', '--no-install-recommends', ...missing];
  await workshop.run({ command, env }).catch(async () => {
    // The lists of a fresh machine are old or absent.
    await workshop.run({ command: ['apt-get', 'update', '--quiet'], env });
    await workshop.run({ command, env });
  });
}

async function findOnPath(program: string, path: string): Promise<string | undefined> {
  for (const directory of path.split(':').filter((entry) => entry !== '')) {
    const found = await realpath(join(directory, program)).catch(() => undefined);
    if (found !== undefined) {
      return found;
    }
  }
  return undefined;
}

/** Adds a file, or a folder with all in it but tests and READMEs, to a digest: paths, modes and contents. */
async function digestTree(digest: ReturnType<typeof createHash>, path: string): Promise<void> {
  const entry = await lstat(path);
  if (entry.isDirectory()) {
    for (const name of (await readdir(path)).toSorted()) {
      await digestTree(digest, join(path, name));
    }
    return;
  }
  if (path.endsWith('.test.ts') || path.endsWith('README.md')) {
    return;
  }
  const content = entry.isSymbolicLink() ? await readlink(path) : await readFile(path);
  digest.update(`${relative(root, path)} ${entry.mode} ${content.length}\n`).update(content);
}

/** What a Dockerfile copies out of its context: the paths, which with its own text decide what it builds. */
export function copiedPaths(dockerfile: string): readonly string[] {
  return dockerfile
    .split('\n')
    .filter((line) => line.startsWith('COPY ') && !line.includes('--from='))
    .flatMap((line) => line.split(/\s+/).slice(1, -1));
}

function dockerfileOf(image: ImageName): string {
  return join(
    root,
    'deploy/images',
    image === 'worker-cuda' ? 'worker/cuda.Dockerfile' : `${image}/Dockerfile`,
  );
}

async function dockerfileKey(image: ImageName, baseKey: string): Promise<string> {
  const file = dockerfileOf(image);
  const digest = createHash('sha256').update(baseKey);
  for (const path of ['.dockerignore', relative(root, file), ...copiedPaths(await readFile(file, 'utf8'))]) {
    await digestTree(digest, join(root, path));
  }
  return digest.digest('hex').slice(0, 16);
}

/** Node and npm that go into the base image: those which brought us here. */
async function findNodeParts(): Promise<{ node: string; npm: string; key: string }> {
  const npmProgram = await findOnPath('npm', process.env['PATH'] ?? '');
  if (npmProgram === undefined) {
    throw new ClusterError(
      'failed_precondition',
      'the base image takes npm from this machine, and it has none',
    );
  }
  const npm = join(dirname(npmProgram), '..');
  const { version } = JSON.parse(await readFile(join(npm, 'package.json'), 'utf8')) as { version: string };
  const recipe = JSON.stringify([process.version, process.arch, version, debianSuite, nodeBase.packages]);
  return {
    node: process.execPath,
    npm,
    key: createHash('sha256').update(recipe).digest('hex').slice(0, 16),
  };
}

/** Makes a base image out of Debian's packages and what `add` puts into its root. */
async function buildBase(
  workshop: Workshop,
  base: Base,
  key: string,
  add: (rootfs: string) => Promise<void> = async () => undefined,
): Promise<void> {
  const { directory, buildah, options } = workshop;
  const { name, packages } = base;
  // The name can stand for one of them at a time, whatever others were made before.
  const marker = join(directory, `base-${basename(name).replace(/:.*/, '')}`);
  if ((await readFile(marker, 'utf8').catch(() => undefined)) === key) {
    return;
  }
  options.onProgress(`making a base image in place of ${name}, once: 1 to 2 minutes`);
  const begin = performance.now();
  const work = await mkdtemp(join(directory, 'base-work-'));
  try {
    const rootfs = join(work, 'rootfs');
    await workshop.run({
      command: [
        'mmdebstrap',
        '--quiet',
        '--variant=minbase',
        `--include=${packages.join(',')}`,
        ...['doc', 'man', 'locale'].map((folder) => `--dpkgopt=path-exclude=/usr/share/${folder}/*`),
        debianSuite,
        rootfs,
      ],
    });
    await add(rootfs);
    await buildah('from', '--name=base-work', 'scratch');
    await buildah('add', '--quiet', 'base-work', rootfs, '/');
    await buildah('commit', '--quiet', '--rm', 'base-work', name);
    await writeFile(marker, key);
    options.onProgress(`made the base image in ${((performance.now() - begin) / 1000).toFixed(0)} s`);
  } finally {
    await rm(work, { recursive: true, force: true });
  }
}

async function addNode(rootfs: string, node: string, npm: string): Promise<void> {
  const modules = join(rootfs, 'usr/local/lib/node_modules');
  await cp(node, join(rootfs, 'usr/local/bin/node'));
  await chmod(join(rootfs, 'usr/local/bin/node'), 0o755);
  await mkdir(modules, { recursive: true });
  await cp(npm, join(modules, 'npm'), { recursive: true });
  await symlink('../lib/node_modules/npm/bin/npm-cli.js', join(rootfs, 'usr/local/bin/npm'));
}

async function npmSetting(name: string): Promise<string> {
  const { stdout } = await promisify(execFile)('npm', ['config', 'get', name], { cwd: homedir() });
  return stdout.trim();
}

/** Options by which npm inside a build uses this machine's packages, and its registry for what is not there. */
async function npmOptions(directory: string): Promise<readonly string[]> {
  const [cache, registry, authority] = await Promise.all(['cache', 'registry', 'cafile'].map(npmSetting));
  const hasAuthority = authority !== '' && authority !== 'null';
  const npmrc = join(directory, 'npmrc');
  await writeFile(
    npmrc,
    [
      'cache=/npm-cache',
      'prefer-offline=true',
      'update-notifier=false',
      `registry=${registry}`,
      ...(hasAuthority ? ['cafile=/npm-authority.crt'] : []),
    ].join('\n'),
  );
  return [
    `--volume=${npmrc}:/root/.npmrc:ro`,
    `--volume=${cache}:/npm-cache`,
    ...(hasAuthority ? [`--volume=${authority}:/npm-authority.crt:ro`] : []),
  ];
}

/** Options by which pip inside a build trusts and asks whom this machine's does. */
async function pipOptions(): Promise<readonly string[]> {
  const files = ['/etc/pip.conf', '/etc/ssl/certs/ca-certificates.crt'];
  const existing = await Promise.all(
    files.map(async (file) => ((await stat(file).catch(() => undefined)) === undefined ? [] : [file])),
  );
  return existing.flat().map((file) => `--volume=${file}:${file}:ro`);
}

/** Writes the Dockerfile and the context of the queue server's image, whose only file is the program. */
async function writeNatsContext(work: string, program: string): Promise<void> {
  await cp(program, join(work, 'nats-server'));
  await chmod(join(work, 'nats-server'), 0o755);
  await writeFile(
    join(work, 'Dockerfile'),
    [
      'FROM scratch',
      'COPY nats-server /usr/local/bin/nats-server',
      'ENV PATH=/usr/local/bin',
      'USER 10001:10001',
      'ENTRYPOINT ["/usr/local/bin/nats-server"]',
    ].join('\n'),
  );
}

/** A plan to build one image: under which key, and how. */
interface Recipe {
  readonly key: string;
  readonly build: (work: string) => Promise<void>;
}

async function recipeOf(image: ImageName, workshop: Workshop): Promise<Recipe> {
  const { buildah, options } = workshop;
  const common = ['bud', '--quiet', '--pull-never', '--layers', `--tag=${imageReferences[image]}`];
  if (image === 'nats') {
    const program = await findNatsServer({ ...options, isBuiltHere: true });
    if (program === null) {
      throw new ClusterError(
        'failed_precondition',
        'the image of nats-server needs Go on the PATH to build it',
      );
    }
    return {
      key: createHash('sha256').update(program).digest('hex').slice(0, 16),
      build: async (work) => {
        await writeNatsContext(work, program);
        await buildah(...common, work);
      },
    };
  }
  const { node, npm, key: baseKey } = await findNodeParts();
  return {
    key: await dockerfileKey(image, baseKey),
    build: async (work) => {
      await buildBase(workshop, nodeBase, baseKey, async (rootfs) => addNode(rootfs, node, npm));
      if (image === 'worker-cuda') {
        await buildBase(workshop, pythonBase, `python-${debianSuite}-${process.arch}`);
      }
      await buildah(
        ...common,
        '--isolation=oci',
        // crun, buildah's first choice, refuses a machine with hybrid cgroups.
        '--runtime=runc',
        '--network=host',
        ...(await npmOptions(work)),
        ...(image === 'worker-cuda' ? await pipOptions() : []),
        `--file=${dockerfileOf(image)}`,
        root,
      );
    },
  };
}

async function buildImage(image: ImageName, workshop: Workshop): Promise<BuiltImage> {
  const { directory, options, buildah } = workshop;
  const { key, build } = await recipeOf(image, workshop);
  const archive = join(directory, `${image}-${key}.tar`);
  if ((await stat(archive).catch(() => undefined)) === undefined) {
    options.onProgress(`building image ${image}`);
    const begin = performance.now();
    const work = await mkdtemp(join(directory, `${image}-work-`));
    try {
      await installBuilders(workshop);
      await build(work);
      const reference = imageReferences[image];
      await buildah('push', '--quiet', reference, `oci-archive:${join(work, 'image.tar')}:${reference}`);
      await rename(join(work, 'image.tar'), archive);
      options.onProgress(`built image ${image} in ${((performance.now() - begin) / 1000).toFixed(0)} s`);
    } finally {
      await rm(work, { recursive: true, force: true });
    }
    await removeOldArchives(directory, image);
    const { bavail, bsize } = await statfs(directory);
    if (bavail * bsize < keptFreeBytes) {
      // Layers of earlier builds, which would speed up later ones.
      await buildah('rmi', '--prune', '--force');
    }
  }
  return { name: imageReferences[image], archive, archiveBytes: (await stat(archive)).size };
}

async function removeOldArchives(directory: string, image: ImageName): Promise<void> {
  const files = (await readdir(directory)).filter(
    (name) => name.startsWith(`${image}-`) && name.endsWith('.tar'),
  );
  const dated = await Promise.all(
    files.map(async (name) => ({ name, mtimeMs: (await stat(join(directory, name))).mtimeMs })),
  );
  for (const { name } of dated.toSorted((a, b) => b.mtimeMs - a.mtimeMs).slice(keptArchives)) {
    await rm(join(directory, name));
  }
}

/**
 * Gives the images, building those of which nothing in the cache has the same sources; one process at a time. Fails
 * with `failed_precondition`, saying what to do, where this machine cannot build images, and with `unavailable` and
 * the builder's last words where a build fails. Options that are left out are as in `findTools`.
 */
export async function findImages<Name extends ImageName>(
  names: readonly Name[],
  given: Partial<FindOptions> = {},
): Promise<Readonly<Record<Name, BuiltImage>>> {
  const options: FindOptions = {
    cacheDirectory: cacheDirectoryFrom(process.env),
    onProgress: (line) => process.stderr.write(`mimo: ${line}\n`),
    signal: new AbortController().signal,
    ...given,
  };
  const workshop = createWorkshop(options);
  await mkdir(workshop.directory, { recursive: true });
  return withFileLock(
    join(workshop.directory, 'lock'),
    async () => {
      const images: Partial<Record<Name, BuiltImage>> = {};
      for (const name of names) {
        images[name] = await buildImage(name, workshop);
      }
      return images as Record<Name, BuiltImage>;
    },
    options.signal,
  );
}
