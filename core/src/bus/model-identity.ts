// The identity of a model's answers: what computes a text, so that nothing else may continue it. Two halves: the files from
// which text becomes tokens and back, which gateways and workers both have, and the weights with their arithmetic, which
// only workers have. Owns how it is written, which files it is made from and which identities go together.
//
//   identity = <text>.<weights>     <text> may be empty: a group started from compiled shards has not seen the tokenizer
//
// Not part of it: how many ranks share the weights, what computes them, how many tokens are drafted, and the version of the
// software. Such groups give the same text up to near-ties of floats, and a stream may move between them.

import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';

/** The files of a checkpoint from which text becomes tokens and back, by the names that are looked for. */
const textFiles = [
  'config.json',
  'generation_config.json',
  'tokenizer_config.json',
  'chat_template.jinja',
  'tokenizer.json',
  'vocab.json',
  'merges.txt',
] as const;

/** A checkpoint's files from which text becomes tokens and back: those of them that are there. */
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

/** The half of an identity that the text's files make up; files of other names take no part. */
export function textDigestOf(files: ReadonlyMap<string, Uint8Array>): string {
  const digests = textFiles
    .filter((name) => files.has(name))
    .map((name) => [name, sha256Of(files.get(name) ?? new Uint8Array())]);
  return sha256Of(Buffer.from(JSON.stringify(digests))).slice(0, digestLength);
}

/** The half that the weights make up, with what else says how they compute. */
export function weightsDigestOf(parts: readonly string[]): string {
  return sha256Of(Buffer.from(JSON.stringify(parts))).slice(0, digestLength);
}

/** An identity of its two halves; `text` is empty where it is not known. */
export function modelIdentity(text: string, weights: string): string {
  return `${text}.${weights}`;
}

/** Whether a group of this identity reads tokens as a tokenizer of this digest writes them, as far as the group knows. */
export function readsText(identity: string, textDigest: string): boolean {
  return identity.startsWith('.') || identity.startsWith(`${textDigest}.`);
}

const digestLength = 16;

function sha256Of(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex');
}
