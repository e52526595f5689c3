// One container of one of our images, run by runc without a cluster: read-only root, the image's own user, no
// capabilities, this machine's loopback. For tests of an image's content and of its process's start. Needs root.

import { execFile } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { chmod, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';

import { ClusterError } from '@mimo/core/process/errors';

import { startChild, type Child } from '../../../cli/src/local/child-process.ts';
import { cacheDirectoryFrom } from '../../../cli/src/local/nats-server.ts';
import { waitFor } from '../wait-for.ts';
import { buildahCommand, type BuiltImage } from './images.ts';

const stopGraceMs = 20_000;

/** An image's root file system, unpacked. Close it. */
export interface UnpackedImage {
  readonly directory: string;
  readonly config: ImageConfig;
  close(): Promise<void>;
}

interface ImageConfig {
  readonly user: string;
  readonly env: readonly string[];
  readonly entrypoint: readonly string[];
  readonly workingDirectory: string;
  readonly labels: Readonly<Record<string, string>>;
}

interface BuildahInspection {
  readonly OCIv1: {
    readonly config: {
      readonly User?: string;
      readonly Env?: readonly string[];
      readonly Entrypoint?: readonly string[];
      readonly WorkingDir?: string;
      readonly Labels?: Readonly<Record<string, string>>;
    };
  };
}

async function buildah(...args: readonly string[]): Promise<string> {
  const [program = '', ...start] = buildahCommand(cacheDirectoryFrom(process.env));
  const { stdout } = await promisify(execFile)(program, [...start, ...args]);
  return stdout.trim();
}

/** Unpacks an image's archive, the one that a node would import. */
export async function unpackImage(image: BuiltImage): Promise<UnpackedImage> {
  const container = `mimo-test-${randomUUID()}`;
  await buildah('from', '--quiet', `--name=${container}`, `oci-archive:${image.archive}`);
  const close = async (): Promise<void> => {
    await buildah('rm', container);
  };
  try {
    const directory = await buildah('mount', container);
    const inspection = JSON.parse(
      await buildah('inspect', '--type=container', container),
    ) as BuildahInspection;
    const { config } = inspection.OCIv1;
    return {
      directory,
      config: {
        user: config.User ?? '',
        env: config.Env ?? [],
        entrypoint: config.Entrypoint ?? [],
        workingDirectory: config.WorkingDir ?? '/',
        labels: config.Labels ?? {},
      },
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}

/** What a pod's spec would add to the image. */
export interface ContainerOptions {
  readonly args?: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
  /** Directories of this machine by their place in the container, which sees them read-only. */
  readonly directories?: Readonly<Record<string, string>>;
  /** Places in the container where it may write, empty at its start, as an emptyDir's are. */
  readonly writable?: readonly string[];
}

/** A running container. Close it. */
export interface Container {
  /** runc's own process, which lives as long as the container and hands its signals on. */
  readonly child: Child;
  /** All that it has printed. */
  log(): Promise<string>;
  /** SIGTERM, then SIGKILL after a while; removes all of it. */
  close(): Promise<void>;
}

/** Runs an unpacked image's process; fails with `unavailable` and runc's words where it does not start. */
export async function startContainer(
  image: UnpackedImage,
  options: ContainerOptions = {},
): Promise<Container> {
  const bundle = await mkdtemp(join(tmpdir(), 'mimo-container-'));
  const [uid = 0, gid = 0] = image.config.user.split(':').map(Number);
  const directories = Object.entries(options.directories ?? {});
  const writable = await Promise.all(
    (options.writable ?? []).map(async (destination, index) => {
      const source = join(bundle, `writable-${index}`);
      await mkdir(source);
      await chmod(source, 0o777);
      return { destination, source };
    }),
  );
  const spec = {
    ociVersion: '1.0.2',
    root: { path: image.directory, readonly: true },
    hostname: 'test',
    process: {
      user: { uid, gid },
      args: [...image.config.entrypoint, ...(options.args ?? [])],
      env: [
        ...image.config.env,
        ...Object.entries(options.env ?? {}).map(([name, value]) => `${name}=${value}`),
      ],
      cwd: image.config.workingDirectory,
      noNewPrivileges: true,
    },
    mounts: [
      { destination: '/proc', type: 'proc', source: 'proc' },
      { destination: '/dev', type: 'tmpfs', source: 'tmpfs', options: ['nosuid', 'mode=755', 'size=64k'] },
      ...directories.map(([destination, source]) => ({
        destination,
        type: 'bind',
        source,
        options: ['bind', 'ro', 'nosuid', 'nodev'],
      })),
      ...writable.map(({ destination, source }) => ({
        destination,
        type: 'bind',
        source,
        options: ['bind', 'nosuid', 'nodev'],
      })),
    ],
    // No namespace for the network: tests reach the process on loopback.
    linux: { namespaces: ['pid', 'mount', 'ipc', 'uts'].map((type) => ({ type })) },
  };
  await writeFile(join(bundle, 'config.json'), JSON.stringify(spec));
  const id = `mimo-${randomUUID()}`;
  const runc = ['runc', `--root=${join(bundle, 'state')}`];
  const logFile = join(bundle, 'log');
  const child = await startChild({
    name: id,
    command: [...runc, 'run', `--bundle=${bundle}`, id],
    logFile,
  });
  const [program = '', ...start] = runc;
  const close = async (): Promise<void> => {
    await child.stop(stopGraceMs);
    await promisify(execFile)(program, [...start, 'delete', '--force', id]);
    await rm(bundle, { recursive: true, force: true });
  };
  // Until then a signal would end runc itself, which hands them on only to a process that runs.
  const isRunning = async (): Promise<boolean> => {
    const { stdout } = await promisify(execFile)(program, [...start, 'state', id]);
    return (JSON.parse(stdout) as { status: string }).status !== 'created';
  };
  try {
    await waitFor(`container ${image.config.entrypoint.join(' ')}`, isRunning);
  } catch (error) {
    const words = child.logTail();
    await close();
    throw new ClusterError('unavailable', `a container did not start:\n${words}`, { cause: error });
  }
  return {
    child,
    log: async () => readFile(logFile, 'utf8'),
    close,
  };
}
