// Plain English: phrases that forced readers to read a sentence twice appear in no text for people. Each has the usual
// wording beside it. The list holds only phrases that are never right here.

import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';

import { describe, expect, it } from 'vitest';

const root = join(import.meta.dirname, '../..');
// The log and the changelog tell of earlier days; the others are generated or not ours.
const exempt = /^docs\/lab\/|^CHANGELOG|src\/gen\/|fixtures\/|^models\/|package-lock|words\.test\.ts$/;
const files = execFileSync('git', ['ls-files', '--cached', '--others', '--exclude-standard'], {
  cwd: root,
  encoding: 'utf8',
})
  .split('\n')
  .filter((file) => /\.(?:ts|mjs|md|yaml|proto|txt|tpl)$/.test(file) && !exempt.test(file));

const plainWords: Readonly<Record<string, RegExp>> = {
  'the caller, the process, the client that ...': /\bwhoever\b/i,
  'because ... was not found': /\bfor want of\b/i,
  forever: /\bfor ever\b/i,
  'is not valid JSON, is not a number': /\bis no (?:JSON|number|valid|plain|MiMo)\b/,
  'invalid ...': /\bthat (?:are|is) no (?:UTF-8|numbers?|JSON|message)\b/,
  conventions: /\bmanners\b/i,
  'accept, allow': /\b(?:is|are|be|was|were) let in\b|\blets (?:everybody|nobody|anybody|in)\b/i,
  'waiting work, waiting requests': /\bwhat waits and runs\b/,
  'launched one kernel at a time': /\bkernel by kernel\b/,
  'would have cost': /\bsmallest bill\b/,
};

describe.each(Object.entries(plainWords))('instead of %s', (_instead, phrase) => {
  it(`nothing says ${phrase.source}`, () => {
    const found = files.flatMap((file) =>
      readFileSync(join(root, file), 'utf8')
        .split('\n')
        .flatMap((line, index) => (phrase.test(line) ? [`${file}:${index + 1}: ${line.trim()}`] : [])),
    );
    expect(found).toEqual([]);
  });
});
