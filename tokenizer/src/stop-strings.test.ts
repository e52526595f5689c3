import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { StopStringMatcher } from './stop-strings.ts';

function run(
  stops: readonly string[],
  pieces: readonly string[],
): { texts: string[]; stop: string | undefined; end: string } {
  const matcher = new StopStringMatcher(stops);
  const results = pieces.map((piece) => matcher.push(piece));
  return { texts: results.map(({ text }) => text), stop: results.at(-1)?.stop, end: matcher.end() };
}

/** The rule on the whole text. */
function cut(stops: readonly string[], text: string): { text: string; stop: string | undefined } {
  for (let end = 1; end <= text.length; end += 1) {
    const completed = stops
      .filter((stop) => text.slice(0, end).endsWith(stop))
      .toSorted((a, b) => b.length - a.length);
    if (completed[0] !== undefined) {
      return { text: text.slice(0, end - completed[0].length), stop: completed[0] };
    }
  }
  return { text, stop: undefined };
}

const letters = fc.constantFrom('a', 'b', '\n', '😀', '😁');

describe('StopStringMatcher', () => {
  it.each([
    ['passes text through without stop strings', [], ['ab', 'c'], ['ab', 'c'], undefined, ''],
    ['holds back what may be a stop string', ['END'], ['a E', 'N', 'x'], ['a ', '', 'ENx'], undefined, ''],
    ['releases it at the end', ['END'], ['a EN'], ['a '], undefined, 'EN'],
    ['stops inside a piece', ['END'], ['aENDb', 'c'], ['a', ''], 'END', ''],
    ['stops across pieces', ['END'], ['aE', 'N', 'Db'], ['a', '', ''], 'END', ''],
    ['falls back within a partial match', ['aab'], ['aa', 'a', 'b'], ['', 'a', ''], 'aab', ''],
    ['takes what ends first', ['abcd', 'bc'], ['abcd'], ['a'], 'bc', ''],
    ['takes the longest of those', ['b', 'ab'], ['xab'], ['x'], 'ab', ''],
    ['never cuts a character in two', ['😀x'], ['😁', '😀', 'y'], ['😁', '', '😀y'], undefined, ''],
  ] as const)('%s', (_, stops, pieces, texts, stop, end) => {
    expect(run(stops, pieces)).toEqual({ texts: [...texts], stop, end });
  });

  it('returns the same result however the text is cut', () => {
    const stopStrings = fc.array(fc.string({ unit: letters, minLength: 1, maxLength: 4 }), { maxLength: 3 });
    const pieceLists = fc.array(fc.string({ unit: letters, maxLength: 5 }), { maxLength: 8 });
    fc.assert(
      fc.property(stopStrings, pieceLists, (stops, pieces) => {
        const { texts, stop, end } = run(stops, pieces);
        expect({ text: texts.join('') + end, stop }).toEqual(cut(stops, pieces.join('')));
      }),
      { numRuns: 1000 },
    );
  });

  it('holds back less than the longest stop string', () => {
    const matcher = new StopStringMatcher(['aaaa']);
    expect(matcher.push('a'.repeat(3)).text).toBe('');
    expect(matcher.push('b').text).toBe('aaab');
  });

  it.each(['', '\ud83d'])('refuses the stop string %j', (stop) => {
    expect(() => new StopStringMatcher([stop])).toThrow(
      expect.objectContaining({ code: 'invalid_argument' }),
    );
  });
});
