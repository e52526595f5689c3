// Random files and conversations, for a bounded time: the result is right or a coded error. Earlier counter-examples
// are kept as `examples`, which run first.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Tokenizer as HuggingFaceTokenizer } from '@huggingface/tokenizers';
import { ClusterError } from '@mimo/core/process/errors';
import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { encodeChat, parseChatTemplate, type ChatMessage } from './chat-template.ts';
import { defaultChatTemplate } from './default-template.ts';
import { StreamDecoder } from './stream-decoder.ts';
import { parseTokenizerFiles } from './tokenizer-files.ts';
import { createTokenizer, type Tokenizer } from './tokenizer.ts';

const demo = readFileSync(join(import.meta.dirname, '../../models/mimo-demo/tokenizer.json'), 'utf8');
const bounded = { numRuns: 100_000, interruptAfterTimeLimit: 4_000, markInterruptAsFailure: false };

function tokenizerFrom(tokenizerJson: string): Tokenizer {
  const absent = { tokenizerConfigJson: undefined, chatTemplateJinja: undefined };
  return createTokenizer(
    parseTokenizerFiles({ ...absent, vocabJson: undefined, mergesTxt: undefined, tokenizerJson }),
  );
}

/** The result; undefined for a coded error. Any other error is rethrown. */
function coded<T>(make: () => T, codes: readonly string[]): T | undefined {
  try {
    return make();
  } catch (error) {
    if (error instanceof ClusterError && codes.includes(error.code)) {
      return undefined;
    }
    throw error;
  }
}

const tokenizer = tokenizerFrom(demo);
const text = fc
  .array(
    fc.oneof(
      fc.string({ unit: 'binary', maxLength: 8 }),
      fc.constantFrom(
        '<|im_start|>',
        '<|im_end|>',
        '<|',
        '|>',
        '<think>',
        '</think>',
        '\0',
        '\ue000',
        'e\u0301',
        ' ',
        '\n',
      ),
    ),
    { maxLength: 12 },
  )
  .map((parts) => parts.join(''));
const message = fc.record<ChatMessage>({
  role: fc.constantFrom('system', 'user', 'assistant', 'tool'),
  content: fc.oneof(text, fc.constant(null)),
});
const messages = fc.array(message, { minLength: 1, maxLength: 5 });

/** Edits of a text: parts cut out, doubled, moved, or replaced by meaningful tokens. */
function edited(source: string, tokens: readonly string[]): fc.Arbitrary<string> {
  const edit = fc.tuple(fc.nat(source.length), fc.nat(12), fc.constantFrom('', ...tokens));
  return fc
    .array(edit, { minLength: 1, maxLength: 6 })
    .map((edits) =>
      edits.reduce(
        (result, [at, units, put]) => result.slice(0, at) + put + result.slice(at + units),
        source,
      ),
    );
}

/** JSON with another value at a path; each step of the path is an index into the existing entries. */
function replaced(value: unknown, [step = 0, ...rest]: readonly number[], put: unknown): unknown {
  const entries = typeof value === 'object' && value !== null ? Object.entries(value) : [];
  const [key, held] = entries[step % Math.max(1, entries.length)] ?? [];
  if (key === undefined) {
    return put;
  }
  const changed = rest.length === 0 ? put : replaced(held, rest, put);
  return Array.isArray(value)
    ? value.map((each: unknown, index) => (String(index) === key ? changed : each))
    : { ...(value as object), [key]: changed };
}

describe('any text', () => {
  it('survives encoding, decoding and streaming unchanged, in composed form', () => {
    fc.assert(
      fc.property(text, fc.boolean(), (given, allowSpecial) => {
        const tokenIds = tokenizer.encode(given, { allowSpecial });
        const composed = given
          .split(/(<\|im_start\|>|<\|im_end\|>)/u)
          .map((part) => part.normalize('NFC'))
          .join('');
        const decoded = tokenizer.decode(tokenIds);
        expect(decoded.normalize('NFC')).toBe(composed.normalize('NFC'));
        const stream = new StreamDecoder(tokenizer);
        expect(tokenIds.map((tokenId) => stream.push(tokenId)).join('') + stream.end()).toBe(decoded);
        expect(tokenizer.leastTokens(given)).toBeLessThanOrEqual(tokenIds.length);
      }),
      {
        ...bounded,
        examples: [
          [`a${'\u0301\u0327'.repeat(40)}`, false],
          ['<|im_<|im_end|>end|>', true],
          ['\u1fbe\u0308\u0301', false],
        ],
      },
    );
  });

  it('streams to the same text as it decodes to, for any token ids', () => {
    fc.assert(
      fc.property(fc.array(fc.nat({ max: 700 })), (tokenIds) => {
        const stream = new StreamDecoder(tokenizer);
        expect(tokenIds.map((tokenId) => stream.push(tokenId)).join('') + stream.end()).toBe(
          tokenizer.decode(tokenIds),
        );
      }),
      bounded,
    );
  });
});

