// One model as the gateway knows it. Owns reading a checkpoint's tokenizer and the few figures of config.json that
// admission needs. The workers load the weights. Facts that only a running group knows come from its heartbeat.

import { readFile, stat } from 'node:fs/promises';
import { join } from 'node:path';

import { z } from 'zod';

import { ClusterError } from '@mimo/core/process/errors';
import { readTextFiles, textDigestOf } from '@mimo/core/bus/model-identity';
import type { Heartbeat } from '@mimo/proto/worker';
import type { TokenTable } from '@mimo/tokenizer';

import type { ModelFacts } from './admission/check.ts';
import {
  loadPromptEncoder,
  type PromptEncoder,
  type PromptEncoderOptions,
} from './prompts/prompt-encoder.ts';
import type { ModelVersion } from './version-choice.ts';

/** A loaded model, whose prompts can be read. Close its encoder. */
export interface ServedModel extends ModelVersion {
  readonly name: string;
  readonly tokenTable: TokenTable;
  readonly encoder: PromptEncoder;
  readonly vocabularySize: number;
  readonly maxContextTokens: number;
  readonly draftTokens: number;
}

const checkpointSchema = z.object({
  vocab_size: z.int().positive(),
  max_position_embeddings: z.int().positive().default(32_768),
  num_nextn_predict_layers: z.int().nonnegative().default(0),
});

/** Loads models from their directories, all or none; fails with the name of a directory without a usable checkpoint. */
export async function loadModels(
  directories: ReadonlyMap<string, string>,
  prompts: PromptEncoderOptions,
): Promise<readonly ServedModel[]> {
  const loads = await Promise.allSettled(
    [...directories].map(([name, directory]) => loadModel({ name, directory, identity: '' }, prompts)),
  );
  const loaded = loads.filter((load) => load.status === 'fulfilled').map(({ value }) => value);
  const failed = loads.find((load) => load.status === 'rejected');
  if (failed !== undefined) {
    await Promise.all(loaded.map(({ encoder }) => encoder.close()));
    throw failed.reason;
  }
  return loaded;
}

/** Where a model's files lie. */
export interface ModelPlace {
  readonly name: string;
  readonly directory: string;
  /** The identity of its groups; empty if unknown. */
  readonly identity: string;
}

/** Loads a model from a directory with config.json and the tokenizer's files; fails as `loadModels` does. */
export async function loadModel(
  { name, directory, identity }: ModelPlace,
  prompts: PromptEncoderOptions,
): Promise<ServedModel> {
  const path = join(directory, 'config.json');
  const json = await readSmall(path).catch((error: unknown) => {
    throw new ClusterError('failed_precondition', `model ${name}: cannot read ${path}`, { cause: error });
  });
  let config;
  try {
    config = checkpointSchema.parse(JSON.parse(json));
  } catch (error) {
    throw new ClusterError('failed_precondition', `model ${name}: ${path} is not a model configuration`, {
      cause: error,
    });
  }
  const textDigest = textDigestOf(await readTextFiles(directory));
  const encoder = await loadPromptEncoder(name, directory, prompts).catch((error: unknown) => {
    const { code, message } = ClusterError.from(error);
    throw new ClusterError(code, `model ${name}: ${directory}: ${message}`, { cause: error });
  });
  return {
    name,
    identity,
    textDigest,
    tokenTable: encoder.tokenTable,
    encoder,
    vocabularySize: config.vocab_size,
    maxContextTokens: config.max_position_embeddings,
    // The engine drafts one token a step with the first MTP layer.
    draftTokens: Math.min(1, config.num_nextn_predict_layers),
  };
}

/** A real one has a few kilobytes; parsing a huge one would block every stream. */
const configMaxBytes = 2 ** 20;

async function readSmall(path: string): Promise<string> {
  const { size } = await stat(path);
  if (size > configMaxBytes) {
    throw new Error(`it has ${size} bytes; the limit is ${configMaxBytes}`);
  }
  return readFile(path, 'utf8');
}

/**
 * A model's current limits: the largest context and most drafts of any live group, or the checkpoint's own without a
 * group.
 */
export function factsOf(model: ServedModel, groups: readonly Heartbeat[]): ModelFacts {
  const most = (figures: readonly number[], limit: number): number =>
    groups.length === 0 ? limit : Math.min(limit, Math.max(...figures));
  return {
    name: model.name,
    vocabularySize: model.vocabularySize,
    specialTokens: model.tokenTable.specialTokens,
    maxContextTokens: most(
      groups.map((group) => group.maxContextTokens),
      model.maxContextTokens,
    ),
    draftTokens: most(
      groups.map((group) => group.draftTokens),
      model.draftTokens,
    ),
  };
}
