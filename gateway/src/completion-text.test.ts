import { join } from 'node:path';

import { loadTokenizer } from '@mimo/tokenizer';
import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';

import { CompletionText, type CompletionTextOptions } from './completion-text.ts';

const tokenizer = await loadTokenizer(join(import.meta.dirname, '../../models/mimo-demo'));

/** Feeds a text's tokens, `step` at a time, and joins the results. */
function relayed(
  text: string,
  options: Partial<CompletionTextOptions> = {},
  step = 1,
): { text: string; reasoning: string; tokens: number; stop: string | undefined } {
  const completion = new CompletionText({
    tokenTable: tokenizer,
    stop: [],
    stopInReasoning: false,
    minTokens: 0,
    reasoning: undefined,
    ...options,
  });
  const tokenIds = tokenizer.encode(text, { allowSpecial: true });
  const sum = { text: '', reasoning: '', tokens: 0, stop: undefined as string | undefined };
  for (let at = 0; at < tokenIds.length && sum.stop === undefined; at += step) {
    const delta = completion.push(tokenIds.slice(at, at + step));
    sum.text += delta.text;
    sum.reasoning += delta.reasoning;
    sum.tokens += delta.tokens;
    sum.stop = delta.stop;
  }
  if (sum.stop === undefined) {
    const rest = completion.end();
    sum.text += rest.text;
    sum.reasoning += rest.reasoning;
    sum.stop = rest.stop;
  }
  return sum;
}

describe('CompletionText', () => {
  it('returns the same text for any grouping of the tokens', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'grapheme' }), fc.integer({ min: 1, max: 5 }), (text, step) => {
        // The tokenizer reads its text in composed form.
        expect(relayed(text, {}, step).text).toBe(text.normalize('NFC'));
      }),
    );
  });

  it('cuts at a stop text, and counts the tokens up to the one that completed it', () => {
    const text = 'The answer is 132. And more.';
    const cut = relayed(text, { stop: ['132'] });
    expect(cut).toMatchObject({ text: 'The answer is ', stop: '132' });
    const upTo = tokenizer.decode(tokenizer.encode(text).slice(0, cut.tokens));
    expect(upTo).toContain('132');
    expect(relayed(text, { stop: ['132'] }, 4)).toEqual(cut);
  });

  it('does not match stop texts before min_tokens', () => {
    const text = 'no no no yes no';
    const tokens = tokenizer.encode('no no no').length;
    const cut = relayed(text, { stop: ['no'], minTokens: tokens });
    expect(cut).toMatchObject({ text: 'no no no yes ', stop: 'no' });
  });

  it('splits the thinking from the answer, and only if requested', () => {
    const text = '<think>\n1 + 1\n</think>\nTwo.';
    expect(relayed(text, { reasoning: { begun: '' } })).toMatchObject({ reasoning: '1 + 1', text: 'Two.' });
    expect(relayed(text)).toMatchObject({ reasoning: '', text });
    expect(relayed('<think>\nendless', { reasoning: { begun: '' } })).toMatchObject({
      reasoning: 'endless',
      text: '',
    });
  });

  describe('with thinking', () => {
    const text = '<think>\nNo = sign.\n</think>\n\nYes = no = end.';
    const reasoning = { begun: '' };

    it.each([1, 3, 50])('matches stop texts in the answer only, %i tokens at a time', (step) => {
      const thinking = { reasoning: 'No = sign.', stop: '=' };
      expect(relayed(text, { reasoning, stop: ['='] }, step)).toMatchObject({ ...thinking, text: 'Yes ' });
      expect(relayed(text, { reasoning, stop: ['\n'] }, step)).toMatchObject({
        reasoning: 'No = sign.',
        text: 'Yes = no = end.',
        stop: undefined,
      });
      // Not across the tag either.
      expect(relayed(text, { reasoning, stop: ['.Yes', 'think'] }, step).stop).toBeUndefined();
    });

    it('matches stop texts in the thinking too if requested', () => {
      const everywhere = { reasoning, stopInReasoning: true };
      expect(relayed(text, { ...everywhere, stop: ['='] })).toMatchObject({
        reasoning: 'No ',
        text: '',
        stop: '=',
      });
      expect(relayed(text, { ...everywhere, stop: ['</think>'] })).toMatchObject({
        reasoning: 'No = sign.\n',
        text: '',
        stop: '</think>',
      });
    });

    it('matches stop texts anywhere in a text without thinking', () => {
      expect(relayed(text, { stop: ['='] })).toMatchObject({ text: '<think>\nNo ', stop: '=' });
    });

    it('continues from the tags in the prompt', () => {
      const rest = 'b = c</think>d = e';
      expect(relayed(rest, { reasoning: { begun: '<think>\n' }, stop: ['='] })).toMatchObject({
        reasoning: 'b = c',
        text: 'd ',
        stop: '=',
      });
      expect(relayed(rest, { reasoning: { begun: 'a' }, stop: ['='] })).toMatchObject({
        reasoning: '',
        text: 'b ',
      });
    });
  });

  it('returns the stop text that names a special token', () => {
    const completion = new CompletionText({
      tokenTable: tokenizer,
      stop: ['<|endoftext|>', 'x'],
      stopInReasoning: false,
      minTokens: 0,
      reasoning: undefined,
    });
    expect(completion.stopTextOf(tokenizer.specialTokens.get('<|endoftext|>') ?? -1)).toBe('<|endoftext|>');
    expect(completion.stopTextOf(tokenizer.specialTokens.get('<|im_end|>') ?? -1)).toBeUndefined();
  });

  it('omits special tokens from the text', () => {
    expect(relayed('a<|im_end|>b').text).toBe('ab');
  });

  it('releases held-back text at the end if it only began like a stop text', () => {
    expect(relayed('go on an', { stop: ['and'] })).toMatchObject({ text: 'go on an', stop: undefined });
  });
});
