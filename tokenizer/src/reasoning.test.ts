import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { ReasoningSplitter, type ReasoningDelta } from './reasoning.ts';

function split(pieces: readonly string[], startsInside = false): ReasoningDelta {
  const splitter = new ReasoningSplitter({ startsInside });
  const deltas = [...pieces.map((piece) => splitter.push(piece)), splitter.end()];
  return {
    thinking: deltas.map(({ thinking }) => thinking).join(''),
    answer: deltas.map(({ answer }) => answer).join(''),
  };
}

/** The rule on the whole text. */
function splitWhole(text: string, startsInside: boolean): ReasoningDelta {
  const opening = /^\s*<think>/u.exec(text);
  if (opening === null && !startsInside) {
    return { thinking: '', answer: text };
  }
  const inside = startsInside ? text : text.slice(opening?.[0].length);
  const match = /^[\r\n]*(.*?)(?:[\r\n]*<\/think>[\r\n]*(.*))?$/su.exec(inside);
  return { thinking: match?.[1] ?? '', answer: match?.[2] ?? '' };
}

describe('ReasoningSplitter', () => {
  it.each([
    [
      'the usual form',
      '<think>\nOkay, so\n</think>\n\nParis.\n',
      { thinking: 'Okay, so', answer: 'Paris.\n' },
    ],
    ['no thinking', 'Paris.', { thinking: '', answer: 'Paris.' }],
    ['no thinking, white space kept', '\n Paris.', { thinking: '', answer: '\n Paris.' }],
    ['white space before the tag', ' \n<think>a</think>b', { thinking: 'a', answer: 'b' }],
    ['empty thinking', '<think>\n\n</think>\n\nParis.', { thinking: '', answer: 'Paris.' }],
    ['thinking cut off', '<think>\nOkay\n\n', { thinking: 'Okay\n\n', answer: '' }],
    ['thinking cut off in a tag', '<think>\nOkay\n</thi', { thinking: 'Okay\n</thi', answer: '' }],
    ['an opening cut off', '<thin', { thinking: '', answer: '<thin' }],
    ['a tag named later', 'Use <think> and </think>.', { thinking: '', answer: 'Use <think> and </think>.' }],
    [
      'tags after the answer began',
      '<think>a</think>b</think><think>c',
      { thinking: 'a', answer: 'b</think><think>c' },
    ],
    ['a tag opened twice', '<think>a<think>b</think>c', { thinking: 'a<think>b', answer: 'c' }],
    ['a tag that is not one', '<think>a</think</think>b', { thinking: 'a</think', answer: 'b' }],
    ['nothing', '', { thinking: '', answer: '' }],
  ])('splits %s, whole and unit by unit', (_, text, expected) => {
    expect(split([text])).toEqual(expected);
    expect(split(text.split(''))).toEqual(expected);
  });

  it('begins inside when the prompt opened the tag', () => {
    expect(split(['\nOk', 'ay</th', 'ink>\n\nYes'], true)).toEqual({ thinking: 'Okay', answer: 'Yes' });
  });

  it('follows its rule however the text is cut', () => {
    const part = fc.constantFrom(
      '<think>',
      '</think>',
      '<',
      '</',
      'think',
      '>',
      '\n',
      '\r\n',
      ' ',
      'a',
      '日',
    );
    fc.assert(
      fc.property(fc.array(part), fc.array(fc.nat({ max: 4 })), fc.boolean(), (parts, cuts, startsInside) => {
        const text = parts.join('');
        const pieces: string[] = [];
        let start = 0;
        for (const units of cuts) {
          pieces.push(text.slice(start, start + units));
          start += units;
        }
        pieces.push(text.slice(start));
        expect(split(pieces, startsInside)).toEqual(splitWhole(text, startsInside));
      }),
      { numRuns: 2000 },
    );
  });

  it('gives out at once what cannot be part of a tag', () => {
    const splitter = new ReasoningSplitter();
    expect(splitter.push('<think>\nOkay, the ')).toEqual({ thinking: 'Okay, the ', answer: '' });
    expect(splitter.push('end <')).toEqual({ thinking: 'end ', answer: '' });
    expect(splitter.isAnswering).toBe(false);
    expect(splitter.push('/think>So')).toEqual({ thinking: '', answer: 'So' });
    expect(splitter.isAnswering).toBe(true);
  });
});
