// The identity of a model's answers: it names what computes a text, so that no other model continues it. It has two
// halves: the tokenizer files, which gateways and workers both have, and the weights with their arithmetic, which
// only workers have. Owns its notation, the files it is made from, and which identities are compatible.
//
//   identity = <text>.<weights>     <text> may be empty: a group started from compiled shards has not seen the tokenizer
// Not part of it: the number of ranks, the execution provider, the number of drafts and the software version. Groups
// that differ in these produce the same text up to near-ties of floats, so a stream may move between them.

import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';

/** The names of a checkpoint's tokenizer files. */
const textFiles = [
  'config.json',
  'generation_config.json',
  'tokenizer_config.json',
  'chat_template.jinja',
  'tokenizer.json',
  'vocab.json',
  'merges.txt',
] as const;

/** The tokenizer files that a checkpoint has. */
export async function readTextFiles(directory: string): Promise<ReadonlyMap<string, Uint8Array>> {
  const files = new Map<string, Uint8Array>();
  for (const name of textFiles) {
    const bytes = await readFile(join(directory, name)).catch(() => undefined);
    if (bytes !== undefined) {
      files.set(name, bytes);
    }
  }
  return files;
}

/** The half of an identity that comes from the tokenizer files; files with other names are ignored. */
export function textDigestOf(files: ReadonlyMap<string, Uint8Array>): string {
  const digests = textFiles
    .filter((name) => files.has(name))
    .map((name) => [name, sha256Of(files.get(name) ?? new Uint8Array())]);
  return sha256Of(Buffer.from(JSON.stringify(digests))).slice(0, digestLength);
}

/** The half that comes from the weights and from the settings of their arithmetic. */
export function weightsDigestOf(parts: readonly string[]): string {
  return sha256Of(Buffer.from(JSON.stringify(parts))).slice(0, digestLength);
}

/** Joins the two halves of an identity; `text` is empty if it is unknown. */
export function modelIdentity(text: string, weights: string): string {
  return `${text}.${weights}`;
}

/** Whether a group with this identity uses the tokenizer with this digest, as far as the group knows. */
export function readsText(identity: string, textDigest: string): boolean {
  return identity.startsWith('.') || identity.startsWith(`${textDigest}.`);
}

const digestLength = 16;

function sha256Of(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex');
}
