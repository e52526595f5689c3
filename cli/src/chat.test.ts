import { describe, expect, it } from 'vitest';

import { FinishReason } from '@mimo/proto/sampling';

import { figures } from './chat.ts';
import { printable } from './terminal.ts';

describe('figures', () => {
  const finish = {
    reason: FinishReason.STOP,
    matchedStop: '',
    usage: { promptTokens: 9, completionTokens: 101 },
    speculation: { draftedTokens: 50, acceptedTokens: 45 },
  };

  it('computes the speed over the whole time', () => {
    expect(figures(finish, 500, 2_500)).toBe(
      '101 tokens, 40 tokens/s, first token after 0.50 s, drafts accepted 45 of 50 (90 %)',
    );
  });

  it('leaves out drafts if there were none', () => {
    const one = { ...finish, usage: { promptTokens: 9, completionTokens: 1 }, speculation: undefined };
    expect(figures(one, 500, 500)).toBe('1 token, 2 tokens/s, first token after 0.50 s');
  });
});

describe('printable', () => {
  it.each([
    ['plain text\nand\ttabs, 한국어 🙂', 'plain text\nand\ttabs, 한국어 🙂'],
    ['\u001B[2Jcleared \u001B]0;title\u0007', 'cleared '],
    ['bell\u0007 back\b return\r', 'bell back return'],
  ])('%j', (text, shown) => {
    expect(printable(text)).toBe(shown);
  });
});
