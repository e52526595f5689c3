// The files of a hub's repository: selects those that MiMo needs and verifies copies on disk. Does no network access.

import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { stat } from 'node:fs/promises';

const weights = /^[^/]+\.safetensors$/;
const otherFiles = new Set([
  'config.json',
  'generation_config.json',
  'model.safetensors.index.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'chat_template.jinja',
  'vocab.json',
  'merges.txt',
]);
/** A file of the repository, as the hub describes it. */
export interface HubFile {
  readonly path: string;
  readonly bytes: number;
  /** Git's id of a small file, the SHA-256 of a large one. */
  readonly digest: { readonly kind: 'git' | 'sha256'; readonly hex: string };
}

/** Whether MiMo needs the file of this path. */
export function isNeeded(path: string): boolean {
  return weights.test(path) || otherFiles.has(path);
}

export function isWeights({ path }: HubFile): boolean {
  return weights.test(path);
}

/** From an entry of the hub's list; large files are known by their LFS object. */
export function hubFileOf({
  path,
  size,
  oid,
  lfs,
}: {
  readonly path: string;
  readonly size: number;
  readonly oid?: string;
  readonly lfs?: { readonly oid: string; readonly size: number };
}): HubFile {
  return lfs === undefined
    ? { path, bytes: size, digest: { kind: 'git', hex: oid ?? '' } }
    : { path, bytes: lfs.size, digest: { kind: 'sha256', hex: lfs.oid } };
}

/** Bytes of a file on disk; 0 if it is missing. */
export async function sizeOf(path: string): Promise<number> {
  return stat(path).then(
    ({ size }) => size,
    () => 0,
  );
}

/** Whether the file on disk equals the hub's: compares its length, then its digest. */
export async function isWhole(path: string, { bytes, digest }: HubFile): Promise<boolean> {
  const size = await stat(path).then(
    (found) => found.size,
    () => undefined,
  );
  if (size !== bytes) {
    return false;
  }
  const hash = createHash(digest.kind === 'git' ? 'sha1' : 'sha256');
  if (digest.kind === 'git') {
    hash.update(`blob ${bytes}\0`);
  }
  for await (const chunk of createReadStream(path)) {
    hash.update(chunk as Buffer);
  }
  return hash.digest('hex') === digest.hex;
}
