import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { parseModelConfig } from './model-config.ts';
import { configToJson, mimo7b } from '../compiler/random-checkpoint.ts';

/** MiMo-7B-RL's config.json, field by field. */
const realConfig = {
  architectures: ['MiMoForCausalLM'],
  model_type: 'mimo',
  auto_map: { AutoConfig: 'configuration_mimo.MiMoConfig' },
  tokenizer_class: ['Qwen2Tokenizer'],
  attention_bias: true,
  attention_dropout: 0,
  bos_token_id: 151_643,
  eos_token_id: 151_645,
  head_dim: 128,
  hidden_act: 'silu',
  hidden_size: 4096,
  initializer_range: 0.02,
  intermediate_size: 11_008,
  max_position_embeddings: 32_768,
  max_window_layers: 36,
  num_attention_heads: 32,
  num_hidden_layers: 36,
  num_key_value_heads: 8,
  num_nextn_predict_layers: 1,
  rms_norm_eps: 1e-5,
  rope_theta: 640_000,
  sliding_window: 32_768,
  tie_word_embeddings: false,
  torch_dtype: 'bfloat16',
  transformers_version: '4.40.1',
  use_cache: true,
  use_mrope: false,
  use_sliding_window: false,
  vocab_size: 151_680,
};

function without(field: keyof typeof realConfig): Record<string, unknown> {
  return Object.fromEntries(Object.entries(realConfig).filter(([name]) => name !== field));
}

describe('parseModelConfig', () => {
  it('reads the real config with its odd fields', () => {
    expect(parseModelConfig({ config: realConfig })).toEqual(mimo7b);
  });

  it('reads RL-0530, which has twice the positions', () => {
    const config = { ...realConfig, max_position_embeddings: 65_536 };
    expect(parseModelConfig({ config }).maxPositions).toBe(65_536);
  });

  it('fills in what Qwen2 configs leave out', () => {
    const bare = {
      hidden_size: 64,
      num_hidden_layers: 2,
      num_attention_heads: 4,
      intermediate_size: 100,
      vocab_size: 50,
    };
    expect(parseModelConfig({ config: bare })).toEqual({
      hiddenSize: 64,
      layers: 2,
      queryHeads: 4,
      kvHeads: 4,
      headDim: 16,
      intermediateSize: 100,
      vocabSize: 50,
      mtpLayers: 0,
      rmsNormEps: 1e-6,
      ropeTheta: 10_000,
      maxPositions: 32_768,
      tiedHead: false,
      bosTokenId: null,
      eosTokenIds: [],
    });
  });

  it('collects the ids that end a completion from all three files', () => {
    const parsed = parseModelConfig({
      config: realConfig,
      generationConfig: { eos_token_id: [151_645, 7] },
      tokenizerConfig: {
        added_tokens_decoder: {
          '151643': { content: '<|endoftext|>' },
          '151644': { content: '<|im_start|>' },
        },
      },
    });
    expect(parsed.eosTokenIds).toEqual([7, 151_643, 151_645]);
  });

  it('accepts "no scaling" in either spelling', () => {
    for (const scaling of [null, { rope_type: 'default' }, { type: 'default' }]) {
      expect(parseModelConfig({ config: { ...realConfig, rope_scaling: scaling } })).toEqual(mimo7b);
    }
  });

  it.each([
    [{ rope_scaling: { type: 'yarn', factor: 4 } }, /rope_scaling: only null is supported.*yarn/],
    [{ use_sliding_window: true }, /use_sliding_window: only false is supported, is true/],
    [{ hidden_act: 'gelu' }, /hidden_act: only "silu" is supported, is "gelu"/],
    [{ hidden_size: '4096' }, /hidden_size: must be an integer from 1 to \d+, is "4096"/],
    [{ num_hidden_layers: 0 }, /num_hidden_layers: must be an integer from 1 to \d+, is 0/],
    [{ num_hidden_layers: 1.5 }, /num_hidden_layers: must be an integer .* is 1.5/],
    [{ num_key_value_heads: 5 }, /num_attention_heads: must be a multiple of num_key_value_heads 5, is 32/],
    [{ head_dim: 20 }, /head_dim: must be a multiple of 16, is 20/],
    [{ num_nextn_predict_layers: -1 }, /num_nextn_predict_layers: must be an integer from 0 to 16, is -1/],
    [{ rms_norm_eps: 'small' }, /rms_norm_eps: must be a number from 0 to 1, is "small"/],
    [{ rope_theta: null, vocab_size: null }, /vocab_size: must be an integer .* is missing/],
    [{ eos_token_id: 151_680 }, /eos_token_id: must be a token id from 0 to 151679, is 151680/],
    [{ bos_token_id: 'x' }, /bos_token_id: must be a token id .* is "x"/],
  ])('rejects %j', (change, message) => {
    const config = { ...realConfig, ...change };
    expect(() => parseModelConfig({ config })).toThrow(
      expect.objectContaining({ code: 'invalid_argument', message: expect.stringMatching(message) }),
    );
  });

  it.each([null, 7, 'config', []])('rejects %j, which is not an object', (config) => {
    expect(() => parseModelConfig({ config })).toThrow(expect.objectContaining({ code: 'invalid_argument' }));
  });

  it('lists every problem at once', () => {
    const config = { ...without('hidden_size'), hidden_act: 'relu', num_hidden_layers: -3 };
    expect(() => parseModelConfig({ config })).toThrow(/hidden_size.*num_hidden_layers.*hidden_act/);
  });

  it('reads back what a random checkpoint writes', () => {
    const config = fc.record({
      hiddenSize: fc.integer({ min: 1, max: 9_999 }),
      layers: fc.integer({ min: 1, max: 99 }),
      kvHeads: fc.integer({ min: 1, max: 16 }),
      group: fc.integer({ min: 1, max: 8 }),
      headDim: fc.integer({ min: 1, max: 8 }).map((units) => units * 16),
      vocabSize: fc.integer({ min: 1, max: 200_000 }),
      mtpLayers: fc.integer({ min: 0, max: 3 }),
      tiedHead: fc.boolean(),
    });
    fc.assert(
      fc.property(config, ({ group, ...drawn }) => {
        const whole = {
          ...mimo7b,
          ...drawn,
          queryHeads: drawn.kvHeads * group,
          bosTokenId: null,
          eosTokenIds: [drawn.vocabSize - 1],
        };
        expect(parseModelConfig({ config: configToJson(whole) })).toEqual(whole);
      }),
    );
  });
});
