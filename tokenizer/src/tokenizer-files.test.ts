import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it, onTestFinished } from 'vitest';
import { ClusterError } from '@mimo/core/process/errors';
import { createLog } from '@mimo/core/process/log';
import { characterFromByte } from './byte-level.ts';
import { parseChatTemplate } from './chat-template.ts';
import { parseTokenizerFiles, readTokenizerFiles, type TokenizerFiles } from './tokenizer-files.ts';
import { createTokenizer, loadTokenizer } from './tokenizer.ts';

const subset = join(import.meta.dirname, '../../tests/golden/tokenizer/mimo-subset');
const bytes = Object.fromEntries(characterFromByte.map((character, byte) => [character, byte]));

const none: TokenizerFiles = {
  tokenizerJson: undefined,
  tokenizerConfigJson: undefined,
  chatTemplateJinja: undefined,
  vocabJson: undefined,
  mergesTxt: undefined,
};

const byteLevel = { type: 'ByteLevel', use_regex: false };
const split = { type: 'Split', pattern: { Regex: '\\s' }, behavior: 'Isolated' };
const smallest = {
  added_tokens: [{ id: 257, content: '<|im_end|>', special: true }],
  normalizer: null,
  pre_tokenizer: { type: 'Sequence', pretokenizers: [split, byteLevel] },
  decoder: { type: 'ByteLevel' },
  model: { type: 'BPE', vocab: { ...bytes, ab: 256 }, merges: [['a', 'b']] },
};

function withSplit(changes: object): object {
  return { pre_tokenizer: { type: 'Sequence', pretokenizers: [{ ...split, ...changes }, byteLevel] } };
}

function withTokenizer(changes: object): TokenizerFiles {
  return { ...none, tokenizerJson: JSON.stringify({ ...smallest, ...changes }) };
}

