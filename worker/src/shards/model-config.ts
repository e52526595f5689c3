// A checkpoint's architecture: from config.json and its companions to a complete, checked ModelConfig. Owns the set of
// supported configs and the tolerated oddities of real ones; knows no files (see checkpoint.ts) and no tensors.
// Source: Qwen2's configuration plus `num_nextn_predict_layers`. Deliberate leniency: `tokenizer_class` may be a list,
// `attention_bias` is ignored (q, k, v always have a bias and o never), unknown fields are ignored.

import { ClusterError } from '@mimo/core/process/errors';

/** A checkpoint's architecture, validated. */
export interface ModelConfig {
  readonly hiddenSize: number;
  readonly layers: number;
  readonly queryHeads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly intermediateSize: number;
  readonly vocabSize: number;
  readonly mtpLayers: number;
  readonly rmsNormEps: number;
  readonly ropeTheta: number;
  readonly maxPositions: number;
  /** The head is the embedding matrix, and the checkpoint holds no `lm_head.weight`. */
  readonly tiedHead: boolean;
  readonly bosTokenId: number | null;
  /** Ids that end a completion: config's and generation_config's eos, and `<|endoftext|>` where known. */
  readonly eosTokenIds: readonly number[];
}

/** The parsed JSON of a checkpoint's small files; all but `config` may be absent. */
export interface ConfigSources {
  readonly config: unknown;
  readonly generationConfig?: unknown;
  readonly tokenizerConfig?: unknown;
}

/** The rotary kernel works on eight pairs at a time. */
const headDimMultiple = 16;

type Fields = Readonly<Record<string, unknown>>;

/**
 * Reads a MiMo (or Qwen2) config. Throws `invalid_argument` listing every problem with its field, limit and value:
 * missing fields, values out of range, and unsupported features (rope_scaling, sliding windows, other activations).
 */
export function parseModelConfig(sources: ConfigSources): ModelConfig {
  const problems: string[] = [];
  if (!isFields(sources.config)) {
    throw new ClusterError(
      'invalid_argument',
      `config.json: must be an object, is ${describe(sources.config)}`,
    );
  }
  const config = sources.config;
  const generation = isFields(sources.generationConfig) ? sources.generationConfig : {};
  const number = (field: string, rule: NumberRule): number => readNumber(config, field, rule, problems);
  const count = (field: string, fallback?: number): number =>
    number(field, { integer: true, min: 1, max: 2 ** 31 - 1, fallback });

  const hiddenSize = count('hidden_size');
  const queryHeads = count('num_attention_heads');
  const kvHeads = count('num_key_value_heads', queryHeads);
  const headDim = count('head_dim', hiddenSize / queryHeads);
  const vocabSize = count('vocab_size');
  const parsed: ModelConfig = {
    hiddenSize,
    layers: count('num_hidden_layers'),
    queryHeads,
    kvHeads,
    headDim,
    intermediateSize: count('intermediate_size'),
    vocabSize,
    mtpLayers: number('num_nextn_predict_layers', { integer: true, min: 0, max: 16, fallback: 0 }),
    rmsNormEps: number('rms_norm_eps', { min: 0, max: 1, fallback: 1e-6 }),
    ropeTheta: number('rope_theta', { min: 1, max: 1e12, fallback: 10_000 }),
    maxPositions: count('max_position_embeddings', 32_768),
    tiedHead: config['tie_word_embeddings'] === true,
    bosTokenId: readTokenIds(config, 'bos_token_id', vocabSize, problems)[0] ?? null,
    eosTokenIds: uniqueAscending([
      ...readTokenIds(config, 'eos_token_id', vocabSize, problems),
      ...readTokenIds(generation, 'eos_token_id', vocabSize, problems),
      ...endOfTextIds(sources.tokenizerConfig, vocabSize),
    ]),
  };

  if (queryHeads % kvHeads !== 0) {
    problems.push(
      `num_attention_heads: must be a multiple of num_key_value_heads ${kvHeads}, is ${queryHeads}`,
    );
  }
  if (headDim % headDimMultiple !== 0) {
    problems.push(`head_dim: must be a multiple of ${headDimMultiple}, is ${headDim}`);
  }
  refuseUnsupported(config, problems);
  if (problems.length > 0) {
    throw new ClusterError('invalid_argument', `config.json: ${problems.join('; ')}`);
  }
  return parsed;
}

function refuseUnsupported(config: Fields, problems: string[]): void {
  const activation = config['hidden_act'] ?? 'silu';
  if (activation !== 'silu') {
    problems.push(`hidden_act: only "silu" is supported, is ${describe(activation)}`);
  }
  if (config['use_sliding_window'] === true) {
    problems.push('use_sliding_window: only false is supported, is true');
  }
  const scaling = config['rope_scaling'];
  if (scaling !== undefined && scaling !== null && !isDefaultRope(scaling)) {
    problems.push(`rope_scaling: only null is supported, is ${describe(scaling)}`);
  }
}

/** Newer writers spell "no scaling" as `{ rope_type: "default" }`. */
function isDefaultRope(scaling: unknown): boolean {
  return isFields(scaling) && (scaling['rope_type'] ?? scaling['type']) === 'default';
}

interface NumberRule {
  readonly min: number;
  readonly max: number;
  readonly integer?: boolean;
  /** Used if the field is absent; without a default the field is required. */
  readonly fallback?: number | undefined;
}

function readNumber(fields: Fields, field: string, rule: NumberRule, problems: string[]): number {
  const value = fields[field] ?? rule.fallback;
  const kind = rule.integer === true ? 'an integer' : 'a number';
  if (
    typeof value !== 'number' ||
    !(value >= rule.min && value <= rule.max) ||
    (rule.integer === true && !Number.isInteger(value))
  ) {
    problems.push(`${field}: must be ${kind} from ${rule.min} to ${rule.max}, is ${describe(value)}`);
    return Number.NaN;
  }
  return value;
}

/** A number, a list of numbers, null or nothing; each id must be in the vocabulary. */
function readTokenIds(fields: Fields, field: string, vocabSize: number, problems: string[]): number[] {
  const value = fields[field] ?? [];
  const ids: unknown[] = Array.isArray(value) ? value : [value];
  return ids.filter((id): id is number => {
    const valid = typeof id === 'number' && Number.isInteger(id) && id >= 0 && id < vocabSize;
    if (!valid && !Number.isNaN(vocabSize)) {
      problems.push(`${field}: must be a token id from 0 to ${vocabSize - 1}, is ${describe(id)}`);
    }
    return valid;
  });
}

/** The base model ends a document with `<|endoftext|>`, which neither config names as eos. */
function endOfTextIds(tokenizerConfig: unknown, vocabSize: number): number[] {
  const added = isFields(tokenizerConfig) ? tokenizerConfig['added_tokens_decoder'] : undefined;
  return Object.entries(isFields(added) ? added : {})
    .filter(([, token]) => isFields(token) && token['content'] === '<|endoftext|>')
    .map(([id]) => Number(id))
    .filter((id) => Number.isInteger(id) && id >= 0 && id < vocabSize);
}

function uniqueAscending(ids: readonly number[]): number[] {
  return [...new Set(ids)].toSorted((a, b) => a - b);
}

function isFields(value: unknown): value is Fields {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function describe(value: unknown): string {
  return value === undefined ? 'missing' : JSON.stringify(value);
}
