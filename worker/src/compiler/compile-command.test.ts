import { describe, expect, it } from 'vitest';
import { compileUsage, parseCompileArgs } from './compile-command.ts';

const required = ['--model', 'in', '--out', 'out'];

describe('parseCompileArgs', () => {
  it('fills in the defaults', () => {
    expect(parseCompileArgs(required)).toEqual({
      modelDirectory: 'in',
      outDirectory: 'out',
      tensorParallel: 1,
      precision: 'int8',
      mtpHidden: 'pre-norm',
      accuracyLevel: 4,
    });
  });

  it('reads every flag of the usage text', () => {
    const flags = [
      '--tensor-parallel=2',
      '--precision=int4',
      '--mtp-hidden=post-norm',
      '--accuracy-level=0',
      '--max-positions=512',
      '--threads=3',
    ];
    expect(parseCompileArgs([...required, ...flags])).toEqual({
      modelDirectory: 'in',
      outDirectory: 'out',
      tensorParallel: 2,
      precision: 'int4',
      mtpHidden: 'post-norm',
      accuracyLevel: 0,
      maxPositions: 512,
      threads: 3,
    });
    const documented = [...compileUsage.matchAll(/^ {2}--([a-z-]+)/gm)].map((match) => match[1]);
    const used = ['model', 'out', ...flags.map((flag) => flag.slice(2, flag.indexOf('=')))];
    expect(documented).toEqual(used);
  });

  it('names every wrong flag at once', () => {
    const args = [
      '--tensor-parallel',
      '0',
      '--precision',
      'int9',
      '--accuracy-level',
      '2',
      '--max-positions',
      'x',
    ];
    const expected = [
      '--model: is missing; give a directory',
      '--out: is missing; give a directory',
      '--tensor-parallel: must be a whole number of at least 1, is 0',
      '--precision: must be fp32 or fp16 or bf16 or int8 or int4, is int9',
      '--accuracy-level: must be 4 or 0, is 2',
      '--max-positions: must be a whole number of at least 1, is x',
    ].join('; ');
    expect(() => parseCompileArgs(args)).toThrow(
      expect.objectContaining({ code: 'invalid_argument', message: expected }),
    );
  });

  it.each([[['--quick']], [['stray']], [['--threads']]])('rejects %j', (args) => {
    expect(() => parseCompileArgs([...required, ...args])).toThrow(
      expect.objectContaining({ code: 'invalid_argument' }),
    );
  });
});
