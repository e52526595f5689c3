import { spawnSync } from 'node:child_process';

import { describe, expect, it, vi } from 'vitest';

import { ClusterError } from './errors.ts';
import { createLog } from './log.ts';

/** What the language and Node quote values in. */
const quotingErrors: readonly ((text: string) => unknown)[] = [
  (text) => JSON.parse(text),
  (text) => 'x' in (text as unknown as object),
  (text) => new RegExp(`(${text}`),
  (text) => BigInt(text),
  (text) => Buffer.from('x', text as BufferEncoding),
  (text) => new Headers([['authorization', `${text}\n\0`]]),
];

function errorOf(act: () => unknown): unknown {
  try {
    return act();
  } catch (error) {
    return error;
  }
}

describe('createLog', () => {
  it('writes one JSON object per line, with process, level by name, fields and errors', () => {
    const lines: string[] = [];
    const destination = { write: (line: string) => void lines.push(line) };
    const log = createLog({ process: 'gateway', level: 'info', destination });
    log.debug('not shown');
    log.info({ requestId: 'r1' }, 'accepted');
    log.error({ error: new ClusterError('internal', 'broken') }, 'request failed');
    const [accepted, failed] = lines.map((line) => JSON.parse(line) as Record<string, unknown>);
    expect(lines).toHaveLength(2);
    expect(accepted).toMatchObject({ level: 'info', process: 'gateway', requestId: 'r1', msg: 'accepted' });
    expect(failed).toMatchObject({ level: 'error', error: { message: 'broken', code: 'internal' } });
  });

  it('counts a repeated message instead of writing it each time', () => {
    vi.useFakeTimers();
    try {
      const lines: string[] = [];
      const destination = { write: (line: string) => void lines.push(line) };
      const log = createLog({ process: 'gateway', level: 'info', destination });
      for (let index = 0; index < 1_000; index++) {
        log.child({ peer: index }).warn({ index }, 'refused');
      }
      log.warn('another message');
      log.info('refused');
      expect(lines).toHaveLength(102);
      vi.advanceTimersByTime(10_000);
      expect(lines).toHaveLength(103);
      expect(JSON.parse(lines.at(-1) ?? '')).toMatchObject({ msg: 'refused', level: 'warn', repeated: 900 });
      log.warn('refused');
      vi.advanceTimersByTime(10_000);
      expect(lines).toHaveLength(104);
    } finally {
      vi.useRealTimers();
    }
  });

  it('writes no text from a parser, and no extra properties of an error', () => {
    const lines: string[] = [];
    const destination = { write: (line: string) => void lines.push(line) };
    const log = createLog({ process: 'gateway', level: 'info', destination });
    let cause: unknown;
    try {
      JSON.parse('sk-secret-1 is not JSON');
    } catch (error) {
      cause = error;
    }
    const foreign = Object.assign(new Error('call failed', { cause }), {
      metadata: { authorization: 'Bearer sk-secret-2' },
      input: 'nats://user:sk-secret-3@host',
      code: 'ERR_CALL',
    });
    log.error({ error: foreign }, 'failed');
    log.error({ error: ClusterError.from(cause) }, 'failed');
    const fromZod = Object.assign(new Error('Unrecognized key: "sk-secret-4"'), { name: 'ZodError' });
    log.error({ error: ClusterError.from(fromZod) }, 'failed');
    log.error({ error: 'sk-secret-5' }, 'failed');
    log.error({ error: ClusterError.from('sk-secret-6') }, 'failed');
    for (const quoting of quotingErrors) {
      log.error({ error: ClusterError.from(errorOf(() => quoting('sk-secret-7'))) }, 'failed');
      log.error({ error: errorOf(() => quoting('sk-secret-8')) }, 'failed');
    }
    expect(lines.join('')).not.toContain('sk-secret');
    expect(JSON.parse(lines[0] ?? '')).toMatchObject({
      error: { message: 'call failed', code: 'ERR_CALL', cause: { type: 'SyntaxError' } },
    });
    expect(lines.join('')).toContain('log.test.ts');
  });
});

describe('logCrashes', () => {
  it.each([
    ['an error', `new Error('marker\\n    at marker')`],
    ['an error of the engine', `new TypeError('cannot read marker')`],
    ['an error with a cause', `new Error('marker', { cause: new Error('marker') })`],
    ['an error with fields', `Object.assign(new Error('x'), { prompt: 'marker', code: 'ERR_X' })`],
    ['a text', `'marker'`],
    ['an object', `{ prompt: 'marker' }`],
  ])('ends the process over %s, and logs where it was thrown but not its message', (_, thrown) => {
    const script = `
      import { createLog, logCrashes } from ${JSON.stringify(new URL('./log.ts', import.meta.url).href)};
      logCrashes(createLog({ process: 'test', level: 'info' }));
      setImmediate(() => { throw ${thrown}; });`;
    const args = ['--input-type=module', '--eval', script];
    const { status, stdout, stderr } = spawnSync(process.execPath, args, { encoding: 'utf8' });
    expect(status).toBe(1);
    expect(JSON.parse(stdout)).toMatchObject({ level: 'fatal', msg: 'uncaught error' });
    expect(stdout + stderr).not.toContain('marker');
  });
});
