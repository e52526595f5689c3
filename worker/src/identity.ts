// What a group's answers are made of, as one short text: see core's model-identity. Owns which of a worker's settings
// say so and which files of a checkpoint are read for it.

import { join } from 'node:path';

import { modelIdentity, readTextFiles, textDigestOf, weightsDigestOf } from '@mimo/core/bus/model-identity';

import type { WorkerConfig } from './config.ts';
import { hashCheckpoint, openCheckpoint } from './compiler/checkpoint.ts';
import { readShardManifest } from './shards/shard.ts';

/** The settings that an identity depends on, with the content of the directories that they name. */
export type IdentityConfig = Pick<WorkerConfig, 'checkpointDirectory' | 'shardDirectory' | 'precision'>;

/**
 * The identity of a configuration. Shards that were compiled elsewhere carry a key of their own, which also says for
 * how many ranks they are, and no tokenizer. Fails as `openCheckpoint` and `readShardManifest` do.
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