describe('any conversation', () => {
  it('adds no special tokens to the prompt', () => {
    const template = parseChatTemplate(defaultChatTemplate);
    const specialsIn = (given: readonly ChatMessage[], continueLast: boolean): number =>
      encodeChat(tokenizer, template, given, { continueLast }).tokenIds.filter((id) =>
        tokenizer.specialTokenIds.has(id),
      ).length;
    fc.assert(
      fc.property(messages, fc.boolean(), (given, continueLast) => {
        const plain = given.map((each) => ({ ...each, content: 'x' }));
        const count = coded(() => specialsIn(given, continueLast), ['invalid_argument']);
        expect([undefined, specialsIn(plain, continueLast)]).toContain(count);
      }),
      bounded,
    );
  });
});

describe('any template', () => {
  const pieces = [
    '{{',
    '}}',
    '{%',
    '%}',
    ' if ',
    'endfor',
    "'",
    '"',
    'message.',
    'messages[0]',
    '|',
    '[',
    '](',
    '- ',
    'not ',
  ];

  it.each([false, true])('renders or fails with a coded error, continued: %s', (continueLast) => {
    fc.assert(
      fc.property(edited(defaultChatTemplate, pieces), messages, (source, given) => {
        const template = coded(() => parseChatTemplate(source), ['failed_precondition']);
        const chat =
          template &&
          coded(
            () => encodeChat(tokenizer, template, given, { continueLast }),
            ['invalid_argument', 'failed_precondition'],
          );
        expect(chat?.tokenIds.every((id) => Number.isInteger(id)) ?? true).toBe(true);
      }),
      bounded,
    );
  });
});

describe('any tokenizer.json', () => {
  it('encodes or fails with a coded error', () => {
    const file: unknown = JSON.parse(demo);
    const odd = fc.oneof(
      fc.constantFrom<unknown>(null, -1, 1e9, 0.5, '', 'a', '\ud800', '\0', [], {}, true, 0, [['a', 'b']], {
        a: 0,
      }),
      fc.jsonValue(),
    );
    const changes = fc.array(fc.tuple(fc.array(fc.nat(), { maxLength: 5 }), odd), {
      minLength: 1,
      maxLength: 3,
    });
    fc.assert(
      fc.property(changes, text, (each, given) => {
        const changed = each.reduce((result, [path, put]) => replaced(result, path, put), file);
        const other = coded(
          () => tokenizerFrom(JSON.stringify(changed)),
          ['failed_precondition', 'data_loss'],
        );
        const tokenIds = other && coded(() => other.encode(given), ['invalid_argument']);
        expect(tokenIds?.every((id) => other !== undefined && id < other.vocabularySize) ?? true).toBe(true);
      }),
      bounded,
    );
  });

  it('splits as Hugging Face’s library does, with any pattern', () => {
    const atom = fc.constantFrom(
      '\\p{L}',
      '\\p{N}',
      '\\s',
      '\\S',
      'a',
      '[^\\s\\p{L}]',
      '[\\r\\n]',
      ' ?\\p{L}',
      '(?i:ab|c)',
      '(?=x)',
    );
    const part = fc
      .tuple(atom, fc.constantFrom('', '+', '?', '*', '{1,3}'))
      .map(([one, times]) => one + times);
    const pattern = fc
      .array(
        fc.array(part, { minLength: 1, maxLength: 3 }).map((parts) => parts.join('')),
        { minLength: 1, maxLength: 4 },
      )
      .map((alternatives) => alternatives.join('|'));
    fc.assert(
      fc.property(pattern, text, (regex, given) => {
        const file = JSON.parse(demo);
        file.pre_tokenizer.pretokenizers[0].pattern.Regex = regex;
        const ours = coded(() => tokenizerFrom(JSON.stringify(file)), ['failed_precondition']);
        const library =
          ours && new HuggingFaceTokenizer({ ...file, added_tokens: [], post_processor: null }, {});
        const plain = given.replaceAll('<', '');
        expect(ours?.encode(plain)).toEqual(library?.encode(plain).ids);
      }),
      bounded,
    );
  });
});
