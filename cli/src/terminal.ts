// What the commands write: answers to standard output, everything else to standard error, so that a pipe gets only
// the answer. Owns colours: none if NO_COLOR is set or the stream is not a terminal.

import { stripVTControlCharacters, styleText } from 'node:util';

type Style = Parameters<typeof styleText>[0];

/** Styles a text for standard error. */
export function styled(style: Style, text: string): string {
  return styleText(style, text, { stream: process.stderr });
}

/** Writes a line to standard error. */
export function note(line: string): void {
  process.stderr.write(`${line}\n`);
}

/** Writes an error the way every command does. */
export function noteError(message: string): void {
  note(`${styled('red', 'error:')} ${message}`);
}

/**
 * Removes what could control a terminal from a model's text: escape sequences, and all control characters except
 * newline and tab.
 */
export function printable(text: string): string {
  return Array.from(stripVTControlCharacters(text))
    .filter(
      (character) => character === '\n' || character === '\t' || !isControl(character.codePointAt(0) ?? 0),
    )
    .join('');
}

function isControl(codePoint: number): boolean {
  return codePoint < 0x20 || (codePoint >= 0x7f && codePoint < 0xa0);
}
