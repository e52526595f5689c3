// Identifies everything that a group's answers depend on, as one short text: see core's model-identity. Owns the choice
// of a worker's settings and of a checkpoint's files that are part of it.

import { join } from 'node:path';

import { modelIdentity, readTextFiles, textDigestOf, weightsDigestOf } from '@mimo/core/bus/model-identity';

import type { WorkerConfig } from './config.ts';
import { hashCheckpoint, openCheckpoint } from './compiler/checkpoint.ts';
import { readShardManifest } from './shards/shard.ts';

/** The settings that an identity depends on, together with the content of their directories. */
export type IdentityConfig = Pick<WorkerConfig, 'checkpointDirectory' | 'shardDirectory' | 'precision'>;

/**
 * The identity of a configuration. Shards that were compiled elsewhere have their own key, which includes the number of
 * ranks but no tokenizer. Throws the errors of `openCheckpoint` and `readShardManifest`.
 */
export async function identityOf(
  { checkpointDirectory, shardDirectory, precision }: IdentityConfig,
  signal: AbortSignal,
): Promise<string> {
  if (shardDirectory !== '') {
    const { key } = await readShardManifest(join(shardDirectory, 'rank-0'));
    return modelIdentity('', weightsDigestOf(['shards', key]));
  }
  const content = await hashCheckpoint(await openCheckpoint(checkpointDirectory), signal);
  const text = textDigestOf(await readTextFiles(checkpointDirectory));
  return modelIdentity(text, weightsDigestOf([content, precision]));
}
