import { join } from 'node:path';

import { Message, Role } from '@mimo/proto/inference';
import { afterAll, describe, expect, it } from 'vitest';

import { loadPromptEncoder } from './prompt-encoder.ts';

const encoder = await loadPromptEncoder(join(import.meta.dirname, '../../models/mimo-demo'));
const never = new AbortController().signal;
const long = 'What is 47 + 85? '.repeat(1_000);

afterAll(() => encoder.close());

describe('PromptEncoder', () => {
  it('gives the same ids for a long prompt, from its thread, as here', async () => {
    const text = { kind: 'text', text: long } as const;
    expect((await encoder.encode(text, never)).tokenIds).toEqual(encoder.tokenizer.encode(long));
    const chat = {
      kind: 'chat',
      messages: [Message.fromPartial({ role: Role.USER, content: long })],
    } as const;
    expect(await encoder.encode(chat, never)).toEqual(encoder.encodeHere(chat));
  });

  it('keeps the event loop free while it encodes, and prompts in order', async () => {
    const dense = 'x'.repeat(200_000);
    let turns = 0;
    const counting = setInterval(() => (turns += 1), 1);
    const order: number[] = [];
    const encoding = [dense, long].map(async (text, index) => {
      await encoder.encode({ kind: 'text', text }, never);
      order.push(index);
    });
    await encoder.encode({ kind: 'text', text: 'short' }, never);
    order.push(-1);
    await Promise.all(encoding);
    clearInterval(counting);
    expect(order).toEqual([-1, 0, 1]);
    expect(turns).toBeGreaterThan(2);
  });

  it('does not encode what was given up while it waited', async () => {
    const stop = new AbortController();
    const first = encoder.encode({ kind: 'text', text: long }, never);
    const second = encoder.encode({ kind: 'text', text: long }, stop.signal);
    stop.abort(new Error('gone'));
    await expect(second).rejects.toThrow('gone');
    expect((await first).tokenIds.length).toBeGreaterThan(1_000);
  });

  it('says what is wrong as it would here', async () => {
    const text = `${long}\ud800`;
    const there = encoder.encode({ kind: 'text', text }, never);
    await expect(there).rejects.toMatchObject({ code: 'invalid_argument' });
  });
});