describe('parseTokenizerFiles', () => {
  it('reads a minimal tokenizer.json', () => {
    const tokenizer = createTokenizer(parseTokenizerFiles(withTokenizer({})));
    expect(tokenizer.vocabularySize).toBe(258);
    expect(tokenizer.encode('ab<|im_end|>', { allowSpecial: true })).toEqual([256, 257]);
  });

  it('reads merges written as lines', () => {
    const model = { ...smallest.model, merges: ['a b'] };
    expect(parseTokenizerFiles(withTokenizer({ model })).bytePair.model.merges).toEqual([['a', 'b']]);
  });

  it.each([
    ['another model', { model: { type: 'Unigram' } }],
    ['byte fallback', { model: { ...smallest.model, byte_fallback: true } }],
    ['a suffix of words', { model: { ...smallest.model, end_of_word_suffix: '</w>' } }],
    ['another decoder', { decoder: { type: 'Metaspace' } }],
    ['another normalizer', { normalizer: { type: 'NFKC' } }],
    ['another pre-tokenizer', { pre_tokenizer: { type: 'Metaspace' } }],
    ['a pre-tokenizer of one step', { pre_tokenizer: { ...byteLevel, use_regex: true } }],
    [
      'words by the library’s own pattern',
      {
        pre_tokenizer: { type: 'Sequence', pretokenizers: [split, { type: 'ByteLevel', use_regex: true }] },
      },
    ],
    [
      'a prefix space',
      {
        pre_tokenizer: { type: 'Sequence', pretokenizers: [split, { ...byteLevel, add_prefix_space: true }] },
      },
    ],
    ['a split that drops text', withSplit({ behavior: 'Removed' })],
    ['an inverted split', withSplit({ invert: true })],
    ['a pattern that the library cannot read', withSplit({ pattern: { Regex: '(' } })],
    ['an added token that strips spaces', { added_tokens: [{ id: 257, content: 'x', lstrip: true }] }],
  ])('refuses %s', (_, changes) => {
    expect(() => createTokenizer(parseTokenizerFiles(withTokenizer(changes)))).toThrow(
      expect.objectContaining({ code: 'failed_precondition' }),
    );
  });

  it.each([
    ['text that is not JSON', { ...none, tokenizerJson: '{' }],
    ['a list', { ...none, tokenizerJson: '[]' }],
    ['a non-numeric id', withTokenizer({ model: { ...smallest.model, vocab: { ...bytes, ab: '256' } } })],
    ['an id beyond reason', withTokenizer({ added_tokens: [{ id: 1e12, content: 'x' }] })],
    [
      'a byte without an id',
      withTokenizer({ model: { ...smallest.model, vocab: { ...bytes, ab: 256, a: undefined } } }),
    ],
    ['a merge whose result has no id', withTokenizer({ model: { ...smallest.model, merges: ['b a'] } })],
    ['no pre-tokenizer', withTokenizer({ pre_tokenizer: null })],
    ['a merge of three', withTokenizer({ model: { ...smallest.model, merges: ['a b c'] } })],
    ['an added token without text', withTokenizer({ added_tokens: [{ id: 257 }] })],
  ])('reports %s as data loss', (_, files) => {
    expect(() => parseTokenizerFiles(files)).toThrow(expect.objectContaining({ code: 'data_loss' }));
  });

  it.each([
    [
      { model: { ...smallest.model, merges: ['b a'] } },
      'tokenizer.json is malformed: model.vocab (of type object): no entry for merge 0',
    ],
    [
      { normalizer: { type: 'NFKC' } },
      'tokenizer.json is not supported: normalizer.type (of type string): Invalid input: expected "NFC"',
    ],
    [{ added_tokens: [{ id: 257 }] }, 'tokenizer.json is malformed: added_tokens.0.content (absent): '],
  ])('names the place and the problem', (changes, message) => {
    expect(() => parseTokenizerFiles(withTokenizer(changes))).toThrow(message);
  });

  const marker = 'markerInTokenizer4bd0';
  it.each<[string, TokenizerFiles]>([
    ['text that is not JSON', { ...none, tokenizerJson: marker }],
    ['JSON that breaks off', { ...none, tokenizerJson: `{"model": "${marker}` }],
    ['a text', { ...none, tokenizerJson: JSON.stringify(marker) }],
    ['a kind of model', withTokenizer({ model: { type: marker } })],
    ['a kind of normalizer', withTokenizer({ normalizer: { type: marker } })],
    ['a vocabulary', withTokenizer({ model: { ...smallest.model, vocab: { ...bytes, [marker]: marker } } })],
    [
      'a long spelling',
      withTokenizer({ model: { ...smallest.model, vocab: { ...bytes, [marker.repeat(1_000)]: 256 } } }),
    ],
    ['a merge', withTokenizer({ model: { ...smallest.model, merges: [`${marker} x`] } })],
    ['a merge of three', withTokenizer({ model: { ...smallest.model, merges: [`a ${marker} x`] } })],
    ['a pattern', withTokenizer(withSplit({ pattern: { Regex: `${marker}(` } }))],
    ['an added token', withTokenizer({ added_tokens: [{ id: marker, content: marker }] })],
    ['an added token that is a text', withTokenizer({ added_tokens: [marker] })],
    [
      'an added token of the configuration',
      {
        ...withTokenizer({}),
        tokenizerConfigJson: JSON.stringify({ added_tokens_decoder: { [marker]: { content: marker } } }),
      },
    ],
    ['a configuration', { ...withTokenizer({}), tokenizerConfigJson: marker }],
    ['merges as lines', { ...none, vocabJson: JSON.stringify(bytes), mergesTxt: `${marker} x` }],
    ['a template', { ...withTokenizer({}), chatTemplateJinja: `{% ${marker} %}` }],
    ['a template that breaks off', { ...withTokenizer({}), chatTemplateJinja: `{{ "${marker}" ~` }],
    ['a template of one letter wrong', { ...withTokenizer({}), chatTemplateJinja: `{{ ${marker} # }}` }],
  ])('does not quote %s', (_, files) => {
    const lines: string[] = [];
    const log = createLog({
      process: 'test',
      level: 'info',
      destination: { write: (line) => void lines.push(line) },
    });
    let error: unknown;
    try {
      const description = parseTokenizerFiles(files);
      createTokenizer(description);
      parseChatTemplate(description.chatTemplate ?? '');
    } catch (thrown) {
      error = thrown;
    }
    log.error({ error }, 'the files are not usable');
    expect(error).toBeInstanceOf(ClusterError);
    expect(`${String(error)} ${lines.join('')}`).not.toContain(marker);
  });

  it('encodes a known word as one token when merges are ignored', () => {
    const model = { ...smallest.model, merges: [], ignore_merges: true };
    expect(createTokenizer(parseTokenizerFiles(withTokenizer({ model }))).encode('ab a')).toEqual([
      256, 32, 97,
    ]);
  });

  it('refuses a directory without a vocabulary', async () => {
    const directory = await mkdtemp(join(tmpdir(), 'tokenizer-'));
    onTestFinished(() => rm(directory, { recursive: true }));
    await expect(loadTokenizer(directory)).rejects.toMatchObject({ code: 'failed_precondition' });
  });

  it('reads tokenizer_config.json leniently', () => {
    const config = {
      tokenizer_class: ['Qwen2Tokenizer'],
      bos_token: null,
      eos_token: { content: '<|im_end|>', lstrip: false },
      chat_template: 'T',
      something_new: {},
      added_tokens_decoder: { '258': { content: '<|extra|>', special: true } },
    };
    const description = parseTokenizerFiles({
      ...withTokenizer({}),
      tokenizerConfigJson: JSON.stringify(config),
    });
    expect(description).toMatchObject({ bosToken: undefined, eosToken: '<|im_end|>', chatTemplate: 'T' });
    expect(description.addedTokens.map(({ id }) => id)).toEqual([257, 258]);
  });

  it.each([
    [
      'a named list',
      {
        chat_template: [
          { name: 'tool_use', template: 'U' },
          { name: 'default', template: 'D' },
        ],
      },
      'D',
    ],
    ['nothing', {}, undefined],
  ])('reads the chat template from %s', (_, config, expected) => {
    const files = { ...withTokenizer({}), tokenizerConfigJson: JSON.stringify(config) };
    expect(parseTokenizerFiles(files).chatTemplate).toBe(expected);
  });

  it('prefers a chat_template.jinja', () => {
    const tokenizerConfigJson = JSON.stringify({ chat_template: 'T' });
    const files = { ...withTokenizer({}), tokenizerConfigJson, chatTemplateJinja: 'J' };
    expect(parseTokenizerFiles(files).chatTemplate).toBe('J');
  });

  it('builds the same tokenizer from vocab.json and merges.txt', async () => {
    const root: {
      model: { vocab: object; merges: string[] };
      added_tokens: { id: number; content: string }[];
    } = JSON.parse(await readFile(join(subset, 'tokenizer.json'), 'utf8'));
    const directory = await mkdtemp(join(tmpdir(), 'tokenizer-'));
    onTestFinished(() => rm(directory, { recursive: true }));
    await writeFile(join(directory, 'vocab.json'), JSON.stringify(root.model.vocab));
    await writeFile(join(directory, 'merges.txt'), `#version: 0.2\n${root.model.merges.join('\n')}\n`);
    const decoder = Object.fromEntries(root.added_tokens.map((token) => [token.id, token]));
    await writeFile(
      join(directory, 'tokenizer_config.json'),
      JSON.stringify({ added_tokens_decoder: decoder }),
    );
    const fromOlderFiles = await loadTokenizer(directory);
    const fromTokenizerJson = await loadTokenizer(subset);
    const text = "Hello, world! What's 123?\n\n<|im_start|>user\n  <tool_call>";
    for (const allowSpecial of [true, false]) {
      expect(fromOlderFiles.encode(text, { allowSpecial })).toEqual(
        fromTokenizerJson.encode(text, { allowSpecial }),
      );
    }
    expect(fromOlderFiles.vocabularySize).toBe(151665);
  });
});

describe('readTokenizerFiles', () => {
  it('leaves absent files undefined', async () => {
    const files = await readTokenizerFiles(subset);
    expect(files.vocabJson).toBeUndefined();
    expect(files.tokenizerJson).toContain('"BPE"');
  });

  it('reports an unreadable file', async () => {
    await expect(readTokenizerFiles(join(subset, 'tokenizer.json'))).rejects.toMatchObject({
      code: 'unavailable',
    });
  });
});
