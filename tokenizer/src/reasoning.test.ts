import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { ReasoningSplitter, type ReasoningDelta } from './reasoning.ts';

function split(pieces: readonly string[], begun = ''): ReasoningDelta {
  const splitter = new ReasoningSplitter({ begun });
  const deltas = [...pieces.map((piece) => splitter.push(piece)), splitter.end()];
  return {
    thinking: deltas.map(({ thinking }) => thinking).join(''),
    answer: deltas.map(({ answer }) => answer).join(''),
  };
}

/** The rule on the whole text, whose first units are in the prompt. */
function splitWhole(text: string, begunUnits: number): ReasoningDelta {
  const match = /^\s*<think>[\r\n]*(.*?)(?:[\r\n]*<\/think>[\r\n]*(.*))?$/dsu.exec(text);
  const part = ([start, end]: readonly number[] = [0, 0]): string =>
    text.slice(Math.max(start ?? 0, begunUnits), Math.max(end ?? 0, begunUnits));
  return match === null
    ? { thinking: '', answer: part([0, text.length]) }
    : { thinking: part(match.indices?.[1]), answer: part(match.indices?.[2]) };
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

  it.each([
    ['an opened tag', '<think>\n', ['\nOk', 'ay</th', 'ink>\n\nYes'], { thinking: 'Okay', answer: 'Yes' }],
    ['closed tags', '<think>\n\n</think>\n\n', ['Yes <think>'], { thinking: '', answer: 'Yes <think>' }],
    ['thinking', '<think>\nOkay', [', so</think>Yes'], { thinking: ', so', answer: 'Yes' }],
    ['an answer', 'It', [' is <think>'], { thinking: '', answer: ' is <think>' }],
    ['half a tag', '<thi', ['nk>a</think>b'], { thinking: 'a', answer: 'b' }],
    ['half of what is no tag', '<thi', ['s'], { thinking: '', answer: 's' }],
    ['half a closing tag', '<think>a\n</thi', ['nk>b'], { thinking: '', answer: 'b' }],
    ['white space', ' \n', ['Yes'], { thinking: '', answer: 'Yes' }],
  ])('continues from %s', (_, begun, pieces, expected) => {
    expect(split(pieces, begun)).toEqual(expected);
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
      fc.property(fc.array(part), fc.array(part), fc.array(fc.nat({ max: 4 })), (before, parts, cuts) => {
        const begun = before.join('');
        const text = parts.join('');
        const pieces: string[] = [];
        let start = 0;
        for (const units of cuts) {
          pieces.push(text.slice(start, start + units));
          start += units;
        }
        pieces.push(text.slice(start));
        expect(split(pieces, begun)).toEqual(splitWhole(begun + text, begun.length));
      }),
      { numRuns: 4000 },
    );
  });

  it('releases at once text that cannot be part of a tag', () => {
    const splitter = new ReasoningSplitter();
    expect(splitter.push('<think>\nOkay, the ')).toEqual({ thinking: 'Okay, the ', answer: '' });
    expect(splitter.push('end <')).toEqual({ thinking: 'end ', answer: '' });
    expect(splitter.isAnswering).toBe(false);
    expect(splitter.push('/think>So')).toEqual({ thinking: '', answer: 'So' });
    expect(splitter.isAnswering).toBe(true);
  });
});
