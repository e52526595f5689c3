// Our tokenizer against ids and prompts that Hugging Face's Python code recorded (make_tokenizer_tables.py).

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import {
  defaultChatTemplate,
  encodeChat,
  loadTokenizer,
  parseChatTemplate,
  renderChat,
  StreamDecoder,
  type ChatMessage,
} from '@mimo/tokenizer';
import { describe, expect, it } from 'vitest';

interface TextRow {
  readonly text: string;
  readonly tokenIds: number[];
  /** With special tokens as ordinary text, where that differs. */
  readonly plainTokenIds?: number[];
}

interface ChatRow {
  readonly name: string;
  readonly messages: ChatMessage[];
  readonly tools?: unknown[];
  readonly addGenerationPrompt?: boolean;
  readonly prompt: string;
  readonly tokenIds: number[];
}

const root = join(import.meta.dirname, '../..');
const checkpoints = [
  {
    name: 'MiMo-7B’s ids',
    directory: 'tests/golden/tokenizer/mimo-subset',
    table: 'mimo-subset/table.jsonl',
  },
  { name: 'the demonstration checkpoint', directory: 'models/mimo-demo', table: 'demo.jsonl' },
];

describe.each(checkpoints)('tokenizer of $name', async ({ directory, table: file }) => {
  const lines = readFileSync(join(import.meta.dirname, 'tokenizer', file), 'utf8')
    .trimEnd()
    .split('\n');
  const rows: (TextRow | ChatRow)[] = lines.map((line) => JSON.parse(line));
  const texts = rows.filter((row): row is TextRow => 'text' in row);
  const chats = rows.filter((row): row is ChatRow => 'messages' in row);
  const tokenizer = await loadTokenizer(join(root, directory));
  const template = parseChatTemplate(tokenizer.chatTemplate ?? defaultChatTemplate);

  it.each(texts)('encodes $text', ({ text, tokenIds, plainTokenIds }) => {
    expect(tokenizer.encode(text, { allowSpecial: true })).toEqual(tokenIds);
    expect(tokenizer.encode(text)).toEqual(plainTokenIds ?? tokenIds);
  });

  it.each(texts)('decodes $text, at once and as a stream', ({ text, tokenIds }) => {
    const composed = text.normalize('NFC');
    expect(tokenizer.decode(tokenIds)).toBe(composed);
    const decoder = new StreamDecoder(tokenizer);
    expect(tokenIds.map((tokenId) => decoder.push(tokenId)).join('') + decoder.end()).toBe(composed);
  });

  it.each(chats)(
    'renders and encodes a chat: $name',
    ({ messages, tools, addGenerationPrompt, prompt, tokenIds }) => {
      const options = {
        ...(tools === undefined ? {} : { tools }),
        ...(addGenerationPrompt === undefined ? {} : { addGenerationPrompt }),
      };
      expect(renderChat(template, messages, options)).toBe(prompt);
      expect(encodeChat(tokenizer, template, messages, options).tokenIds).toEqual(tokenIds);
      expect(renderChat(parseChatTemplate(defaultChatTemplate), messages, options)).toBe(prompt);
    },
  );
});
