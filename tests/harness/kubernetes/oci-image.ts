// The image of a pod's own process: busybox in one layer, made without a registry or an image tool, so that a cluster
// starts without any of our images. images.ts builds all others.

import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { copyFile, mkdir, mkdtemp, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { promisify } from 'node:util';

/** An image in a tar file, and the name under which an import brings it. */
interface ImageFile {
  readonly file: string;
  readonly name: string;
}

interface ImageOptions {
  /** With its registry and tag: what pods ask for. */
  readonly name: string;
  /** A static program of this machine; it lies in /usr/local/bin, which is the PATH. */
  readonly program: string;
  readonly args?: readonly string[];
}

/** The image of a pod's own process, which holds its namespaces open: Debian's static busybox asleep. */
export async function createPauseImage(directory: string): Promise<ImageFile> {
  const name = 'registry.k8s.io/pause:mimo-tests';
  return createImage(directory, { name, program: '/bin/busybox', args: ['sleep', 'infinity'] });
}

async function createImage(directory: string, options: ImageOptions): Promise<ImageFile> {
  const { name, program, args = [] } = options;
  const layout = await mkdtemp(join(directory, 'image-'));
  const blobs = join(layout, 'blobs/sha256');
  const programDirectory = join(layout, 'usr/local/bin');
  await mkdir(blobs, { recursive: true });
  await mkdir(programDirectory, { recursive: true });
  await copyFile(program, join(programDirectory, basename(program)));
  const layerFile = join(layout, 'layer.tar');
  await createTar(layerFile, layout, ['usr']);
  const layer = await readFile(layerFile);
  const layerDigest = digestOf(layer);
  await rename(layerFile, join(blobs, layerDigest));
  const store = async (content: unknown): Promise<{ readonly digest: string; readonly size: number }> => {
    const bytes = Buffer.from(JSON.stringify(content));
    const digest = digestOf(bytes);
    await writeFile(join(blobs, digest), bytes);
    return { digest: `sha256:${digest}`, size: bytes.length };
  };
  const config = await store({
    architecture: process.arch === 'x64' ? 'amd64' : process.arch,
    os: 'linux',
    config: {
      Entrypoint: [`/usr/local/bin/${basename(program)}`, ...args],
      Env: ['PATH=/usr/local/bin'],
      User: '65535:65535',
    },
    rootfs: { type: 'layers', diff_ids: [`sha256:${layerDigest}`] },
  });
  const manifest = await store({
    schemaVersion: 2,
    mediaType: 'application/vnd.oci.image.manifest.v1+json',
    config: { mediaType: 'application/vnd.oci.image.config.v1+json', ...config },
    layers: [
      {
        mediaType: 'application/vnd.oci.image.layer.v1.tar',
        digest: `sha256:${layerDigest}`,
        size: layer.length,
      },
    ],
  });
  const index = {
    schemaVersion: 2,
    mediaType: 'application/vnd.oci.image.index.v1+json',
    manifests: [
      {
        mediaType: 'application/vnd.oci.image.manifest.v1+json',
        ...manifest,
        annotations: { 'io.containerd.image.name': name },
      },
    ],
  };
  await writeFile(join(layout, 'index.json'), JSON.stringify(index));
  await writeFile(join(layout, 'oci-layout'), JSON.stringify({ imageLayoutVersion: '1.0.0' }));
  const file = `${layout}.tar`;
  await createTar(file, layout, ['oci-layout', 'index.json', 'blobs']);
  await rm(layout, { recursive: true });
  return { file, name };
}

async function createTar(file: string, directory: string, members: readonly string[]): Promise<void> {
  const reproducible = ['--owner=0', '--group=0', '--numeric-owner', '--sort=name', '--mtime=@0'];
  await promisify(execFile)('tar', ['-cf', file, '-C', directory, ...reproducible, ...members]);
}

function digestOf(bytes: Buffer): string {
  return createHash('sha256').update(bytes).digest('hex');
}
