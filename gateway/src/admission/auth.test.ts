import { createHash } from 'node:crypto';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { createLog } from '@mimo/core/process/log';
import { describe, expect, it } from 'vitest';

import { authenticateNobody, loadKeys, parseKeys } from './auth.ts';
import { assertMayUse } from './permit.ts';

const sha256 = createHash('sha256').update('key-of-b').digest('hex');
const authenticate = parseKeys(
  {
    keys: [
      { key: 'key-of-a', tenant: 'a' },
      { sha256, tenant: 'b', models: ['m1'] },
    ],
  },
  'keys.json',
);

describe('parseKeys', () => {
  it('finds the tenant of a key, listed in plain text or as a hash', () => {
    expect(authenticate('Bearer key-of-a')).toEqual({ tenant: 'a', models: undefined });
    expect(authenticate('bearer  key-of-b')).toEqual({ tenant: 'b', models: new Set(['m1']) });
  });

  it.each([
    undefined,
    '',
    'key-of-a',
    'Basic key-of-a',
    'Bearer',
    'Bearer ',
    'Bearer key-of-c',
    `Bearer ${sha256}`,
  ])('rejects %s', (authorization) => {
    expect(() => authenticate(authorization)).toThrow(expect.objectContaining({ code: 'unauthenticated' }));
  });

  it.each([
    ['no keys', {}],
    ['a key and its hash', { keys: [{ key: 'key-of-a', sha256, tenant: 'a' }] }],
    ['neither', { keys: [{ tenant: 'a' }] }],
    ['a hash that is none', { keys: [{ sha256: 'abc', tenant: 'a' }] }],
    ['a key that is too short', { keys: [{ key: 'short', tenant: 'a' }] }],
    ['no tenant', { keys: [{ key: 'key-of-a' }] }],
    ['a misspelt field', { keys: [{ key: 'key-of-a', tenant: 'a', model: ['m'] }] }],
  ])('refuses a file with %s', (_name, json) => {
    expect(() => parseKeys(json, 'keys.json')).toThrow(/^the keys file keys\.json/);
  });
});

describe('loadKeys', () => {
  it.each([
    ['not JSON', 'sk-secret-0001'],
    ['a key as a field', '{"sk-secret-0001": "tenant"}'],
    ['a key as a field of an entry', '{"keys": [{"sk-secret-0001": 1, "key": "sk-secret-0002"}]}'],
    ['a key where the hash belongs', '{"keys": [{"sha256": "sk-secret-0001", "tenant": "a"}]}'],
    ['a key where the tenant belongs', '{"keys": [{"key": "sk-secret-0001", "tenant": ["sk-secret-0002"]}]}'],
    [
      'a key in a list of models',
      '{"keys": [{"key": "sk-secret-0001", "tenant": "a", "models": [["sk-secret-1"]]}]}',
    ],
  ])('logs nothing of a file with %s', async (_name, text) => {
    const directory = await mkdtemp(join(tmpdir(), 'mimo-keys-'));
    const path = join(directory, 'keys.json');
    await writeFile(path, text);
    const lines: string[] = [];
    const destination = { write: (line: string) => void lines.push(line) };
    const error: unknown = await loadKeys(path).then(String, (thrown: unknown) => thrown);
    createLog({ process: 'test', level: 'info', destination }).error({ error }, 'invalid keys file');
    await rm(directory, { recursive: true });
    expect(error).toMatchObject({ code: 'invalid_argument', message: expect.stringContaining(path) });
    expect(lines.join('')).not.toContain('sk-secret');
  });

  it('names the unreadable file, and quotes none of its content', async () => {
    await expect(loadKeys('/nowhere/keys.json')).rejects.toMatchObject({
      code: 'invalid_argument',
      message: 'the keys file /nowhere/keys.json is not readable JSON',
    });
  });
});

describe('assertMayUse', () => {
  it('restricts a caller to the models of its key', () => {
    expect(() => assertMayUse(authenticate('Bearer key-of-b'), 'm2')).toThrow(
      /tenant b may not use model m2/,
    );
    assertMayUse(authenticate('Bearer key-of-b'), 'm1');
    assertMayUse(authenticate('Bearer key-of-a'), 'm2');
    assertMayUse(authenticateNobody(undefined), 'm2');
  });
});
