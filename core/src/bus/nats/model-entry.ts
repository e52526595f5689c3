// A model as the object store holds it: one object of all its files, their names, sizes and digests in its metadata.
// Owns the bounds of a model and the digests; nothing here waits.

import { createHash } from 'node:crypto';

import type { ObjectInfo } from '@nats-io/obj';

import { ClusterError } from '../../process/errors.ts';
import type { ModelFiles } from '../model-catalog.ts';

const maxFiles = 16;
/** MiMo's tokenizer.json has 7 to 11 MB. */
const maxModelBytes = 64 * 2 ** 20;
const maxNameBytes = 256;
const fileName = /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/;

/** One file of a model. */
export interface CatalogFile {
  readonly name: string;
  readonly sha256: string;
  readonly bytes: number;
}

/** A model in its written form. */
export interface ModelEntry {
  readonly name: string;
  readonly metadata: Record<string, string>;
  readonly content: Uint8Array;
}

/** Fails with `invalid_argument` if names or sizes are out of bounds. */
export function entryOf({ name, files, identity }: ModelFiles): ModelEntry & { readonly digest: string } {
  const sorted = [...files].toSorted(([a], [b]) => (a < b ? -1 : 1));
  const described = sorted.map(([file, bytes]) => ({
    name: file,
    sha256: sha256Of(bytes),
    bytes: bytes.length,
  }));
  const problem = problemWith(name, described);
  if (problem !== undefined) {
    throw new ClusterError(
      'invalid_argument',
      `model ${JSON.stringify(name)} cannot be published: ${problem}`,
    );
  }
  const digest = digestOf(described, identity);
  const metadata = { digest, identity, files: JSON.stringify(described) };
  return { name, digest, metadata, content: Buffer.concat(sorted.map(([, bytes]) => bytes)) };
}

/**
 * The files according to an object's metadata; fails with `data_loss` if the metadata contradicts its digest or size.
 */
export function parseFiles(info: ObjectInfo): readonly CatalogFile[] {
  const { name, size, metadata } = info;
  try {
    const files: readonly CatalogFile[] = JSON.parse(metadata?.['files'] ?? '');
    const bytes = files.reduce((sum, file) => sum + file.bytes, 0);
    if (
      digestOf(files, metadata?.['identity'] ?? '') === metadata?.['digest'] &&
      bytes === size &&
      problemWith(name, files) === undefined
    ) {
      return files;
    }
  } catch {
    // Reported below.
  }
  throw new ClusterError('data_loss', `model ${name}: the catalogue's entry contradicts itself`);
}

/** Why the catalogue rejects a model; undefined if it accepts it. */
function problemWith(name: string, files: readonly CatalogFile[]): string | undefined {
  const bytes = files.reduce((sum, file) => sum + file.bytes, 0);
  if (name === '' || Buffer.byteLength(name) > maxNameBytes) {
    return `its name must have 1 to ${maxNameBytes} bytes`;
  }
  if (files.length === 0 || files.length > maxFiles) {
    return `it must have 1 to ${maxFiles} files, not ${files.length}`;
  }
  if (bytes > maxModelBytes) {
    return `its files have ${bytes} bytes in total, over the limit of ${maxModelBytes}`;
  }
  const wrong = files.find((file) => !fileName.test(file.name));
  return wrong === undefined ? undefined : `${JSON.stringify(wrong.name)} is not a plain file name`;
}

function digestOf(files: readonly CatalogFile[], identity: string): string {
  const described = files.map(({ name, sha256, bytes }) => [name, sha256, bytes]);
  return sha256Of(Buffer.from(JSON.stringify([identity, described])));
}

/** In hex. */
export function sha256Of(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex');
}
